"""The hash of the source that a row was measured with."""

import pytest

from benchmarks.harness import machine


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A folder with two families of kernels and a file that they share."""
    for name in ("common", "lstm/scan", "lstm/cell", "vae/kl"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("import torch\n")
    monkeypatch.setattr(machine, "KERNELS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "differs"), [("lstm/scan", True), ("lstm/cell", True), ("common", True), ("vae/kl", False)]
)
def test_a_kernel_depends_on_its_family_and_on_what_families_share(changed, differs, kernels):
    before = machine.kernel_sha256(["lstm/scan"])
    (kernels / f"{changed}.py").write_text("import torch  # changed\n")
    assert (machine.kernel_sha256(["lstm/scan"]) != before) is differs


def test_kernels_that_are_gone_or_none_have_no_source(kernels):
    assert machine.kernel_sha256(["lstm/scan", "lstm/gone"]) is None and machine.kernel_sha256([]) is None
