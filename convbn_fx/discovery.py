"""Which pairs a model's forwards run: every module's own forward is explored symbolically, its children as leaves.

What is found decides only which convolutions may wait for a batch norm, and what the report says. What runs is always
the forward itself (see [`deferral`][convbn_fx.deferral]), so an exploration may guess where a trace has to give up: a
branch on data is taken both ways, a loop over a tensor is short, an optional argument is left out and given, and what
a forward did before it raised counts as well.
"""

import gc
import inspect
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from types import FrameType, FunctionType
from typing import Any, Final

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.lazy import LazyModuleMixin

from convbn_fx import kinds
from convbn_fx.function_calls import Site, site_of_caller
from convbn_fx.graph_module import GraphModule
from convbn_fx.matching import find_pairs_in
from convbn_fx.records import Match, Pair, Skip, SkipReason
from convbn_fx.tracing import Proxy, Tracer, attributes_as_found, left_as_found

# Of one forward so many ways are looked at, on each of which so many branches are taken.
_WAYS: Final = 16
_BRANCHES: Final = 64
_NODES: Final = 20_000


@dataclass(frozen=True)
class OwnedPair:
    """A pair of modules, and whose forward runs it. All names are qualified names in the model.

    Attributes:
        record: The record for the report.
        owner: The module whose own forward runs both.
        methods: Names of the owner's methods that run both.
        between: Modules inside the owner out of or into which the convolution's output goes on its way.
        site: Where the convolution is called, if it is a function.
        to_function: Whether the batch norm is a function.
    """

    record: Pair
    owner: str
    methods: frozenset[str]
    between: frozenset[str]
    site: Site | None = None
    to_function: bool = False


@dataclass
class _Way:
    """What one exploration of a forward recorded."""

    root: nn.Module
    graph: Graph
    opened: frozenset[str]
    methods: dict[Node, set[tuple[int, str]]]
    sites: dict[Node, Site | None]
    with_other_gradients: set[Node]


@dataclass
class Discovery:
    """What the forwards of a model do with convolutions and batch norms.

    Attributes:
        pairs: The pairs, in the order of the forwards.
        skips: A `Skip` for every Eval-mode batch norm that is in no pair.
        used_apart: Convolutions and batch norms (by id) that some forward also uses outside of a pair.
    """

    pairs: list[OwnedPair]
    skips: list[Skip]
    used_apart: set[int]


def discover(model: nn.Module, include_training: bool = False) -> Discovery:
    """Explores every forward of a model.

    Args:
        model: The model; it is left as it was found.
        include_training: Take pairs whose batch norm is in Train mode now as well.

    Returns:
        The pairs that its forwards run.
    """
    pairs: dict[tuple[str, str], OwnedPair] = {}
    skips: dict[str, Skip] = {}
    decided: dict[str, Skip] = {}  # those that no other way through a forward outvotes
    used_apart: set[int] = set()
    ends = _Ends(set(), set())
    with left_as_found(model):
        # Children first: how their forwards begin and end decides whether their parent looks inside them.
        for name, module in _with_forwards_of_their_own(model):
            for way in _explore(module, ends):
                ends.learn(way)
                matches, refusals = find_pairs_in(way.graph, module, include_training)
                judged = [(match, _refusal(match, way)) for match in matches]
                taken = [match for match, refusal in judged if refusal is None]
                refusals += [refusal for _, refusal in judged if refusal is not None]
                for pair in (_owned(match, way, name) for match in taken):
                    pairs.setdefault((pair.record.convolution, pair.record.batch_norm), pair)
                for skip in (
                    refusal.prefixed(name) for refusal in refusals
                ):  # the outermost forward knows best
                    skips[skip.batch_norm] = skip
                    if skip.reason is SkipReason.MODIFIED_IN_BETWEEN:
                        decided[skip.batch_norm] = skip
                for output in _kept_outputs(way):
                    decided[_joined(name, output)] = _KEPT
                used_apart |= _used_apart(way, taken)
    for key, pair in list(pairs.items()):
        decision = decided.get(pair.record.batch_norm) or decided.get(pair.record.convolution)
        if decision is not None:
            del pairs[key]
            skips[pair.record.batch_norm] = replace(decision, batch_norm=pair.record.batch_norm)
    fused = {pair.record.batch_norm for pair in pairs.values()}
    left = [skip for name, skip in skips.items() if name not in fused]
    never_called = _never_called(model, fused | skips.keys())
    return Discovery(list(pairs.values())[::-1], left[::-1] + never_called, used_apart)


