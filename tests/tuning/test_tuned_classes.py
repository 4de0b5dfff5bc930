"""Generated classes: what they leave to the class that they were generated from, and how long they live."""

import gc
import weakref

import pytest
import torch
from models import Pair, data, prepared, tuned_with
from torch import nn

from convbn_fx import tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


class FreezingTrain(Pair):
    def train(self, mode=True, freeze_norm=False):
        super().train(mode)
        self.norm.train(mode and not freeze_norm)
        return (self, "frozen") if freeze_norm else self


@pytest.mark.parametrize(
    "arguments", [{"freeze_norm": True}, {"mode": False}, {"mode": True, "freeze_norm": True}]
)
def test_train_with_arguments_and_a_result_of_its_own(arguments):
    model = prepared(FreezingTrain())
    tuned = tuned_with(model, 1)
    returned = tuned.train(**arguments)
    assert returned == ((tuned, "frozen") if arguments.get("freeze_norm") else tuned)
    model.train(**arguments)
    assert tuned.norm.training == model.norm.training
    assert_equivalent(model, tuned, X)


class StaticBody(Pair):
    @staticmethod
    def body(module, x):
        return module.norm(module.conv(x))

    def forward(self, x):
        return self.body(self, x)


class ClassBody(Pair):
    @classmethod
    def body(cls, module, x):
        assert issubclass(cls, ClassBody)
        return module.norm(module.conv(x))

    def forward(self, x):
        return type(self).body(self, x)


@pytest.mark.parametrize("cls", [StaticBody, ClassBody])
def test_a_static_method_or_class_method_that_runs_the_pair(cls):
    model = prepared(cls())
    tuned = tuned_with(model, 1)
    assert_equivalent(model, tuned, X)
    torch.testing.assert_close(tuned.body(tuned, X), model.body(model, X))


def test_classes_live_as_long_as_their_models():
    def use():
        class Conv(nn.Conv2d):
            pass

        class Norm(nn.BatchNorm2d):
            def forward(self, input):
                return super().forward(input)

        class Model(Pair):
            def forward(self, x):
                return super().forward(x)

        for norm in (nn.BatchNorm2d(4), Norm(4)):
            tune(prepared(Model(Conv(3, 4, 3), norm)))(X)
        return [weakref.ref(cls) for cls in (Conv, Norm, Model)]

    references = use()
    for _ in range(2):  # a generated class goes first, and then what it was generated from
        gc.collect()
    assert [reference() for reference in references] == [None, None, None]
