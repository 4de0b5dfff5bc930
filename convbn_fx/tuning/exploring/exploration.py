"""Explores a forward symbolically, its children as leaves: the ways through it, and what each does with what.

Nothing that is recorded here ever runs, so an exploration may guess where a trace has to give up: a branch on data is
taken both ways, a loop over a tensor is short, an optional argument is left out and given, and what a forward did
before it raised counts as well.
"""

import dis
import gc
import inspect
import operator
import sys
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache
from itertools import product
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from convbn_fx import _torch, kinds
from convbn_fx._torch import pytree
from convbn_fx.functional.autocast import autocast_state
from convbn_fx.fx.pairs import Site
from convbn_fx.fx.private_copy import PrivateCopy
from convbn_fx.fx.proxies import Proxy, StoredTensor, is_ours_or_torchs, known_class, questions_of_class
from convbn_fx.fx.side_effects import attributes_as_found, random_states
from convbn_fx.fx.tracing import FORWARD_IS_CALLED_BY, Tracer
from convbn_fx.tuning.exploring.exact_classes import functions_in
from convbn_fx.tuning.exploring.silence import silence
from convbn_fx.tuning.exploring.time_limit import OutOfTime, within

# Of one forward so many ways are looked at, on each of which so many branches are taken.
_PATHS: Final = 16
_BRANCHES: Final = 64
_NODES: Final = 20_000
_SECONDS: Final = 20  # for all ways through one forward; the largest that are known take a tenth of it
_LENGTH: Final = 2  # of what is iterated over, at first


class Context(NamedTuple):
    """What is around a call: whether it records gradients, who saves tensors for it, and its autocast."""

    records_gradients: bool
    saved_by: object
    autocast: tuple[torch.dtype | None, ...]

    @classmethod
    def now(cls) -> "Context":
        """That of whoever asks."""
        hooks: Any = _torch.saved_tensors_hooks()
        # Not the hooks themselves: those of a region keep its arguments.
        saved_by = None if hooks is None else weakref.ref(hooks[0])
        return cls(torch.is_grad_enabled(), saved_by, tuple(map(autocast_state, ("cpu", "cuda"))))


@dataclass
class Path:
    """What one exploration of a forward recorded.

    Attributes:
        root: The module whose forward it is.
        graph: Its nodes; without an output where the forward raised.
        opened: Children whose own forwards are part of it.
        methods: For the nodes of convolutions and batch norms, the calls of the root's methods that were under way.
        sites: For those that are functions, which calls they are.
        contexts: For the nodes of convolutions and batch norms, what with-statements and checkpoints were around them.
        own_context: What was around the forward itself.
        broke_off: Where and why the forward was not followed to its end, or not on all ways; empty if it was.
        has_guessed_a_number: Whether a loop may be longer, or a choice another, than on any way: because of a number of
            a tensor's, one that was drawn, or what the forward itself keeps.
        elsewhere: Modules that it calls and that are not inside the root.
        loops: Whether code that calls functions of convolutions has a loop, which may call one more often.
    """

    root: nn.Module
    graph: Graph
    opened: frozenset[str]
    methods: dict[Node, set[tuple[int, str]]]
    sites: dict[Node, Site]
    contexts: dict[Node, "Context"]
    own_context: "Context"
    broke_off: str
    has_guessed_a_number: bool
    elsewhere: list[nn.Module]
    loops: bool

    def name_of(self, node: Node) -> str:
        """The name of a convolution or batch norm; a function's is under that of the module that calls it."""
        if node.op == "call_module":
            return str(node.target)
        return ".".join(filter(None, (self.sites[node].caller, node.name)))

    @property
    def is_whole(self) -> bool:
        """Whether the forward was followed to its end, and no way through it was left out."""
        return not self.broke_off


