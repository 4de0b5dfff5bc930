"""The contenders: one model in each mode and by each way that a user could pick instead.

All share the parameters of the model that they are made of, so that none trains another's copy; Deploy, which has
parameters of its own, apart.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

import convbn_fx
from convbn_fx import functional
from convbn_fx.tuning.cloning import clone

TRAIN: Final = "Train"
EVAL: Final = "Eval"
TUNE: Final = "Tune"
PAIRS: Final = "Tune, pairs alone"
COMPOSITE: Final = "composite Tune"
DEPLOY: Final = "Deploy"
FROZEN: Final = "FrozenBatchNorm"
CHECKPOINT: Final = "checkpointing"
SELECTIVE: Final = "selective checkpointing"
TUNE_CHECKPOINT: Final = "Tune + checkpointing"
COMPILED: Final = "compile"
HALF_BUDGET: Final = "compile, budget 0.5"
THIRD_BUDGET: Final = "compile, budget 0.3"
COMPILED_FLAG: Final = "compile, PyTorch's flag"
COMPILED_CONVBN: Final = 'compile, "convbn"'
INPLACE: Final = "Inplace-ABN"

#: What each of them is, for the page.
MEANING: Final[dict[str, str]] = {
    TRAIN: "batch norms in Train mode: statistics of the batch",
    EVAL: "convolution, then batch norm with frozen statistics",
    TUNE: "`convbn_fx.tune`",
    PAIRS: "`convbn_fx.tune(model, activations=False)`",
    COMPOSITE: "the rivals' formula: the weight multiplied, then convolved, as plain operations",
    DEPLOY: "`convbn_fx.deploy`: batch norms baked in; the lower limit, but training it is unstable",
    FROZEN: "torchvision's FrozenBatchNorm2d: nothing in it trains",
    CHECKPOINT: "Eval, each block recomputed in the backward pass",
    SELECTIVE: "the same with `create_selective_checkpoint_contexts`: the outputs of convolutions are kept",
    TUNE_CHECKPOINT: "Tune, each block recomputed in the backward pass",
    COMPILED: "`torch.compile` of Eval",
    HALF_BUDGET: "the same with `torch._functorch.config.activation_memory_budget = 0.5`",
    THIRD_BUDGET: "the same with 0.3",
    COMPILED_FLAG: "`torch.compile` with `efficient_conv_bn_eval_fx_passes`",
    COMPILED_CONVBN: '`torch.compile(backend="convbn", options={"inner": "inductor"})`',
    INPLACE: "InPlaceABN with leaky ReLU in the place of batch norm and ReLU, frozen statistics",
}


def composite(model: nn.Module) -> nn.Module:
    """Tune mode as the paper's script, mmengine and inductor compute it, with whatever autograd saves for it.

    Args:
        model: A model in Eval mode.

    Returns:
        The tuned model, whose pairs run as plain operations.
    """
    tuned = convbn_fx.transform(convbn_fx.symbolic_trace(model), activations=False)
    for node in tuned.graph.find_nodes(op="call_function", target=functional.conv_batch_norm):
        node.target = _composite_pair
    tuned.recompile()
    return tuned


def _composite_pair(conv: Any, norm: Any, input: Tensor) -> Tensor:
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    transposed = isinstance(conv, nn.ConvTranspose2d)
    weight = conv.weight * (scale.view(1, -1, 1, 1) if transposed else scale.view(-1, 1, 1, 1))
    bias = norm.bias + scale * bias
    if transposed:
        return F.conv_transpose2d(
            input, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        )
    return F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def frozen(model: nn.Module) -> nn.Module:
    """The model with FrozenBatchNorm2d in the place of its BatchNorm2d."""
    result: nn.Module = freeze_batch_norm_2d(clone(model))
    return result


def checkpointed(model: nn.Module, block: Callable[[nn.Module], bool], kept: Sequence[Any] = ()) -> nn.Module:
    """The model with those of its modules recomputed in the backward pass that `block` picks.

    Tune the result, not the argument: a clone of a tuned model is of the original classes again.

    Args:
        model: The model.
        block: Which of its modules.
        kept: Operators whose outputs are kept, not recomputed.

    Returns:
        A clone.
    """
    result = clone(model)
    for module in list(result.modules()):
        if kept and getattr(module, "inplace", False):
            module.__dict__["inplace"] = False  # what is kept must not be changed: squeeze-and-excite does so
        for name, child in module.named_children():
            if block(child):
                setattr(module, name, _Checkpointed(child, kept))
    return result


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, kept: Sequence[Any]) -> None:
        super().__init__()
        self.block = block
        self.contexts = partial(create_selective_checkpoint_contexts, [*kept]) if kept else noop_context_fn

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.block, *inputs, use_reentrant=False, context_fn=self.contexts)


def in_train_mode(model: nn.Module) -> nn.Module:
    """The model with its batch norms in Train mode, all else in the mode it is in."""
    result = clone(model)
    convbn_fx.batchnorm_mode(result, train=True)
    # Statistics of its own: those of the model are what the others are compared with.
    for module in result.modules():
        module._buffers = {
            name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
        }
    return result


def compiled(model: nn.Module, backend: str = "inductor", **options: Any) -> nn.Module:
    """The model compiled, with options of the backend."""
    result: Any = torch.compile(model, backend=backend, options=options or None)
    return result  # type: ignore[no-any-return]


def within_budget(model: nn.Module, budget: float, backend: str = "inductor") -> nn.Module:
    """The model compiled with so much of the memory for activations as it needs without recomputing."""

    # A function of its own: for one that it knows, Dynamo would run what it has compiled of the model before.
    def compile_within(graph: Any, inputs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return lookup_backend(backend)(graph, inputs)

    result: Any = torch.compile(model, backend=compile_within)
    return result  # type: ignore[no-any-return]


#: How each contender is made of a model in Eval mode.
EAGER: Final[dict[str, Callable[[nn.Module], nn.Module]]] = {
    TRAIN: in_train_mode,
    EVAL: lambda model: model,
    TUNE: convbn_fx.tune,
    PAIRS: partial(convbn_fx.tune, activations=False),
    COMPOSITE: composite,
    DEPLOY: convbn_fx.deploy,
    FROZEN: frozen,
}

#: The same of those that a compiler makes.
COMPILERS: Final[dict[str, Callable[[nn.Module], nn.Module]]] = {
    COMPILED: compiled,
    HALF_BUDGET: partial(within_budget, budget=0.5),
    THIRD_BUDGET: partial(within_budget, budget=0.3),
    COMPILED_FLAG: lambda model: compiled(model, efficient_conv_bn_eval_fx_passes=True),
    COMPILED_CONVBN: lambda model: compiled(model, "convbn", inner="inductor"),
}


def make(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Makes contenders of a model in Eval mode.

    Args:
        model: The model.
        names: Which, of `EAGER` and `COMPILERS`.

    Returns:
        The contenders by name.
    """
    return {name: (EAGER | COMPILERS)[name](model) for name in names}
