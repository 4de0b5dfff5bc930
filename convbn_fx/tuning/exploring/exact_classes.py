"""Code of a model that asks for an exact class: `type(module) is nn.BatchNorm2d`, `module.__class__ in TABLE`.

Tuned modules are of generated subclasses, what stands for a tensor is of one, and what is baked is of another class. An
exploration does not see such a question, so the source is read of all that a forward and `train` may come to call.
"""

import ast
import builtins
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple

from torch import nn

from convbn_fx import kinds

_BEGINNINGS: Final = ("forward", "train", "__call__")


class Question(NamedTuple):
    """A place where code asks for a class.

    Attributes:
        told: Where, and how it reads.
        classes: What the class is compared with; None where that cannot be told.
    """

    told: str
    classes: frozenset[type] | None

    def is_answered_otherwise(self, changed: set[type]) -> bool:
        """Whether the answer may be another where what is of one of these classes becomes of a subclass."""
        return self.classes is None or not changed.isdisjoint(self.classes)


def questions_in(model: nn.Module) -> list[tuple[nn.Module, Question]]:
    """What the modules of a model ask about exact classes."""
    bases = {
        module: [cls for cls in kinds.class_of(module).__mro__ if not _is_of_torch(cls.__module__)]
        for module in model.modules()
    }
    attributes: list[tuple[Any, type]] = [
        (cls, cls) for cls in dict.fromkeys(cls for classes in bases.values() for cls in classes)
    ]
    attributes += [(module, kinds.class_of(module)) for module in bases]  # functions that it keeps, too
    questions = _questions_of_classes(attributes)
    return [
        (module, question)
        for module, classes in bases.items()
        for cls in classes
        for question in questions.get(cls, ())
    ]


def _questions_of_classes(holders: list[tuple[Any, type]]) -> dict[type, list[Question]]:
    """What the forward and `train` of classes ask, and what these may come to call; and who has which functions."""
    methods: defaultdict[str, list[tuple[FunctionType, type]]] = defaultdict(list)
    for holder, owner in holders:
        for name, value in vars(holder).items():
            methods[name] += [(function, owner) for function in functions_in(value)]
    found: defaultdict[type, list[Question]] = defaultdict(list)
    pending = [method for name in _BEGINNINGS for method in methods.pop(name, [])]
    known: set[tuple[FunctionType, type]] = set()
    while pending:
        function, owner = pending.pop()
        if (function, owner) in known:
            continue
        known.add((function, owner))
        found[owner] += _questions(function)
        for name in _names_in(function.__code__):
            pending += methods.pop(name, [])
            helper = function.__globals__.get(name)
            if isinstance(helper, FunctionType) and not _is_of_torch(helper.__module__):
                pending.append((helper, owner))
    return found


def functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions of which an attribute of a class is made: itself, what it decorates, what it wraps."""
    pending, known = [value], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        cls = type(value)  # a weak proxy passes for what it refers to
        if issubclass(cls, (staticmethod, classmethod)):
            pending.append(value.__func__)
        elif issubclass(cls, property):
            pending += [value.fget, value.fset]
        elif issubclass(cls, (functools.partial, functools.partialmethod)):
            pending.append(value.func)
        elif cls is FunctionType:
            yield value
            pending += [value.__dict__.get("__wrapped__"), *_closed_over(value).values()]


def _closed_over(function: FunctionType) -> dict[str, Any]:
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # nothing has been assigned to it yet
            continue
    return values


def _is_of_torch(name: str | None) -> bool:
    return f"{name}.".startswith(("torch.", "builtins.", "convbn_fx."))


def _names_in(code: CodeType) -> Iterator[str]:
    """What a function's code, and that of the functions defined in it, reads from elsewhere by name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


# --- One function ------------------------------------------------------------------------------------------------


def _questions(function: FunctionType) -> list[Question]:
    """What a function asks about classes."""
    if not {"type", "__class__"} & set(_names_in(function.__code__)):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return [Question(f"{function.__qualname__} asks for a class, in code without source", None)]
    names = _Names(function, tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return [
        Question(
            f"{function.__qualname__} asks: {ast.unparse(parents[node])}",
            _compared_with(node, parents[node], names),
        )
        for node in ast.walk(tree)
        if _is_a_class(node) and not _is_harmless(node, parents)
    ]


def _is_a_class(node: ast.AST) -> bool:
    """Whether an expression is `type(...)` or `....__class__`."""
    match node:
        case ast.Call(ast.Name("type"), [_], []) | ast.Attribute(attr="__class__"):
            return True
    return False


#: Attributes of a class that a subclass does not have from it.
_OWN_ATTRIBUTES: Final = frozenset({"__mro__", "mro", "__bases__", "__base__", "__subclasses__", "__dict__"})


def _is_harmless(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a subclass of the same name does as well: an attribute is read, an instance made, a message written."""
    around = node
    while around in parents:
        around = parents[around]
        if isinstance(around, (ast.Raise, ast.FormattedValue)):
            return True
    match parents[node]:
        case ast.Attribute(attr=name):
            return name not in _OWN_ATTRIBUTES
        case ast.Call(ast.Name(function), [first, *_]) if first is node:
            return function in ("print", "str", "repr", "issubclass", "hasattr", "getattr")
        case ast.Call(function):
            return function is node
    return isinstance(parents[node], ast.Expr)


class _Names:
    """What the names in a function mean.

    Args:
        function: The function.
        tree: Its source.
    """

    def __init__(self, function: FunctionType, tree: ast.AST) -> None:
        nodes = list(ast.walk(tree))
        self.local = {
            node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self.local |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.values = vars(builtins) | function.__globals__ | _closed_over(function)

    def meaning(self, node: ast.expr) -> Any:
        """The value of an expression.

        Raises:
            LookupError: It cannot be told.
        """
        match node:
            case ast.Tuple(parts) | ast.List(parts) | ast.Set(parts):
                return [self.meaning(part) for part in parts]
            case ast.Constant(value):
                return value
            case ast.Name(name) if name not in self.local:
                return self.values[name]
            case ast.Attribute(owner, name) if isinstance(found := self.meaning(owner), (ModuleType, type)):
                return vars(found)[name]
        raise LookupError


def _compared_with(node: ast.AST, parent: ast.AST, names: _Names) -> frozenset[type] | None:
    """The classes that a class is compared with; None where it is used in another way, or they cannot be told."""
    if not isinstance(parent, ast.Compare):
        return None
    try:
        others = [names.meaning(side) for side in (parent.left, *parent.comparators) if side is not node]
    except LookupError:
        return None
    return frozenset(cls for other in others for cls in _classes(other))


def _classes(value: Any) -> Iterator[type]:
    """The classes that a value is, or has in it."""
    if isinstance(value, type):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value:
            yield from _classes(part)
