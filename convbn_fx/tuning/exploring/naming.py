"""What names in code may mean: which modules inside another code can reach that mentions them."""

import dis
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, Final

from torch import nn

from convbn_fx.fx.copying import reached_from
from convbn_fx.tuning.exploring.bytecode import (
    Instructions,
    beginning,
    call_of,
    instructions_of,
    reads_to_call,
)
from convbn_fx.tuning.exploring.exact_classes import functions_in

# --- Whose code ---------------------------------------------------------------------------------------------------

#: No model's code is in these; PyTorch imports some of them when it first needs them, which would be watched, too.
_OF_NO_MODEL: Final = {
    "torch",
    "sympy",
    "mpmath",
    "numpy",
    "networkx",
    "triton",
    "_distutils_hack",  # which imports
    "_pytest",  # which rewrites assertions
    "thop",  # counts operations
    "convbn_fx",
    *sys.stdlib_module_names,
}


@cache
def is_of_a_model(name: str) -> bool:
    """Whether a Python module is neither PyTorch's, nor what it is made with, nor Python's, nor ours."""
    top, _, _ = name.partition(".")
    if top == "transformers":  # where others load, save, configure, and put outputs together
        return name.startswith("transformers.models.")
    return top == "__main__" or _OF_NO_MODEL.isdisjoint((top, name))


def functions_of(cls: type[nn.Module]) -> dict[str, list[FunctionType]]:
    """The model's own functions of which attributes of a class are made: methods, what they decorate, properties."""
    return {
        name: found
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if (found := own_functions(value))
    }


def own_functions(value: Any) -> list[FunctionType]:
    """The model's own functions among those of which a value is made."""
    return [each for each in functions_in(value) if is_of_a_model(str(each.__globals__.get("__name__")))]


# --- Which names --------------------------------------------------------------------------------------------------

#: What leads to an attribute whose name is computed, and the name that stands for any.
_COMPUTING: Final = frozenset({"getattr", "attrgetter", "methodcaller", "vars", "__dict__", "eval", "exec"})
_COMPUTED: Final = "*"


def names_in_code(
    code: CodeType, namespace: dict[str, Any], among: Collection[dis.Instruction] | None = None
) -> set[str]:
    """Names of attributes that are read, and strings that may be such; `name()` where it is called at once.

    Args:
        code: The code; that which is defined in it, and functions of the model's that it names, are read as well.
        namespace: Its globals.
        among: Those of its instructions that count; all by default.
    """
    names: set[str] = set()
    todo, known = [(code, namespace)], set[CodeType]()
    while todo:
        code, namespace = todo.pop()
        if code in known:
            continue
        known.add(code)
        instructions = instructions_of(code)
        counting, among = instructions if among is None else among, None
        for place, each in enumerate(instructions):
            if each in counting:
                names.update(_names_read(instructions, place))
                functions = own_functions(namespace.get(each.argval)) if each.opname == "LOAD_GLOBAL" else ()
                todo += [(function.__code__, function.__globals__) for function in functions]
                todo += [(each.argval, namespace)] if isinstance(each.argval, CodeType) else []
    return names


def names_in(functions: Iterable[FunctionType]) -> set[str]:
    """The names in the code of functions."""
    return {name for each in functions for name in names_in_code(each.__code__, each.__globals__)}


def _names_read(instructions: Instructions, place: int) -> Iterator[str]:
    """The names that an instruction may mean."""
    each = instructions[place]
    if each.argval in _COMPUTING and not _is_given_a_constant(instructions, place):
        yield _COMPUTED
    if not isinstance(each.argval, str):
        return
    if "CONST" in each.opname:
        yield each.argval
    elif instructions[place - 1].opname == "LOAD_GLOBAL":
        return  # an attribute of what is no part of a model
    elif reads_to_call(each):
        yield f"{each.argval}()"
    elif each.opname == "LOAD_ATTR":
        yield each.argval


def _is_given_a_constant(instructions: Instructions, place: int) -> bool:
    """Whether `getattr` is loaded there, and called at once, for a constant name, or of no part of a model."""
    end = call_of(instructions, place)
    if instructions[place].argval != "getattr" or end is None:
        return False
    count, end = instructions[end].arg, end - (instructions[end - 1].opname == "PRECALL")
    end = beginning(instructions, end) if count == 3 else end  # of the default
    of_global = instructions[place + 1].opname == "LOAD_GLOBAL" and beginning(instructions, end) == place + 2
    return instructions[end - 1].opname == "LOAD_CONST" or of_global


def with_those_of_methods(names: set[str], module: nn.Module) -> set[str]:
    """The names, and those in the methods of the module's class that have one of them.

    Not in what it has of `nn.Module`'s: code that calls a tensor's `to`, say, does not mean it.
    """
    inherited = vars(nn.Module).keys() - {"forward"}
    functions = {
        name: made_of for name, made_of in functions_of(type(module)).items() if name not in inherited
    }
    todo, known = list(names), set(names)
    while todo:
        made_of = functions.get(todo.pop().removesuffix("()"), [])
        new = names_in(made_of) - known
        known |= new
        todo += new
    return known


# --- What they lead to --------------------------------------------------------------------------------------------

#: By which any module inside another can be reached.
_ENUMERATING: Final = frozenset(
    {"children", "modules", "named_children", "named_modules", "_modules", "get_submodule"}
)

#: Attributes of every module.
OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


def reached_by(names: set[str], module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside one that code can reach which mentions these names.

    What is only called runs as it always does, whatever is inside.
    """
    if not names.isdisjoint(module._parameters):
        yield "", module
    reaches_all = any(name.removesuffix("()") in _ENUMERATING for name in names)
    for name, part in module.named_modules(remove_duplicate=False):
        *around, last = name.split(".")
        if reaches_all or (
            all(step in names or step.isdigit() for step in around)
            and (last in names or f"{last}()" in names or last.isdigit())
        ):
            yield name, part


def named_in(names: set[str], owner: nn.Module, called: Collection[str] = ()) -> Iterator[int]:
    """What code may use that mentions these names, and has a module; by id.

    Args:
        names: The names; those in methods that have one of them are added.
        owner: The module.
        called: Names of those inside it that it was seen to call: not what is inside of these is meant, nor inside of
            those that another number in the name leads to, unless it is named.
    """
    names = with_those_of_methods(names, owner)
    seen = set(map(_any_number, called))
    inside = tuple(f"{name}.#" for name in seen)
    named: list[tuple[str, Any]] = [(_any_number(name), part) for name, part in reached_by(names, owner)]
    for name in {name.removesuffix("()") for name in names} - OF_EVERY_MODULE:
        named += [(name, part) for part in reached_from(vars(owner).get(name)).values()]
    yield from (id(part) for name, part in named if name in seen or not name.startswith(inside))
    if _COMPUTED in names:
        inside = tuple(f"{name}." for name in seen)
        parts = owner.named_modules(remove_duplicate=False)
        yield from (id(part) for name, part in parts if not _any_number(name).startswith(inside))


def _any_number(name: str) -> str:
    return ".".join("#" if step.isdigit() else step for step in name.split("."))
