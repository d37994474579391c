"""Every case, provider and mode as a pytest-benchmark test. Only `python -m benchmarks` compares with float64."""

import torch

from benchmarks.harness.runner import prepare


def test_speed(benchmark, case, provider, mode):
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    call = prepare(case, case.providers[provider], mode, case.inputs(torch.device("cuda" if cuda else "cpu")))

    def finished():
        # pytest-benchmark reads the host's clock: the GPU must have finished before.
        call()
        if cuda:
            torch.cuda.synchronize()

    finished()
    benchmark.group = f"{case.op} {case.shape} {case.dtype} {mode}"
    benchmark.pedantic(finished, rounds=10, warmup_rounds=1)