class _Guess(Proxy):
    """A proxy that answers what a trace cannot know by a guess."""

    tracer: "_Explorer"

    @property  # type: ignore[misc] # which is how an object passes for one of another class
    def __class__(self) -> Any:
        """The class of what it stands for, to code that asks by `isinstance` or reads the attribute; else its own.

        PyTorch's C++ asks, too, and would take whatever says that it is a tensor for the memory of one.
        """
        asking = sys._getframe(1)
        question = questions_of_class(asking.f_code).get(asking.f_lasti)
        if question is None or is_ours_or_torchs(asking):
            return type(self)
        if question == "__class__":
            self.tracer.asked_for.add(self.node)
        return self.tracer.class_of(self.node) or type(self)

    def __getattr__(self, name: str) -> Any:
        return _GuessedAttribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        operation, argument = _instruction(sys._getframe(1))
        match operation:
            case "UNPACK_SEQUENCE":
                length = argument
            case "UNPACK_EX":  # a, *b, c = ...
                length = (argument & 255) + (argument >> 8) + 1
            case _:
                self.tracer.guesses_for(sys._getframe(1))
                length = self.tracer.length
        return (
            self.tracer.create_proxy("call_function", operator.getitem, (self, i), {}) for i in range(length)
        )

    def __len__(self) -> int:
        self.tracer.guesses_for(sys._getframe(1))
        return self.tracer.length

    def __int__(self) -> int:
        self.tracer.guesses_for(sys._getframe(1))
        return 1

    __index__ = __int__

    def __float__(self) -> float:
        self.tracer.guesses_for(sys._getframe(1))
        return 1.0

    def __round__(self, digits: int | None = None) -> float:
        self.tracer.guesses_for(sys._getframe(1))
        return 1.0 if digits else 1

    def __format__(self, specification: str) -> str:
        return self._written(sys._getframe(1))

    def __str__(self) -> str:
        return self._written(sys._getframe(1))

    def _written(self, frame: FrameType) -> str:
        if _is_kept(frame):
            self.tracer.guesses_for(frame)
        return repr(self)

    def __hash__(self) -> int:  # of a number in a set, or a dtype in a dictionary
        if not is_ours_or_torchs(sys._getframe(1)):
            self.tracer.guesses_for(sys._getframe(1))
        return id(self)

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.to_bool(self))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tracer", "node"):
            super().__setattr__(name, value)
        else:  # such as a tensor's data
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_method", "__setitem__", (self, key, value), {})


class _GuessedAttribute(_Guess):
    """An attribute of what a guess stands for: a node of its own only if it is no method that is called."""

    def __init__(self, owner: _Guess, name: str) -> None:
        vars(self).update(tracer=owner.tracer, _owner=owner, _name=name)

    @property
    def node(self) -> Node:  # type: ignore[override]
        """The node, made when it is first asked for."""
        if "_node" not in vars(self):
            attribute = self.tracer.create_proxy("call_function", getattr, (self._owner, self._name), {})
            vars(self)["_node"] = attribute.node
        return vars(self)["_node"]  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self._name, (self._owner, *args), kwargs)


class GuessedTensor(StoredTensor, _Guess):  # type: ignore[override]
    """A parameter or buffer."""

    __setattr__ = _Guess.__setattr__


def _instruction(frame: FrameType, offset: int | None = None) -> tuple[str, int]:
    """What a frame is doing, or was at an offset: the operation of its bytecode, and the argument."""
    code, offset = frame.f_code.co_code, frame.f_lasti if offset is None else offset
    return dis.opname[code[offset]], code[offset + 1]


def _is_kept(frame: FrameType) -> bool:
    """Whether something is made of what a frame computes: a message that is printed or raised decides on nothing."""
    after = (each.opname for each in dis.get_instructions(frame.f_code) if each.offset > frame.f_lasti)
    ends = (
        "COMPARE",
        "CONTAINS",
        "END_FOR",
        "JUMP",
        "POP_JUMP",
        "POP_TOP",
        "RAISE",
        "RETURN",
        "STORE",
        "YIELD",
    )
    end = next((name for name in after if name.startswith(ends)), "")
    return not is_ours_or_torchs(frame) and not end.startswith(("POP_TOP", "RAISE"))


def _place(frame: FrameType) -> tuple[CodeType, int]:
    return frame.f_code, frame.f_lasti


@cache
def _has_loop(code: CodeType) -> bool:
    return any("BACKWARD" in each.opname for each in dis.get_instructions(code))


def _may_be_in_place(node: Node) -> bool:
    """Whether a node may change what it is given, by its name."""
    name = str(getattr(node.target, "__name__", node.target))
    return (
        name.endswith("_")
        or name in ("setattr", "setitem")
        or (hasattr(operator, f"__{name}__") and name[:1] == "i")
    )


def _tracebacks(error: Exception) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _told(error: Exception) -> str:
    """An exception and its place in the model's own code, in one line."""
    own = [step for step in _tracebacks(error) if not is_ours_or_torchs(step.tb_frame)]
    first_line, *_ = [*str(error).splitlines(), ""]
    told = f"{type(error).__name__}: {first_line[:150]}"
    if not own:
        return told
    code = own[-1].tb_frame.f_code
    return f"{code.co_qualname}, {code.co_filename}:{own[-1].tb_lineno}: {told}"


