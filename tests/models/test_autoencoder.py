"""The autoencoder: any shape, the loss as documented, features from which an image can be reconstructed."""

import pytest
import torch

from fastgen.models import Autoencoder


def small(shape=(1, 5, 6), latent_dim=3, **options):
    return Autoencoder(shape, latent_dim, channels=4, hidden=16, **options)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 1, 9), (4, 1, 1), (1, 13, 2)], ids=str)
@pytest.mark.parametrize("network", ["convolutional", "mlp"])
def test_any_shape(shape, network):
    model = small(shape, network=network, n_classes=2)
    x, condition = torch.randint(256, (3, *shape)), torch.tensor([0, 1, 1])
    assert model.encode(x, condition).shape == (3, 3)
    assert model(x, condition).shape == model.reconstruct(x, condition).shape == x.shape
    model.loss(x, condition).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_loss_is_the_squared_distance_on_the_scale_of_the_floats():
    model = small(levels=17).double()
    x = torch.randint(17, (4, 1, 5, 6))
    floats = x / 8.0 - 1
    images = model.decode(model.encode(x))
    torch.testing.assert_close(model.loss(x), (images - floats).square().sum() / 4)
    torch.testing.assert_close(model.loss(floats.double()), model.loss(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.reconstruct(x), (images.clamp(-1, 1) + 1) * 8)


def test_as_many_features_as_images_rebuild_them():
    model = small((1, 4, 4), latent_dim=2, levels=2)
    x = torch.randint(2, (3, 1, 4, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    assert torch.equal(model.reconstruct(x).round().long(), x)


def test_the_class_matters():
    model = small(n_classes=3)
    features = torch.zeros(2, 3)
    images = model.decode(features, torch.tensor([0, 2]))
    assert not torch.allclose(images[0], images[1])
    with pytest.raises(ValueError, match="condition is missing"):
        model.decode(features)


def test_compiles_into_one_graph():
    model = small()
    x = torch.randint(256, (2, 1, 5, 6))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Autoencoder((1, 4), 2), "shape"),
        (lambda: Autoencoder((1, 4, 4), 0), "latent_dim"),
        (lambda: Autoencoder((1, 4, 4), 2, levels=1), "levels"),
        (lambda: Autoencoder((1, 4, 4), 2, network="linear"), "network"),
        (lambda: Autoencoder((1, 4, 4), 2, channels=0), "channels"),
        (lambda: small().loss(torch.zeros(1, 1, 5, 5)), "x must have the shape"),
        (lambda: small().encode(torch.zeros(1, 1, 5, 6), torch.zeros(1)), "condition was given"),
        (lambda: small().decode([0.0]), "features must be a tensor of the shape .* got list"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
