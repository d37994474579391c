"""The built wheel contains what it should, and works outside of the repository, also without Triton."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is packaged, so that the repository stays as it is; no network, no other packages."""
    root = tmp_path_factory.mktemp("source")
    copied = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "fastgen", "kernels"]
    subprocess.run(["cp", "-a", *[str(ROOT / name) for name in copied], str(root)], check=True)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(target), str(root)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(target.glob("fastgen-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(code, folder):
    """Runs code in a fresh interpreter that sees the installed wheel and nothing of the repository."""
    start = f"import sys; sys.path[:0] = [{str(folder)!r}]\n"
    result = subprocess.run([sys.executable, "-I", "-c", start + code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_holds_every_module_once(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names)) and not any(
        name.startswith(("kernels", "tests", "benchmarks")) for name in names
    )
    own = {f"fastgen/{path.relative_to(ROOT / 'fastgen')}" for path in (ROOT / "fastgen").rglob("*.py")}
    own |= {f"fastgen/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == own
    assert {"fastgen/py.typed", "fastgen/sampling/machine/cpu/machine.cpp"} <= set(names)


def test_declares_what_it_needs(wheel):
    files = zipfile.ZipFile(wheel)
    metadata = next(files.read(name).decode() for name in files.namelist() if name.endswith("METADATA"))
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata, re.M)
    assert {name for name, rest in needs if "extra" not in rest} == {"torch", "numpy", "safetensors", "tqdm", "pillow"}
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M))
    assert extras == {"demo", "plots", "data", "log", "hub", "compress", "config", "benchmarks", "dev"}
    points = next(files.read(name).decode() for name in files.namelist() if name.endswith("entry_points.txt"))
    assert "fastgen = fastgen.cli:main" in points


def test_outside_the_repository(installed):
    """fastgen and fastgen.kernels and no top-level kernels; the command; nothing large is imported before it is needed;
    the benchmarks stay in the checkout, and that is said."""
    out = run(
        """
import importlib.util, fastgen, fastgen.kernels
from fastgen.cli import main
print(fastgen.__file__, fastgen.kernels.__file__, importlib.util.find_spec("kernels"))
print([name for name in ("triton", "sklearn", "matplotlib", "datasets") if name in sys.modules])
print(main(["bench"]))
main(["--help"])
""",
        installed,
    )
    lines = out.splitlines()
    own = [str(installed / "fastgen" / name) for name in ("__init__.py", "kernels/__init__.py")]
    assert lines[0].split() == [*own, "None"]
    assert lines[1:3] == ["[]", "2"] and lines[3].startswith("usage: fastgen")


WITHOUT_TRITON = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocked())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else real(name, *rest)
"""


def test_runs_without_triton(installed):
    """Imports, trains a step, saves, loads and samples; `doctor` names the reason."""
    out = run(
        WITHOUT_TRITON
        + """
import tempfile, torch, fastgen
from fastgen import cli, data, models, train
split = data.Split(torch.randint(3, (8, 1, 4, 4), dtype=torch.uint8))
model = models.GatedPixelCNN((1, 4, 4), 3, channels=4, layers=2)
with tempfile.TemporaryDirectory() as folder:
    dataset = data.Dataset("x", 3, None, split, split, split)
    train.train(model, dataset, folder, train.Settings(steps=1, batch_size=4), progress=False)
    print(fastgen.load(folder).sample(2, seed=0).shape)
assert cli.main(["doctor"]) == 0
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
""",
        installed,
    )
    assert "torch.Size([2, 1, 4, 4])" in out and "triton is not installed" in out


def test_nothing_imports_the_benchmarks():
    for path in [*(ROOT / "fastgen").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text(), re.M), path
