import numpy as np
import pytest
import torch

from fastgen import data
from fastgen.demos import baselines

pytest.importorskip("sklearn")


def test_the_baselines_are_those_of_the_digits():
    digits = data.load("digits")
    assert baselines.uniform_bits_per_dim(digits) == pytest.approx(4.0875, abs=1e-4)
    assert baselines.histogram_bits_per_dim(digits, digits.test) == pytest.approx(2.3662, abs=1e-4)
    seen = torch.cat((digits.train.images, digits.validation.images))[:, 0, 3, 4].tolist()
    direct = [-np.log2((seen.count(value) + 1) / (1500 + 17)) for value in digits.test.images[:, 0, 3, 4].tolist()]
    pixel = [data.Split(part.images[:, :, 3:4, 4:5]) for part in (digits.train, digits.validation, digits.test)]
    cropped = data.Dataset("one pixel", 17, None, *pixel)
    assert baselines.histogram_bits_per_dim(cropped, cropped.test) == pytest.approx(np.mean(direct))
