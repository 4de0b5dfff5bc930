"""The cost rule: which form a pair takes, and that every form is the same function wherever it is taken."""

from functools import partial
from unittest import mock

import pytest
import torch
from models import KINDS, LAYOUTS, fused
from torch import nn

from convbn_fx.functional import cost_rule as costs
from convbn_fx.functional import dispatch
from convbn_fx.functional.cost_rule import Costs, Form, cheapest_form
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent, randomize_batchnorms

SIZES = (1, 9, 1_000, 65_535, 65_536, 10**6, 10**9)


def always(form, *_):
    return form


@pytest.mark.usefixtures("real_costs")
@pytest.mark.parametrize("device", [*costs.COSTS, "xpu"])
def test_apart_is_for_outputs_smaller_than_the_weight_alone(device):
    for weight in SIZES:
        for output in SIZES:
            form = cheapest_form(weight, output, device, gamma_trains=True)
            assert (form is Form.FOLDED) == (weight <= output)
            assert cheapest_form(weight, output, device, gamma_trains=False) is not Form.APART


def test_both_constants_count(monkeypatch):
    monkeypatch.setitem(costs.COSTS, "cpu", Costs(fixed=100, weight_per_output=4.0))
    rule = partial(cheapest_form, device_type="cpu", gamma_trains=True)
    assert [rule(400, output) for output in (99, 100, 399, 400)] == [
        Form.APART,
        Form.SCALED,
        Form.SCALED,
        Form.FOLDED,
    ]
    assert rule(401, 100) is Form.APART


@pytest.mark.usefixtures("plain_operations")  # the operator in C++ decides for itself
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("layer", [*KINDS, *LAYOUTS])
def test_every_form_is_the_same_function(layer, form):
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model()
    graph_module = fused(model)
    with mock.patch.object(dispatch, "cheapest_form", partial(always, form)):
        assert_equivalent(model, graph_module, layer.input())


@pytest.mark.usefixtures("real_costs")
@pytest.mark.parametrize("size", [1, 2, 7, 28])
@pytest.mark.parametrize("channels", [4, 64])
def test_an_output_larger_than_its_weight_is_never_saved(channels, size):
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    graph_module = fused(randomize_batchnorms(model.eval()))
    x = torch.randn(2, channels, size, size)
    saved = saved_bytes(graph_module, x)
    if x.numel() >= model[0].weight.numel():
        assert saved == x.nbytes
    assert saved <= saved_bytes(model, x)
