"""A copy that shares tensors with its original: what leads to its modules leads to the copy's."""

import copy
import functools
import gc
import inspect
import threading
import weakref
from types import MethodType, SimpleNamespace

import pytest
import torch
from models import Pair, data, net, prepared, tuned_with
from torch import nn

from convbn_fx import tune
from convbn_fx.testing import assert_equivalent
from convbn_fx.tuning.cloning import clone

X = data(2, 3, 6, 6)


def pair():
    return prepared(Pair(nn.Conv2d(3, 4, 3, padding=1)))


# --- Tensors are shared, dictionaries are not ---------------------------------------------------------------------


def without_statistics(model):
    model.norm.running_mean = model.norm.running_var = None


STATE = {
    "no statistics": without_statistics,
    "another buffer": lambda m: setattr(m.norm, "running_mean", torch.ones(4, dtype=torch.float64)),
    "a new buffer": lambda m: m.norm.register_buffer("extra", torch.ones(1)),
    "no buffer": lambda m: delattr(m.norm, "num_batches_tracked"),
    "assigned": lambda m: m.load_state_dict(
        {name: torch.ones_like(value) for name, value in m.state_dict().items()}, assign=True
    ),
    "meta": lambda m: m.to("meta"),
    "no parameter": lambda m: setattr(m.norm, "weight", None),
}


@pytest.mark.parametrize("changed", ["original", "tuned"])
@pytest.mark.parametrize("change", STATE)
def test_a_tensor_that_is_replaced_in_one_stays_in_the_other(change, changed):
    original = pair()
    tuned = tuned_with(original, 1)
    one, other = (original, tuned) if changed == "original" else (tuned, original)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in other.state_dict(keep_vars=True).items()}
    expected = other(X).detach()
    STATE[change](one)
    after = {name: (id(tensor), tensor) for name, tensor in other.state_dict(keep_vars=True).items()}
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(other(X), expected)


@pytest.mark.parametrize("changed", ["original", "tuned"])
def test_what_changes_in_place_shows_in_both(changed):
    original = pair()
    tuned = tuned_with(original, 1)
    one, other = (original, tuned) if changed == "original" else (tuned, original)
    one.train()(X).sum().backward()
    assert other.norm.num_batches_tracked == 1
    torch.testing.assert_close(other.norm.running_mean, one.norm.running_mean)
    assert other.conv.weight.grad is one.conv.weight.grad
    one.load_state_dict(pair().state_dict())
    assert other.norm.num_batches_tracked == 0
    assert_equivalent(original.eval(), tuned.eval(), X)


@pytest.mark.parametrize("moved", ["original", "tuned"])
def test_parameters_move_in_both_and_buffers_in_the_one_that_is_moved(moved):
    original = pair()
    tuned = tuned_with(original, 1)
    one, other = (original, tuned) if moved == "original" else (tuned, original)
    one.float()
    assert one.conv.weight is other.conv.weight
    assert other.conv.weight.dtype is torch.float32
    assert (one.norm.running_mean.dtype, other.norm.running_mean.dtype) == (torch.float32, torch.float64)
    other.float()  # the same for the other, and all is well
    assert_equivalent(original, tuned, X.float(), atol=1e-5, rtol=1e-4)


# --- References lead to the copies --------------------------------------------------------------------------------


