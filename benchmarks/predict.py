"""`python -m benchmarks predict [FILE ..]`: what whole images in one launch should take on a GPU, not yet measured.

Instructions, bytes and multiply-adds are counted in the plans of the models of `sampling`; rates are those that rows of
`probes` in the given files tell, and otherwise ASSUMED, from data sheets of the H100 and from guesses. A program of the
launch owns some images and plays all instructions one after the other, with a barrier after each:

    an instruction   its fixed time, and the longest of: weights from L2, multiply-adds, activations
    a draw           a fixed time for each of its groups of images
    a barrier        where several programs share images, one before each instruction and each draw, of which each
                     program then has its share of tiles

Heavy programs (ends of rows) are played over the whole GPU while images are few: each of their instructions takes a
launch, and its tiles are shared by all processors. One whole pass of the model, which makes sure of a batch, is not
part of it.
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
SHARING = (2, 4, 8)  # programs that may share images
PROBED = 128, 256  # widths of the products that `probes` measures


@dataclass(frozen=True)
class Rates:
    """Of a GPU; seconds, bytes and multiply-adds a second. The defaults are no measurements.

    Attributes:
        processors: streaming multiprocessors (H100 SXM: 132).
        weights: bytes that one processor reads from L2 (64 a clock at 1.755 GHz).
        together: bytes that all of them read from L2 (published microbenchmarks of the H100: about 5.5 TB/s).
        multiply_adds: of one processor, of TF32 thrice (data sheet: 512 a clock dense, of which `mma` without `wgmma`
            reaches about half).
        instruction: fixed time of one, barrier included (a guess: some loads of L2, 0.2 us each).
        draw: of a group of images (a guess).
        launch: of a node of a CUDA graph (published measurements: about 2 us).
        barrier: between programs (a guess: an atomic addition and a look at it, each a way to L2 and back).
    """

    processors: float = 132
    weights: float = 64 * 1.755e9
    together: float = 5.5e12
    multiply_adds: float = 512 * 1.755e9 / 2 / 3
    instruction: float = 0.45e-6
    draw: float = 1.5e-6
    launch: float = 2.2e-6
    barrier: float = 1.3e-6


BF16 = 989e12  # operations a second of an H100's data sheet, to which a measured rate of large products is compared


def rates_of(measured: Iterable[Row]) -> tuple[Rates, list[str]]:
    """What rows say, and the names of the rates that they say. Of several rows of a probe the last."""
    probes = {row["shape"]: row for row in measured if row["op"] == "probes" and row["provider"] == "fastgen"}
    found: dict[str, float] = {}
    times = []
    for width in PROBED:
        name = f"by {width}x{width} in one program"
        row = next((row for shape, row in probes.items() if shape.endswith(name)), None)
        if row is not None and row["ms_p50"] is not None:
            times.append(row["ms_p50"] / 1e3)
            if row["matmul_tflop_s"]:
                found["multiply_adds"] = Rates.multiply_adds * row["matmul_tflop_s"] * 1e12 / BF16
    if len(times) == len(PROBED) and times[1] > times[0]:
        small, large = (2 * width**2 for width in PROBED)  # bytes of bfloat16
        found["weights"] = (large - small) / (times[1] - times[0])
        found["instruction"] = max(0.0, times[0] - small / found["weights"])
    for rate, name in (("launch", "launches, one after the other"), ("barrier", "barriers between all")):
        of_rate = [row["ms_p50"] for shape, row in probes.items() if shape.endswith(name)]
        if of_rate and of_rate[-1] is not None:
            found[rate] = of_rate[-1] / 1e3
    return replace(Rates(), **found), list(found)


@dataclass(frozen=True)
class Work:
    """Of one program for its images.

    Attributes:
        weights: bytes that products read, once for every tile of rows.
        products: multiply-adds, those with zeros that fill a tile included.
        activations: bytes of all else that is read and written.
    """

    weights: float = 0
    products: float = 0
    activations: float = 0


def work_of(one: Fused, tiles: Tiles, images: int) -> Work:
    sizes, strides = one.collapsed()
    product = one.head.op == "product"
    sides = [of for side, of in zip(one.sides, strides, strict=True) if not (product and side is one.head.inputs[0])]
    passed = sum(images * math.prod(size for size, step in zip(sizes, of, strict=True) if step) for of in sides)
    height, columns, depth = images * math.prod(sizes[:-1]), sizes[-1], one.head.depth
    if not product:
        return Work(0, height * columns * depth, 4 * (passed + height * columns * depth))
    row_tiles, panels = -(-height // tiles.BM), -(-columns // tiles.BN)
    packed = panels * tiles.BN * -(-depth // tiles.BK) * tiles.BK
    return Work(4 * row_tiles * packed, row_tiles * packed * tiles.BM, 4 * (passed + panels * height * depth))


def tiles_of(one: Fused, tiles: Tiles, images: int) -> int:
    """Of its result, each of which a program computes."""
    *rows, columns = one.collapsed()[0]
    return -(-images * math.prod(rows) // tiles.BM) * -(-columns // tiles.BN)


@dataclass(frozen=True)
class Prediction:
    """Attributes:
    instructions: a draw, in the mean.
    seconds: a draw, of a batch.
    terms: what of them is bound by what.
    """

    instructions: float
    seconds: float
    terms: dict[str, float]

    @property
    def binding(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])


def predict(plan: Plan, batch: int, rates: Rates, sharing: int = 1) -> Prediction | str:
    """What the machine does not know, by name, where it does not know all.

    sharing: programs that share images, as far as all run at the same time.
    """
    served = Counter(step.program for step in plan.steps[1:])
    unknown = sorted({name for number in served for name in unknown_in(plan.programs[number])})
    if unknown:
        return ", ".join(unknown)
    tiles = next((one for one in SIZES[:-1] if -(-batch // one.BM) <= rates.processors), SIZES[-1])
    groups, images = -(-batch // tiles.BM), min(batch, tiles.BM)
    sharing = max(1, min(sharing, int(rates.processors) // groups))
    from_l2 = min(rates.weights, rates.together / min(groups * sharing, rates.processors))
    waves = -(-groups * sharing // rates.processors)
    barrier = waves * rates.barrier if sharing > 1 else 0.0
    terms, instructions = dict.fromkeys(TERMS, 0.0), 0
    heavy = heavy_programs(plan, batch, tiles, rates.processors)
    for number, times in served.items():
        everywhere = number in heavy
        for one in fuse(plan.programs[number].instructions):
            work = work_of(one, tiles, batch if everywhere else images)
            # Of all processors, or of those that share images, as many as there are tiles.
            most, of_images = (rates.processors, batch) if everywhere else (sharing, images)
            shared = min(most, tiles_of(one, tiles, of_images))
            speed = min(shared * rates.weights, rates.together) if everywhere else shared * from_l2
            of = {
                "weights": work.weights / speed,
                "products": work.products / (shared * rates.multiply_adds),
                "activations": work.activations / speed,
            }
            longest = max(of, key=lambda name: of[name])
            repeats = times if everywhere else times * waves
            terms[longest] += repeats * of[longest]
            terms["fixed"] += repeats * (rates.launch if everywhere else rates.instruction)
            terms["barriers"] += 0 if everywhere else times * barrier
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
    """Prints a line for each model and batch of `sampling`.

    Raises:
        ValueError: a file is not there or has a line that is no row.
    """
    rates, told = rates_of(row for name in files for row in rows.load(Path(name)))
    for one in fields(rates):
        source = "measured" if one.name in told else "ASSUMED, data sheet or guess"
        print(f"{one.name:<14} {getattr(rates, one.name):>10.3g}  {source}")
    print(
        f"\n{'us a draw, by':<52}" + "".join(f"{term:>13}" for term in TERMS) + f"{'all':>9}{'images/s':>10}  binding"
    )
    build: Any
    for build, shape, levels, more, batch in sampling.JOBS[size]:
        name = f"{build.__name__} {'x'.join(map(str, shape))} levels={levels} B={batch}"
        plan = _plan(build, shape, levels, tuple(more.items()))
        found = predict(plan, batch, rates)
        if isinstance(found, str):
            print(f"{name:<52}  no prediction: the machine does not know {found}", flush=True)
            continue
        options = ((f"  {many} programs share images", predict(plan, batch, rates, many)) for many in SHARING)
        shared = {text: option for text, option in options if isinstance(option, Prediction)}
        quickest = min(shared, key=lambda text: shared[text].seconds)
        lines = {f"{name} ({found.instructions:.0f} instr.)": found, quickest: shared[quickest]}
        for text, line in lines.items():
            terms = "".join(f"{MICRO * line.terms[term]:>13.1f}" for term in TERMS)
            speed = batch / (line.seconds * len(plan.order))
            print(f"{text:<52}{terms}{MICRO * line.seconds:>9.1f}{speed:>10.1f}  {line.binding}", flush=True)
    return 0
