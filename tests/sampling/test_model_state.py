"""What changes in a model is noticed, and what passes write is put back."""

from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgen.sampling.model_state import ModelState, unchanged


def test_what_kind_of_change_it_was():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.slope, self.scale = 0.1, torch.ones(3)
            self.register_buffer("index", torch.arange(4))
            self.options, self.config = {"steps": [1, 2]}, SimpleNamespace(size=3)
            self.masks = [torch.ones(2), (torch.ones(2),)]
            with torch.no_grad():
                self.conv.weight[0, 0, 0] = 0

    changes = {
        "nothing": (
            lambda m: None,
            lambda m: m.conv.weight.data.mul_(1),
            lambda m: m.requires_grad_(False),
            lambda m: m.register_forward_hook(lambda module, given, found: None),
        ),
        "values": (
            lambda m: m.conv.weight.data.mul_(1.5),
            lambda m: m.conv.bias.data.fill_(2),
            lambda m: m.scale.mul_(2),
            lambda m: m.masks[1][0].mul_(2),
            lambda m: m.masks.__setitem__(0, torch.full((2,), 3.0)),
            lambda m: m.norm.running_var.mul_(3),
        ),
        "structure": (
            lambda m: m.conv.weight.data[0, 0, 0].fill_(1),
            lambda m: m.conv.weight.data[1, 0, 0].fill_(0),
            lambda m: m.train(),
            lambda m: setattr(m, "slope", 0.2),
            lambda m: m.index.add_(1),
            lambda m: m.double(),
            lambda m: setattr(m, "norm", nn.Identity()),
            lambda m: setattr(m, "scale", None),
            lambda m: m.options["steps"].append(3),
            lambda m: setattr(m.config, "size", 4),
            lambda m: m.register_buffer("more", torch.ones(1)),
            lambda m: m.conv.register_forward_hook(lambda module, given, found: 2 * found),
            lambda m: m.norm.register_forward_pre_hook(lambda module, given: None),
        ),
    }
    for kind, of_kind in changes.items():
        for change in of_kind:
            model = Model().eval()
            state = ModelState(model)
            change(model)
            assert state.change() == kind, change


def test_unchanged_puts_back_containers_and_modules():
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    model.things, model.numbers, model.names = {"a": 1}, [1, 2], {"x"}
    model.config = SimpleNamespace(seen=None)
    model.register_buffer("map", torch.zeros(2, 1))
    with unchanged(model) as passes:
        model.config.seen = 3
        model.map.resize_(3, 2)
        model.things["b"] = 2
        model.things["a"] = 3
        model.numbers.reverse()
        model.names.add("y")
        model.add_module("more", nn.Identity())
        model[0].weight.data.fill_(7)
        model.number = 1
    assert (model.things, model.numbers, model.names, len(model)) == ({"a": 1}, [1, 2], {"x"}, 1)
    assert not hasattr(model, "number")
    assert model.config.seen is None and model.map.tolist() == [[0], [0]]
    inside = {"map", "config['seen']", "things['a']", "things['b']", "numbers[0]", "numbers[1]"}
    assert passes.written == {"number", *inside} and passes.containers == {"things", "numbers", "names", "config"}
    assert list(passes.tensors) == ["0.weight"] and passes.tensors["0.weight"].item() == 7 != model[0].weight.item()


def test_unchanged_puts_back_containers_inside_of_others():
    model = nn.Identity()
    model.cache = OrderedDict(layer={"keys": None, "seen": [1]})
    model.recent, model.counts = deque([1, 2], maxlen=2), defaultdict(list, a=[1])
    with unchanged(model):
        model.cache["layer"]["keys"] = torch.ones(2)
        model.cache["layer"]["seen"].append(2)
        model.recent.append(3)
        model.counts["b"].append(1)
        model.counts["a"].clear()
    assert model.cache == {"layer": {"keys": None, "seen": [1]}}
    assert (list(model.recent), model.counts) == ([1, 2], {"a": [1]})


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_buffers_are_watched(layout):
    model = nn.Identity()
    model.mask = getattr(torch.eye(3), layout)()
    state = ModelState(model)
    with state.kept():
        pass
    assert state.change() == "nothing"
    values = model.mask._values() if layout == "to_sparse" else model.mask.values()
    values.mul_(2)
    assert state.change() == "values"
