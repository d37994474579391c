"""Kernels of the masked convolution that give wrong numbers, or do not run, are not used."""

import json

import pytest
import torch

from fastgen.kernels.masked_conv2d import check, launch, products, tune
from fastgen.kernels.masked_conv2d.config import Tile
from fastgen.ops import masked_conv2d
from tests.ops.masked_conv2d_truth import problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    launch.forget()
    yield
    launch.forget()


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_the_search_refuses_wrong_numbers(direction, monkeypatch):
    """In the interpreter: a configuration that computes something else is not chosen, however fast."""
    monkeypatch.setattr(tune, "milliseconds", lambda call: call() is None or 1.0)
    product = tune.Problem(1, 17, 6, 3, 4, torch.float32, True).product(direction, CPU)
    right, wrong = Tile(32, 16, 16, 4, 1), Tile(16, 16, 16, 4, 1)
    name = "masked_conv2d_weight_kernel" if direction == "weight" else "masked_conv2d_kernel"
    place = 2 if direction == "weight" else 6
    broken = Broken(getattr(products, name), lambda a, c: c["IMAGES"] == 16 and a[place].mul_(1.01))
    monkeypatch.setattr(products, name, broken)
    with pytest.warns(UserWarning, match="gives wrong results"):
        row = tune.search(product, [wrong, right])
    assert (Tile(**row["tile"]), row["refused"]) == (right, 1)
    assert set(row["ms"]) == {"cudnn", "triton"}
    with pytest.warns(UserWarning, match="gives wrong results"):
        row = tune.search(product, [wrong])
    assert row["provider"] != "triton" and row["refused"] == 1
    json.dumps(row["ms"])


class Broken:
    """A kernel that does its work and then something else."""

    def __init__(self, kernel, spoil):
        self.kernel, self.spoil = kernel, spoil

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            self.spoil(arguments, constants)

        return run


def layer_and_gradients(channels_last=True):
    torch.manual_seed(0)
    x, weight, mask, bias = problem("B", 2, 16, 16, 4, 4, (1, 1), dtype=torch.float32)
    out = masked_conv2d(x, weight, mask, bias, impl="triton")
    grad = torch.randn_like(out).contiguous(memory_format=torch.channels_last)
    return [out, *torch.autograd.grad(out, (x, weight, bias), grad)]


def test_what_gives_right_numbers_is_tried_once(monkeypatch):
    monkeypatch.setattr(check, "can_be_wrong", lambda x: True)
    tried = []
    whole = check.is_right
    monkeypatch.setattr(check, "is_right", lambda *args: tried.append(args[0]) or whole(*args))
    found = layer_and_gradients()
    assert [one.func.__name__ for one in tried] == ["Convolve", "Convolve", "WeightGradient"]
    layer_and_gradients()
    assert len(tried) == 3
    x, weight, mask, bias = problem("B", 5, 16, 16, 4, 4, (1, 1), dtype=torch.float32)
    masked_conv2d(x.detach(), weight.detach(), mask, bias.detach(), impl="triton")
    assert len(tried) == 3, "another batch is the same kernel"
    monkeypatch.setattr(check, "can_be_wrong", lambda x: False)
    launch.forget()
    assert all(torch.equal(one, two) for one, two in zip(found, layer_and_gradients(), strict=True))


def spoiled(place, columns, boxes):
    """Multiplies columns of an argument, a tensor or a descriptor, where a map is given by descriptors, or always."""

    def spoil(arguments, constants):
        if not boxes or constants["HEIGHT"] > 0:
            getattr(arguments[place], "base", arguments[place])[..., columns].mul_(1.1)

    return spoil


@pytest.mark.parametrize(
    ("kernel", "place", "columns"),
    [
        ("masked_conv2d_kernel", 6, slice(None)),
        # The weight, while the sums for the bias stay right; and the other way round.
        ("masked_conv2d_weight_kernel", 2, slice(0, -16)),
        ("masked_conv2d_weight_kernel", 2, slice(-16, None)),
    ],
)
def test_what_gives_wrong_numbers_is_not_used(kernel, place, columns, monkeypatch):
    """By descriptors it is wrong, without it is right; then nothing is right."""
    expected = layer_and_gradients()
    monkeypatch.setattr(check, "can_be_wrong", lambda x: True)
    whole = getattr(products, kernel)
    for boxes in (True, False):
        launch.forget()
        monkeypatch.setattr(products, kernel, Broken(whole, spoiled(place, columns, boxes)))
        with pytest.warns(UserWarning, match="gives wrong results"):
            found = layer_and_gradients()
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two)
    assert check.FAILED in reasons()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_a_wrong_tap_is_noticed(direction, dtype, monkeypatch):
    """One weight of 5 * 24 is taken from another place, or is missing in the gradient. The dtypes take turns."""
    make, tensors = tune.Problem(1, 24, 32, 3, 6, dtype, False).product(direction, CPU)
    choice = make(*tensors).choice
    assert check.is_right(make, tensors, choice)
    name = "masked_conv2d_weight_kernel" if direction == "weight" else "masked_conv2d_pack_kernel"
    whole = getattr(products, name)
    for tap in range(dtype == torch.bfloat16, 5, 2):

        def spoil(arguments, constants, column=tap * 32 + 7):
            if direction == "weight":
                arguments[2][:, 5, column] = 0
            else:
                arguments[2][5, column] = arguments[2][5, column + 1]

        monkeypatch.setattr(products, name, Broken(whole, spoil))
        with pytest.warns(UserWarning, match="gives wrong results"):
            assert not check.is_right(make, tensors, choice)


def reasons():
    plans = [one for plan in launch._plans.values() for one in (plan, *plan.gradients.values())]
    products = [getattr(plan, name, plan) for plan in plans for name in ("weight", "x")]
    return [one.choice.why for one in products if hasattr(one, "choice")]


def test_what_does_not_run_is_not_used_but_full_memory_is_told(monkeypatch):
    monkeypatch.setattr(check, "can_be_wrong", lambda x: True)

    def fail(arguments, constants):
        if constants["HEIGHT"] > 0:
            raise error

    monkeypatch.setattr(products, "masked_conv2d_kernel", Broken(products.masked_conv2d_kernel, fail))
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        layer_and_gradients()
    assert not check.trusted
    error = RuntimeError("out of shared memory")
    with pytest.warns(UserWarning, match="does not run and is not used: out of shared memory"):
        layer_and_gradients()


def test_the_search_wants_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