def _kept_outputs(way: _Way) -> Iterator[str]:
    """The convolutions whose output is put where the forward's own variables do not reach."""
    for node in way.graph.nodes:
        readers = [user for user in node.users if user.target is _kept or _is_stored_by(user, node)]
        if readers and node in way.methods:
            yield str(node.target) if node.op == "call_module" else node.name


def _is_stored_by(user: Node, node: Node) -> bool:
    """Whether a method of a container is called with the node."""
    storing = (
        "append",
        "extend",
        "insert",
        "add",
        "update",
        "setdefault",
        "appendleft",
        "put",
        "__setitem__",
    )
    return user.op == "call_method" and user.target in storing and node not in user.args[:1]


def _used_apart(way: _Way, matches: list[Match]) -> set[int]:
    """The modules of this way's calls that no pair explains, but for what its caller gives or gets."""
    paired = {node for match in matches for node in (match.convolution_node, match.batch_norm_node)}
    apart = set()
    for node in way.graph.nodes:
        if node.op != "call_module" or node in paired:
            continue
        module = way.root.get_submodule(str(node.target))
        users = {user.op for user in node.users}
        sources = {source.op for source in node.all_input_nodes}
        if (kinds.convolution_kind(module) is not None and users - {"output"}) or (
            kinds.resembles_batch_norm(module) and sources - {"placeholder"}
        ):
            apart.add(id(module))
    return apart


_KEPT: Final = Skip("", SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, "kept on some path of the forward")


def _with_forwards_of_their_own(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules to explore, children first."""
    in_graphs = {id(module) for graph in _graphs(model) for module in _uncalled(graph)}
    for name, module in reversed(list(model.named_modules())):
        if id(module) not in in_graphs and not _is_leaf(module):
            yield name, module


def _graphs(model: nn.Module) -> list[GraphModule]:
    return [module for module in model.modules() if isinstance(module, GraphModule)]


def _uncalled(graph_module: GraphModule) -> Iterator[nn.Module]:
    """The modules inside a graph that are neither called by a node nor inside one that is."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    for name, module in graph_module.named_modules():
        if called.isdisjoint({name, *_enclosing(name)}):
            yield module


def _is_leaf(module: nn.Module) -> bool:
    """Whether nothing is to be learnt from the module's own forward."""
    return (
        kinds.convolution_kind(module) is not None
        or kinds.batch_norm_kind(module) is not None
        or isinstance(module, (GraphModule, torch.jit.ScriptModule, LazyModuleMixin))
        or "forward" in vars(module)  # which the class's generated one could not replace
        or type(module).forward is _NO_FORWARD
        or not any(
            kinds.resembles_convolution(part)
            or kinds.resembles_batch_norm(part)
            or len(part._buffers) > 1  # which may be the statistics of a function
            for part in module.modules()
        )
    )


_NO_FORWARD: Final = nn.Module.forward


def _never_called(model: nn.Module, known: set[str]) -> list[Skip]:
    """Skips for the Eval-mode batch norms that no exploration saw; those in graphs are in the graphs' own reports."""
    in_graphs = {id(part) for graph in _graphs(model) for part in graph.modules()}
    patched = {name for name, module in model.named_modules() if "forward" in vars(module)}
    return [
        Skip(name, SkipReason.NOT_CALLED)
        if patched.isdisjoint({"", *_enclosing(name)})
        else Skip(name, SkipReason.INSIDE_LEAF_MODULE, "the forward of an instance was replaced")
        for name, module in model.named_modules()
        if kinds.resembles_batch_norm(module)
        and not module.training
        and name not in known
        and id(module) not in in_graphs
    ]


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# --- One way through a forward -----------------------------------------------------------------------------------


def _refusal(match: Match, way: _Way) -> Skip | None:
    """Why a pair that a graph could fuse cannot wait for its batch norm in a forward."""
    name = match.pair.batch_norm
    if match.convolution_node.op == "call_function" and isinstance(way.root, torch.fx.GraphModule):
        return Skip(name, SkipReason.FUNCTION_CALL)
    if match.convolution_node.users.keys() != {match.batch_norm_node: None}.keys():
        return Skip(name, SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, "its shape or dtype is read")
    if way.with_other_gradients & {match.convolution_node, match.batch_norm_node}:
        return Skip(name, SkipReason.UNUSUAL_CALL, "inside a with-statement that changes the grad mode")
    return None


def _owned(match: Match, way: _Way, owner: str) -> OwnedPair:
    calls = way.methods.get(match.convolution_node, set()) & way.methods.get(match.batch_norm_node, set())
    methods = {name for _, name in calls}
    convolution, batch_norm = _enclosing(match.pair.convolution), _enclosing(match.pair.batch_norm)
    record = replace(
        match.pair,
        convolution=_joined(owner, match.pair.convolution),
        batch_norm=_joined(owner, match.pair.batch_norm),
    )
    between = (convolution ^ batch_norm) & way.opened
    return OwnedPair(
        record,
        owner,
        frozenset(methods | {"forward"}),
        frozenset(_joined(owner, name) for name in between),
        way.sites.get(match.convolution_node),
        match.batch_norm_node.op == "call_function",
    )


def _enclosing(name: str) -> frozenset[str]:
    """The qualified names of the modules around one."""
    return frozenset(name[:end] for end, letter in enumerate(name) if letter == ".")


class _Guess(Proxy):
    """A proxy that answers what a trace cannot know by a guess."""

    tracer: "_Explorer"

    @property  # type: ignore[misc] # which is how an object passes for one of another class
    def __class__(self) -> Any:
        """Its class; a forward that asks for it is noted, as what stands for an output may be of another."""
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith(("torch.", "convbn_fx.")):
            self.tracer.asked_for.add(self.node)
        return _Guess

    def __iter__(self) -> Iterator[Any]:
        try:
            return super().__iter__()
        except torch.fx.proxy.TraceError:
            return iter(
                [self.tracer.create_proxy("call_function", operator.getitem, (self, i), {}) for i in (0, 1)]
            )

    def __len__(self) -> int:
        return 2

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __float__(self) -> float:
        return 1.0

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.to_bool(self))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tracer", "node"):
            super().__setattr__(name, value)
        else:  # such as a tensor's data
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_method", "__setitem__", (self, key, value), {})