class Hooked(nn.Module):
    """Keeps its pair's output, by a hook that gets hold of the module in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.pair = Pair(nn.Conv2d(3, 4, 3, padding=1))
        self.kept = {}
        self.pair.register_forward_hook(way(self))

    def keep(self, module, args, output):
        self.kept["pair"] = output

    def forward(self, x):
        self.kept.clear()
        self.pair(x)
        return self.kept.get("pair")


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Keeper:
    def __init__(self, model):
        self.model = model

    def __call__(self, *args):
        self.model.keep(*args)


class SlottedKeeper:
    __slots__ = ("keep",)

    def __init__(self, model):
        self.keep = model.keep

    def __call__(self, *args):
        self.keep(*args)


class Deaf(SlottedKeeper):
    """Holds what cannot be copied, too."""

    __slots__ = ("lock",)

    def __init__(self, model):
        super().__init__(model)
        self.lock = threading.Lock()


def by_proxy(model):
    return functools.partial(Hooked.keep, weakref.proxy(model))


def by_a_weak_method(model):
    method = weakref.WeakMethod(model.keep)
    return lambda *args: method()(*args)  # noqa: PLW0108 - not before it is called


def by_a_dictionary_alone(model):
    kept = model.kept
    return lambda module, args, output: kept.update(pair=output)


def by_a_builtin_method(model):
    update = model.kept.update
    return lambda module, args, output: update(pair=output)


def by_itself(model):
    def hook(*args, again=True):
        return hook(*args, again=False) if again else model.keep(*args)

    return hook


def by_an_attribute(model):
    def hook(*args):
        hook.model.keep(*args)

    hook.model = model
    return hook


def by_an_object_of_objects(model):
    box = SimpleNamespace(boxes=[SimpleNamespace(models={"model": (model,)})])
    return lambda *args: box.boxes[0].models["model"][0].keep(*args)  # noqa: PLW0108 - not before it is called


HOOKS = {
    "wrapped": lambda model: decorated(model.keep),
    "wrapped closure": lambda model: decorated(lambda *args: model.keep(*args[:3])),
    "wrapped twice": lambda model: decorated(decorated(model.keep)),
    "partial of a wrapped one": lambda model: functools.partial(decorated(Hooked.keep), model),
    "keyword of a partial": lambda model: functools.partial(lambda *args, to: to.keep(*args), to=model),
    "callable object": Keeper,
    "callable object with slots": SlottedKeeper,
    "callable object with a lock": Deaf,
    "callable object in a partial": lambda model: functools.partial(Keeper(model)),
    "method of an object": lambda model: Keeper(model).__call__,
    "method of a function": lambda model: MethodType(lambda self, *args: model.keep(*args), model),
    **{
        way.__name__.replace("_", " "): way
        for way in (
            *(
                by_proxy,
                by_a_weak_method,
                by_a_dictionary_alone,
                by_a_builtin_method,
                by_itself,
                by_an_attribute,
            ),
            by_an_object_of_objects,
        )
    },
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("way", HOOKS)
def test_a_hook_writes_on_the_copy(way, times):
    original = prepared(Hooked(HOOKS[way]))
    tuned = original
    for _ in range(times):
        tuned = tuned_with(tuned, 1)
    (hook,) = tuned.pair._forward_hooks.values()
    if hasattr(hook, "__wrapped__"):
        assert hook.__wrapped__ is not next(iter(original.pair._forward_hooks.values())).__wrapped__
    original(X)
    kept = original.kept["pair"]
    tuned(X)
    assert original.kept["pair"] is kept
    assert tuned.kept["pair"] is not kept
    assert_equivalent(original, tuned, X)
    tuned.kept.clear()
    original(X)
    assert not tuned.kept


def test_a_hook_goes_on_writing_to_what_is_no_part_of_the_model():
    original, seen = pair(), []
    original.norm.register_forward_hook(lambda *_: seen.append(1))
    tuned_with(original, 1)(X)
    assert seen == [1]


class Child(nn.Module):
    """Knows its parent, which is no child of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.parent.factor


