"""Single operations between masked layers: the engine takes them, and ready times say when their results are known."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical, accelerate
from fastgen.sampling.causality.draws import draw_index_of, raster
from fastgen.sampling.causality.ready_times import ready_times
from fastgen.sampling.machine.parts import unknown_in
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.trace.decompositions import WRITTEN_OUT
from fastgen.sampling.trace.network import Network
from fastgen.sampling.trace.recorder import trace
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.zoo_case import DataMask

SHAPE, DISTRIBUTION, N = (1, 4, 4), Categorical(4, "B(KC)HW"), 3
CHECKERS = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0


def below(x):
    """One pixel further down and to the right, so that a window around a pixel shows what came before."""
    return F.pad(x, (1, -1, 1, -1))


def patches(x):
    return F.fold(F.unfold(F.pad(x, (0, 0, 1, -1)), (1, 3), padding=(0, 1)), x.shape[-2:], (1, 3), padding=(0, 1))


def at_places(x):
    rows, columns = torch.meshgrid(torch.arange(4.0) - 1.4, torch.arange(4.0) * 0.8, indexing="ij")
    grid = torch.stack((columns, rows), -1)[None] / 1.5 - 1
    return F.pad(F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=True), (0, 0, 1, -1))


def nearest_code(x):
    codes = torch.linspace(-1, 1, 48).view(8, 6)
    rows = x.permute(0, 2, 3, 1)
    found = torch.cdist(rows.reshape(-1, 6), codes).argmin(1)
    return codes[found].view(rows.shape).permute(0, 3, 1, 2)


def straight_through(x):
    codes = torch.linspace(-1, 1, 48).view(8, 6)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 6)
    distances = rows.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * rows @ codes.T
    found = torch.zeros_like(distances).scatter_(1, distances.argmin(1, keepdim=True), 1.0) @ codes
    return x + (found.view(len(x), 4, 4, 6).permute(0, 3, 1, 2) - x).detach()


def codes_by_distance(x):
    codes = torch.linspace(-1, 1, 48).view(1, 8, 6).expand(len(x), -1, -1)
    return (torch.softmax(-torch.cdist(x.flatten(2).mT, codes, p=1), -1) @ codes).mT.view_as(x)


def filtered(x):
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.tensor([1.0, 0.5, 0.3, 0.1]).view(4, 1, 1), 6, 1)


def table_of_buckets(x):
    edges = torch.linspace(-2, 2, 9)
    return torch.linspace(-1, 1, 10).to(x)[torch.searchsorted(edges.to(x), x.contiguous(), right=True)]


def many_groups(x):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(36, 2, 2, 3, generator=generator), torch.randn(36, generator=generator)
    weight, bias = weight.to(x) / 4, bias.to(x)
    found = F.conv2d(F.pad(x.repeat(1, 4, 1, 1), (2, 0, 1, 0)), weight, bias, groups=12)
    return found.unflatten(1, (6, 6)).mean(2)


def strongest_and_weakest(x):
    values, places = x.topk(2, 1)
    least = x.topk(3, 1, largest=False)
    return (
        x * values[:, 1:] - least.values[:, ::2].sum(1, keepdim=True) + 0.1 * places[:, 1:] - 0.2 * least.indices[:, :1]
    )


def written_at_places(x):
    values, places = x.permute(0, 2, 3, 1).topk(2, -1)
    chosen = torch.full_like(x.movedim(1, -1), -math.inf).scatter(-1, places, values).softmax(-1).movedim(-1, 1)
    twice = x.scatter_add(1, x.argmin(1, keepdim=True).expand(-1, 2, -1, -1), x[:, 3:5])
    return twice * chosen + x.gather(1, x[:, :4].topk(2, 1).indices).sum(1, keepdim=True)


def infinite_by_conditions(x):
    least = torch.where(x > 0, x, -math.inf).amax(1, keepdim=True).clamp(min=-1.0)
    return x + least + x.masked_fill(x < 0, math.inf).amin(1, keepdim=True).clamp(max=1.0)


def written_by_masks(x):
    x = x.clone()
    x[:, :, CHECKERS] = 0.5
    x[..., ~CHECKERS] = x[..., ~CHECKERS] * 2
    x[x < -1] = -1.0
    return x


def rotated(x):
    pairs = torch.view_as_complex(x.permute(0, 2, 3, 1).reshape(-1, 4, 4, 3, 2).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(3), torch.arange(3.0)))
    return turned.flatten(3).permute(0, 3, 1, 2)


def by_pixel(norm):
    return lambda x: norm(x.permute(0, 2, 3, 1).reshape(-1, 6)).view(-1, 4, 4, 6).permute(0, 3, 1, 2)


def coarse(pool, mode, **options):
    """Rows far above, pooled and brought back to size."""

    def run(x):
        return below(F.interpolate(pool(F.pad(x, (0, 0, 2, -2))), size=x.shape[-2:], mode=mode, **options))

    return run


OPERATIONS = {
    "sort": lambda x: x.sort(1, descending=True).values,
    "top-k mask": lambda x: x * torch.zeros_like(x).scatter(1, x.topk(2, 1).indices, 1.0),
    "strongest and weakest": strongest_and_weakest,
    "strongest of equal ones": lambda x: x * torch.zeros_like(x).scatter_(1, F.relu(x).topk(3, 1).indices, x),
    "gather": lambda x: x + x.gather(1, x.argmax(1, keepdim=True)),
    "written at places": written_at_places,
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1), x),
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, :2]),
    "index_copy": lambda x: x.index_copy(2, torch.tensor([0, 2]), x[:, :, :2] * 0.5),
    "index_fill": lambda x: x.index_fill(3, torch.tensor([2]), 0.5),
    "median": lambda x: x - x.median(1).values.unsqueeze(1) + x.kthvalue(2, 1, keepdim=True).values,
    "running maximum": lambda x: x.cummax(3).values + (x.sigmoid() + 0.5).cumprod(1) + x.logcumsumexp(1),
    "bilinear form": by_pixel(lambda x: F.bilinear(x, x.flip(-1), torch.arange(216).sin().view(6, 6, 6).to(x))),
    "Fourier": filtered,
    "rotated": rotated,
    "cross product": lambda x: torch.linalg.cross(x[:, :3], x[:, 3:], dim=1).repeat(1, 2, 1, 1),
    "buckets": lambda x: torch.bucketize(x.contiguous(), torch.linspace(-2, 2, 9)) * 0.3 + x,
    "table of buckets": table_of_buckets,
    "whole quotients": lambda x: ((x * 9).long() // 2).to(x) * 0.2 + torch.div(x * 9, 2, rounding_mode="floor"),
    "some of several": lambda x: x * torch.isin((x * 4).long(), torch.tensor([-1, 2]))
    + x * torch.isin((x * 4).long(), 1, invert=True),
    "fake quantization": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
    "local response": lambda x: F.local_response_norm(x, 3),
    "groups of a pixel": by_pixel(lambda x: F.group_norm(x, 2)),
    "deviation": lambda x: x / torch.std_mean(x, 1, keepdim=True)[0],
    "quantile": lambda x: x - x.quantile(0.3, dim=1, keepdim=True),
    "vector quantization": nearest_code,
    "straight-through": straight_through,
    "boolean masks": written_by_masks,
    "products of nothing": lambda x: x + x[..., :0] @ x.new_ones(0, 4) + x[..., :0].softmax(3).sum(3, keepdim=True),
    "differences of complex numbers": lambda x: (torch.complex(x, x.tanh()) - torch.complex(x.square(), x)).abs(),
    "clamped by another": lambda x: x.clamp(min=x.mean(1, keepdim=True)),
    "sums of nothing": lambda x: x + torch.stack([x[:, :c].sum(1) for c in range(6)], 1),
    "zero times": lambda x: x + 0.0 * x.flip(3) + x.flip(2) * 0,
    "clamped": lambda x: x.clamp(-0.2, 0.4) + x.clamp(max=0.3) * x.clamp(min=-0.1),
    "chosen by a mask": lambda x: torch.where(CHECKERS, x, (x * 9).tanh()) + x.masked_fill(CHECKERS, 0.7),
    "a number or another": lambda x: torch.where(CHECKERS, 0.3, x) + x.masked_fill(~CHECKERS, -math.inf).exp(),
    "infinity by a mask": lambda x: x.masked_fill(CHECKERS, math.inf).clamp(max=0.3),
    "conditions": lambda x: torch.where((x > 0.2) | ~(x <= x.roll(1, 1)) & (x != 0), x, -0.5 * x.ge(-0.1)),
    "infinity by a condition": infinite_by_conditions,
    "counted conditions": lambda x: x + 0.1 * (x > 0).sum(1, keepdim=True) + (x > 0.5).any(1, keepdim=True) + x.bool(),
    "least and where": lambda x: x - x.amin(1, True) + 0.1 * x.max(1, True).indices + 0.2 * x.argmin(1, True),
    "many groups": many_groups,
    "softplus and others": lambda x: F.softplus(x) - F.mish(x) + F.selu(x).erf() * x.square().log1p() + F.relu6(x),
    "average, its zeros not counted": lambda x: below(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    "average, last windows cut": coarse(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), "nearest"),
    "average, another divisor": coarse(lambda x: F.avg_pool2d(x, 2, divisor_override=3), "nearest"),
    "average along rows": lambda x: F.pad(F.avg_pool1d(x.flatten(0, 1), 3, 1, 1).view_as(x), (1, -1)),
    "greatest around": lambda x: below(F.max_pool2d(x, 3, 1, 1)),
    "greatest, last windows cut": coarse(lambda x: F.max_pool2d(x, (3, 2), 2, (1, 0), ceil_mode=True), "nearest"),
    "bilinear": coarse(lambda x: x[:, :, ::2, ::2], "bilinear"),
    "bilinear, corners aligned": coarse(lambda x: F.max_pool2d(x, 2), "bilinear", align_corners=True),
    "bicubic": lambda x: F.pad(F.interpolate(F.adaptive_avg_pool2d(x, (4, 3)), (4, 4), mode="bicubic"), (0, 0, 3, -3)),
    "area": coarse(lambda x: x[:, :, ::2, ::2], "area"),
}  # fmt: skip
WITHOUT_RULES = {  # of which whole passes draw
    "triangular": by_pixel(lambda x: torch.linalg.solve_triangular(torch.eye(6), x.unsqueeze(-1), upper=False)[..., 0]),
    "randomized ReLU": F.rrelu,
    "soft codes": codes_by_distance,
    "overlapping patches": patches,
    "constant grid": at_places,
}


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out, self.function = DataMask(1, 6, 3, True), nn.Conv2d(6, 4, 1), function

    def forward(self, x):
        return self.out(self.function(2 * self.first(x)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_engine_takes_it(name):
    fast, naive = pair(Between(OPERATIONS[name]).eval(), SHAPE, distribution=DISTRIBUTION)
    for seed in range(2):
        assert_exact(fast, naive, N, seed=seed)
    known = {"known": torch.randint(4, SHAPE), "known_mask": torch.arange(4).view(4, 1).expand(4, 4) < 2}
    assert_exact(fast, naive, N, seed=1, **known)
    assert fast.work_ratio <= 1.05


@pytest.mark.parametrize("name", WITHOUT_RULES)
def test_whole_passes_draw_what_has_no_rule(name):
    model = Between(WITHOUT_RULES[name]).eval()
    with pytest.warns(UserWarning, match="falls back to the fixed_point backend"):
        fast = accelerate(model, SHAPE, distribution=DISTRIBUTION)
    naive = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="naive")
    noise = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fast.sample(N, noise=noise), naive.sample(N, noise=noise))
    assert fast.stats.backend == "fixed_point"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt(),
        lambda x: x - x.amax(1, keepdim=True) + x.sum(1).unsqueeze(1),
        lambda x: x.masked_fill(CHECKERS, 0.7) + x.masked_fill(~CHECKERS, -math.inf).exp(),
        lambda x: torch.where(CHECKERS, x, 0.3) + torch.where(CHECKERS, x.tanh(), x.masked_fill(CHECKERS, 0)),
        lambda x: x.clamp(-0.2, 0.4) + x.clamp(max=0.3) * x.clamp(min=-0.1),
        lambda x: below(F.avg_pool2d(x, 3, 1, 1)),
        lambda x: below(F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)),
        *(OPERATIONS[name] for name in ("conditions", "infinity by a condition", "least and where")),
        *(OPERATIONS[name] for name in ("softplus and others", "many groups", "average, last windows cut")),
        OPERATIONS["strongest and weakest"],
    ],
)
def test_sums_maxima_and_conditions_are_the_machines_own(function):
    network = Network(Between(function).eval(), SHAPE, lambda levels: levels.float(), None, 4)
    plan = make_plan(network, DISTRIBUTION)
    assert [name for program in plan.programs for name in unknown_in(program)] == []


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (lambda x: x.relu().topk(2, 1).values.sum(1, keepdim=True) + x, True),
        (lambda x: 0.1 * x.relu().topk(2, 1).indices[:, :1] + x, False),
        (lambda x: 0.1 * x.masked_fill(CHECKERS, -1e30).topk(2, 1).indices[:, :1] + x, False),
        (lambda x: 0.1 * (x * CHECKERS).topk(2, 1).indices[:, :1] + x, False),
        (lambda x: 0.1 * (x + 3).softmax(1).topk(2, 1).indices[:, :1] + x, True),
        (lambda x: 0.1 * x.topk(2, 1, sorted=False).values.sum(1, keepdim=True) + x, False),
        (lambda x: 0.1 * x.repeat(1, 4, 1, 1).topk(17, 1).values[:, 16:] + x, False),
    ],
)
def test_of_numbers_that_are_equal_by_construction_torch_chooses_places(function, known):
    """Which of them it takes is not specified: an engine that chose itself would need another pass of the model."""
    network = Network(Between(function).eval(), SHAPE, lambda levels: levels.float(), None, 4)
    plan = make_plan(network, DISTRIBUTION)
    names = {name for program in plan.programs for name in unknown_in(program)}
    assert names - {"cut"} == (set() if known else {"topk"})


@pytest.mark.parametrize(
    "name",
    ["conditions", "infinity by a condition", "counted conditions", "least and where"]
    + ["strongest and weakest", "strongest of equal ones", "written at places"],
)
def test_conditions_in_machine_code(name):
    """Where memory holds them as numbers, also for the operations that torch then does."""
    fast, naive = pair(Between(OPERATIONS[name]).eval(), SHAPE, "compiled", distribution=DISTRIBUTION)
    assert_exact(fast, naive, N, seed=0)


def test_the_greatest_of_windows_says_where_it_was():
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for options in ((2,), (3, 2, 1), ((3, 2), 2, (1, 0), 1, True), (2, 1, 0, 2)):
        expected = F.max_pool2d(x, *options, return_indices=True)
        given = [(one, one) if isinstance(one, int) and not isinstance(one, bool) else one for one in options]
        found = WRITTEN_OUT["max_pool2d_with_indices"](None, x, *given)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_moves_a_result_after_its_ready_time(name):
    """By changing every level, in double precision, of the operation itself behind one masked layer."""
    model = Between(OPERATIONS[name]).double().eval() if name not in FLOATS else Between(OPERATIONS[name]).eval()
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)).to(model.out.weight.dtype) * 2 - 1
    draw_index = draw_index_of(raster(SHAPE, False), SHAPE)
    with torch.no_grad():
        ready = ready_times(trace(model, model, x), draw_index).output_ready()
        count = math.prod(SHAPE)
        changed = x.repeat(count, 1, 1, 1)
        changed.view(count, count).diagonal().add_(0.7)
        moved = (model(changed) - model(x.repeat(count, 1, 1, 1))).abs() > 1e-6
    last = torch.where(moved, torch.arange(count).view(-1, 1, 1, 1), -2).amax(0)
    assert (last <= ready).all()
    assert (last > 0).any()  # it does see something


FLOATS = {
    "Fourier", "rotated", "vector quantization", "straight-through",
}  # fmt: skip