class _FunctionsOfGuesses(TorchFunctionMode):
    """Records the functions that are given guesses in the place of numbers, before PyTorch's C++ sees them."""

    def __init__(self, tracer: "_Explorer") -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A node if an argument, or a part of one, is a guess; what is of tensors alone is recorded without this."""
        kwargs = kwargs or {}
        is_guess = (issubclass(type(value), _Guess) for value in pytree.tree_leaves((args, kwargs)))
        if not is_tensor_method_or_property(func) and any(is_guess):
            # Whether it is a number was asked before this: nothing depends on which.
            self.tracer.guessed.discard(_place(sys._getframe(1)))
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


def _module_of_elsewhere(*_: Any, **__: Any) -> None:
    """Stands for the call of a module that is not among those of the root."""


class _Explorer(Tracer):
    """Records one way through a forward."""

    def __init__(self, opened: frozenset[str], variant: "_Variant", names: dict[CodeType, str]) -> None:
        super().__init__(opened)
        self.given = variant.given
        self.length = variant.length
        self.needed_length = 0  # of what was unpacked, where it was another than guessed
        self.decisions = list(variant.decisions)
        self.taken = 0
        self.varies = False
        self.guessed: set[tuple[CodeType, int]] = set()  # where the code asked for a number
        self.names = names
        self.frames: dict[FrameType, int] = {}
        self.methods: dict[Node, set[tuple[int, str]]] = {}
        self.calls: dict[Node, tuple[str, frozenset[tuple[str, int]]]] = {}  # of functions: by whom, numbers
        self.convolved = [0]  # how many convolutions the forwards that are under way have called
        self.convolved_before: dict[int, int] = {}  # a call of a method of the root
        self.callees: defaultdict[str, set[str]] = defaultdict(set)
        self.contexts: dict[Node, Context] = {}
        self.own_context = Context.now()
        self.left_out: list[Any] = []
        self.elsewhere: list[nn.Module] = []
        self.loops = False
        self.asked_for: set[Node] = set()  # whose class was, not by isinstance
        self.classes: dict[Node, type | None] = {}
        self.truths: dict[Node, bool] = {}  # of arguments
        self.outputs: list[tuple[Node, weakref.ReferenceType[Proxy]]] = []  # of convolutions

    def proxy(self, node: Node) -> Proxy:
        """Makes the proxy that stands for a node while the forward runs."""
        proxy = _Guess(node, self)
        if node in self.methods:
            self.outputs.append((node, weakref.ref(proxy)))
        return proxy

    def follow(self, private: PrivateCopy, root: nn.Module, seconds: float) -> str:
        """Follows the forward as far as guesses lead; tells where and why it was not to its end.

        What a forward raises itself is an end, too, unless a guessed number may be the cause.
        """
        try:
            with _FunctionsOfGuesses(self):
                within(seconds, lambda: self.trace_in(private, root))
        except OutOfTime:
            return f"it has not ended after {_SECONDS} seconds"
        except Exception as error:  # noqa: BLE001 - a forward may raise anything, and this one is given guesses
            *_, innermost = _tracebacks(error)
            operation, argument = _instruction(innermost.tb_frame, innermost.tb_lasti)
            if operation == "UNPACK_SEQUENCE":
                self.needed_length = argument
            raises = operation == "RAISE_VARARGS" and not is_ours_or_torchs(innermost.tb_frame)
            return "" if raises and not self.guessed else _told(error)
        return ""

    def guesses_for(self, frame: FrameType) -> None:
        """Notes that a number was guessed which this code asked for."""
        self.guessed.add(_place(frame))

    def note_what_is_kept(self) -> None:
        """Records a reader of every output that outlives the forward, in whatever keeps it."""
        self.frames.clear()  # they keep what was local
        if any(reference() is not None for _, reference in self.outputs):
            gc.collect(0)  # where all that the forward has made still is
        kept = [node for node, reference in self.outputs if reference() is not None or node in self.asked_for]
        self.graph.create_node("call_function", kept_by_someone, tuple(kept))

    def path(self, broke_off: str) -> Path:
        """What has been recorded."""
        return Path(
            self.original(self.root),
            self.graph,
            self.opened,
            self.methods,
            {
                node: Site(caller, numbers, frozenset(self.callees[caller]))
                for node, (caller, numbers) in self.calls.items()
            },
            self.contexts,
            self.own_context,
            broke_off,
            bool(self.guessed) or self.varies,
            self.elsewhere,
            self.loops,
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calling `m` becomes one node."""
        return module_qualified_name not in self.opened

    def class_of(self, node: Node) -> type | None:
        """The class of what a node stands for: a tensor, and on another way something else, where it is not known."""
        if node not in self.classes:
            known = known_class(node, self.root)
            self.classes[node] = known or (Tensor if self._decision() else None)
        return self.classes[node]

    def to_bool(self, obj: Any) -> bool:
        """The truth of a value: that of an argument is the same whenever it is asked for."""
        node = obj.node
        if node.op != "placeholder" or any(map(_may_be_in_place, node.users)):
            return self._decision()
        if node not in self.truths:
            self.truths[node] = self._decision()
        return self.truths[node]

    def _decision(self) -> bool:
        """The branch that was decided on, or else the first."""
        if self.taken == _BRANCHES:
            raise RuntimeError("this forward branches without end")
        self.taken += 1
        if self.taken > len(self.decisions):
            self.decisions.append(True)
        return self.decisions[self.taken - 1]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Makes proxies for the required arguments, and for those optional ones that are to be given."""
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD or (
                parameter.default is not parameter.empty and parameter.name not in self.given
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
            self.elsewhere.append(self.original(m))
            return self.create_proxy("call_function", _module_of_elsewhere, args, kwargs)
        self.callees[self.scope.module_path].add(self.path_of_module(m))
        self.convolved.append(0)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.convolved.pop()
            self.convolved[-1] += kinds.convolution_kind(m) is not None

    def create_arg(self, a: Any) -> Any:
        """Makes a value an argument of a node; an object that a graph cannot hold is left out."""
        if issubclass(type(a), _Guess):
            return a.node
        if is_dataclass(a) and not isinstance(a, (type, dict)):
            self.left_out.append(a)  # the forward hands it on as it is, and nothing looks inside
        try:
            return super().create_arg(a)
        except (NotImplementedError, NameError, RuntimeError):
            self.left_out.append(a)  # what it holds counts as kept
            return None

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Records a node, and which methods of the root were running."""
        if len(self.graph.nodes) > _NODES:
            raise RuntimeError("this forward goes on without end")
        if kind == "call_function" and self.calling_module() not in (self.submodule_paths or {}):
            self.elsewhere.append(self.calling_module())
            if target in kinds.CONVOLUTION_FUNCTIONS or target in kinds.BATCH_NORM_FUNCTIONS:
                target = _module_of_elsewhere
        node = super(Tracer, self).create_node(kind, target, *args, **kwargs)
        if (
            kind == "call_module"
            or target in kinds.CONVOLUTION_FUNCTIONS
            or target in kinds.BATCH_NORM_FUNCTIONS
        ):
            self.methods[node] = methods = set(self._methods_running())
            for call, _ in methods:
                self.convolved_before.setdefault(call, self.convolved[0])
            if kind == "call_function":
                self._note_call(node, methods)
            self.contexts[node] = Context.now()
        return node

    def _note_call(self, node: Node, methods: set[tuple[int, str]]) -> None:
        """Records which call of a function a node is."""
        caller, number = self.scope.module_path, self.convolved[-1]
        numbers = {(name, number - self.convolved_before[call]) for call, name in methods if not caller}
        self.calls[node] = caller, frozenset(numbers or {("forward", number)})
        self.convolved[-1] += node.target in kinds.CONVOLUTION_FUNCTIONS
        self.loops = self.loops or any(map(_has_loop, self._codes_of_caller()))

    def _codes_of_caller(self) -> Iterator[CodeType]:
        """The code that is running, out to the forward of the module that calls."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code not in FORWARD_IS_CALLED_BY:
            if not is_ours_or_torchs(frame):
                yield frame.f_code
            frame = frame.f_back

    def _methods_running(self) -> Iterator[tuple[int, str]]:
        """The calls of the root's methods that are under way, each with a number of its own, and their names."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = self.names.get(frame.f_code)
            if name and frame.f_locals.get(frame.f_code.co_varnames[0]) is self.root:
                yield self.frames.setdefault(frame, len(self.frames)), name
            frame = frame.f_back


