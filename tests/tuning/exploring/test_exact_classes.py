"""Forwards that ask for the exact class of a module or tensor, which a tuned model's classes are not."""

import functools

import pytest
import torch
from models import Pair, data, prepared, reasons, tuned_with
from torch import Tensor, nn

from convbn_fx import deploy, report, tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)
KNOWN = {nn.BatchNorm2d: 2.0, nn.BatchNorm1d: 3.0}


def of_the_norm(m, x):
    return m.norm(m.conv(x)) * (2 if type(m.norm) is nn.BatchNorm2d else 3)


def by_the_attribute(m, x):
    return m.norm(m.conv(x)) * sum(child.__class__ in (nn.Conv2d, nn.Linear) for child in m.children())


def in_a_table(m, x):
    return m.norm(m.conv(x)) * KNOWN.get(type(m.norm), 1.0)


def of_itself(m, x):
    return m.norm(m.conv(x)) * (2 if type(m).__mro__[1] is Pair else 3)


def kept_in_a_variable(m, x):
    cls = type(m.norm)
    return m.norm(m.conv(x)) * (2 if cls == nn.BatchNorm2d else 3)


def is_plain(module):
    return type(module) in {nn.BatchNorm2d, nn.Conv2d}


def in_a_helper(m, x):
    return m.norm(m.conv(x)) * (2 if is_plain(m.norm) else 3)


def of_the_output(m, x):
    y = m.conv(x)
    if type(y) is Tensor:
        y = y.add(0)
    return m.norm(y)


def in_two_steps(m, x):
    y = m.conv(x)
    return m.norm(y) * (2 if nn.Conv2d is type(m.conv) else 3)


def decorated(forward):
    @functools.wraps(forward)
    def doubled(m, x):
        return forward(m, x) * 2

    return doubled


ASKING = [of_the_norm, by_the_attribute, in_a_table, kept_in_a_variable, in_a_helper, of_the_output]
ASKING += [of_itself, decorated(in_two_steps)]


def built(forward, **methods):
    return prepared(type("Built", (Pair,), {"forward": forward} | methods)())


@pytest.mark.parametrize("forward", ASKING, ids=lambda forward: forward.__name__)
def test_pairs_stay_where_exact_classes_are_asked_for(forward):
    model = built(forward)
    tuned = tuned_with(model, 0)
    if forward is not of_the_output:
        assert reasons(tuned) == {"norm": "CLASS_ASKED_FOR"}
        assert "asks: " in report(tuned).skipped[0].detail
    assert_equivalent(model, tuned, X)
    torch.testing.assert_close(deploy(model)(X), model(X))


def test_train_may_ask_as_well():
    def train(m, mode=True):
        nn.Module.train(m, mode)
        for child in m.children():
            if type(child) is nn.BatchNorm2d:
                child.eval()
        return m

    model = built(lambda m, x: m.norm(m.conv(x)), train=train)
    assert reasons(tune(model)) == {"norm": "CLASS_ASKED_FOR"}
    assert not tune(model).train().norm.training


def test_only_what_the_code_can_look_at_stays():
    model = nn.Sequential(built(of_the_norm), prepared(Pair(nn.Conv2d(4, 4, 3))))
    tuned = tuned_with(model, 1)
    assert reasons(tuned) == {"0.norm": "CLASS_ASKED_FOR"}
    assert_equivalent(model, tuned, X)


def test_what_it_can_look_at_need_not_be_registered():
    """A question about a convolution in a tuple; the pair that it is in belongs to another module."""
    asking, running = built(of_the_norm), prepared(Pair())
    asking.norm = nn.Identity()
    asking.norms = (running.norm,)
    type(asking).forward = lambda m, x: x + (type(m.norms[0]) is nn.BatchNorm2d)
    model = nn.Sequential(running, asking)
    assert_equivalent(model, tuned_with(model, 0), X)


def named(m, x):
    y = m.norm(m.conv(x))
    assert m.__class__.__name__ == "Built"
    return y * len(f"{type(m.conv)}") * len(type(m.norm).__qualname__)


def of_something_else(m, x):
    if type(x) in (tuple, list) or x.__class__ is dict:
        x = x[0]
    return m.norm(m.conv(x)) * sum(type(child) is nn.Linear for child in m.children())


def in_a_message(m, x):
    if x.dim() != 4:
        raise TypeError("not for this class", type(x))
    return m.norm(m.conv(x))


def of_its_own_kind(m, x):
    return m.norm(m.conv(x)) * type(m).factor * issubclass(type(m), Pair) * isinstance(m.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "forward", [named, of_something_else, in_a_message, of_its_own_kind], ids=lambda forward: forward.__name__
)
def test_what_makes_no_difference_is_no_obstacle(forward):
    model = built(forward, factor=2.0)
    tuned = tuned_with(model, 1)
    assert_equivalent(model, tuned, X)


def test_what_no_call_leads_to_is_no_obstacle():
    def initialize(m):
        return [nn.init.ones_(child.weight) for child in m.children() if type(child) is nn.Conv2d]

    tuned_with(built(lambda m, x: m.norm(m.conv(x)), initialize=initialize), 1)
