"""Scans that programs share: programs at the same time, each a process in Triton's interpreter, or on a GPU."""

import multiprocessing
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from fastgen.kernels.lstm import choice, tiles
from fastgen.kernels.lstm import diagonal as diagonal_kernels
from fastgen.kernels.lstm.choice import ASSERTING, TileLaunch, shared_scan, step_by_step
from tests.kernels.test_lstm_kernels import diagonal, problem, rows


class ProcessForEveryProgram:
    """A kernel whose programs run at the same time: the interpreter runs one after the other, and none could wait."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            for argument in arguments:
                if isinstance(argument, torch.Tensor):
                    argument.share_memory_()
            context = multiprocessing.get_context("fork")
            programs = [
                context.Process(target=self.run, args=(program, grid, arguments, options)) for program in range(grid[0])
            ]
            for program in programs:
                program.start()
            for program in programs:
                program.join()
            assert [program.exitcode for program in programs] == [0] * len(programs)

        return launch

    def run(self, program, grid, arguments, options):
        from triton.runtime.interpreter import interpreter_builder as builder

        torch.set_num_threads(1)
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
        builder.set_grid_dim = lambda *dim: set_dim(grid[0], *dim[1:])
        builder.set_grid_idx = lambda x, y, z: set_idx(program, y, z)
        self.kernel[(1, *grid[1:])](*arguments, **options)


@pytest.fixture
def programs_at_once(monkeypatch, device):
    if device == "cpu":
        for name in ("lstm_tiles_forward_kernel", "lstm_tiles_backward_kernel"):
            monkeypatch.setattr(tiles, name, ProcessForEveryProgram(getattr(tiles, name)))


def test_a_shared_diagonal_scan_equals_that_of_one_program(programs_at_once, device):
    """To the last bit: the tiles are the same, and only who computes them differs. Of three programs one has none."""
    gates, weight, grad = problem(3, 19, 3, 2, 2, torch.float32, device)
    alone = TileLaunch(16, 16, 16, groups=1)
    expected = diagonal(gates, weight, grad, True, alone)
    found = diagonal(gates, weight, grad, True, replace(alone, programs=3))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_shared_row_scan_equals_that_of_one_program(programs_at_once, device):
    gates, weight, grad = problem(3, 5, 3, 9, 3, torch.float32, device)
    alone = TileLaunch(16, 16, 16, groups=2)
    expected = rows(gates, weight, grad, alone)
    found = rows(gates, weight, grad, replace(alone, programs=2))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device-side assertion ends the process's use of the GPU")
@pytest.mark.parametrize("scan", ["forward", "backward"])
def test_a_lost_program_is_an_error(scan, monkeypatch):
    """The interpreter does not begin the second program before the first has ended, so for that one it is lost."""
    from triton.runtime.interpreter import interpreter_builder as builder

    asserting = replace(builder.options, **ASSERTING)  # which launches compile in, and the interpreter does not read
    monkeypatch.setattr(builder, "options", asserting)
    gates, weight, grad = problem(1, 3, 2, 3, 2, torch.float32, "cpu")
    alone = TileLaunch(16, 16, 16)
    lost = TileLaunch(16, 16, 16, groups=1, programs=2, patience=3)
    _, activated, cell = diagonal_kernels.forward(gates, weight, False, save=True, choice=alone)
    with pytest.raises(Exception, match="a program of the scan was lost"):
        if scan == "forward":
            diagonal_kernels.forward(gates, weight, False, save=True, choice=lost)
        else:
            diagonal_kernels.backward(grad, activated, cell, weight, False, choice=lost)


@pytest.mark.parametrize(("batch", "lanes", "units"), [(16, 32, 128), (64, 32, 128), (500, 64, 256), (1, 1, 1)])
@pytest.mark.parametrize("processors", [1, 132])
def test_all_programs_of_a_shared_scan_have_a_processor(batch, lanes, units, processors, monkeypatch):
    monkeypatch.setattr(choice, "processors_of", lambda device: processors)
    launch = shared_scan(torch.empty(batch, 1, dtype=torch.bfloat16), lanes, units)
    assert 1 <= launch.groups <= batch and launch.programs >= 1
    assert launch.groups * launch.programs <= processors
    assert (launch.programs > 1) == (processors > 1 and units > 1)


@pytest.mark.gpu
@pytest.mark.parametrize("units", [64, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_scans_are_right_every_time(units, dtype):
    gates, weight, grad = problem(21, units, 29, 31, 2, dtype, "cuda")
    expected = diagonal(gates, weight, grad, False, step_by_step(gates))
    for _ in range(50):
        found = diagonal(gates, weight, grad, False, shared_scan(gates, 29, units))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
