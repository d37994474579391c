"""Imports point in one direction, as drawn in CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (  # each may import those before it, and its own
    {"kernels", "_version", "files", "pages"},
    {"ops", "mixture"},
    {"nn"},
    {"distributions"},
    {"sampling"},
    {"models"},
    {"distributed", "checkpoint", "weights", "data", "plots", "likelihood", "scores", "classification"},
    {"stream_header", "compression"},
    {"train"},
    {"demos", "reference"},
    {"cli", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
FILES = {path.relative_to(ROOT / "fastgen"): path for path in (ROOT / "fastgen").rglob("*.py")}
FILES |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
FILES.pop(Path("__init__.py"))  # whose names are those of all rooms


def imported(path):
    """Modules of fastgen that a file imports at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastgen."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "fastgen":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("place", FILES, ids=str)
def test_imports_point_one_way(place):
    room = place.parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} is new: say in ROOMS, and in CONTRIBUTING.md, what it may import"
    for name in imported(FILES[place]):
        other = name.split(".")[1]
        assert room != "kernels" or other == "kernels", f"{place} imports {name}"
        if other in LEVEL:  # the rest are names of fastgen itself
            assert LEVEL[other] <= LEVEL[room], f"{place} imports {name}"
