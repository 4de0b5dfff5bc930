"""What rewritten graphs call: one function that decides, at every call, how a convolution and a batch norm run.

The arithmetic is in [`arithmetic`][convbn_fx.functional.arithmetic], its autograd in
[`autograd`][convbn_fx.functional.autograd].
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from convbn_fx import _torch, kinds
from convbn_fx._torch import FakeTensor, FunctionalTensor, has_any_global_hook
from convbn_fx.functional import native
from convbn_fx.functional.activations import activation
from convbn_fx.functional.arithmetic import (
    batch_norm,
    convolution,
    is_eager,
    is_half,
    is_plainly_fake,
    output_channels,
    rounded,
)
from convbn_fx.functional.autocast import autocast_state, computing_dtype
from convbn_fx.functional.autograd import fused_convolution
from convbn_fx.functional.cost_rule import Form, cheapest_form
from convbn_fx.functional.folding import fold
from convbn_fx.functional.geometry import output_size
from convbn_fx.functional.recomputation import recomputed_in_backward
from convbn_fx.kinds import BatchNormKind
from convbn_fx.operands import BatchNorm, Convolution

native.load()  # a tuned model that comes out of a pickle needs no tune to run fast


def conv_batch_norm(
    conv: nn.Module | Convolution, norm: nn.Module | BatchNorm, /, *args: Any, **kwargs: Any
) -> Tensor:
    """A convolution and the batch norm after it, as one convolution wherever that is the same function.

    Everything is looked up at this call: the batch norm's mode, parameters, statistics, eps, hooks, ranks, dtypes.
    Where the two cannot be one (Train mode, hooks on either module, dimensions that do not match, ...) the convolution
    and then the batch norm run as they are.

    Args:
        conv: A convolution or linear module, or the operands of a functional one.
        norm: A batch-norm module, or the operands of a functional one with frozen statistics.
        *args: What the convolution is called with; for a functional one its input, of shape (N, C_in, ...).
        **kwargs: As `args`; `output_size` of a transposed convolution, for example.

    Returns:
        The normalised tensor, of shape (N, C_out, ...), in the dtype that Eval mode gives.

    Raises:
        Exception: What the convolution or the batch norm raises for such an input.

    Example:
        ```python
        import torch
        from convbn_fx.functional import conv_batch_norm
        from convbn_fx.operands import BatchNorm, Convolution

        conv, norm, x = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8).eval(), torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(conv_batch_norm(conv, norm, x), norm(conv(x)), rtol=1e-3, atol=1e-4)

        conv = Convolution("conv2d", conv.weight, conv.bias)  # the same as functions
        norm = BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        assert conv_batch_norm(conv, norm, x).shape == (2, 8, 14, 14)
        ```
    """
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        proxies = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.fx.Proxy)]
        if proxies:  # somebody traces a rewritten graph again (unpickling does): stay one node
            return handle_torch_function(conv_batch_norm, proxies, conv, norm, *args, **kwargs)
    norm_kind = fusible_kind(norm)
    read = None if norm_kind is None else _read_convolution(conv, args, kwargs)
    if norm_kind is not None and read is not None:
        input, operands = read
        normalised = normalised_convolution(input, operands, batch_norm_operands(norm, norm_kind), norm_kind)
        if normalised is not None:
            return with_epilogue(norm, norm_kind, normalised, activation)
        conv, args, kwargs = operands, (input,), {}  # to read them again may change what computes them
    return batch_norm(norm, convolution(conv, *args, **kwargs))


def _refuse_scripting() -> Callable[..., Any]:
    raise TypeError(
        "torch.jit.script: a graph that convbn_fx.transform rewrote is no TorchScript. Script convbn_fx.untune(model), "
        "which has the same tensors, or convbn_fx.deploy(model)"
    )


conv_batch_norm.__prepare_scriptable__ = _refuse_scripting  # type: ignore[attr-defined] # torch.jit asks for it


def normalised_convolution(
    input: Any, conv: Convolution, norm: BatchNorm, norm_kind: BatchNormKind
) -> Tensor | None:
    """A convolution and the normalisation after it, as one convolution.

    Args:
        input: The convolution's input.
        conv: Its operands.
        norm: Those of a batch norm with frozen statistics.
        norm_kind: Its `fusible_kind`.

    Returns:
        The normalised tensor; None where the two have to run, or are cheaper, one after the other.
    """
    rank = conv.weight.ndim
    if not isinstance(input, Tensor) or input.ndim != rank or not norm_kind.accepts(rank):
        # Dimension 1, which the batch norm reads, does not hold the output channels: an unbatched convolution, a
        # linear layer's input of more dimensions. (Or the batch norm is about to raise.)
        return None
    if native.operator is not None and _are_for_the_operator(input, conv, norm, norm_kind):
        return native.fused_convolution(input, conv, norm)
    dtype = computing_dtype(input, conv)
    if dtype is None or not _are_ordinary(input, conv, norm, dtype, norm_kind.promotes):
        return None
    return _in_best_form(input, conv, norm, dtype)


def _are_for_the_operator(
    input: Tensor, conv: Convolution, norm: BatchNorm, norm_kind: BatchNormKind
) -> bool:
    """Whether plain tensors are just to be computed with: by the operator, which looks at dtypes, shapes, sizes."""
    if type(input) is Tensor:
        is_run, plain = is_eager(input), _PLAIN
    else:
        is_run, plain = is_plainly_fake(input), _FAKE
    if not is_run or _torch.is_forward_ad_on() or norm_kind.promotes:
        return False
    weight, (mean, variance, gamma, beta, _) = conv.weight, norm
    for tensor in (weight, conv.bias, gamma, beta, mean, variance):
        if tensor is not None and type(tensor) not in plain:
            return False
    if not (weight.requires_grad or gamma is None) and _trains_gamma_alone(input, conv, norm):
        return not torch.is_grad_enabled()  # Eval mode may save less: the sizes of storages tell
    return conv.op != "convolution" or autocast_state(input.device.type) is None


def batch_norm_operands(norm: nn.Module | BatchNorm, norm_kind: BatchNormKind) -> BatchNorm:
    """The operands of a batch norm of this kind."""
    return norm if isinstance(norm, BatchNorm) else norm_kind.operands(norm)


def with_epilogue(
    norm: nn.Module | BatchNorm,
    norm_kind: BatchNormKind,
    normalised: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """What calling a batch norm of this kind returns, given its input normalised, and what calls modules in it."""
    return normalised if norm_kind.epilogue is None else norm_kind.epilogue(norm, normalised, call)


# --- May the modules be bypassed? --------------------------------------------------------------------------------


def _read_convolution(
    conv: nn.Module | Convolution, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Convolution] | None:
    """The operands of a call, or None where calling the module does something this file cannot know."""
    if has_any_global_hook() or _torch.is_jit_tracing():  # of torch.jit
        return None
    if isinstance(conv, Convolution):
        (input,) = args
        return input, conv
    kind = kinds.convolution_kind(conv)
    return None if kind is None or kinds.has_hooks(conv) else kind.operands(conv, *args, **kwargs)


FUNCTIONAL_BATCH_NORM: Final = kinds.BATCH_NORM_FUNCTIONS[F.batch_norm]


def fusible_kind(norm: nn.Module | BatchNorm) -> BatchNormKind | None:
    """The batch norm's row of the table, or None unless calling it normalises by running statistics and no more."""
    if isinstance(norm, BatchNorm):
        return FUNCTIONAL_BATCH_NORM
    return None if kinds.has_hooks(norm) else kinds.frozen_kind(norm)


