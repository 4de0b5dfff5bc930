"""What PyTorch's private APIs are taken to do: the first to fail where a new version has changed one of them."""

import ast
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.package.importer import sys_importer
from torch.utils.checkpoint import checkpoint

import convbn_fx
from convbn_fx import _torch

X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_base_classes_of_layers(rank):
    norm, conv, transposed = (
        getattr(nn, f"{name}{rank}d") for name in ("BatchNorm", "Conv", "ConvTranspose")
    )
    assert issubclass(norm, _torch.BatchNormBase)
    assert issubclass(nn.SyncBatchNorm, _torch.BatchNormBase)
    assert issubclass(conv, _torch.ConvBase)
    assert issubclass(transposed, _torch.ConvTransposeBase)
    assert issubclass(_torch.ConvTransposeBase, _torch.ConvBase)
    assert not issubclass(conv, _torch.ConvTransposeBase)
    assert not issubclass(nn.InstanceNorm2d, _torch.BatchNormBase)


def test_hooks_of_a_checkpoint():
    seen = []

    def region(x):
        seen.append(_torch.are_of_checkpoint(_torch.saved_tensors_hooks()))
        return x * x

    checkpoint(region, X.clone().requires_grad_(), use_reentrant=False)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        region(X)
    region(X)
    assert seen == [True, False, False]


def test_a_hook_with_its_module():
    module = nn.Identity()
    module._register_load_state_dict_pre_hook(lambda module, *args: None, with_module=True)
    (hook,) = module._load_state_dict_pre_hooks.values()
    assert isinstance(hook, _torch.WrappedHook)
    assert hook.with_module
    assert hook.module() is module


def test_global_hooks():
    assert not _torch.has_any_global_hook()
    handle = register_module_forward_hook(lambda *call: None)
    try:
        assert _torch.has_any_global_hook()
    finally:
        handle.remove()
    assert not _torch.has_any_global_hook()


def test_calls_that_go_elsewhere():
    module = nn.Identity()
    _torch.hand_calls_to(module, lambda x: x + 1)
    assert module(1) == 2
    _torch.hand_calls_to(module, None)
    _torch.hand_calls_to(module, None)
    assert module(1) == 1
    module.compile(backend="eager")
    assert "_compiled_call_impl" in vars(module)


def test_autocast_on_any_device():
    assert not _torch.is_any_autocast_on()
    with torch.autocast("cpu", torch.bfloat16):
        assert _torch.is_any_autocast_on()
        with torch.autocast("cpu", enabled=False):
            assert not _torch.is_any_autocast_on()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tracing_for_jit():
    told = []
    torch.jit.trace(lambda x: (told.append(_torch.is_jit_tracing()), x + 1)[1], X, check_trace=False)
    assert told == [True]
    assert not _torch.is_jit_tracing()


def test_transforms():
    def batched(x):
        told.append((_torch.are_transforms_active(), _torch.transform_level()))
        return x

    told = []
    vmap(batched)(X)
    assert told == [(True, 1)]
    assert not _torch.are_transforms_active()
    assert _torch.transform_level() in (None, -1)


def test_gradients_that_are_batched_the_old_way():
    told = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            told.append(_torch.is_legacy_batched(gradient))
            return gradient * 2

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Noting.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(Noting.apply(x), x, torch.ones(3))
    assert told == [True, False]


def test_dispatch_modes():
    class Watching(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert _torch.dispatch_modes() == 0
    with Watching():
        assert _torch.dispatch_modes() == 1


def test_backward_passes():
    told = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: told.append(_torch.backward_pass()))
    (2 * x).sum().backward()
    (2 * x).sum().backward()
    assert _torch.backward_pass() == -1
    assert -1 not in told
    assert told[0] != told[1]


def test_a_subclass_treated_as_a_tensor():
    class Own(torch.Tensor):
        pass

    own = X.as_subclass(Own)
    assert type(own + 1) is Own
    with _torch.DisableTorchFunction():
        assert type(own + 1) is torch.Tensor


