"""The README's Python code runs, its commands exist, and its first figure is that of its picture."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.demos.stranger import stranger

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme", "model": stranger(levels=256)}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    assert names["images"].shape == (16, 1, 16, 16)


def test_every_command_is_there():
    from fastgen.cli import build_parser

    parser = build_parser()
    lines = re.findall(r"^fastgen (train|evaluate|sample|complete) (.*?)(?:  +#.*)?$", README, re.M)
    assert len(lines) == 5
    for command, rest in lines:
        parser.parse_args([command, *rest.replace("[", "").replace("]", "").split()])


def test_is_read_in_a_minute_or_two():
    assert len(README.split()) <= 900


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_first_figure_is_that_of_the_picture():
    path = ROOT / "docs" / "front_page.png"
    assert path.stat().st_size < 200_000
    numbers = json.loads(Image.open(path).text["Description"])
    assert numbers["samples_identical"] is True and numbers["date"] in README
    ratio = numbers["naive_seconds"] / numbers["fast_seconds"]
    assert f"{ratio:.0f} times as fast" in " ".join(README.split())