# --- Which form? -------------------------------------------------------------------------------------------------


def _in_best_form(input: Tensor, conv: Convolution, norm: BatchNorm, dtype: torch.dtype) -> Tensor | None:
    """Fused in the form that suits the call; None where Eval mode's two steps are better."""
    if _is_compiled(input):
        return _captured(input, conv, norm, dtype)
    size = output_size(input, conv.weight, conv)
    if _is_transformed() or not _wants_gradient(input, conv, norm):
        return None if is_half(dtype) or conv.weight.numel() > size else _formula(input, conv, norm)
    gamma_trains = norm.weight is not None and norm.weight.requires_grad
    form = cheapest_form(conv.weight.numel(), size, input.device.type, gamma_trains)
    if form is Form.APART or (
        gamma_trains
        and _eval_mode_saves_the_output_alone(input, conv)
        and size * dtype.itemsize <= _saved_for_gamma(input, conv)
    ):
        return None
    return fused_convolution(rounded(input, dtype), conv, norm, form is Form.SCALED or is_half(dtype))


def _captured(input: Tensor, conv: Convolution, norm: BatchNorm, dtype: torch.dtype) -> Tensor | None:
    """Fused in the form that suits a compiler, whatever the sizes; None where Eval mode's two steps are better."""
    if not is_half(dtype):
        return _formula(input, conv, norm)
    # In float16 gamma's gradient may need a second look at its values, which a graph cannot take.
    if dtype is not torch.bfloat16 or not _captures_both_passes(input):
        return None
    if not _wants_gradient(input, conv, norm) or _eval_mode_saves_the_output_alone(input, conv):
        return None
    return fused_convolution(rounded(input, dtype), conv, norm, scale_on_output=True)


