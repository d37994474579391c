"""What the compile gate needs to know of a kernel. Every module of kernels defines `CATALOGUE: list[Entry]`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Kind = tuple[Any, tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...]]  # kernel, signature, constants and options


@dataclass(frozen=True)
class Entry:
    """One launch configuration that ships, compiled by `python -m fastgen.kernels.catalogue` for every target.

        Entry(
            scale_kernel,
            "fp32",
            signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "row_stride": "i64", "size": "i32"},
            constexprs={"bias_ptr": None, "BLOCK": 1024},
            aligned=("row_stride",),
            num_warps=4,
        )

    Attributes:
        kernel: the `@triton.jit` function.
        config: a short name that tells the entries of one kernel apart ("bf16", "wide rows", ...).
        signature: Triton type of each run-time argument: "*fp32", "*bf16", "*u8", "i32", "i64", "fp32", or a tensor
            descriptor "tensordesc<fp16[64,64]>".
        constexprs: value of every other argument: the `tl.constexpr` ones, and those that Triton folds because they
            are None (an absent pointer) or 1 (an int).
        aligned: integer arguments compiled as multiples of 16 (a stride of 1024, say). Without these hints a kernel
            may show spills and narrow loads that no launch has.
        unaligned: pointers that may not be at a multiple of 16 bytes; all others are compiled as aligned.
        num_warps, num_stages: as in the launch.
        options: further compiler options of the launch, e.g. {"maxnreg": 128}.
        spills: bytes of local memory allowed per thread, by target ("sm_80", ..., "gfx942"); 0 where not named.
        barriers: how many barriers of a block the PTX may have, a loop's counted once, by target; any number where
            not named.
        requires: words that the PTX or SASS of a target must contain, e.g. {"sm_90": "wgmma"}.
        skips: targets that this configuration is never launched on, each with the reason.
        reason: why spills are allowed; needed where `spills` is given.
    """

    kernel: Any
    config: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    spills: Mapping[str, int] = field(default_factory=dict)
    barriers: Mapping[str, int] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    skips: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__}[{self.config}]"

    def arguments(self) -> tuple[dict[str, str], dict[tuple[int], list]]:
        """The signature over all arguments, in order, and the divisibility hints by position, as Triton wants them.

        Raises:
            ValueError: the entry does not describe exactly the kernel's arguments, or allows spills without a reason.
        """
        names = list(self.kernel.arg_names)
        described = [*self.signature, *self.constexprs]
        if sorted(names) != sorted(described):
            missing, unknown = sorted(set(names) - set(described)), sorted(set(described) - set(names))
            twice = sorted({name for name in described if described.count(name) > 1})
            raise ValueError(
                f"does not match the kernel's arguments: missing {missing}, unknown {unknown}, twice {twice}"
            )
        stray = sorted({*self.aligned, *self.unaligned} - set(self.signature))
        if stray:
            raise ValueError(f"aligned and unaligned name arguments that are not in the signature: {stray}")
        if any(self.spills.values()) and not self.reason:
            raise ValueError("allows spills without a reason")
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        divisible = [
            name for name, kind in self.signature.items() if kind.startswith("*") and name not in self.unaligned
        ]
        hints: dict[tuple[int], list] = {
            (names.index(name),): [["tt.divisibility", 16]] for name in (*divisible, *self.aligned)
        }
        return signature, hints


@contextlib.contextmanager
def noted() -> Iterator[dict[Kind, None]]:
    """Inside, no `Launches` are made, so that tensors need no memory: what Triton would compile for them, each once."""
    import torch

    from fastgen.kernels.common import Launches

    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}

    kinds: dict[Kind, None] = {}

    def note(self: Any, *tensors: Any) -> None:
        signature, constants = {}, dict(self.constants)
        for name, value in zip(self.kernel.arg_names, tensors + self.arguments, strict=False):
            if value is None:
                constants[name] = value
            elif isinstance(value, (int, float)):
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            else:
                kind = types[getattr(value, "base", value).dtype]
                block = None if isinstance(value, torch.Tensor) else list(value.block_shape)
                signature[name] = f"tensordesc<{kind}{block}>".replace(" ", "") if block else f"*{kind}"
        kinds[self.kernel, tuple(signature.items()), tuple(constants.items())] = None

    before = Launches.start
    Launches.start = note  # type: ignore[method-assign]
    try:
        yield kinds
    finally:
        Launches.start = before  # type: ignore[method-assign]


def entries_of(noted_on: Mapping[str, Iterable[Kind]], about: Callable[[Kind], dict[str, Any]]) -> list[Entry]:
    """Entries of what was noted on each target; about: further attributes of one."""
    targets: dict[Kind, list[str]] = {}
    for target, kinds in noted_on.items():
        for kind in kinds:
            targets.setdefault(kind, []).append(target)
    made = []
    for kind, on in targets.items():
        kernel, signature, constants = kind
        fixed = dict(constants)
        options = {name: fixed.pop(name) for name in ("num_warps", "num_stages") if name in fixed}
        words = [str(value) for name, value in fixed.items() if name.isupper() and value != ""]
        words += [f"no {name.split('_')[0]}" for name, value in fixed.items() if value is None]
        skips = {target: "is launched otherwise there" for target in noted_on if target not in on}
        config = " ".join((signature[0][1], *words))
        made.append(Entry(kernel, config, dict(signature), fixed, skips=skips, **options, **about(kind)))
    return made