class _Variant(NamedTuple):
    """How an exploration is to go."""

    training: bool
    given: frozenset[str]  # of the optional arguments
    decisions: tuple[bool, ...] = ()
    length: int = _LENGTH


def kept_by_someone(*_: Any) -> None:
    """Stands for whoever reads what a forward has left behind."""


def beside_data(value: Any) -> Any:
    """What a value is, if it is not nothing but tensors: the module, of the output of a convolution; else itself."""
    if type(value) in (list, tuple):
        return next((found for part in value if (found := beside_data(part)) is not None), None)
    if type(value) is not _Guess:
        return None if issubclass(type(value), (Tensor, _Guess)) else value
    node, tracer = value.node, value.tracer
    is_function = node.target in kinds.CONVOLUTION_FUNCTIONS and node in tracer.calls
    if not is_function and node.op != "call_module":
        return None
    module = tracer.root.get_submodule(tracer.calls[node][0] if is_function else str(node.target))
    is_convolution = is_function or kinds.resembles_convolution(module)
    return tracer.private.originals.get(module) if is_convolution else None


def explore(root: nn.Module, borders: "Borders", private: PrivateCopy, method: str = "forward") -> list[Path]:
    """Explores a module's forward, and inside those children whose border a pair may cross.

    Args:
        root: The module.
        borders: What is known of its children.
        private: The copy of the model to run it in.
        method: Name of another method that is to be explored.

    Returns:
        The ways through it.
    """
    opened: frozenset[str] = frozenset()
    while True:
        paths = _paths(root, opened, private, method)
        crossed = {name for path in paths for name in borders.crossed(path)}
        if crossed <= opened:
            return paths
        opened |= crossed


