"""One model three times: as it is (Eval), with its pairs fused (Tune), with its batch norms baked in (Deploy)."""

import copy
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import convbn_fx
from bench.contenders import DEPLOY, EVAL, TUNE
from convbn_fx.functional import conv_batch_norm
from convbn_fx.operands import BatchNorm


def make_variants(model: nn.Module) -> dict[str, nn.Module]:
    """Makes the three variants of a model that is in Eval mode.

    Args:
        model: The model; it becomes the Eval variant itself and shares its parameters with the Tune variant.

    Returns:
        The variants by name, in the order Eval, Tune, Deploy.
    """
    tuned = convbn_fx.transform(convbn_fx.symbolic_trace(model))
    return {EVAL: model, TUNE: tuned, DEPLOY: bake(tuned)}


def bake(tuned: GraphModule) -> GraphModule:
    """Replaces every fused pair by one convolution with the batch norm in its weight and bias.

    Args:
        tuned: What `convbn_fx.transform` returned; left untouched.

    Returns:
        A copy that holds no batch norm of a fused pair any more, and parameters of its own.
    """
    baked = copy.deepcopy(tuned)
    for index, node in enumerate(baked.graph.find_nodes(op="call_function", target=conv_batch_norm)):
        convolution, batch_norm, *args = node.args
        name = f"baked_{index}"
        baked.add_submodule(name, _fold(_module(baked, convolution), _operands(baked, batch_norm)))
        with baked.graph.inserting_before(node):
            node.replace_all_uses_with(baked.graph.call_module(name, tuple(args), node.kwargs))
        baked.graph.erase_node(node)
    baked.graph.eliminate_dead_code()
    baked.delete_all_unused_submodules()
    baked.graph.lint()
    baked.recompile()
    return baked


def _module(graph_module: GraphModule, convolution: object) -> nn.Module:
    if not isinstance(convolution, Node):
        raise TypeError(f"only convolutions that are modules can be baked, not {convolution}")
    return graph_module.get_submodule(str(convolution.target))


def _operands(graph_module: GraphModule, batch_norm: Any) -> BatchNorm:
    """Looks up the four vectors of a batch norm, whether the graph names its module or each of them."""

    def look_up(value: Any) -> Any:
        return attrgetter(str(value.target))(graph_module) if isinstance(value, Node) else value

    if isinstance(batch_norm, BatchNorm):
        return BatchNorm(*map(look_up, batch_norm))
    module = look_up(batch_norm)
    return BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


@torch.no_grad()
def _fold(convolution: nn.Module, batch_norm: BatchNorm) -> nn.Module:
    """A copy of a convolution that does the batch norm's work too.

    With `scale = gamma / sqrt(var + eps)` its weight is `scale W` along the output channels, its bias
    `beta + scale (b - mu)`.
    """
    folded = cast(nn.Conv2d | nn.ConvTranspose2d, copy.deepcopy(convolution))
    mean, variance, gamma, beta, eps = batch_norm
    scale = torch.rsqrt(variance + eps) if gamma is None else gamma * torch.rsqrt(variance + eps)
    bias = -mean if folded.bias is None else folded.bias - mean
    folded.bias = nn.Parameter(scale * bias if beta is None else beta + scale * bias)
    folded.weight = nn.Parameter(_scale_output_channels(folded, scale))
    return folded


def _scale_output_channels(convolution: nn.Conv2d | nn.ConvTranspose2d, scale: Tensor) -> Tensor:
    """The weight with each output channel multiplied by its scale, of shape (C_out,).

    A weight is laid out as (C_out, C_in / groups, ...), a transposed one as (C_in, C_out / groups, ...), where the
    first C_in / groups rows belong to the first C_out / groups output channels, and so on.
    """
    weight = convolution.weight
    if not isinstance(convolution, nn.ConvTranspose2d):
        return weight * scale.view(-1, 1, 1, 1)
    groups = convolution.groups
    by_group = weight.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, 1, 1)
    return by_group.view_as(weight)
