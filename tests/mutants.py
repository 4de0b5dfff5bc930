"""Wrong versions of the arithmetic, and the check that has to notice each of them.

A mutant is an edit: in the code of one function, as `ast.unparse` spells it, one expression becomes another. An edit
that no longer applies, because the function has changed, says so; give it the new spelling then.
"""

import ast
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

import convbn_fx
from convbn_fx.testing import assert_equivalent, randomize_batchnorms


@dataclass(frozen=True)
class Mutant:
    """A function of the package, named from there, with `old` replaced by `new`."""

    name: str
    function: str
    old: str
    new: str

    def install(self, monkeypatch):
        """Puts the wrong function in the place of the right one, in every file that imported it."""
        path, _, name = self.function.rpartition(".")
        scope = pkgutil.resolve_name(f"convbn_fx.{path}")
        owner = inspect.isclass(scope)
        module = sys.modules[scope.__module__] if owner else scope
        right = getattr(scope, name)
        tree = ast.parse(textwrap.dedent(inspect.getsource(right)))
        (definition,) = tree.body
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
        source = ast.unparse(tree)
        if source.count(self.old) != 1:
            raise LookupError(f"mutant {self.name!r}: {self.old!r} is not once in {self.function}:\n{source}")
        made = {}
        exec(source.replace(self.old, self.new), vars(module), made)
        if owner:
            monkeypatch.setattr(scope, name, made[name])
            return
        for importer in [module for path, module in sys.modules.items() if path.startswith("convbn_fx.")]:
            if getattr(importer, name, None) is right:
                monkeypatch.setattr(importer, name, made[name])


MUTANTS = [
    Mutant(
        "mean ignored",
        "functional.arithmetic.plus_centred",
        "at_least_float32(running_mean)",
        "0 * running_mean",
    ),
    Mutant(
        "variance ignored",
        "functional.arithmetic.inverse_deviation",
        "at_least_float32(running_var)",
        "at_least_float32(running_var) ** 0",
    ),
    Mutant(
        "eps 0",
        "functional.arithmetic.inverse_deviation",
        "(_kept(eps, variance.dtype) if is_eager(variance) else eps)",
        "0",
    ),
    Mutant("no square root", "functional.arithmetic.inverse_deviation", "rsqrt", "reciprocal"),
    Mutant("divided twice", "functional.arithmetic.scale_of", "gamma *", "gamma * inverse_deviation *"),
    Mutant(
        "gamma ignored", "functional.arithmetic.scale_of", "gamma * inverse_deviation", "inverse_deviation"
    ),
    Mutant("gamma detached", "functional.arithmetic.scale_of", "gamma *", "gamma.detach() *"),
    Mutant("beta ignored", "functional.folding.Folding.parameters", "norm.bias", "None"),
    Mutant("bias of the convolution dropped", "functional.folding.Folding.parameters", "conv.bias", "None"),
    Mutant("mean added", "functional.arithmetic.plus_centred", "value=-1", "value=1"),
    Mutant(
        "mean added to a bias",
        "functional.arithmetic.plus_centred",
        "factor, bias - mean)",
        "factor, bias + mean)",
    ),
    Mutant(
        "shift not scaled",
        "functional.folding.Folding.parameters",
        "self.scale",
        "torch.ones_like(self.scale)",
    ),
    Mutant("weight not scaled", "functional.folding.Folding.weight", "self.scale", "self.scale ** 0"),
    Mutant("weight scaled twice", "functional.folding.Folding.weight", "self.scale", "self.scale ** 2"),
    Mutant(
        "input channels scaled",
        "functional.arithmetic.along_output_channels",
        "view(-1, *[1] * (weight.ndim - 1))",
        "view(1, -1, *[1] * (weight.ndim - 2))",
    ),
    Mutant(
        "input channels of a transposed convolution scaled",
        "functional.arithmetic.along_output_channels",
        "view(1, -1, *ones)",
        "view(-1, 1, *ones)",
    ),
    Mutant(
        "groups of a transposed convolution in turn",
        "functional.arithmetic.along_output_channels",
        "repeat_interleave(weight.shape[0] // conv.groups, dim=0)",
        "repeat(weight.shape[0] // conv.groups, 1)",
    ),
    Mutant(
        "products of the input channels", "functional.arithmetic.products", "(1, *range(3,", "(2, *range(3,"
    ),
    Mutant(
        "products of one group",
        "functional.arithmetic.products",
        "by_group.sum(",
        "by_group[:1].expand_as(by_group).sum(",
    ),
    Mutant(
        "gradient of the input unscaled",
        "functional.autograd._gradients_of_folded",
        "fold.weight()",
        "weight",
    ),
    Mutant(
        "gradient of the weight unscaled",
        "functional.folding.Folding.gradients",
        "grad_weight.mul_(scale)",
        "grad_weight",
    ),
    Mutant(
        "gradient of the bias unscaled",
        "functional.folding.Folding.gradients",
        "self.scale * grad_shift",
        "grad_shift",
    ),
    Mutant(
        "gradient of gamma undivided",
        "functional.folding.Folding.gradients",
        "centred * self.inverse",
        "centred",
    ),
    Mutant(
        "gradient of gamma without the mean",
        "functional.folding.Folding.gradients",
        "self.norm.running_mean",
        "0 * self.norm.running_mean",
    ),
    Mutant(
        "gradient of gamma without the bias", "functional.folding.Folding.gradients", "self.conv.bias", "None"
    ),
    Mutant(
        "gradient of gamma without the shift",
        "functional.folding.Folding.gradients",
        "per_scale, grad_shift",
        "per_scale, 0 * grad_shift",
    ),
    Mutant(
        "gradient of beta scaled",
        "functional.autograd._gradients_of_folded",
        "grad_shift if",
        "fold.scale * grad_shift if",
    ),
    Mutant(
        "scaled: gradient of the bias unscaled",
        "functional.autograd._gradients_of_scaled",
        "scale * grad_shift",
        "grad_shift",
    ),
    Mutant(
        "scaled: gradient of gamma without the mean",
        "functional.autograd._gradients_of_scaled",
        "bias, running_mean)",
        "bias, 0 * running_mean)",
    ),
    Mutant(
        "scaled: gradient of gamma undivided",
        "functional.autograd._gradients_of_scaled",
        "running_mean) * inverse",
        "running_mean)",
    ),
    Mutant(
        "scaled: gradient of the output unscaled",
        "functional.autograd._on_channels",
        "grad_output * per_channel",
        "grad_output + 0 * per_channel",
    ),
    Mutant(
        "scaled: scale left in gamma's gradient",
        "functional.autograd._gradients_of_scaled",
        "conv) / output_scale",
        "conv)",
    ),
]


