"""Races looked for by addresses: every address that an instruction of a real plan reads and writes, from its tables."""

import warnings

import numpy as np
import pytest
import torch

from fastgen import accelerate
from fastgen.kernels.sampler import words as w
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.run.gpu_player import GPUPlayer
from fastgen.sampling.trace.network import Network
from tests.sampling.zoo import CASES, built

N = 3
MODELS = {
    "gated": lambda: GatedPixelCNN((1, 5, 4), 4, channels=8, layers=2),
    "plain, colours": lambda: PixelCNN((3, 5, 4), 3, channels=6, layers=2),
    "plusplus": lambda: PixelCNNPP((3, 4, 4), channels=4, layers=1, n_mix=2),
}
WIDE = {w.OPS[op] for op in ("softmax", "log_softmax", "normalized")}  # a result for every number of a row
NARROW = {w.OPS[op] for op in ("sum", "mean", "amax")}
TO_INTEGERS = {w.OPS[op] for op in ("to_int64", "move_int64")}
NOWHERE = -(1 << 62)


class Addresses:
    """Of an instruction for N images. All are numbers (elements, ...): elements of the result, what each one reads.

    Attributes:
        written: by the head; NOWHERE where it keeps nothing.
        own, shared: read for one element alone, and for several, of the arena that is written.
        elsewhere: read of the other arena.
        follow: of each link what it reads for one element alone (or None) and what it writes (or None); NOWHERE where
            an element of the second half of the columns has been folded into one of the first.
    """

    def __init__(self, code, offsets, links=(), table_rows=0):
        self.op = int(code[w.OP.value])
        self.code, self.offsets = code, offsets
        depth, columns = int(code[w.DEPTH.value]), int(code[w.COLUMNS.value])
        self.sizes = [N, *code[w.S1.value : w.S3.value + 1].tolist(), columns]
        rows = [*self.sizes[:-1], 1]
        along, along_b = (np.arange(depth) * int(code[word.value]) for word in (w.ALONG, w.ALONG_B))
        product, contract = self.op == w.OPS["product"], self.op == w.OPS["contract"]
        self.rowwise = self.op in WIDE | NARROW
        self.written = self.of(w.OUT, [*rows[:-1], depth] if self.op in WIDE else self.sizes).ravel()
        self.own, self.shared, self.elsewhere, self.follow = [], [], [], []
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
            self.shared.append(self.of(w.A, self.sizes)[..., None] + np.arange(table_rows) * int(code[w.ALONG.value]))
            self.elsewhere.append(self.of(w.B, rows))
        elif self.op in (w.OPS["copy_int64"], w.OPS["to_int64"]):
            self.elsewhere.append(self.of(w.A, self.sizes))
        else:
            self.own.append(self.of(w.A, self.sizes).ravel())
        if code[w.HAS_ADDED.value]:
            self.own.append(self.of(w.ADDED, self.sizes).ravel())
        folded = 0
        for link in links:
            assert (link[w.S1.value : w.COLUMNS.value + 1] == code[w.S1.value : w.COLUMNS.value + 1]).all()
            folded = folded or int(link[w.FOLDS.value] * code[w.HALF.value])
            assert link[w.KEPT.value] in (0, self.sizes[-1])
            sides = [w.ADDED if link[w.HAS_ADDED.value] else None, w.OUT if link[w.KEPT.value] else None]
            self.code = link
            self.follow.append([None if side is None else self.of_half(side, folded) for side in sides])
        self.code = code
        assert code[w.KEPT.value] in (0, self.sizes[-1])
        if not code[w.KEPT.value]:
            self.written = np.full_like(self.written, NOWHERE)

    def of_half(self, side, half):
        """As `of`, NOWHERE for elements that are no longer there where half is not 0."""
        found = self.of(side, self.sizes)
        if half:
            assert 2 * half == self.sizes[-1]
            found[..., half:] = NOWHERE
        return found.ravel()

    def of(self, side, sizes):
        start, slot, *strides = self.code[side.value : side.value + w.SIDE].tolist()
        found = np.array(start + int(self.offsets[slot]))
        for size, stride in zip(sizes, strides, strict=True):
            found = found[..., None] + np.arange(size) * stride
        return found

    def check(self):
        """No element is written twice; what is written, no other element reads, nor a later link."""
        outs = [self.written, *(out for _, out in self.follow if out is not None)]
        elements = np.tile(np.arange(len(self.written)), len(outs))
        written = np.concatenate(outs)
        elements, written = elements[written >= 0], written[written >= 0]
        assert len(written), "nothing is kept"
        order = np.argsort(written, kind="stable")
        sorted_, elements = written[order], elements[order]
        assert (np.diff(sorted_) > 0).all(), "written twice"

        def writer_of(addresses):
            at = np.searchsorted(sorted_, addresses).clip(max=len(sorted_) - 1)
            return np.where(sorted_[at] == addresses, elements[at], -1)

        before = self.written[self.written >= 0]
        for read, out in self.follow:
            if read is not None:
                assert not np.isin(read[read >= 0], before).any(), "read by a later link"
            if out is not None:
                before = np.concatenate((before, out[out >= 0]))
        if self.code[w.IN_ORDER.value]:
            starts = [int(self.code[side.value]) for side in (w.OUT, w.A)]
            assert starts[0] < starts[1]
            reaches = [self.of(side, self.sizes).reshape(N, -1) for side in (w.OUT, w.A)]
            assert max(reaches[1][0]) < min(reaches[0][1]) and max(reaches[1][0]) < min(reaches[1][1])
            return
        for addresses in (*self.own, *(read for read, _ in self.follow if read is not None)):
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
    """The copies and instructions of every step that the kernel plays, with the step's offsets, links, and the rows of
    a table."""
    tables = player.tables
    codes, programs, offsets = tables.codes.numpy(), tables.programs.numpy(), tables.offsets.numpy()
    played = [one for one in tables.steps.tolist() if player._fused[one[0]] is not None]
    for program, first, moves, count in played:
        begin, number = programs[program].tolist()
        for k in (*range(moves, moves + count), *range(begin, begin + number)):
            links_at = codes[k][w.LINKS_AT.value]
            links = codes[links_at : links_at + codes[k][w.LINKS.value]]
            looks = codes[k][w.OP.value] == w.OPS["lookup"]
            table_rows = player._fused[program][k - begin].head.inputs[0].view.sizes[0] if looks else 0
            yield codes[k], offsets[first:], links, table_rows


