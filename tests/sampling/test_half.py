"""Models in half precision: an engine's output is as far from the model's own as rounding takes it, and no further."""

import pytest
import torch

from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN

MODELS = {
    "gated, classes": lambda: GatedPixelCNN((1, 4, 4), 4, channels=6, layers=2, n_classes=3),
    "plain, colours": lambda: PixelCNN((3, 3, 2), 3, channels=6, layers=1),
    "plusplus": lambda: PixelCNNPP((3, 4, 4), channels=4, layers=1, n_mix=2),
    "diagonal": lambda: PixelRNN((1, 3, 4), 4, hidden_channels=6, layers=2),
    "diagonal, colours": lambda: PixelRNN((3, 3, 2), 3, hidden_channels=6, layers=1),
    "row": lambda: PixelRNN((1, 4, 3), 3, kind="row_lstm", hidden_channels=6, layers=2),
}
N = 3


def distances(name, dtype, backend):
    """Of the logits of the same levels from the model's in float64: an engine's, and the model's own in `dtype`."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()  # weights of that dtype, which float64 holds as they are
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    condition = torch.arange(N) % 3 if model.n_classes else None
    sampler = accelerate(model, model.shape, distribution=model.distribution, condition=condition, backend=backend)
    levels = torch.randint(getattr(model, "levels", 256), (N, *model.shape))
    params = sampler.params(levels)
    assert params.dtype == dtype and f"{backend}:" in sampler.explain()
    with torch.no_grad():
        own = model(model.encode(levels), condition)
        truth = model.double()(model.encode(levels), condition)
    return ((one.double() - truth).abs().max() / truth.abs().max() for one in (params, own))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_to_the_truth_as_the_models_own(name, dtype):
    of_engine, of_model = distances(name, dtype, "eager")
    assert of_model < 8 * torch.finfo(dtype).eps  # else the bound says nothing
    assert of_engine < 1.5 * of_model + torch.finfo(dtype).eps
