"""A tuned model is what it was: its class, its attributes, its modules wherever an attribute holds them."""

import inspect
from types import MethodType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from blocks import WAYS, ByReference
from models import Functional, Net, Pair, conv_norm, data, net, pair, prepared, runs_fused, tuned_with
from torch import nn

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")


# --- The model stays itself ---------------------------------------------------------------------------------------


REGISTER = {}


class Registered(nn.Module):
    """Keeps a register of its subclasses, each with a keyword of its own."""

    def __init_subclass__(cls, *, alias, **kwargs):
        super().__init_subclass__(**kwargs)
        assert alias not in REGISTER
        REGISTER[alias] = cls


class Named(Registered, alias="named"):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv_norm()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Convolves."""
        return self.norm(self.conv(x)) * scale


def test_a_class_that_registers_its_subclasses():
    model = prepared(Named())
    tuned = tuned_with(model, 1)
    assert REGISTER == {"named": Named}
    assert_equivalent(model, tuned, X)


class Rich(nn.Module):
    """Has a little of everything that classes have."""

    kind = "rich"
    __slots__ = ("slot",)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv_norm()
        self.default_cfg = {"first_conv": "conv", "classifier": ["head"]}
        self.grad_checkpointing = False
        self.slot = 3

    @property
    def channels(self):
        return self.conv.out_channels

    @classmethod
    def make(cls):
        return cls()

    @staticmethod
    def twice(x):
        return 2 * x

    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Convolves."""
        return self.twice(self.norm(self.conv(x))) * scale + self.slot

    def extra_repr(self):
        return f"kind={self.kind}"


def test_class_and_attributes():
    model = prepared(Rich())
    tuned = tuned_with(model, 1)
    assert isinstance(tuned, Rich)
    assert isinstance(tuned.conv, nn.Conv2d)
    assert isinstance(tuned.norm, nn.BatchNorm2d)
    for m, t in zip(model.modules(), tuned.modules(), strict=True):
        assert (type(t).__name__, type(t).__module__, type(t).__doc__) == (
            type(m).__name__,
            type(m).__module__,
            type(m).__doc__,
        )
    assert repr(tuned) == repr(model)
    assert inspect.signature(tuned.forward) == inspect.signature(model.forward)
    assert tuned.forward.__doc__ == "Convolves."
    assert tuned.default_cfg == model.default_cfg
    assert (tuned.channels, tuned.kind, tuned.twice(2), tuned.slot) == (4, "rich", 4, 3)
    assert set(dir(model)) <= set(dir(tuned))
    assert_equivalent(model, tuned, X)
    tuned.set_grad_checkpointing()
    assert (tuned.grad_checkpointing, model.grad_checkpointing) == (True, False)
    assert isinstance(type(tuned).make(), Rich)
    assert_equivalent(model, tuned, X, 2.0)


@pytest.mark.parametrize("way", WAYS)
def test_references_lead_to_the_copies(way):
    model = prepared(ByReference(way))
    tuned = tune(model)
    assert_equivalent(model, tuned, X)
    tuned.drop.train()
    model.drop.train()
    assert_equivalent(model, tuned, X)
    model.drop.eval()
    assert not torch.equal(tuned(X), model(X))
    if way != "bound method":
        seen = []
        tuned.conv.register_forward_hook(lambda *_: seen.append(1))
        tuned(X)
        assert seen == [1]


@pytest.mark.parametrize("kind", ["method", "closure"])
def test_a_patched_forward(kind):
    model = prepared(Net())
    original = model.block.forward
    model.block.forward = {
        "method": MethodType(lambda self, x: type(self).forward(self, x) * 2, model.block),
        "closure": lambda x: original(x) * 2,
    }[kind]
    tuned = tune(model)
    assert_equivalent(model, tuned, X)
    tuned.block.first.norm.train()
    model.block.first.norm.train()
    assert_equivalent(model, tuned, X)
    model.block.first.norm.eval()
    assert not torch.allclose(tuned(X), model(X))


