"""What the compile gate needs to know of a kernel. Every module of kernels defines `CATALOGUE: list[Entry]`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
