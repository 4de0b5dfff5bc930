"""Nothing that a forward does while it is explored or traced reaches the caller's model, or the rest of the process."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import Pair, data, fused, prepared
from torch import nn

import convbn_fx
from convbn_fx import deploy, symbolic_trace, tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


def averaged(m):
    for slow, fast in zip(m.slow.parameters(), m.conv.parameters(), strict=True):
        slow.mul_(0.9).add_(fast, alpha=0.1)


def assigned(m):
    for slow, fast in zip(m.slow.parameters(), m.conv.parameters(), strict=True):
        slow.data = slow.data * 0.9 + fast.data * 0.1


def in_a_closure(m):
    m.update()


def in_place(function):
    return lambda m: function(m.slow.weight)


WRITES = {
    "a moving average": averaged,
    "through data": lambda m: m.slow.weight.data.mul_(0.9),
    "assigning data": assigned,
    "foreach": lambda m: torch._foreach_mul_(list(m.slow.parameters()), 0.9),
    "foreach of two lists": lambda m: torch._foreach_add_(
        list(m.slow.parameters()), [parameter.detach() for parameter in m.conv.parameters()]
    ),
    "foreach of a list that is kept": lambda m: torch._foreach_mul_(m.listed, 0.9),
    "out": lambda m: torch.mul(m.slow.weight, 2.0, out=m.slow.weight),
    "out, of what is kept": lambda m: torch.mul(m.listed[0], 2.0, out=m.listed[0]),
    "a keyword": lambda m: torch.add(input=m.plain, other=1.0, out=m.plain),
    "all state": lambda m: [value.zero_() for value in m.state_dict().values()],
    "an initialisation": lambda m: nn.init.zeros_(m.slow.weight),
    "a list": lambda m: m.listed[0].mul_(0.9),
    "data of what is in a list": lambda m: m.listed[0].data.mul_(0.9),
    "assigning data of what is in a list": lambda m: setattr(m.listed[0], "data", m.listed[0] * 0.9),
    "a dictionary of an object": lambda m: m.helper.tensors["weight"].mul_(0.9),
    "a closure": in_a_closure,
    "a plain tensor": lambda m: m.plain.add_(1.0),
    "a buffer": lambda m: m.buffer.add_(1.0),
    "a buffer by keyword": lambda m: torch.add(m.buffer, 1.0, out=m.buffer),
    "an array": lambda m: np.multiply(m.array, 2.0, out=m.array),
    "an array in a list": lambda m: m.arrays[0].__imul__(2.0),
    "a view as an array": lambda m: m.plain.numpy().__imul__(2.0),
    "a view as an array of what is in a list": lambda m: m.listed[0].detach().numpy().__imul__(2.0),
    "a view as an array of a parameter": lambda m: next(m.slow.parameters()).data.numpy().fill(0.0),
    "a global": lambda m: GLOBAL.add_(1.0),
    "items": lambda m: m.listed[0].data.__setitem__(0, 0.0),
    "random numbers": lambda m: m.listed[0].data.normal_(),
    "freezing": lambda m: m.slow.requires_grad_(False),
    "no gradient": lambda m: m.slow.zero_grad(),
}
GLOBAL = torch.zeros(3)


def writing(write):
    def forward(m, x):
        with torch.no_grad():
            write(m)
        return m.norm(m.conv(x))

    model = Pair(forward=forward)
    model.slow = nn.Conv2d(3, 4, 3)
    model.register_buffer("buffer", torch.zeros(4))
    model.plain, model.array, model.arrays = torch.ones(4), np.ones(4), [np.ones(4)]
    prepared(model)
    model.listed = [model.slow.weight, model.slow.bias]
    model.helper = SimpleNamespace(tensors={"weight": model.slow.weight})
    weight = model.slow.weight
    model.update = lambda: weight.mul_(0.9)
    model.slow.weight.grad = torch.ones_like(model.slow.weight)
    return model


def everything(model):
    tensors = [*model.state_dict().values(), model.plain, GLOBAL, model.slow.weight.grad]
    arrays = [model.array, *model.arrays]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return [tensor.tolist() for tensor in tensors], [array.tolist() for array in arrays], flags


@pytest.mark.parametrize(
    "rewrite", [convbn_fx.tune, convbn_fx.deploy, symbolic_trace], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("write", WRITES)
def test_what_a_forward_writes(write, rewrite):
    model = writing(WRITES[write])
    before = everything(model)
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers(), model.plain)]
    try:
        rewrite(model)
    except convbn_fx.TracingError:
        assert rewrite is symbolic_trace
    assert everything(model) == before
    assert versions == [tensor._version for tensor in (*model.parameters(), *model.buffers(), model.plain)]


@pytest.mark.parametrize("write", ["a moving average", "through data", "foreach", "a buffer", "out"])
def test_what_a_graph_can_write_it_writes_at_every_call(write):
    def forward(m, x):
        WRITES[write](m)
        return m.norm(m.conv(x)) * m.slow.weight.sum() * m.buffer.sum()

    model = Pair(forward=forward)
    model.slow = nn.Conv2d(3, 4, 3)
    model.register_buffer("buffer", torch.ones(4))
    prepared(model).requires_grad_(False)
    graph_module = fused(model)
    with torch.no_grad():
        assert_equivalent(model, graph_module, X)


@pytest.mark.parametrize("rewrite", [convbn_fx.tune, convbn_fx.deploy], ids=lambda f: f.__name__)
def test_what_a_hook_keeps_in_its_closure(rewrite):
    seen = []
    model = prepared(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    rewritten = rewrite(model)
    assert not seen
    rewritten(X)
    assert len(seen) == 1


class ByWeakReference(Pair):
    """Keeps what its forward calls by a weak reference alone, which writes to a tensor of its own."""

    def __init__(self, kept):
        super().__init__()
        self.reference = weakref.ref(kept)

    def forward(self, x):
        return self.reference()(super().forward(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(())

    def forward(self, x):
        self.calls.data = self.calls + 1
        return x


@pytest.mark.parametrize("how", [tune, deploy], ids=["tune", "deploy"])
def test_a_module_that_a_weak_reference_alone_leads_to(how):
    kept = Counting()
    model = prepared(ByWeakReference(kept))
    how(model)
    assert kept.calls == 0
