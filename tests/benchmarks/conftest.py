"""One thread: what the tests fork must not wait for threads that only their parent has."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def precision():
    """A session on a GPU allows TF32 from then on."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolutions.fp32_precision
    yield
    matmul.fp32_precision, convolutions.fp32_precision = before
