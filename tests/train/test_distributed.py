"""Several processes under torchrun on the CPU: they compute what one process computes, and one may die."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgen
from fastgen import cli, distributed
from fastgen.demos.examples import two_gpus
from fastgen.train import read_state

DIGITS = importlib.util.find_spec("sklearn") is not None
ROOT = Path(__file__).parents[2]
TINY = ["--batch-size", 7, "--validate-every", 2, "--set", "channels=4", "--lr", 0.02, "--device", "cpu"]


def launch(count, *command):
    """Starts a job of `count` processes without waiting for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*start, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.npz"
    random = np.random.RandomState(0)
    np.savez(path, images=random.randint(3, size=(60, 4, 4)).astype(np.uint8), labels=np.arange(60) % 2, levels=3)
    return f"npz:{path}"


def commands(images, root):
    """Train a conditional PixelCNN and a VAE, train the first on, also with sharded parameters, score, draw."""
    pixel, vae = root / "pixelcnn", root / "vae"
    new = ["train", "--data", images, *TINY]
    first = [*new, "--model", "pixelcnn", "--set", "layers=1", "--conditional", "--steps", 3]
    score = ["--data", images, "--device", "cpu", "--batch-size", 2]
    draw = ["--device", "cpu", "--seed", 3, "--out"]
    return [
        [*first, "--out", pixel],
        ["train", "--resume", "--steps", 6, "--device", "cpu", "--out", pixel],
        [*first, "--parallel", "fsdp", "--out", root / "fsdp"],
        ["train", "--resume", "--steps", 6, "--device", "cpu", "--out", root / "fsdp"],
        [*new, "--model", "vae", "--set", "hidden=8", "--steps", 1, "--out", vae],
        ["evaluate", pixel, *score],
        ["evaluate", vae, *score, "--samples", 3],
        ["sample", pixel, "--n", 5, *draw, root / "pixelcnn.npz"],
        ["sample", vae, "--n", 130, *draw, root / "vae.npz"],
    ]


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """Runs the same commands in this process."""
    root = tmp_path_factory.mktemp("one")
    for command in commands(images, root):
        assert cli.main([str(argument) for argument in command]) == 0
    return root


def curve(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): value for row in rows for name, value in row.items()}


def copied(source, target):
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(("count", "sharded"), [(2, False), (3, True)])
def test_a_job_of_processes_is_a_job_of_one(count, sharded, images, one, tmp_path, capsys):
    """Training, also resumed, replicated and sharded: the same curve up to the order of sums. Scores and images of the
    same weights: the same. Without shards, which hold the group, no thread of it is left at the end. The example for
    two GPUs says the same of two processes as of one."""
    jobs = commands(images, tmp_path)
    # From the weights of the single process, so that every figure must be the same to the last bit.
    for name in ("pixelcnn", "vae"):
        copied(one / name, tmp_path / f"one-{name}")
    jobs += [
        [str(argument).replace(f"{tmp_path}/", f"{tmp_path}/one-") for argument in command] for command in jobs[-4:]
    ]
    jobs.append([*jobs[2][:-1], tmp_path / "parts"])
    if not sharded:
        jobs = [job for job in jobs if "fsdp" not in job and tmp_path / "fsdp" not in job]
        jobs += [["two_gpus", tmp_path / "two"]] if DIGITS else []
    job = launch(count, Path(__file__).parent / "commands.py", json.dumps([[str(a) for a in job] for job in jobs]))
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    for name in ("pixelcnn", "fsdp") if sharded else ("pixelcnn",):
        found, expected = curve(tmp_path / name), curve(one / name)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5)
        assert fastgen.load(tmp_path / name).n_classes == 2
        weights, truth = (fastgen.load(root / name).state_dict() for root in (tmp_path, one))
        for key, value in truth.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)
        sums = [read_state(root / name)["loss"] for root in (tmp_path, one)]
        assert sums[0][1] == sums[1][1] == 6
        torch.testing.assert_close(*(total for total, _ in sums))
    assert out.count("saved in") == (6 if sharded else 3)  # one process prints
    if sharded:
        goes_on_alone(tmp_path / "parts", one / "pixelcnn")
    elif DIGITS:
        (bits,) = re.findall(r"processes: 2, bits/dim on the validation images: ([\d.]+)", out)
        assert float(bits) == pytest.approx(two_gpus.main(tmp_path / "alone", steps=2), abs=1e-4)
    for name in ("pixelcnn", "vae"):
        with np.load(one / f"{name}.npz") as expected, np.load(tmp_path / f"one-{name}.npz") as found:
            assert np.array_equal(expected["images"], found["images"])
    for name in ("pixelcnn", "vae"):
        capsys.readouterr()
        score = ["--data", images, "--device", "cpu", "--batch-size", "2", "--samples", "3"]
        assert cli.main(["evaluate", str(one / name), *score]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(line in out.splitlines() for line in lines), (lines, out)


def goes_on_alone(parts, one):
    """A single process resumes a run of sharded processes."""
    rest = ["train", "--resume", "--steps", "6", "--device", "cpu", "--parallel", "ddp", "--out"]
    assert cli.main([*rest, str(parts)]) == 0
    assert curve(parts) == pytest.approx(curve(one), rel=1e-5)
    state, truth = read_state(parts), read_state(one)
    assert state["loss"][1] == truth["loss"][1]
    torch.testing.assert_close(state["loss"][0], truth["loss"][0])
    for number, entry in truth["optimizer"]["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(state["optimizer"]["state"][number][key], value, rtol=1e-3, atol=1e-6)


def test_a_process_that_dies_ends_all_with_one_line(images, tmp_path):
    run = tmp_path / "run"
    new = ["train", "--data", images, *TINY, "--model", "pixelcnn", "--set", "layers=1", "--patience", 0]
    job = launch(3, "-m", "fastgen", *new, "--steps", 100000, "--out", run)
    for line in job.stdout:
        if line.startswith("step 4 "):
            break
    children = [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    ranks = {}
    for child in children:
        found = re.search(rb"\0RANK=(\d)", Path(f"/proc/{child}/environ").read_bytes())
        if found:
            ranks[int(found[1])] = child
    os.kill(ranks[1], 9)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("fastgen train:")]
    assert len(lines) == 1 and "another of the 3 processes has ended" in lines[0], err
    state = read_state(run)
    assert state["step"] >= 4 and state["step"] % 2 == 0
    fastgen.load(run)


def test_parts_are_whole(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        for count in (0, 1, 5, 21):
            seen = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                seen += list(range(count))[distributed.shard(count)]
            assert seen == list(range(count))