def _module_of_elsewhere(*_: Any, **__: Any) -> None:
    """Stands for the call of a module that is not among those of the root."""


class _Explorer(Tracer):
    """Records one way through a forward."""

    def __init__(self, opened: frozenset[str], given_all: bool, decisions: tuple[bool, ...]) -> None:
        super().__init__(opened)
        self.given_all = given_all
        self.decisions = list(decisions)
        self.taken = 0
        self.frames: dict[FrameType, int] = {}
        self.methods: dict[Node, set[tuple[int, str]]] = {}
        self.sites: dict[Node, Site | None] = {}
        self.with_other_gradients: set[Node] = set()
        self.left_out: list[Any] = []
        self.asked_for: set[Node] = set()  # whose class was
        self.outputs: list[tuple[Node, weakref.ReferenceType[Proxy]]] = []  # of convolutions

    def proxy(self, node: Node) -> Proxy:
        """Makes the proxy that stands for a node while the forward runs."""
        proxy = _Guess(node, self)
        if node in self.methods:
            self.outputs.append((node, weakref.ref(proxy)))
        return proxy

    def note_what_is_kept(self) -> None:
        """Records a reader of every output that outlives the forward, in whatever keeps it."""
        self.frames.clear()  # they keep what was local
        if any(reference() is not None for _, reference in self.outputs):
            gc.collect()
        kept = [node for node, reference in self.outputs if reference() is not None or node in self.asked_for]
        self.graph.create_node("call_function", _kept, tuple(kept))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calling `m` becomes one node."""
        return module_qualified_name not in self.opened

    def to_bool(self, obj: Any) -> bool:
        """Takes the branch that was decided on, or else the first."""
        if self.taken == _BRANCHES:
            raise RuntimeError("this forward branches without end")
        self.taken += 1
        if self.taken > len(self.decisions):
            self.decisions.append(True)
        return self.decisions[self.taken - 1]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Makes proxies for the required arguments, or for all."""
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD or (
                parameter.default is not parameter.empty and not self.given_all
            ):
                continue
            proxy = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY or (
                kwargs and parameter.kind is not parameter.VAR_POSITIONAL
            ):
                kwargs[parameter.name] = proxy
            else:
                args.append(proxy)
        return lambda: root_fn(*args, **kwargs), []

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records a module's call, wherever the forward has the module from."""
        if m not in (self.submodule_paths or {}):
            return self.create_proxy("call_function", _module_of_elsewhere, args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        """Makes a value an argument of a node; an object that a graph cannot hold is left out."""
        if type(a) is _Guess:
            return a.node
        try:
            return super().create_arg(a)
        except (NotImplementedError, NameError, RuntimeError):
            self.left_out.append(a)  # what it holds counts as kept
            return None

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Records a node, and which methods of the root were running."""
        if len(self.graph.nodes) > _NODES:
            raise RuntimeError("this forward goes on without end")
        node = super(Tracer, self).create_node(kind, target, *args, **kwargs)
        if (
            kind == "call_module"
            or target in kinds.CONVOLUTION_FUNCTIONS
            or target in kinds.BATCH_NORM_FUNCTIONS
        ):
            self.methods[node] = set(self._methods_running())
            if kind == "call_function":
                self.sites[node] = site_of_caller(sys._getframe(1))
            if torch.is_grad_enabled() != self.context[0]:
                self.with_other_gradients.add(node)
        return node

    def _methods_running(self) -> Iterator[tuple[int, str]]:
        """The calls of the root's methods that are under way, each with a number of its own, and their names."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is self.root:
                yield self.frames.setdefault(frame, len(self.frames)), code.co_name
            frame = frame.f_back


def _kept(*_: Any) -> None:
    """Stands for whoever reads what a forward has left behind."""


def _explore(root: nn.Module, ends: "_Ends") -> list[_Way]:
    """The ways through a module's forward, inside those children too whose border a pair may cross."""
    opened: frozenset[str] = frozenset()
    while True:
        ways = list(_ways(root, opened))
        crossed = {name for way in ways for name in ends.crossed(way)}
        if crossed <= opened:
            return ways
        opened |= crossed


def _ways(root: nn.Module, opened: frozenset[str]) -> Iterator[_Way]:
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1:]
    has_optional = any(parameter.default is not parameter.empty for parameter in parameters)
    variants = product(
        (False, True) if _reads_its_mode(root) else (root.training,), (False, True)[: 1 + has_optional]
    )
    pending: list[tuple[bool, bool, tuple[bool, ...]]] = [(*variant, ()) for variant in variants]
    for _ in range(_WAYS):
        if not pending:
            return
        training, given_all, decisions = pending.pop(0)
        explorer = _Explorer(opened, given_all, decisions)
        with attributes_as_found((root, *map(root.get_submodule, opened))), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root.training = training
            with suppress(Exception):  # a forward may raise anything, and this one is given guesses
                explorer.trace(root)
            explorer.note_what_is_kept()
        yield _Way(
            root, explorer.graph, opened, explorer.methods, explorer.sites, explorer.with_other_gradients
        )
        pending += [
            (training, given_all, (*explorer.decisions[:taken], False))
            for taken in range(len(decisions), len(explorer.decisions))
        ]