class Core(NamedTuple):
    """A pair, and the shapes of two inputs: that make its output larger than its weight, and smaller.

    The scale then goes to the weight, or stays on the output.
    """

    make: Callable[[], tuple[nn.Module, nn.Module]]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype = torch.float64


#: Each way in which output channels can lie, and the variants that the arithmetic tells apart. There are as many input
#: as output channels, so that no mix-up raises.
CORE = [
    Core(lambda: (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), ((5, 4, 8, 8), (1, 4, 4, 4))),
    Core(lambda: (nn.Conv1d(4, 4, 3, groups=2, bias=False), nn.BatchNorm1d(4)), ((5, 4, 8), (1, 4, 4))),
    Core(lambda: (nn.Linear(4, 4), nn.BatchNorm1d(4, eps=0.5, affine=False)), ((5, 4), (1, 4))),
    Core(lambda: (nn.ConvTranspose2d(4, 4, 3, 2), nn.BatchNorm2d(4)), ((5, 4, 4, 4), (1, 4, 1, 1))),
    Core(lambda: (nn.ConvTranspose1d(4, 4, 3, groups=2), nn.BatchNorm1d(4)), ((5, 4, 4), (1, 4, 1))),
    Core(lambda: (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), ((5, 4, 8, 8), (1, 4, 4, 4)), torch.bfloat16),
]


def core_models(randomized=True):
    """The models in Eval mode, each with its inputs."""
    for core in CORE:
        model = nn.Sequential(*core.make()).to(core.dtype).eval()
        yield (
            randomize_batchnorms(model) if randomized else model,
            [torch.randn(s, dtype=core.dtype) for s in core.shapes],
        )


def core_check(randomized=True):
    """The suite in small: outputs and all gradients, in the form that autograd runs and in the one that is transformed.

    Raises:
        AssertionError: A fused model is not the model.
    """
    for model, inputs in core_models(randomized):
        fused = convbn_fx.transform(convbn_fx.symbolic_trace(model))
        assert len(convbn_fx.report(fused).fused) == 1
        parameters = dict(model.named_parameters())
        for input in inputs:
            assert_equivalent(model, fused, input)
            with torch.no_grad():
                assert_equivalent(gradients(model, parameters), gradients(fused, parameters), input)


def upstream_check():
    """What the tests of the same pass in PyTorch compare: outputs in float32, on the statistics of a new layer.

    Raises:
        AssertionError: The fused model's output is not the model's.
    """
    model, (input, _) = next(core_models(randomized=False))
    fused = convbn_fx.transform(convbn_fx.symbolic_trace(model))
    torch.testing.assert_close(fused.float()(input.float()), model.float()(input.float()))


def gradients(model, parameters):
    """The gradients of a scalar function of the model's outputs, as a function of its input, by torch.func."""

    def scalar(parameters, input):
        outputs = pytree.tree_leaves(functional_call(model, parameters, input.clone()))
        return sum(output.sin().sum() for output in outputs)

    return lambda input: grad(scalar, argnums=(0, 1))(parameters, input)
