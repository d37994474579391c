"""Entries of the KL's kernels in the catalogue of the compile gate."""

from typing import Any

from fastgen.kernels.catalogue_entry import Entry


def entry(
    kernel: Any, dtype: str, rows: int, out: int, within: int, *, eps_given: bool, across: bool = False, **kind: Any
) -> Entry:
    """kind: of `Tiles`; logvar is contiguous along the other dimension than mu where a tile has two, and `across` from
    row to row."""
    names = ("ODD", "ALIGNED", "FOURS", "DIVIDED", "WIDE", "BOUNDED", "PACKED")
    flags = {**dict.fromkeys(names, False), "ALIGNED": 0, **kind}
    fixed: dict[str, Any] = {"ROWS": rows, "OUT": out, "IN": within, **flags}
    fixed |= {f"{name}_inner_stride": 1 for name in ("mu", "grad_z", "eps")}
    contiguous = "row" if across else "outer" if out > 1 and not flags["PACKED"] else "inner"
    fixed[f"logvar_{contiguous}_stride"] = 1
    if eps_given:
        kind["eps"] = "given"
    else:
        fixed |= {"eps_ptr": None, "grad_eps_ptr": None}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    kinds = {"seed_ptr": "*i64", "kl_ptr": "*fp32", "grad_kl_ptr": "*fp32", "free_bits": "fp32"}
    signature = {
        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in fixed
    }
    multiples = not (flags["FOURS"] or flags["ODD"])
    suffixes = ("columns", "stride", "outers", "inner") if multiples else ()
    aligned = tuple(name for name in signature if name.endswith(suffixes))
    config = " ".join(
        [f"{dtype} {rows}x{out}x{within}", *["across"] * across, *(f"{name}={value}" for name, value in kind.items())]
    )
    warps = within // 256 if flags["PACKED"] else 4
    spills = {"sm_90": 8} if flags["PACKED"] and eps_given else {}
    reason = "two words, a choice of ptxas far from the register limit" if spills else ""
    return Entry(kernel, config, signature, fixed, aligned=aligned, num_warps=warps, spills=spills, reason=reason)
