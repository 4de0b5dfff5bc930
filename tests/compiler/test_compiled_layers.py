"""Layers that are shared, hooked, computed or of classes of their own, compiled."""

import pytest
import torch
from compiled import INNER, compiled, pairs, skips
from models import Pair, data, net, prepared
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations

from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    # Dynamo looks at .grad of every input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def shared_convolution(m, x):
    return m.norm(m.conv(x)) + m.other(m.conv(-x))


def pair_run_twice(m, x):
    return m.norm(m.conv(x)) + m.norm(m.conv(-x))


def one_convolution_into_two_norms(m, x):
    y = m.conv(x)
    return m.norm(y) + m.other(y)


def called_once_with_norm_and_once_bare(m, x):
    return m.norm(m.conv(x)) + m.conv(-x)


def norm_twice_in_a_row(m, x):
    return m.norm(m.norm(m.conv(x)))


def output_returned_as_well(m, x):
    y = m.conv(x)
    return {"features": y, "normalised": m.norm(y)}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "forward",
    [
        shared_convolution,
        pair_run_twice,
        one_convolution_into_two_norms,
        called_once_with_norm_and_once_bare,
        norm_twice_in_a_row,
        output_returned_as_well,
    ],
)
def test_sharing(forward, inner):
    model = Pair(forward=forward)
    model.other = nn.BatchNorm2d(4)
    prepared(model)
    candidate = compiled(model, inner, fullgraph=True)
    assert_equivalent(model, candidate, X)
    called = {"norm", "other"} if "other" in forward.__code__.co_names else {"norm"}
    told = {name for _, name in pairs(candidate)} | {name for name, _ in skips(candidate)}
    assert told == called


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("where", ["conv", "norm"])
@pytest.mark.parametrize("before", [True, False])
def test_forward_hooks(where, before, inner):
    model = prepared(Pair())
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output.sin()

    def pre_hook(module, args):
        return (args[0] * 2,)

    if before:
        model.get_submodule(where).register_forward_hook(hook)
    candidate = compiled(model, inner)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # by default Dynamo does not look again
        assert_equivalent(model, candidate, X)
        if not before:
            model.get_submodule(where).register_forward_hook(hook)
            assert_equivalent(model, candidate, X)
        model.get_submodule(where).register_forward_pre_hook(pre_hook)
        assert_equivalent(model, candidate, X)
    calls.clear()
    candidate(X)
    assert calls == [1]


def test_hooks_that_read_and_leave():
    """A hook that keeps the convolution's output gets the convolution's output."""
    model = prepared(Pair())
    seen = []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    candidate = compiled(model)
    candidate(X)
    model(X)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "parametrise",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(torch.nn.utils.weight_norm, id="old weight_norm"),
    ],
)
def test_parametrised_convolutions(parametrise, inner):
    model = prepared(Pair(parametrise(nn.Conv2d(3, 4, 3))))
    candidate = compiled(model, inner)
    assert_equivalent(model, candidate, X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert_equivalent(model, candidate, X)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean([1, 2, 3], keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("cls", [Scaled, Standardised])
def test_subclasses_with_a_forward_of_their_own(cls, inner):
    model = prepared(Pair(cls(3, 4, 3)))
    assert_equivalent(model, compiled(model, inner, fullgraph=True), X)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode):
    model = prepared(Pair(nn.Conv2d(3, 4, 3, padding=2, padding_mode=mode)))
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    assert pairs(candidate) == {("conv", "norm")}


NORMS = {
    "affine=False": lambda: nn.BatchNorm2d(4, affine=False),
    "momentum=None": lambda: nn.BatchNorm2d(4, momentum=None),
    "eps=0": lambda: nn.BatchNorm2d(4, eps=0.0),
    "bias=None": lambda: nn.BatchNorm2d(4),
}


@pytest.mark.parametrize("norm", NORMS)
def test_unusual_norms(norm):
    model = prepared(Pair(norm=NORMS[norm]()))
    if norm == "bias=None":
        model.norm.bias = None
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    assert pairs(candidate) == {("conv", "norm")}


def test_per_sample_gradients_compiled():
    model = net()
    names = dict(model.named_parameters())
    parameters = {name: p.detach() for name, p in names.items() if "unused" not in name}

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).sin().sum()

    per_sample = vmap(grad(loss), (None, 0))
    expected = per_sample(parameters, X)
    torch.testing.assert_close(torch.compile(per_sample, backend="convbn")(parameters, X), expected)


def test_double_backward():
    """With the plain inner backend; AOT Autograd has none for any model."""
    model = net()
    candidate = compiled(model)

    def second(run):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), [x, model.stem.norm.weight, model.stem.conv.weight])

    torch.testing.assert_close(second(candidate), second(model))