def explore_again(paths: list[Path], private: PrivateCopy, method: str = "forward") -> list[Path]:
    """Explores the forward, or other method, that these ways lead through once more."""
    return _paths(paths[0].root, paths[0].opened, private, method)


def _paths(root: nn.Module, opened: frozenset[str], private: PrivateCopy, method: str) -> list[Path]:
    parameters = list(inspect.signature(getattr(type(root), method)).parameters.values())[1:]
    optional = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    given_together = {frozenset[str](), frozenset(optional), *(frozenset({name}) for name in optional)}
    variants = product(
        (False, True) if _reads_its_mode(root) else (root.training,), sorted(given_together, key=len)
    )
    names = _names_of_methods(type(root))
    pending = [_Variant(*variant) for variant in variants]
    paths: list[Path] = []
    end = time.monotonic() + _SECONDS
    while pending and len(paths) < _PATHS and (not paths or time.monotonic() < end):
        variant = pending.pop(0)
        explorer = _Explorer(opened, variant, names)
        explorer.traced_func_name = method
        copied = private.copies[root]
        mode, copied.training = copied.training, variant.training
        states, private.writes.has_drawn = random_states(), False
        with (
            silence(),
            attributes_as_found((copied, *map(copied.get_submodule, opened))) as has_changed,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            with _nothing_ages():
                broke_off = explorer.follow(private, root, end - time.monotonic())
                explorer.note_what_is_kept()
            # The next call may go another way.
            explorer.varies = private.writes.has_drawn or random_states() != states or has_changed()
        copied.training = mode
        if explorer.needed_length and variant.length == _LENGTH != explorer.needed_length:
            pending.insert(0, variant._replace(length=explorer.needed_length))
            continue
        pending += [
            variant._replace(decisions=(*explorer.decisions[:taken], False))
            for taken in range(len(variant.decisions), len(explorer.decisions))
        ]
        paths.append(explorer.path(broke_off))
    if pending:
        told = f"more than {_PATHS} ways lead through it, or they take more than {_SECONDS} seconds"
        paths[-1].broke_off = paths[-1].broke_off or told
    return paths


@contextmanager
def _nothing_ages() -> Iterator[None]:
    """Holds the garbage collector back: what is made meanwhile stays young, and the young are quickly collected."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _names_of_methods(cls: type[nn.Module]) -> dict[CodeType, str]:
    """The names of a class's methods by their code, and by that of what they decorate."""
    return {
        function.__code__: name
        for base in cls.__mro__
        if base is not nn.Module
        for name, value in vars(base).items()
        if isinstance(value, FunctionType)
        for function in functions_in(value)
        if function.__code__.co_argcount
    }


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
class Borders:
    """The modules whose output may be a convolution's, and those whose input may go straight to a batch norm.

    Attributes:
        convolutions: Ids of the former.
        batch_norms: Ids of the latter.
    """

    convolutions: set[int]
    batch_norms: set[int]

    def learn(self, path: Path) -> None:
        """Adds what one way through a module's forward shows of the module."""
        for node in path.graph.nodes:
            if node.op == "output" and any(
                self._produces(source, path.root) for source in node.all_input_nodes
            ):
                self.convolutions.add(id(path.root))
            if node.op == "placeholder" and any(self._consumes(user, path.root) for user in node.users):
                self.batch_norms.add(id(path.root))

    def crossed(self, path: Path) -> Iterator[str]:
        """Names of the children out of which, or into which, a convolution's output goes to a batch norm."""
        for node in path.graph.nodes:
            if not self._produces(node, path.root):
                continue
            for user in node.users:
                if self._consumes(user, path.root):
                    yield from (end.target for end in (node, user) if self._is_crossed(end, path.root))

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
