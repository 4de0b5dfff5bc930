"""Optional arguments, nested inputs and outputs, control flow."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from models import Pair, data, fused, prepared
from torch import nn

import convbn_fx
from convbn_fx import symbolic_trace, transform
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 5, 5)
Result = namedtuple("Result", ["main", "auxiliary"])


class Optional(Pair):
    def forward(self, x, mask=None, scale=1.0):
        y = self.norm(self.conv(x)) * scale
        return y if mask is None else y * mask


def test_an_optional_argument_that_is_left_out():
    """A proxy is not None: without `concrete_args` the branch for a mask is the one that is traced."""
    model = prepared(Optional())
    graph_module = fused(model, trace=lambda m: symbolic_trace(m, {"mask": None, "scale": 1.0}))
    assert_equivalent(model, graph_module, X)


def test_an_optional_argument_that_is_given():
    model = prepared(Optional())
    graph_module = fused(model)
    mask = data(2, 4, 3, 3, seed=1)
    assert_equivalent(model, graph_module, X, mask, 3.0)
    assert_equivalent(model, graph_module, X, kwargs={"scale": 2.0, "mask": mask})
    assert_equivalent(model, graph_module, X, kwargs={"mask": mask})


def test_concrete_args_are_constants():
    model = prepared(Optional())
    graph_module = fused(model, trace=lambda m: symbolic_trace(m, concrete_args={"mask": None}))
    assert_equivalent(model, graph_module, X, None, 2.0)
    with pytest.raises(AssertionError, match="mask"):
        graph_module(X, data(2, 4, 3, 3))


class TwoInputs(Pair):
    def forward(self, x, /, y, *, factor=2.0):
        return self.norm(self.conv(x + y)) * factor


def test_keyword_only_arguments():
    model = prepared(TwoInputs())
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X, X.sin())
    assert_equivalent(model, graph_module, X, X.sin(), kwargs={"factor": 3.0})
    assert_equivalent(model, graph_module, X, kwargs={"y": X, "factor": 3.0})


class Variadic(Pair):
    def forward(self, *args, **kwargs):
        return self.norm(self.conv(args[0])) * kwargs["scale"]


def test_variadic_arguments():
    model = prepared(Variadic())
    assert_equivalent(model, fused(model), X, kwargs={"scale": 2.0})


class Nested(Pair):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, batch):
        y = self.norm(self.conv(batch["images"][0])) + batch["images"][1]
        return self.returned(y, batch)


OUTPUTS = {
    "tuple": lambda y, batch: (y, y + 1),
    "list": lambda y, batch: [y, [y * 2]],
    "dict": lambda y, batch: {"main": y, "nested": {"inner": (y.sin(),)}},
    "namedtuple": lambda y, batch: Result(y, None),
    "constants": lambda y, batch: (y, 3, "name", None, 1.5, True),
    "an input": lambda y, batch: (y, batch["images"][1]),
    "the same twice": lambda y, batch: (y, y),
    "nothing": lambda y, batch: None,
}


@pytest.mark.parametrize("returned", OUTPUTS)
def test_nested_inputs_and_outputs(returned):
    model = prepared(Nested(OUTPUTS[returned]))
    assert_equivalent(model, fused(model), {"images": [X, data(2, 4, 3, 3, seed=1)], "labels": [1]})


def test_an_ordered_dict_stays_one():
    model = prepared(Nested(lambda y, batch: OrderedDict([("out", y), ("aux", y.mean())])))
    assert_equivalent(model, fused(model), {"images": [X, X[:, :1, :3, :3]]})


def test_an_exported_ordered_dict_of_features():
    """What segmentation backbones return."""
    model = prepared(Nested(lambda y, batch: OrderedDict([("out", y), ("aux", y.mean())])))
    graph_module = fused(
        model, trace=lambda m: torch.export.export(m, ({"images": [X, X[:, :1, :3, :3]]},)).module()
    )
    assert_equivalent(model, graph_module, {"images": [X, X[:, :1, :3, :3]]})


DATA_DEPENDENT = {
    "if": lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else m.conv(x),
    "for": lambda m, x: [m.norm(m.conv(row)) for row in x],
    "while": lambda m, x: m.norm(m.conv(x)) if bool(x.any()) else x,
    "int": lambda m, x: m.norm(m.conv(x)) * int(x[0, 0, 0, 0]),
    "assert": lambda m, x: [x.shape[0] > 1 or (_ for _ in ()).throw(ValueError), m.norm(m.conv(x))][1],
    "len": lambda m, x: m.norm(m.conv(x)) / len(x),
}


@pytest.mark.parametrize("case", DATA_DEPENDENT)
@pytest.mark.parametrize("inner", [False, True])
def test_control_flow_that_depends_on_data(case, inner):
    """The error names the module at fault, and the ways out."""
    pair = Pair(forward=DATA_DEPENDENT[case])
    model = prepared(nn.Sequential(OrderedDict(first=Pair(), second=pair)) if inner else pair)
    with pytest.raises(convbn_fx.TracingError) as raised:
        symbolic_trace(model)
    message = str(raised.value)
    assert type(model).__name__ in message
    assert ("'second'" if inner else "its own forward") in message
    assert raised.value.module == ("second" if inner else None)
    assert "concrete_args" in message
    assert "torch.export" in message
    assert raised.value.__cause__ is not None
    assert isinstance(raised.value, RuntimeError)


def test_control_flow_that_depends_on_the_shape_of_data_can_be_exported():
    model = prepared(Pair(forward=lambda m, x: m.norm(m.conv(x)) if x.shape[0] > 1 else m.conv(x)))
    with pytest.raises(convbn_fx.TracingError):
        symbolic_trace(model)
    graph_module = fused(model, trace=lambda m: torch.export.export(m, (X,)).module())
    assert_equivalent(model, graph_module, X)


def test_a_sub_module_with_control_flow_but_without_batch_norm_is_no_obstacle():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, scale=None):
            x = x.mean([2, 3])
            return self.linear(x) if x.sum() > 0 else self.linear(-x) * (1 if scale is None else scale)

    model = prepared(nn.Sequential(Pair(), Head()))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


def without_gradients(m, x):
    with torch.no_grad():
        y = m.norm(m.conv(x))
    return y * m.scale


def in_inference_mode(m, x):
    with torch.inference_mode():
        y = m.norm(m.conv(x))
    return y.clone() * m.scale


def in_bfloat16(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.norm(m.conv(x))
    return y * m.scale


def in_float32(m, x):
    with torch.autocast("cpu", enabled=False):
        y = m.norm(m.conv(x))
    return y * m.scale


def with_a_random_number(m, x):
    return m.norm(m.conv(x)) * torch.rand(1)


@pytest.mark.parametrize(
    ("forward", "autocast"),
    [
        (without_gradients, False),
        (in_inference_mode, False),
        (in_bfloat16, False),
        (in_float32, True),
        (with_a_random_number, False),
    ],
)
def test_what_a_graph_cannot_hold_is_kept_or_refused(forward, autocast):
    """A frozen backbone under `no_grad` is the common case."""
    model = Pair(forward=forward)
    model.scale = nn.Parameter(torch.ones(1))
    prepared(model, torch.float32)
    try:
        graph_module = fused(model)
    except convbn_fx.TracingError:
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_equivalent(model, graph_module, X.float())


def test_control_flow_on_python_values_is_evaluated():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.pairs = nn.ModuleList(
                Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(depth)
            )

        def forward(self, x):
            features = []
            for index, pair in enumerate(self.pairs):
                x = pair(x) if index % 2 else pair(x).relu()
                features.append(x)
            return features

    model = prepared(Deep(4))
    assert_equivalent(model, fused(model, 4), X)


def test_the_mode_of_a_module_that_is_walked_through_is_baked_in():
    """A limit of every symbolic trace, and documented."""
    model = prepared(Pair(forward=lambda m, x: m.norm(m.conv(x)) * (2 if m.training else 1)))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X)
    assert "self.training" in (symbolic_trace.__doc__ or "")
    model.train()
    model.norm.eval()
    torch.testing.assert_close(2 * graph_module(X), model(X))


def test_exported_graphs_keep_nested_inputs():
    model = prepared(Nested(OUTPUTS["dict"]))
    batch = {"images": [X, data(2, 4, 3, 3, seed=1)]}
    graph_module = fused(model, trace=lambda m: torch.export.export(m, (batch,)).module())
    assert_equivalent(model, graph_module, batch)
    assert transform(graph_module).code == graph_module.code
