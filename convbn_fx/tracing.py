"""Module -> GraphModule: symbolic tracing that keeps convolutions and batch norms visible as nodes.

Whatever tracing walks through is baked in: branches taken, `self.training`, optional arguments. So the tracer walks
through as little as it can. A module that holds no batch norm stays a leaf, whatever it does (dropout, stochastic
depth, attention, squeeze-and-excitation), and so does one with hooks, or one that timm lists as not traceable. A leaf
whose output a batch norm reads is opened afterwards, if it holds a convolution and can be traced: that is where a pair
crosses a module's border.
"""

import copy
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convbn_fx import kinds, libraries
from convbn_fx.graph_module import GraphModule


class TracingError(RuntimeError):
    """A model whose forward cannot be traced symbolically. Says which module stopped it, and the ways out.

    Attributes:
        module: Qualified name of the innermost module in which tracing failed; None for the root's own forward.
    """

    def __init__(self, root: str, module: str | None, error: Exception) -> None:
        where = "its own forward" if module is None else f"its sub-module {module!r}"
        super().__init__(
            f"{root} cannot be traced symbolically: {where} raised {type(error).__name__}: {error}\n"
            "Ways out: trace the traceable sub-modules by themselves (model.backbone = "
            "convbn_fx.transform(convbn_fx.symbolic_trace(model.backbone))), make the arguments that control flow "
            "depends on constants (concrete_args={...}), or capture the model with torch.export."
        )
        self.module = module


def _context() -> tuple[Any, ...]:
    """What with-statements around an operation change about it."""
    torch.autocast_increment_nesting()
    depth_of_autocast = torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), depth_of_autocast


class Proxy(torch.fx.Proxy):
    """A proxy for which augmented assignment is what it is for tensors: a change in place, seen by every alias."""


def _augmented_assignment(
    function: Callable[[Any, Any], Any],
) -> Callable[[torch.fx.Proxy, Any], torch.fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift),
    operator.irshift,
):
    setattr(Proxy, f"__{_function.__name__}__", _augmented_assignment(_function))