class Parent(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.child = Child()
        self.factor = 1.0
        self.child.__dict__["parent"] = way(self)

    def forward(self, x):
        return self.child(x)


@pytest.mark.parametrize("way", [weakref.proxy, lambda parent: parent], ids=["proxy", "strong"])
def test_a_child_that_knows_its_parent(way):
    original = prepared(Parent(way))
    tuned = tuned_with(original, 1)
    original.factor = 2.0
    assert_equivalent(original, tuned_with(original, 1), X)
    torch.testing.assert_close(tuned(X) * 2, original(X))
    part = tune(original.child)  # around which the parent stays
    original.factor = 3.0
    torch.testing.assert_close(part(X), original.child(X))


@pytest.mark.parametrize("reference", [weakref.proxy, weakref.ref, lambda m: weakref.WeakSet([m])])
def test_a_dead_reference(reference):
    original, other = pair(), nn.Linear(1, 1)
    vars(original)["gone"] = reference(other)  # registered, a proxy is a child
    original.boxed = [original.gone]
    del other
    gc.collect()
    tuned = tuned_with(original, 1)
    assert type(vars(tuned)["gone"]) is type(vars(original)["gone"])
    torch.testing.assert_close(tuned(X), original(X))


@pytest.mark.parametrize(
    "hold",
    [
        lambda parts: weakref.WeakValueDictionary(enumerate(parts)),
        lambda parts: weakref.WeakKeyDictionary((part, index) for index, part in enumerate(parts)),
        weakref.WeakSet,
        lambda parts: [weakref.proxy(part) for part in parts],
        frozenset,
        lambda parts: (part for part in parts),
    ],
    ids=["weak values", "weak keys", "weak set", "proxies", "frozen set", "generator"],
)
def test_containers_of_modules(hold):
    original = pair()
    original.parts = hold([original.conv, original.norm])
    tuned = tuned_with(original, 1)
    if inspect.isgenerator(original.parts):
        assert tuned.parts is original.parts  # there is no copying it
        return
    values = getattr(tuned.parts, "values", lambda: tuned.parts)()
    found = list(tuned.parts) if isinstance(tuned.parts, weakref.WeakKeyDictionary) else list(values)
    assert {part._get_name() for part in found} == {"Conv2d", "BatchNorm2d"}
    tuned.norm.eps = tuned.conv.eps = 0.25
    assert all(part.eps == 0.25 for part in found)
    assert original.norm.eps != 0.25


def test_a_module_that_is_registered_nowhere():
    """It leads to modules that are; one that does not is shared."""

    class Runner(nn.Module):
        def __init__(self, conv, norm):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x):
            return self.norm(self.conv(x))

    class Running(Pair):
        def forward(self, x):
            return self.runner[0](x) + self.teacher[0](x)

    original = Running(nn.Conv2d(3, 4, 3, padding=1))
    original.runner, original.teacher = (
        [Runner(original.conv, original.norm)],
        [nn.Conv2d(3, 4, 3, padding=1)],
    )
    original.teacher[0].double()
    prepared(original)
    tuned = clone(original)
    assert tuned.runner[0].conv is tuned.conv
    assert tuned.teacher[0] is original.teacher[0]
    assert_equivalent(original, tune(original), X)


def test_what_leads_to_no_module_is_shared():
    original = pair()
    sentinel, lock = object(), threading.Lock()
    original.sentinel, original.lock, original.plain = sentinel, lock, torch.ones(2)
    original.settings = SimpleNamespace(values=[1])
    original.holder = SimpleNamespace(model=original, lock=lock, sentinel=sentinel, tensor=original.plain)
    original.generator = torch.Generator()
    tuned = tune(original)
    for name in ("sentinel", "lock", "plain", "settings", "generator"):
        assert getattr(tuned, name) is getattr(original, name)
    assert tuned.holder.model is tuned
    assert tuned.holder.lock is lock
    assert tuned.holder.sentinel is sentinel
    assert tuned.holder.tensor is original.plain


def test_two_references_to_one_object_stay_so():
    original = pair()
    original.box = SimpleNamespace(model=original)
    original.boxes = [original.box, original.box]
    original.norm.box = original.box
    tuned = tune(original)
    assert tuned.boxes[0] is tuned.boxes[1] is tuned.box is tuned.norm.box
    assert tuned.box.model is tuned


def test_functions_that_share_a_variable_go_on_sharing_it():
    original = pair()

    def use(module):
        nonlocal used
        used = module

    used = original
    original.use, original.used = use, lambda: used
    tuned = tune(original)
    assert tuned.used() is tuned
    tuned.use(None)
    assert tuned.used() is None
    assert original.used() is original


def test_copies_of_a_large_model_take_no_longer_than_its_modules():
    model = nn.Sequential(*(net() for _ in range(30)))
    model.names = {str(number): number for number in range(100_000)}
    assert len(clone(model).names) == 100_000
    assert copy.deepcopy(clone(model)).names == model.names