def test_kernels_of_autocast():
    assert _torch.has_kernel("aten::convolution", "AutocastCUDA")
    assert not _torch.has_kernel("aten::relu", "AutocastCUDA")


def test_forward_mode_differentiation():
    assert not _torch.is_forward_ad_on()
    with forward_ad.dual_level():
        assert _torch.is_forward_ad_on()
    assert not _torch.is_forward_ad_on()


def test_hooks_on_saved_tensors():
    def pack(tensor):
        return weakref.ref(tensor)

    def unpack(reference):
        return reference()

    assert _torch.saved_tensors_hooks() is None
    with saved_tensors_hooks(pack, unpack):
        assert _torch.saved_tensors_hooks() == (pack, unpack)
        _torch.leave_saved_tensors_hooks()
        assert _torch.saved_tensors_hooks() is None
        _torch.enter_saved_tensors_hooks(pack, unpack)
        assert _torch.saved_tensors_hooks() == (pack, unpack)
    assert _torch.saved_tensors_hooks() is None


def test_fake_tensors():
    with _torch.FakeTensorMode() as mode:
        fake = torch.empty(2, 3)
    assert isinstance(fake, _torch.FakeTensor)
    copy = mode.from_tensor(X)
    assert (copy.shape, copy.device) == (X.shape, X.device)
    with mode, _torch.FakeCopyMode(mode):
        assert isinstance(torch.utils.swap_tensors.__globals__["torch"].empty(1), _torch.FakeTensor)
    assert issubclass(_torch.FunctionalTensor, torch.Tensor)
    assert isinstance(torch.ops.aten.relu.default, _torch.OpOverload)


def test_nested_values():
    leaves, structure = _torch.pytree.tree_flatten({"a": (1, [2]), "b": None})
    assert leaves[:2] == [1, 2]
    assert _torch.pytree.tree_unflatten(leaves, structure) == {"a": (1, [2]), "b": None}


class Traced(nn.Module):
    def forward(self, x):
        self.told = torch.compiler.is_compiling()
        return wrapped(x)


def wrapped(x):
    return x + 1


def test_what_a_trace_patches():
    namespace = {"wrapped": wrapped}
    with _torch.Patcher() as patcher:
        _torch.patch_wrapped_functions(patcher)
        patcher.patch(namespace, "wrapped", _torch.create_wrapped_function(wrapped))
        assert namespace["wrapped"] is not wrapped
        tracer = torch.fx.Tracer()
        tracer.graph = torch.fx.Graph()
        result = namespace["wrapped"](tracer.proxy(tracer.graph.placeholder("x")))
        assert result.node.target is wrapped
        assert patcher.visit_once(namespace) != patcher.visit_once(namespace)
    assert namespace["wrapped"] is wrapped


def test_while_a_graph_is_traced():
    with _torch.while_fx_traces():
        pass
    assert torch.Tensor in _torch.CONSTANT_ATTRIBUTE_TYPES


def test_the_imports_of_generated_code():
    block = _torch.format_import_block({"torch": torch, "batch_norm": nn.functional.batch_norm}, sys_importer)
    assert "import torch" in block
    assert "from torch.nn.functional import batch_norm" in block


def test_backends_by_name():
    assert _torch.lookup_backend("eager") is torch._dynamo.lookup_backend("eager")


def _private(path):
    """Private modules of PyTorch's, and attributes of `torch._C`, that a file names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [node.module, *(alias.name for alias in node.names)]
            yield from (name for name in names if any(part.startswith("_") for part in name.split(".")))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._"):
            yield ast.unparse(node)


def test_private_apis_are_in_one_file():
    package = Path(convbn_fx.__file__).parent
    found = {path.name: names for path in package.rglob("*.py") if (names := set(_private(path)))}
    assert found.pop("_torch.py")
    # A function of PyTorch's by its name alone: what `torch._assert` is to a graph.
    assert {name for names in found.values() for name in names} <= {"torch._assert", "torch.__version__"}