def checked(player):
    """The addresses of all instructions: no races, inside of the arenas, and the first number is never written."""
    floats, integers = (player._arena.arenas[dtype].numel() for dtype in (torch.float32, torch.int64))
    found = [Addresses(*one) for one in instructions_of(player)]
    for one in found:
        one.check()
        here, there = (integers, floats) if one.op in TO_INTEGERS else (floats, integers)
        links = [side for sides in one.follow for side in sides if side is not None]
        for addresses, room in (
            *((side[side != NOWHERE], here) for side in (one.written, *one.own, *one.shared, *links)),
            *((side, there) for side in one.elsewhere),
        ):
            assert not addresses.size or (addresses.min() >= 0 and addresses.max() < room)
        assert all((out != 0).all() for out in (one.written, *(out for _, out in one.follow if out is not None)))
    return found


def test_nobody_reads_what_another_one_writes(player):
    found = checked(player)
    assert len(found) > 200 and {w.OPS["product"], w.OPS["copy_int64"]} <= {one.op for one in found}
    assert sum(len(one.follow) for one in found) > 100


@pytest.mark.parametrize("name", CASES)
def test_nor_in_the_plans_of_strangers(name):
    model, shape, arguments = built(name, N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = accelerate(model, shape, backend="eager", **arguments)._backends.made[-1].backend
    player = GPUPlayer(engine.plan, N, torch.device("cpu"))
    assert checked(player) or None in player._fused  # what the kernel does not know


def test_the_check_sees_a_race(player):
    """A copy of what lies one further; a product into its own rows; a link into the rows, of what the head writes, of
    what another element writes."""
    codes = [(code.copy(), offsets, links.copy()) for code, offsets, links, _ in instructions_of(player)]
    copy = next(one for one in codes if one[0][w.OP.value] == w.OPS["copy"])
    product = next(one for one in codes if one[0][w.OP.value] == w.OPS["product"] and one[0][w.KEPT.value])
    linked = next(one for one in codes if len(one[2]) and one[0][w.OP.value] == w.OPS["product"])
    code, offsets, _ = copy
    code[w.IN_ORDER.value] = 0
    code[w.S1.value : w.COLUMNS.value + 1], code[w.KEPT.value] = (1, 1, 1, 4), 4
    code[w.OUT.value : w.OUT.value + w.SIDE] = 100, 0, 50, 0, 0, 0, 1
    code[w.A.value : w.A.value + w.SIDE] = 101, 0, 50, 0, 0, 0, 1
    with pytest.raises(AssertionError, match="another element"):
        Addresses(code, offsets).check()
    code, offsets, links = linked
    out, rows, added = (slice(side.value, side.value + w.SIDE) for side in (w.OUT, w.A, w.ADDED))
    last = links[-1].copy()
    last[out] = code[rows]
    with pytest.raises(AssertionError, match=r"written twice|several elements"):
        Addresses(code, offsets, [last]).check()
    reader = links[-1].copy()
    reader[w.HAS_ADDED.value], reader[added] = 1, last[out]
    before = links[-1].copy()
    before[out] = last[out]
    with pytest.raises(AssertionError, match=r"read by a later link|written twice"):
        Addresses(code, offsets, [before, reader]).check()
    reader[added] = reader[out]
    reader[added][0] += 1
    with pytest.raises(AssertionError, match="another element"):
        Addresses(code, offsets, [reader]).check()
    code, offsets, _ = product
    code[w.A.value : w.A.value + 3] = code[w.OUT.value : w.OUT.value + 3]
    with pytest.raises(AssertionError, match="several elements"):
        Addresses(code, offsets).check()
