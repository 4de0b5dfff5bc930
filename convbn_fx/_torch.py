"""Every private API of PyTorch that is used, each with what it is for: what a new version may change without a word.

A test for each runs on every version that is supported. What is public by now is used as such where it is needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as fx_tracing
from torch.fx.graph_module import _format_import_block
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import _has_any_global_hook, _WrappedHook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BatchNormBase",
    "ConvBase",
    "ConvTransposeBase",
    "DisableTorchFunction",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "OpOverload",
    "Patcher",
    "TorchDispatchMode",
    "WrappedHook",
    "pytree",
]

# --- Modules -----------------------------------------------------------------------------------------------------

#: What a user would call a batch norm, a convolution, a transposed one, whatever its number of dimensions.
BatchNormBase: Final = _BatchNorm
ConvBase: Final = _ConvNd
ConvTransposeBase: Final = _ConvTransposeNd

#: A forward hook that gets its module by a weak reference: `register_forward_pre_hook` of a bound method makes one.
WrappedHook: Final = _WrappedHook

#: Whether hooks are registered that run for every module.
has_any_global_hook: Final[Callable[[], bool]] = _has_any_global_hook


def hand_calls_to(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Has calls of a module, unless its class has a `__call__` of its own, go elsewhere; None takes that back."""
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call  # where `module.compile()` puts what it has compiled


# --- What is around a call ---------------------------------------------------------------------------------------

#: Whether `torch.jit.trace` is running.
is_jit_tracing: Final[Callable[[], bool]] = torch._C._is_tracing

#: Whether a transform of `torch.func` is on, and how many are; -1 or None where there is none.
are_transforms_active: Final[Callable[[], bool]] = torch._C._are_functorch_transforms_active
transform_level: Final[Callable[[], int | None]] = torch._C._functorch.maybe_current_level

#: Whether a tensor is one of those that `is_grads_batched` makes.
is_legacy_batched: Final[Callable[[Tensor], bool]] = torch._C._functorch.is_legacy_batchedtensor

#: Whether autocast is on for any type of device.
is_any_autocast_on: Final[Callable[[], bool]] = torch._C._is_any_autocast_enabled

#: How many `TorchDispatchMode`s are on.
dispatch_modes: Final[Callable[[], int]] = torch._C._len_torch_dispatch_stack

#: Which backward pass is running in this thread; -1 where none is.
backward_pass: Final[Callable[[], int]] = torch._C._current_graph_task_id

#: Entered, a subclass of Tensor is treated as a Tensor.
DisableTorchFunction: Final[Callable[[], AbstractContextManager[None]]] = (
    torch._C.DisableTorchFunctionSubclass
)

#: Whether an operator does something of its own under a dispatch key, such as `AutocastCPU`.
has_kernel: Final[Callable[[str, str], bool]] = torch._C._dispatch_has_kernel_for_dispatch_key


def is_forward_ad_on() -> bool:
    """Whether a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0


def saved_tensors_hooks() -> Any:
    """The innermost hooks on saved tensors, by which regions are recomputed or offloaded, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def are_of_checkpoint(hooks: Any) -> bool:
    """Whether these hooks on saved tensors are those of a region that is recomputed."""
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def leave_saved_tensors_hooks() -> None:
    """Leaves the innermost hooks on saved tensors."""
    torch._C._autograd._pop_saved_tensors_default_hooks()


def enter_saved_tensors_hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    """Enters hooks on saved tensors."""
    torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


# --- torch.fx ----------------------------------------------------------------------------------------------------

#: Puts attributes in the place of others while it is open, and wraps what `torch.fx.wrap` names.
Patcher = fx_tracing._Patcher
patch_wrapped_functions: Final[Callable[[Any], None]] = fx_tracing._patch_wrapped_functions
create_wrapped_function: Final[Callable[[Any], Any]] = fx_tracing._create_wrapped_func

#: Types of attributes that a graph holds as they are.
CONSTANT_ATTRIBUTE_TYPES: Final = fx_tracing._constant_attribute_types

#: Given the globals of generated code and an importer, the import statements that these take.
format_import_block: Final[Callable[[dict[str, Any], Any], str]] = _format_import_block


def while_fx_traces() -> AbstractContextManager[Any]:
    """While open, `torch.compiler.is_compiling()` knows that torch.fx traces; older versions have no such thing."""
    context: Callable[[bool], AbstractContextManager[Any]] = getattr(
        fx_tracing, "_is_fx_tracing_context", nullcontext
    )
    return context(True)


# --- torch.compile -----------------------------------------------------------------------------------------------


def lookup_backend(name: str) -> Callable[..., Any]:
    """A backend of `torch.compile`, by its name."""
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend
