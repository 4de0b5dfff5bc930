"""Deploy of convolution classes whose own forward calls the function: it runs on, with baked parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convbn_fx import SkipReason, deploy, report, tune
from convbn_fx.testing import assert_equivalent, randomize_batchnorms


def test_efficientnet_pytorch():
    library = pytest.importorskip("efficientnet_pytorch")
    model = library.EfficientNet.from_name("efficientnet-b0", image_size=64).double().eval()
    randomize_batchnorms(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    tuned, deployed = tune(model), deploy(model)
    assert len(report(tuned).fused) == 49
    assert_equivalent(model, tuned, x)
    assert [pair.is_baked for pair in report(deployed).fused] == [True] * 49
    torch.testing.assert_close(deployed(x), model(x))


class Own(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class AddsItsBias(nn.Conv2d):
    def forward(self, x):
        y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[:, None, None]


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias)


class Counting(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + sum(p.numel() for p in self.parameters()) - self.size


class Summing(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + sum(p.sum() for p in self.parameters())


def built(cls, bias, around=nn.Sequential):
    model = around(cls(3, 4, 3, bias=bias), nn.BatchNorm2d(4)).double().eval()
    model.size = sum(p.numel() for p in model.parameters())
    randomize_batchnorms(model)
    return model


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
def test_the_forward_runs_on(bias):
    model = built(Own, bias)
    deployed = deploy(model)
    assert type(deployed[0]) is Own
    assert type(deployed[1]) is nn.Identity
    torch.testing.assert_close(deployed(X), model(X))


@pytest.mark.parametrize(("cls", "told"), [(Scaled, "weight is computed"), (AddsItsBias, "")])
def test_what_does_more_stays(cls, told):
    model = built(cls, False)
    deployed = deploy(model)
    assert not report(deployed).fused
    (skip,) = report(deployed).skipped
    assert skip.reason in (SkipReason.FUNCTION_CALL, SkipReason.MAY_BE_USED_ELSEWHERE)
    assert told in skip.detail
    torch.testing.assert_close(deployed(X), model(X))


def test_values_of_parameters_that_are_read_as_all():
    model = built(nn.Conv2d, True, Summing)
    deployed = deploy(model)
    assert not report(deployed).fused
    torch.testing.assert_close(deployed(X), model(X))


def test_parameters_that_are_counted():
    model = built(nn.Conv2d, True, Counting)
    torch.testing.assert_close(deploy(model)(X), model(X))


class ChoosingItsWeight(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.other = nn.Parameter(self.weight.detach() + 1)

    def forward(self, x):
        return F.conv2d(x, (self.weight, self.other)[int(x.shape[0]) - 1], self.bias)


class Repeating(nn.Conv2d):
    def forward(self, x):
        for _ in range(int(x.shape[0])):
            x = F.conv2d(x, self.weight, self.bias)
        return x


@pytest.mark.parametrize("conv", [ChoosingItsWeight(3, 4, 3), Repeating(4, 4, 1)])
def test_a_call_that_depends_on_a_guessed_number(conv):
    model = nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), conv, nn.BatchNorm2d(4)).double().eval()
    randomize_batchnorms(model)
    deployed = deploy(model)
    assert not report(deployed).fused
    torch.testing.assert_close(deployed(X), model(X))
