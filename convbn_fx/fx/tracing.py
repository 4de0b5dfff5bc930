"""Module -> GraphModule: symbolic tracing that keeps convolutions and batch norms visible as nodes.

Whatever tracing walks through is baked in: branches taken, `self.training`, optional arguments. So the tracer walks
through as little as it can. A module that holds no batch norm stays a leaf, whatever it does (dropout, stochastic
depth, attention, squeeze-and-excitation), and so does one with hooks, or one that timm lists as not traceable. A leaf
whose output a batch norm reads is opened afterwards, if it holds a convolution and can be traced: that is where a pair
crosses a module's border.
"""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from convbn_fx import _torch, kinds
from convbn_fx.fx.graph_module import GraphModule
from convbn_fx.fx.private_copy import PrivateCopy, private_copy
from convbn_fx.fx.proxies import Proxy, StoredTensor, known_class
from convbn_fx.kinds import third_party as libraries


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


class Tracer(torch.fx.Tracer):
    """The tracer behind [`symbolic_trace`][convbn_fx.symbolic_trace]; usable with torch.fx's own machinery too.

    Args:
        opened: Qualified names of modules to walk through although they hold no batch norm.
        closed: Qualified names of modules to keep as leaves although they hold one.
    """

    # Buffers are read where the forward reads them, not when it is traced.
    proxy_buffer_attributes = True

    def __init__(self, opened: frozenset[str] = frozenset(), closed: frozenset[str] = frozenset()) -> None:
        super().__init__(autowrap_functions=libraries.functions_kept_whole())
        self.context = _context()
        self.opened = opened
        self.closed = closed
        self.culprit: str | None = None  # the innermost module in which tracing failed
        self.private: PrivateCopy
        self.reads: dict[str, torch.fx.Proxy] = {}
        self.expected: set[Node] = set()

    def trace(
        self,
        root: nn.Module | Callable[..., Any],
        concrete_args: dict[str, Any] | None = None,
    ) -> Graph:
        """Traces a model, as `torch.fx.Tracer.trace` does; tensors that it makes constants become attributes of it."""
        if not isinstance(root, nn.Module):
            return super().trace(root, concrete_args)
        with private_copy(root) as private:
            graph = self.trace_in(private, root, concrete_args)
            vars(root).update(self.constants())
        self.root = root
        return graph

    def trace_in(
        self, private: PrivateCopy, root: nn.Module, concrete_args: dict[str, Any] | None = None
    ) -> Graph:
        """Traces a module in the private copy of its model. Targets are qualified names in the module.

        Args:
            private: The copy.
            root: The model, or a module inside it.
            concrete_args: Arguments of the forward to make constants.

        Returns:
            The graph.
        """
        self.private, private.tracer = private, self
        self.root = private.copies[root]
        self.root_module_name = root._get_name()
        self.submodule_paths = {module: name for name, module in self.root.named_modules()}
        self.graph = Graph(tracer_cls=type(self))
        function = getattr(type(root), self.traced_func_name)
        private.keep_functions_whole(getattr(function, "__globals__", {}))
        with _torch.while_fx_traces():
            forward, args = self.create_args_for_root(function, True, concrete_args)
            returned = inspect.get_annotations(inspect.unwrap(function)).get("return")
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {}, type_expr=returned)
        return self.graph

    def constants(self) -> dict[str, Any]:
        """What tracing has made attributes of the root, by name: tensors that the forward makes, say."""
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        new = vars(self.root).keys() - vars(self.private.originals[self.root]).keys()
        return {name: vars(self.root)[name] for name in read & new}

    @cached_property
    def names_of_tensors(self) -> dict[int, str]:
        """The first qualified name of every parameter and buffer of the root, by identity."""
        names: dict[int, str] = {}
        modules = list(self.private.originals[self.root].named_modules(prefix=""))
        for kind in ("_parameters", "_buffers"):
            for prefix, module in modules:
                for name, tensor in vars(module)[kind].items():
                    names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
        return names

    @cached_property
    def tensor_attrs(self) -> dict[Any, str]:  # type: ignore[override]
        """The qualified names of tensors that are plain attributes, and of what else becomes an attribute."""
        constants = _torch.CONSTANT_ATTRIBUTE_TYPES
        return {
            value: f"{prefix}.{name}" if prefix else name
            for prefix, module in self.root.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, constants)
        }

    def read(self, tensor: Tensor) -> torch.fx.Proxy:
        """The proxy of a parameter or buffer of the root; it is read once."""
        name = self.names_of_tensors.get(id(tensor))
        if name is None:
            raise NameError("parameter is not a member of this module")
        if name not in self.reads:
            self.reads[name] = self.create_proxy("get_attr", name, (), {})
        return self.reads[name]

    def proxy(self, node: Node) -> torch.fx.Proxy:
        """Makes the proxy that stands for a node while the forward runs."""
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calling `m` becomes one node."""
        m = self.original(m)
        if kinds.convolution_kind(m) or kinds.batch_norm_kind(m) or kinds.has_hooks(m):
            return True
        if module_qualified_name in self.closed | self.opened:
            return module_qualified_name in self.closed
        return libraries.is_kept_whole(m) or not kinds.may_hold_batch_norm(m)

    def create_arg(self, a: Any) -> Any:
        """Makes a value an argument of a node. An OrderedDict stays one, where torch.fx would write a dict."""
        if isinstance(a, Tensor) and id(a) in self.names_of_tensors:
            return self.read(a).node
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
        if self.calling_module() not in (self.submodule_paths or {}):
            raise NameError("module is not installed as a submodule")
        return super().create_node(*args, **kwargs)

    def original(self, module: nn.Module) -> nn.Module:
        """The model's module of which one is the copy."""
        return self.private.originals.get(module, module)

    def calling_module(self) -> nn.Module:
        """The innermost module that is being called, wherever the forward has it from."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _TRACE:
            if frame.f_code is _CALL:
                return frame.f_locals["self"]  # type: ignore[no-any-return]
            frame = frame.f_back
        return self.root

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

    def class_of(self, node: Node) -> type | None:
        """The class of what a node stands for; where it is not known, the graph checks what it was taken for.

        That is what an argument is if it is left out, and else a tensor.
        """
        known = known_class(node, self.root)
        if known is not None:
            return known
        default = node.args if node.op == "placeholder" else ()
        expected = type(default[0]) if default else Tensor
        if node not in self.expected:
            self.expected.add(node)
            if default:
                cls = self.create_node("call_function", type, default, {})
                is_expected = self.create_node("call_function", isinstance, (node, cls), {})
            else:
                is_expected = self.create_node("call_function", torch.is_tensor, (node,), {})
            told = f"{node.name} is no {expected.__name__}, which it was taken for when the model was traced"
            self.create_node("call_function", torch._assert, (is_expected, told), {})
        return expected

    def check_reads(self) -> None:
        """Raises if a class computes what stands in the graph for a tensor of that name: it would be computed twice."""
        root = self.private.originals[self.root]
        for name in self.reads:
            owner, _, last = name.rpartition(".")
            module = root.get_submodule(owner)
            if self.names_of_tensors.get(id(getattr(module, last, None))) != name:
                raise RuntimeError(
                    f"the forward reads {name}, which {type(module).__name__} computes when it is read"
                )

    def check_writes(self) -> None:
        """Raises if a tensor is written to that is no parameter or buffer: a graph keeps such as they were made."""
        tensors = set(self.names_of_tensors.values())
        written = [
            source.target
            for node in self.graph.nodes
            if str(getattr(node.target, "__name__", node.target)).endswith("_")
            or node.kwargs.get("out") is not None
            for source in node.all_input_nodes
            if source.op == "get_attr" and source.target not in tensors
        ]
        if written or self.private.writes.has_written:
            raise RuntimeError("the forward writes to a tensor that is no buffer: register it as one")

    def check_leaves(self) -> None:
        """Raises if the forward has computed what a leaf uses: the graph would not."""
        for name, module in self.root.named_modules():
            if name and self.is_leaf_module(module, name):
                for key, value in (vars(module) | module._parameters | module._buffers).items():
                    if isinstance(value, torch.fx.Proxy) and not isinstance(value, StoredTensor):
                        raise RuntimeError(
                            f"the forward assigns {name}.{key}, which a graph cannot do at every call"
                        )


_CALL: Final = nn.Module._call_impl.__code__
_TRACE: Final = Tracer.trace_in.__code__
#: What is running around a module's forward, or the root's.
FORWARD_IS_CALLED_BY: Final = (_CALL, _TRACE)


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
    if type(root).__call__ is not nn.Module.__call__ and not isinstance(root, torch.fx.GraphModule):
        called = TypeError("its class has a __call__ of its own, and tracing would ignore it")
        raise TracingError(type(root).__name__, None, called)
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
            name = error.module
            if name is None or name in closed:
                raise
            if name not in opened and not kinds.resembles_batch_norm(root.get_submodule(name)):
                raise
            opened, closed = (
                opened - {name},
                closed | {name},
            )  # it stays a leaf, and its batch norm gets a Skip
            continue
        feeding = _leaves_before_batch_norms(traced) - closed
        if feeding <= opened:
            return traced
        opened |= feeding


def _trace(
    root: nn.Module, concrete_args: dict[str, Any] | None, opened: frozenset[str], closed: frozenset[str]
) -> GraphModule:
    tracer = Tracer(opened, closed)
    with private_copy(root) as private:
        try:
            graph = tracer.trace_in(private, root, concrete_args)
            tracer.check_leaves()
            tracer.check_reads()
            tracer.check_writes()
            if private.writes.has_drawn:
                raise RuntimeError(
                    "the forward draws random numbers that depend on no input: they would be constants"
                )
        except Exception as error:
            raise TracingError(type(root).__name__, tracer.culprit, error) from error
        return GraphModule(root, graph, type(root).__name__, tracer.constants())


def _leaves_before_batch_norms(traced: GraphModule) -> frozenset[str]:
    """Leaf modules that hold a convolution and whose output is read by a batch norm."""
    leaves = set()
    for node in traced.graph.nodes:
        producer = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(producer, Node) and producer.op == "call_module" and _is_batch_norm(node, traced):
            module = traced.get_submodule(str(producer.target))
            is_whole = kinds.convolution_kind(module) is not None or kinds.has_hooks(module)
            if not is_whole and any(map(kinds.resembles_convolution, module.modules())):
                leaves.add(str(producer.target))
    return frozenset(leaves)


def _is_batch_norm(node: Node, traced: GraphModule) -> bool:
    if node.op == "call_module":
        return kinds.resembles_batch_norm(traced.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target in kinds.BATCH_NORM_FUNCTIONS