def test_the_report_of_a_patched_owner_is_true():
    model = pair()
    model.forward = MethodType(lambda self, x: self.norm(self.conv(x).sin()), model)
    tuned = tune(model)
    assert_equivalent(model, tuned, X)
    assert bool(report(tuned).fused) == runs_fused(model, tuned)


def test_feature_extraction_by_hooks():
    model = net()
    tuned = tune(model)
    features = {}
    for name in ("stem", "block.first", "block"):
        tuned.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: features.update({name: output})
        )
    tuned(X)
    assert {type(feature) for feature in features.values()} == {torch.Tensor}
    torch.testing.assert_close(features["stem"], model.stem(X))
    assert runs_fused(model, tuned)


# --- Modules in containers ----------------------------------------------------------------------------------------


class Layers(NamedTuple):
    conv: nn.Module
    norm: nn.Module


def in_a_namedtuple(model):
    model.layers = Layers(model.conv, model.norm)
    return lambda self, x: self.layers.norm(self.layers.conv(x))


def in_a_list_of_an_object(model):
    model.box = SimpleNamespace(layers=[model.conv, model.norm])
    return lambda self, x: self.box.layers[1](self.box.layers[0](x))


def in_a_list_that_a_function_closes_over(model):
    layers = [model.conv, model.norm]
    model.run = lambda x: layers[1](layers[0](x))
    return lambda self, x: self.run(x)


def with_defaults(model):
    layers = [lambda x, layer=layer: layer(x) for layer in (model.conv, model.norm)]
    model.layers = layers
    return lambda self, x: self.layers[1](self.layers[0](x))


class Registry(dict):
    """A container of a class of its own."""


def in_a_registry(model):
    model.registry = Registry(conv=model.conv, norm=model.norm)
    return lambda self, x: self.registry["norm"](self.registry["conv"](x))


HOLDERS = (
    in_a_namedtuple,
    in_a_list_of_an_object,
    in_a_list_that_a_function_closes_over,
    with_defaults,
    in_a_registry,
)


@pytest.mark.parametrize("held", HOLDERS)
def test_modules_are_found_wherever_an_attribute_holds_them(held):
    model = prepared(Pair())
    forward = held(model)
    model.__class__ = type("Holding", (Pair,), {"forward": forward})
    tuned = tuned_with(model, 1)
    x = data(2, 3, 6, 6)
    assert saved_bytes(tuned, x) < saved_bytes(model, x)
    for training in (False, True, False):
        assert_equivalent(model.train(training), tuned.train(training), x)


def test_a_forward_that_is_replaced_on_its_class():
    class Own(Pair):
        def forward(self, x):
            return self.norm(self.conv(x))

    model = prepared(Own())
    tuned = tuned_with(model, 1)
    Own.forward = lambda self, x: 2 * self.norm(self.conv(x)).sin()
    for each in (tuned, tune(model)):
        assert_equivalent(model, each, X)
        assert runs_fused(model, each)


def test_replicas_run_as_they_are():
    tuned = tune(prepared(Pair()).float())
    replica = tuned._replicate_for_data_parallel()
    replica.conv, replica.norm = (child._replicate_for_data_parallel() for child in (tuned.conv, tuned.norm))
    for child, original in ((replica.conv, tuned.conv), (replica.norm, tuned.norm)):
        for name, tensor in (original._parameters | original._buffers).items():
            setattr(child, name, tensor.to("meta"))  # another device
    assert replica(torch.empty(2, 3, 6, 6, device="meta")).is_meta


def test_a_block_is_compiled_by_itself_where_functions_are_pairs():
    class Own(Functional):
        def __init__(self):
            super().__init__(None, (4, 3, 3, 3), 4)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())

        def forward(self, x):
            return self.block(self.normalize(torch.nn.functional.conv2d(x, self.weight, self.bias)))

    torch.manual_seed(0)
    model = Own().double()
    tuned = tuned_with(model, 1)
    torch._dynamo.reset()
    tuned.block.compile(backend="eager", fullgraph=True)
    assert_equivalent(model, tuned, X)
