"""`python -m benchmarks predict [FILE ..]`: predicts how long a GPU takes for whole images in one launch.

Instructions, bytes and multiply-adds are counted in the plans of the models of the benchmark `sampling`. The rates come
from rows of `probes` in the given files; rates that no row tells are ASSUMED, from data sheets of the H100 or by guess.
In the launch, each GPU program (thread block) owns a group of images and plays all instructions one after the other:

    an instruction   takes a fixed time, plus the longest of: reading weights from L2, multiply-adds, activations
    a draw           takes a fixed time for each group of images
    a barrier        comes before each instruction and each draw if several GPU programs share their images; each
                     program then computes some of the tiles

Heavy programs of the plan (ends of rows) are played by the whole GPU if there are few images: each of their
instructions takes a launch, and all processors share its tiles. The whole pass of the model that verifies a batch is
not included.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import sampling
from benchmarks.harness import rows
from benchmarks.harness.rows import Row
from fastgen.kernels.sampler.machine import SIZES, Tiles
from fastgen.sampling.levels import levels_of
from fastgen.sampling.machine.gpu.fusion import Fused, fuse
from fastgen.sampling.machine.parts import unknown_in
from fastgen.sampling.plan.plan import Plan, make_plan
from fastgen.sampling.run.gpu_player import heavy_programs
from fastgen.sampling.trace.network import Network

MICRO = 1e6
TERMS = ("fixed", "weights", "products", "activations", "draws", "barriers")
SHARING = (2, 4, 8)  # numbers of GPU programs that may share images
PROBED = 128, 256  # widths of the matrix products that `probes` measures


@dataclass(frozen=True)
class Rates:
    """Rates and times of a GPU. The defaults were not measured by this project.

    Attributes:
        processors: number of streaming multiprocessors (H100 SXM: 132).
        weights: bytes per second that one processor reads from L2 (64 per clock at 1.755 GHz).
        together: bytes per second that all processors read from L2 (published microbenchmarks of the H100: 5.5 TB/s).
        multiply_adds: multiply-adds per second of one processor, in three TF32 products each (data sheet: 512 per
            clock, of which `mma` without `wgmma` reaches about half).
        instruction: fixed seconds of an instruction, including its barrier (a guess: some loads from L2, 0.2 us each).
        draw: seconds of a draw for a group of images (a guess).
        launch: seconds of a node of a CUDA graph (published measurements: about 2 us).
        barrier: seconds of a barrier between GPU programs (a guess: an atomic addition and a load of the counter, two
            round trips to L2).
    """

    processors: float = 132
    weights: float = 64 * 1.755e9
    together: float = 5.5e12
    multiply_adds: float = 512 * 1.755e9 / 2 / 3
    instruction: float = 0.45e-6
    draw: float = 1.5e-6
    launch: float = 2.2e-6
    barrier: float = 1.3e-6


BF16 = 989e12  # bfloat16 operations per second in the H100's data sheet; `rates_of` scales `multiply_adds` by it


def rates_of(measured: Iterable[Row]) -> tuple[Rates, list[str]]:
    """The rates in measured rows of `probes`, with defaults for the others; and the names of the measured rates. If a
    probe has several rows, the last counts."""
    probes = {row["shape"]: row for row in measured if row["op"] == "probes" and row["provider"] == "fastgen"}
    rates: dict[str, float] = {}
    times = []
    for width in PROBED:
        name = f"by {width}x{width} in one program"
        row = next((row for shape, row in probes.items() if shape.endswith(name)), None)
        if row is not None and row["ms_p50"] is not None:
            times.append(row["ms_p50"] / 1e3)
            if row["matmul_tflop_s"]:
                rates["multiply_adds"] = Rates.multiply_adds * row["matmul_tflop_s"] * 1e12 / BF16
    if len(times) == len(PROBED) and times[1] > times[0]:
        small, large = (2 * width**2 for width in PROBED)  # bytes of the weights in bfloat16
        rates["weights"] = (large - small) / (times[1] - times[0])
        rates["instruction"] = max(0.0, times[0] - small / rates["weights"])
    for rate, name in (("launch", "launches, one after the other"), ("barrier", "barriers between all")):
        milliseconds = [row["ms_p50"] for shape, row in probes.items() if shape.endswith(name)]
        if milliseconds and milliseconds[-1] is not None:
            rates[rate] = milliseconds[-1] / 1e3
    return replace(Rates(), **rates), list(rates)


@dataclass(frozen=True)
class Work:
    """The work of one instruction for some images.

    Attributes:
        weights: bytes of weights that a product reads, once for every tile of rows.
        products: multiply-adds, including those with the zeros that pad a tile.
        activations: bytes of everything else that is read and written.
    """

    weights: float = 0
    products: float = 0
    activations: float = 0


def work_of(instruction: Fused, tiles: Tiles, images: int) -> Work:
    """The work of a fused instruction, computed in these tiles for this many images."""
    sizes, strides = instruction.collapsed()
    is_product = instruction.head.op == "product"
    # The strides of all operands and results; the left factor of a product is counted apart, as rows.
    passed_strides = [
        side_strides
        for side, side_strides in zip(instruction.sides, strides, strict=True)
        if not (is_product and side is instruction.head.inputs[0])
    ]
    passed = sum(  # elements: a dimension with stride 0 is broadcast, and read once
        images * math.prod(size for size, stride in zip(sizes, side_strides, strict=True) if stride)
        for side_strides in passed_strides
    )
    rows, columns, depth = images * math.prod(sizes[:-1]), sizes[-1], instruction.head.depth
    if not is_product:
        return Work(0, rows * columns * depth, 4 * (passed + rows * columns * depth))
    row_tiles, column_tiles = -(-rows // tiles.BM), -(-columns // tiles.BN)
    packed = column_tiles * tiles.BN * -(-depth // tiles.BK) * tiles.BK  # elements of the padded weights
    return Work(4 * row_tiles * packed, row_tiles * packed * tiles.BM, 4 * (passed + column_tiles * rows * depth))


def tiles_of(instruction: Fused, tiles: Tiles, images: int) -> int:
    """The number of tiles of the result of a fused instruction."""
    *rows, columns = instruction.collapsed()[0]
    return -(-images * math.prod(rows) // tiles.BM) * -(-columns // tiles.BN)


@dataclass(frozen=True)
class Prediction:
    """What one draw of a batch takes.

    Attributes:
        instructions: instructions per draw, on average.
        seconds: seconds per draw.
        terms: the parts of `seconds`, by TERMS: what limits them.
    """

    instructions: float
    seconds: float
    terms: dict[str, float]

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def predict(plan: Plan, batch: int, rates: Rates, sharing: int = 1) -> Prediction | str:
    """Predicts the time of a draw for a plan.

    Args:
        batch: number of images.
        rates: rates of the GPU.
        sharing: number of GPU programs that share images, if so many can run at the same time.

    Returns:
        The prediction; or the names of the instructions in the plan that the GPU machine does not know.
    """
    served = Counter(step.program for step in plan.steps[1:])
    unknown = sorted({name for number in served for name in unknown_in(plan.programs[number])})
    if unknown:
        return ", ".join(unknown)
    tiles = next((size for size in SIZES[:-1] if -(-batch // size.BM) <= rates.processors), SIZES[-1])
    groups, images = -(-batch // tiles.BM), min(batch, tiles.BM)
    sharing = max(1, min(sharing, int(rates.processors) // groups))
    from_l2 = min(rates.weights, rates.together / min(groups * sharing, rates.processors))
    waves = -(-groups * sharing // rates.processors)
    barrier = waves * rates.barrier if sharing > 1 else 0.0
    terms, instructions = dict.fromkeys(TERMS, 0.0), 0
    heavy = heavy_programs(plan, batch, tiles, rates.processors)
    for number, times in served.items():
        whole_gpu = number in heavy
        for instruction in fuse(plan.programs[number].instructions):
            instruction_images = batch if whole_gpu else images
            work = work_of(instruction, tiles, instruction_images)
            # A tile is computed by one processor: no more than there are tiles can work at the same time.
            busy = min(rates.processors if whole_gpu else sharing, tiles_of(instruction, tiles, instruction_images))
            speed = min(busy * rates.weights, rates.together) if whole_gpu else busy * from_l2
            seconds = {
                "weights": work.weights / speed,
                "products": work.products / (busy * rates.multiply_adds),
                "activations": work.activations / speed,
            }
            longest = max(seconds, key=lambda name: seconds[name])
            repeats = times if whole_gpu else times * waves
            terms[longest] += repeats * seconds[longest]
            terms["fixed"] += repeats * (rates.launch if whole_gpu else rates.instruction)
            terms["barriers"] += 0 if whole_gpu else times * barrier
            instructions += times
    draws = len(plan.order)
    channels = plan.levels.shape[1] if plan.whole_pixels else 1
    terms["draws"] = waves * draws * channels * -(-images // tiles.ROWS // sharing) * rates.draw
    terms["barriers"] += draws * barrier
    terms = {name: seconds / draws for name, seconds in terms.items()}
    return Prediction(instructions / draws, sum(terms.values()), terms)


@functools.cache
def _plan(build: Any, shape: tuple[int, int, int], levels: int, size: tuple[tuple[str, int], ...]) -> Plan:
    model = build(shape, levels, **dict(size)).eval().requires_grad_(False)
    network = Network(model, shape, model.encode, None, levels_of(model.distribution))
    return make_plan(network, model.distribution)


def run(files: Sequence[str], size: str) -> int:
    """Prints a line for each model and batch of the benchmark `sampling`.

    Args:
        files: files of rows, as `rows.load` reads them.
        size: a key of `sampling.JOBS`.

    Raises:
        ValueError: a file is missing, or has a line that is not a row.
    """
    rates, measured = rates_of(row for name in files for row in rows.load(Path(name)))
    for field in fields(rates):
        source = "measured" if field.name in measured else "ASSUMED, data sheet or guess"
        print(f"{field.name:<14} {getattr(rates, field.name):>10.3g}  {source}")
    print(
        f"\n{'us a draw, by':<52}" + "".join(f"{term:>13}" for term in TERMS) + f"{'all':>9}{'images/s':>10}  binding"
    )
    build: Any
    for build, shape, levels, more, batch in sampling.JOBS[size]:
        name = f"{build.__name__} {'x'.join(map(str, shape))} levels={levels} B={batch}"
        plan = _plan(build, shape, levels, tuple(more.items()))
        prediction = predict(plan, batch, rates)
        if isinstance(prediction, str):
            print(f"{name:<52}  no prediction: the machine does not know {prediction}", flush=True)
            continue
        options = ((f"  {count} programs share images", predict(plan, batch, rates, count)) for count in SHARING)
        shared = {text: option for text, option in options if isinstance(option, Prediction)}
        quickest = min(shared, key=lambda text: shared[text].seconds)
        lines = {f"{name} ({prediction.instructions:.0f} instr.)": prediction, quickest: shared[quickest]}
        for text, line in lines.items():
            terms = "".join(f"{MICRO * line.terms[term]:>13.1f}" for term in TERMS)
            speed = batch / (line.seconds * len(plan.order))
            print(f"{text:<52}{terms}{MICRO * line.seconds:>9.1f}{speed:>10.1f}  {line.binding}", flush=True)
    return 0
