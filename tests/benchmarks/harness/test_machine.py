"""Which source a row was measured with."""

import hashlib

from benchmarks.harness import machine


def test_the_hash_is_of_the_kernels_source():
    (file,) = machine.KERNELS.rglob("reparameterize_kl.py")
    name = file.relative_to(machine.KERNELS).with_suffix("").as_posix()
    assert machine.kernel_sha256([name]) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert machine.sources((name,))[0] == name
    assert machine.kernel_sha256(["no_such_kernel"]) is None


def test_imports_of_a_kernel_count_as_its_source(tmp_path, monkeypatch):
    (tmp_path / "scan.py").write_text(
        "from fastgen.kernels.cell import step\nfrom fastgen.kernels.catalogue_entry import Entry\n"
    )
    (tmp_path / "cell.py").write_text("from fastgen.kernels import launch\nfrom fastgen.kernels.scan import x\n")
    (tmp_path / "launch.py").write_text("import torch\n")
    monkeypatch.setattr(machine, "KERNELS", tmp_path)
    assert machine.sources(("scan",)) == ["scan", "cell", "launch"]
    before = machine.kernel_sha256(["scan", "cell", "launch"])
    (tmp_path / "launch.py").write_text("import torch  # changed\n")
    assert machine.kernel_sha256(["scan", "cell", "launch"]) != before


def test_kernels_may_lie_in_folders(tmp_path, monkeypatch):
    (tmp_path / "lstm").mkdir()
    (tmp_path / "lstm" / "scan.py").write_text(
        "from fastgen.kernels.lstm import cell\nfrom fastgen.kernels.common import x\n"
    )
    (tmp_path / "lstm" / "cell.py").write_text("import torch\n")
    (tmp_path / "common.py").write_text("import torch\n")
    monkeypatch.setattr(machine, "KERNELS", tmp_path)
    assert machine.sources(("lstm.scan",)) == ["lstm/scan", "common", "lstm/cell"]
    assert machine.sources(("lstm",)) == ["lstm/cell", "lstm/scan", "common"]
    assert machine.kernel_sha256(["lstm/scan", "common"]) is not None