def _formula(input: Tensor, conv: Convolution, norm: BatchNorm) -> Tensor:
    """The folded convolution as plain operations."""
    with recomputed_in_backward() if _captures_both_passes(input) else nullcontext():
        parameters = fold(conv, norm)
    return convolution(Convolution(conv.op, *parameters, *conv[3:]), input)


def _is_compiled(input: Tensor) -> bool:
    """Whether a compiler captures the operations."""
    return torch.compiler.is_compiling() or isinstance(input, FunctionalTensor)


def _captures_both_passes(input: Tensor) -> bool:
    """Whether AOT Autograd does: not Dynamo, which comes before it, nor an export, which keeps the forward alone."""
    return isinstance(input, FunctionalTensor) and not (torch.compiler.is_exporting() or _is_transformed())


def _is_transformed() -> bool:
    """Whether a function transform or forward-mode AD needs operations that it knows."""
    return _torch.are_transforms_active() or _torch.is_forward_ad_on()


def _wants_gradient(input: Tensor, conv: Convolution, norm: BatchNorm) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensor in (conv.weight, input, norm.weight, norm.bias, conv.bias):
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _saved_for_gamma(input: Tensor, conv: Convolution) -> int:
    """Bytes that the fused form saves where gamma trains: the input, and parameters that are computed themselves."""
    computed = [
        tensor
        for tensor in (conv.weight, conv.bias)
        if not (tensor is None or isinstance(tensor, nn.Parameter))
    ]
    size: int = input.untyped_storage().nbytes() + sum(tensor.nbytes for tensor in computed)
    return size


def _trains_gamma_alone(input: Tensor, conv: Convolution, norm: BatchNorm) -> bool:
    gamma_trains = norm.weight is not None and norm.weight.requires_grad
    return gamma_trains and _eval_mode_saves_the_output_alone(input, conv)


def _eval_mode_saves_the_output_alone(input: Tensor, conv: Convolution) -> bool:
    """Whether Eval mode would save the convolution's output, for gamma, and not its input: little else trains."""
    for tensor in (conv.weight,) if conv.op == "linear" else (conv.weight, input, conv.bias):
        if tensor is not None and tensor.requires_grad:
            return False
    return True


def _are_ordinary(
    input: Tensor, conv: Convolution, norm: BatchNorm, dtype: torch.dtype, promotes: bool
) -> bool:
    """Whether types, dtypes and shapes are such that Eval mode works and the fused form is known to equal it."""
    statistics_dtype = norm.running_var.dtype
    if dtype not in _FUSED or statistics_dtype not in _FUSED[dtype] or (promotes and is_half(dtype)):
        return False
    if not are_plain(input, conv.weight, conv.bias, *norm[:4]):
        return False
    shape = (output_channels(conv),)
    for vector in norm[:4]:
        if vector is not None and not (vector.dtype == statistics_dtype and vector.shape == shape):
            return False
    if not input.numel() or (conv.bias is not None and conv.bias.shape != shape):
        return False
    return not (norm.running_mean.requires_grad or norm.running_var.requires_grad)


# The dtypes that convolutions are fused in, and those of the statistics beside each.
_FUSED: Final = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.float16: (torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
}


_PLAIN: Final = frozenset({Tensor, nn.Parameter})
_FAKE: Final = frozenset({FakeTensor})


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether the tensors are dense ones, of classes that give no function a meaning of its own."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN and not isinstance(tensor, (FakeTensor, FunctionalTensor)):
            return False
        if tensor.layout is not torch.strided:
            return False
    return True
