"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "readme"})


def test_every_command_is_there():
    from fastgen.cli import build_parser

    parser = build_parser()
    lines = re.findall(r"^fastgen (train|evaluate|sample|complete) (.*?)(?:  +#.*)?$", README, re.M)
    assert len(lines) == 6
    for command, rest in lines:
        parser.parse_args([command, *rest.replace("[", "").replace("]", "").split()])
