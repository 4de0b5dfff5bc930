"""The caller's model is left as found, whatever its forward does; and the two do not see each other's changes."""

from types import SimpleNamespace

import pytest
import torch
from blocks import Chain, ConvLast, NormFirst
from models import Net, Pair, data, modes, net, pair, prepared, snapshot, tuned_with
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from convbn_fx import tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.log = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.log.append(x)
        self.latest = self.pair(x)
        raise LookupError("as always")


@pytest.mark.parametrize(
    "model", [net(), pair(), prepared(Raising()), prepared(Chain(ConvLast(), NormFirst()))]
)
def test_the_callers_model_is_left_as_found(model):
    before = snapshot(model)
    for options in ({}, {"norm_eval": True}, {"include_training": True}, {"modules": []}):
        tune(model, **options)
        assert snapshot(model) == before


def test_a_forward_that_raises():
    model = prepared(Raising())
    tuned = tuned_with(model, 1)
    with pytest.raises(LookupError, match="as always"):
        assert_equivalent(model, tuned, X)
    assert not hasattr(tuned, "latest") or type(tuned.latest) is torch.Tensor


def momentum_through_data(m):
    for slow, fast in zip(m.slow.parameters(), m.fast.parameters(), strict=True):
        slow.data = slow.data * 0.5 + fast.data * 0.5


def momentum_in_place(m):
    with torch.no_grad():
        for slow, fast in zip(m.slow.parameters(), m.fast.parameters(), strict=True):
            slow.mul_(0.5).add_(fast, alpha=0.5)


def momentum_by_state_dict(m):
    state = m.fast.state_dict()
    m.slow.load_state_dict({key: value * 0.5 for key, value in state.items()})


def statistics_decay(m):
    for buffer in m.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.5)


def counted_in_a_list(m):
    m.counters[0].add_(1)


def counted_in_buffers(m):
    m._buffers["count"].add_(1)


def weights_decay_by_apply(m):
    with torch.no_grad():
        m.apply(lambda part: part.weight.mul_(0.5) if isinstance(part, nn.Conv2d) else None)


UPDATES = [
    momentum_through_data,
    momentum_in_place,
    momentum_by_state_dict,
    statistics_decay,
    counted_in_a_list,
    counted_in_buffers,
    weights_decay_by_apply,
]


class Momentum(nn.Module):
    """As MoCo: a second encoder follows the first, at every call."""

    def __init__(self, update):
        super().__init__()
        self.fast, self.slow = Pair(), Pair()
        self.slow.requires_grad_(False)
        self.counters = [torch.zeros(())]
        self.register_buffer("count", torch.zeros(()))
        self.update = update

    def forward(self, x):
        self.update(self)
        return self.fast(x), self.slow(x)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_exploring_updates_no_tensor(update):
    model = prepared(Momentum(update))
    values = [t.clone() for t in (*model.parameters(), *model.buffers(), *model.counters)]
    storages = [p.data_ptr() for p in model.parameters()]
    tune(model)
    torch.testing.assert_close([*model.parameters(), *model.buffers(), *model.counters], values)
    assert [p.data_ptr() for p in model.parameters()] == storages


class Journal(nn.Module):
    """Keeps what it sees wherever one can."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.nested = {"seen": []}
        self.object = SimpleNamespace(seen=[], count=0)

    def forward(self, x):
        self.nested["seen"].append(x)
        self.object.seen.append(x)
        self.object.count += 1
        return self.pair(x)


def test_exploring_leaves_no_trace():
    model = prepared(Journal())
    tuned = tune(model)
    for m in (model, tuned):
        assert m.nested == {"seen": []}


def test_modes_are_independent():
    model = net()
    tuned = tune(model)
    tuned.train()
    assert not any(modes(model).values())
    tuned.eval()
    model.train()
    assert not any(modes(tuned).values())


CHANGES = {
    "attribute": lambda m: setattr(m.stem.conv, "padding", (0, 0)),
    "child": lambda m: m.add_module("extra", nn.ReLU()),
    "deleted child": lambda m: delattr(m, "unused"),
    "weight norm": lambda m: nn.utils.weight_norm(m.stem.conv),
    "parametrization": lambda m: parametrizations.weight_norm(m.stem.conv),
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    "assign": lambda m: m.load_state_dict(prepared(Net()).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changed", ["model", "tuned"])
def test_what_is_changed_on_one_does_not_break_the_other(change, changed):
    model = net()
    tuned = tune(model)
    expected, keys = model(X).detach(), list(model.state_dict())
    one, two = (model, tuned) if changed == "model" else (tuned, model)
    torch.manual_seed(5)
    CHANGES[change](one)
    assert list(two.state_dict()) == keys
    torch.testing.assert_close(two(X), expected)


@pytest.mark.parametrize("part", ["stem.conv", "head"])
def test_parametrizations_removed_from_one(part):
    model = net()
    for name in ("stem.conv", "head"):
        parametrizations.weight_norm(model.get_submodule(name))
    tuned = tune(model)
    expected = model(X).detach()
    parametrize.remove_parametrizations(tuned.get_submodule(part), "weight")
    torch.testing.assert_close(tuned(X), expected)
    torch.testing.assert_close(model(X), expected)