class Tracer(torch.fx.Tracer):
    """The tracer behind [`symbolic_trace`][convbn_fx.symbolic_trace]; usable with torch.fx's own machinery too.

    Args:
        opened: Qualified names of modules to walk through although they hold no batch norm.
        closed: Qualified names of modules to keep as leaves although they hold one.
    """

    # Buffers are read where the forward reads them, not when it is traced, and tracing never changes them.
    proxy_buffer_attributes = True

    def __init__(self, opened: frozenset[str] = frozenset(), closed: frozenset[str] = frozenset()) -> None:
        super().__init__(autowrap_functions=libraries.functions_kept_whole())
        self.context = _context()
        self.opened = opened
        self.closed = closed
        self.culprit: str | None = None  # the innermost module in which tracing failed

    def proxy(self, node: Node) -> torch.fx.Proxy:
        """Makes the proxy that stands for a node while the forward runs."""
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calling `m` becomes one node."""
        if kinds.convolution_kind(m) or kinds.batch_norm_kind(m) or kinds.has_hooks(m):
            return True
        if module_qualified_name in self.closed:
            return True
        if module_qualified_name in self.opened:
            return False
        return libraries.is_kept_whole(m) or not kinds.may_hold_batch_norm(m)

    def create_arg(self, a: Any) -> Any:
        """Makes a value an argument of a node. An OrderedDict stays one, where torch.fx would write a dict."""
        if type(a) is OrderedDict:
            return super().create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Records a node, unless it would run in another context than the forward runs it in."""
        if _context() != self.context:
            raise RuntimeError(
                "a with-statement changes grad mode or autocast here, which a graph cannot hold. Trace the part inside "
                "it, or the parts around it, by themselves"
            )
        return super().create_node(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records or walks through one module call, and remembers the innermost module in which tracing failed."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.culprit is None:
                self.culprit = self.path_of_module(m)
            raise


def symbolic_trace(root: nn.Module, concrete_args: dict[str, Any] | None = None) -> GraphModule:
    """Traces a model into a graph in which convolutions and batch norms are nodes.

    Made for [`transform`][convbn_fx.transform]. Differs from `torch.fx.symbolic_trace` in what is a node: every
    convolution and batch norm of the table of kinds (parametrised ones too), and every module that holds no batch
    norm or has hooks. Buffers are read at every call. The result keeps all sub-modules of `root`, called or not.

    What every symbolic trace bakes in remains: the branches that the walked-through forwards take on `self.training`,
    on optional arguments and on Python values, and hooks that are registered later on modules walked through.

    Args:
        root: The model. It is left as it was found, whatever its forward does while it is traced.
        concrete_args: Arguments of the forward to make constants, as in `torch.fx.symbolic_trace`.

    Returns:
        A GraphModule that shares the modules and tensors of `root`.

    Raises:
        TypeError: `root` is no module.
        TracingError: The forward cannot be traced; names the module that stopped it.

    Example:
        ```python
        import torch
        import convbn_fx

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        gm = convbn_fx.symbolic_trace(model)
        assert [str(node.target) for node in gm.graph.nodes] == ["input", "0", "1", "2", "output"]
        assert len(convbn_fx.report(convbn_fx.transform(gm)).fused) == 1
        ```
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"symbolic_trace: expected a torch.nn.Module, got {type(root).__name__}")
    if "forward" in vars(root):
        patched = TypeError("the instance's forward is not its class's, and tracing would ignore it")
        raise TracingError(type(root).__name__, None, patched)
    if taken := _NAMES_OF_GRAPH_MODULES & root._modules.keys():
        renamed = NameError(
            f"rename {', '.join(sorted(taken))}: a GraphModule has attributes of that name itself"
        )
        raise TracingError(type(root).__name__, None, renamed)
    return _trace_as_far_as_possible(root, concrete_args)


_NAMES_OF_GRAPH_MODULES: Final = frozenset(dir(torch.fx.GraphModule)) - frozenset(dir(nn.Module)) | {"meta"}


def _trace_as_far_as_possible(root: nn.Module, concrete_args: dict[str, Any] | None) -> GraphModule:
    """Traces, with the leaves opened that feed a batch norm, and the batch norms closed that cannot be traced."""
    opened: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()
    while True:
        try:
            traced = _trace(root, concrete_args, opened, closed)
        except TracingError as error:
            if error.module is None or error.module in closed:
                raise
            if error.module in opened or kinds.resembles_batch_norm(root.get_submodule(error.module)):
                # It stays a leaf, and its batch norm gets a Skip.
                opened, closed = opened - {error.module}, closed | {error.module}
                continue
            raise
        feeding = _leaves_before_batch_norms(traced) - closed
        if feeding <= opened:
            return traced
        opened |= feeding


def _trace(
    root: nn.Module, concrete_args: dict[str, Any] | None, opened: frozenset[str], closed: frozenset[str]
) -> GraphModule:
    tracer = Tracer(opened, closed)
    random_state = torch.get_rng_state()
    with left_as_found(root):
        try:
            graph = tracer.trace(root, concrete_args)
            _check_leaves(root, tracer)
            with unset_fake_temporarily():
                drawn = not torch.equal(torch.get_rng_state(), random_state)
            if drawn:
                raise RuntimeError(
                    "the forward draws random numbers that depend on no input: they would be constants"
                )
        except Exception as error:
            raise TracingError(type(root).__name__, tracer.culprit, error) from error
        return GraphModule(root, graph, type(root).__name__)


def _check_leaves(root: nn.Module, tracer: Tracer) -> None:
    """Raises if the forward computes what a leaf uses: the graph would not."""
    for name, module in root.named_modules():
        computed = [key for key, value in vars(module).items() if isinstance(value, torch.fx.Proxy)]
        if computed and name and tracer.is_leaf_module(module, name):
            raise RuntimeError(
                f"the forward assigns {name}.{computed[0]}, which a graph cannot do at every call"
            )


def _leaves_before_batch_norms(traced: GraphModule) -> frozenset[str]:
    """Leaf modules that hold a convolution and whose output is read by a batch norm."""
    leaves = set()
    for node in traced.graph.nodes:
        producer = node.args[0] if node.args else node.kwargs.get("input")
        if not (isinstance(producer, Node) and producer.op == "call_module" and _is_batch_norm(node, traced)):
            continue
        module = traced.get_submodule(str(producer.target))
        if (
            kinds.convolution_kind(module) is None
            and not kinds.has_hooks(module)
            and any(kinds.resembles_convolution(inner) for inner in module.modules())
        ):
            leaves.add(str(producer.target))
    return frozenset(leaves)


def _is_batch_norm(node: Node, traced: GraphModule) -> bool:
    if node.op == "call_module":
        return kinds.resembles_batch_norm(traced.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target in kinds.BATCH_NORM_FUNCTIONS


@contextmanager
def left_as_found(root: nn.Module) -> Iterator[None]:
    """Undoes what a forward, run with proxies, changes on the modules, and what tracing stores on the root."""
    attributes = [value for module in root.modules() for value in vars(module).values()]
    tensors = [
        (value, value._version, value.detach().clone()) for value in attributes if _is_restorable(value)
    ]
    data = [(tensor, tensor.data) for tensor in (*root.parameters(), *root.buffers())]
    random_state = random.getstate()
    numpy: Any = sys.modules.get("numpy")  # if the forward draws from it, it is imported
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), _TensorsAsTheyAre(root), attributes_as_found(root.modules()):
            yield
    finally:
        random.setstate(random_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for tensor, original in data:
            if _address(tensor) != _address(original):
                tensor.data = original
        for tensor, version, value in tensors:
            if tensor._version != version:
                tensor.data.copy_(value)


def _is_a_helper(value: Any) -> bool:
    """Whether a value is an object that may keep what a forward gives it."""
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type, ModuleType))


@contextmanager
def attributes_as_found(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undoes what changes in the attributes of modules and of objects they hold, and in containers that are attributes.

    Only what has changed is touched, and in place: handles of hooks refer to the very containers.
    """
    containers: list[tuple[Any, bool]] = [(vars(module), True) for module in modules]
    known = {id(container) for container, _ in containers}
    for container, is_of_module in containers:  # those that are found inside are looked into as well
        for value in list(container.values() if isinstance(container, dict) else container):
            inside, inside_is_of_module = value, is_of_module
            if not isinstance(value, (dict, list, set, deque)):
                if not is_of_module or not _is_a_helper(value):
                    continue  # objects that an object holds are left alone
                inside, inside_is_of_module = vars(value), False
            if id(inside) not in known:
                known.add(id(inside))
                containers.append((inside, inside_is_of_module))
    found = [(container, copy.copy(container)) for container, _ in containers]
    try:
        yield
    finally:
        for container, content in found:
            if _identities(container) != _identities(content):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(content)


class _TensorsAsTheyAre(TorchDispatchMode):
    """Leaves out what would write to a parameter or buffer: a forward may reach them in ways that no proxy sees."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        attributes = pytree.tree_leaves([list(vars(module).values()) for module in root.modules()])
        tensors = [value for value in attributes if isinstance(value, Tensor)]
        self.storages = {_storage(tensor) for tensor in tensors} - {None}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and _storage(value) in self.storages:
                    return value
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int | None:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if plain else None


def _address(tensor: Tensor) -> tuple[object, ...]:
    storage = _storage(tensor)
    return (
        ()
        if storage is None
        else (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    )


def _is_restorable(value: Any) -> bool:
    return (
        type(value) is Tensor
        and value.layout is torch.strided
        and not (value.is_inference() or value.is_nested)
    )


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return sorted(map(id, container)) if isinstance(container, set) else list(map(id, container))