def _reads_its_mode(module: nn.Module) -> bool:
    functions = [
        value for cls in type(module).__mro__ for value in vars(cls).values() if cls is not nn.Module
    ]
    return any(
        "training" in function.__code__.co_names
        for function in functions
        if isinstance(function, FunctionType)
    )


# --- How forwards begin and end ----------------------------------------------------------------------------------


@dataclass
class _Ends:
    """The modules whose output may be a convolution's, and those whose input may go straight to a batch norm."""

    convolutions: set[int]
    batch_norms: set[int]

    def learn(self, way: _Way) -> None:
        """Adds what one way through a module's forward shows of the module."""
        for node in way.graph.nodes:
            if node.op == "output" and any(
                self._produces(source, way.root) for source in node.all_input_nodes
            ):
                self.convolutions.add(id(way.root))
            if node.op == "placeholder" and any(self._consumes(user, way.root) for user in node.users):
                self.batch_norms.add(id(way.root))

    def crossed(self, way: _Way) -> Iterator[str]:
        """Names of the children out of which, or into which, a convolution's output goes to a batch norm."""
        for node in way.graph.nodes:
            if not self._produces(node, way.root):
                continue
            for user in node.users:
                if self._consumes(user, way.root):
                    yield from (end.target for end in (node, user) if self._is_crossed(end, way.root))

    def _produces(self, node: Node, root: nn.Module) -> bool:
        if node.op != "call_module":
            return node.target in kinds.CONVOLUTION_FUNCTIONS
        module = root.get_submodule(str(node.target))
        return kinds.convolution_kind(module) is not None or id(module) in self.convolutions

    def _consumes(self, node: Node, root: nn.Module) -> bool:
        if node.op != "call_module":
            return node.target in kinds.BATCH_NORM_FUNCTIONS
        module = root.get_submodule(str(node.target))
        return kinds.resembles_batch_norm(module) or id(module) in self.batch_norms

    def _is_crossed(self, node: Node, root: nn.Module) -> bool:
        return (
            node.op == "call_module"
            and id(root.get_submodule(str(node.target))) in self.convolutions | self.batch_norms
        )
