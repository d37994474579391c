"""Races looked for by addresses: every address that an instruction of a real plan reads and writes, from its tables."""

import numpy as np
import pytest
import torch

from fastgen.kernels.sampler import words as w
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.run.gpu_player import GPUPlayer
from fastgen.sampling.trace.network import Network

N = 3
MODELS = {
    "gated": lambda: GatedPixelCNN((1, 5, 4), 4, channels=8, layers=2),
    "plain, colours": lambda: PixelCNN((3, 5, 4), 3, channels=6, layers=2),
    "plusplus": lambda: PixelCNNPP((3, 4, 4), channels=4, layers=1, n_mix=2),
}
WIDE = {w.OPS[op] for op in ("softmax", "log_softmax", "normalized")}  # a result for every number of a row
NARROW = {w.OPS[op] for op in ("sum", "mean", "amax")}
COPIES = {w.OPS["copy_int64"], w.OPS["move_int64"], w.OPS["lookup"]}


class Addresses:
    """Of an instruction for N images. All are numbers (elements, ...): elements of the result, what each one reads."""

    def __init__(self, code, offsets):
        self.op = int(code[w.OP.value])
        self.code, self.offsets = code, offsets
        depth, columns = int(code[w.DEPTH.value]), int(code[w.COLUMNS.value])
        self.sizes = [N, *code[w.S1.value : w.S3.value + 1].tolist(), columns]
        rows = [*self.sizes[:-1], 1]
        along, along_b = (np.arange(depth) * int(code[word.value]) for word in (w.ALONG, w.ALONG_B))
        product, contract = self.op == w.OPS["product"], self.op == w.OPS["contract"]
        self.rowwise = self.op in WIDE | NARROW
        self.written = self.of(w.OUT, [*rows[:-1], depth] if self.op in WIDE else self.sizes).ravel()
        self.own, self.shared = [], []  # read for one element alone, and for several
        if product:
            self.shared.append(self.of(w.A, rows)[..., None] + np.arange(depth))
        elif contract:
            self.shared.append(self.of(w.A, self.sizes)[..., None] + along)
            self.shared.append(self.of(w.B, self.sizes)[..., None] + along_b)
        elif self.op in WIDE:
            self.own.append((self.of(w.A, rows)[..., 0, None] + along).ravel())
        elif self.op in NARROW:
            self.shared.append(self.of(w.A, rows)[..., None] + along)
        elif self.op == w.OPS["lookup"]:
            self.shared.append(self.of(w.B, rows))  # integers: another arena than what is written
        else:
            self.own.append(self.of(w.A, self.sizes).ravel())
            if self.op not in COPIES and self.code[w.B.value]:
                self.own.append(self.of(w.B, self.sizes).ravel())
        if code[w.HAS_ADDED.value]:
            self.own.append(self.of(w.ADDED, self.sizes).ravel())

    def of(self, side, sizes):
        start, slot, *strides = self.code[side.value : side.value + w.SIDE].tolist()
        found = np.array(start + int(self.offsets[slot]))
        for size, stride in zip(sizes, strides, strict=True):
            found = found[..., None] + np.arange(size) * stride
        return found

    def check(self):
        """No element is written twice; what is written, no other element reads."""
        order = np.argsort(self.written, kind="stable")
        sorted_ = self.written[order]
        assert (np.diff(sorted_) > 0).all(), "written twice"

        def writer_of(addresses):
            at = np.searchsorted(sorted_, addresses).clip(max=len(sorted_) - 1)
            return np.where(sorted_[at] == addresses, order[at], -1)

        if self.op in (w.OPS["copy_int64"], w.OPS["lookup"]):  # they read the other arena
            return
        if self.code[w.IN_ORDER.value]:
            starts = [int(self.code[side.value]) for side in (w.OUT, w.A)]
            assert starts[0] < starts[1]
            reaches = [self.of(side, self.sizes).reshape(N, -1) for side in (w.OUT, w.A)]
            assert max(reaches[1][0]) < min(reaches[0][1]) and max(reaches[1][0]) < min(reaches[1][1])
            return
        for addresses in self.own:
            writer = writer_of(addresses)
            assert ((writer == -1) | (writer == np.arange(len(addresses)))).all(), "read by another element"
        for addresses in self.shared:
            assert (writer_of(addresses.ravel()) == -1).all(), "read by several elements"


@pytest.fixture(scope="module", params=MODELS)
def player(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    plan = make_plan(Network(model, model.shape, model.encode, None, model.levels), model.distribution)
    return GPUPlayer(plan, N, torch.device("cpu"))


def instructions_of(player):
    """The copies and instructions of every step, with the step's offsets."""
    tables = player.tables
    codes, programs, offsets = tables.codes.numpy(), tables.programs.numpy(), tables.offsets.numpy()
    for program, first, moves, count in tables.steps.tolist():
        begin, number = programs[program].tolist()
        for k in (*range(moves, moves + count), *range(begin, begin + number)):
            yield codes[k], offsets[first:]


def test_nobody_reads_what_another_one_writes(player):
    found = [Addresses(*one) for one in instructions_of(player)]
    for one in found:
        one.check()
    assert len(found) > 400 and {w.OPS["product"], w.OPS["copy_int64"]} <= {one.op for one in found}


def test_all_addresses_are_in_the_arenas_and_the_first_number_is_never_written(player):
    floats, integers = (player._arena.arenas[dtype].numel() for dtype in (torch.float32, torch.int64))
    for code, offsets in instructions_of(player):
        one = Addresses(code, offsets)
        to_integers, from_integers = one.op == w.OPS["move_int64"], one.op in (w.OPS["move_int64"], w.OPS["copy_int64"])
        assert one.written.min() > 0 and one.written.max() < (integers if to_integers else floats)
        for addresses in (*one.own, *one.shared):
            assert addresses.min() >= 0 and addresses.max() < (integers if from_integers else floats)


def test_the_check_sees_a_race(player):
    """A copy of what lies one further; a product into its own rows."""
    codes = [(code.copy(), offsets) for code, offsets in instructions_of(player)]
    copy, product = (next(one for one in codes if one[0][w.OP.value] == w.OPS[op]) for op in ("copy", "product"))
    code, offsets = copy
    code[w.IN_ORDER.value] = 0
    code[w.S1.value : w.COLUMNS.value + 1] = 1, 1, 1, 4
    code[w.OUT.value : w.OUT.value + w.SIDE] = 100, 0, 50, 0, 0, 0, 1
    code[w.A.value : w.A.value + w.SIDE] = 101, 0, 50, 0, 0, 0, 1
    with pytest.raises(AssertionError, match="another element"):
        Addresses(code, offsets).check()
    code, offsets = product
    code[w.A.value : w.A.value + 3] = code[w.OUT.value : w.OUT.value + 3]
    with pytest.raises(AssertionError, match="several elements"):
        Addresses(code, offsets).check()
