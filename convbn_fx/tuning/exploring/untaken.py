"""Code of a model's forwards that no exploration ran, and what it could use.

An exploration follows what a forward asks a tensor. What it asks of anything else (an option that is a string or a
member of an enum, `**kwargs`, the dtype) goes one way in every exploration. So what is on the other way is read.
"""

import dis
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, Final

from torch import nn

from convbn_fx.fx.copying import reached_from
from convbn_fx.tuning.exploring.exact_classes import functions_in
from convbn_fx.tuning.exploring.exploration import convolution_called

#: A piece of code, and the module that it ran for, which is its first argument; None for that of no module.
Key = tuple[CodeType, nn.Module | None]

#: By which any module inside another can be reached.
_ENUMERATING: Final = frozenset(
    {"children", "modules", "named_children", "named_modules", "_modules", "get_submodule"}
)


class CodeRun:
    """Watches which instructions of the model's own code run in this thread while it is entered."""

    def __init__(self) -> None:
        self.originals: dict[nn.Module, nn.Module] = {}  # of the modules that the code ran for
        self.executed: defaultdict[Key, set[int]] = defaultdict(set)
        # At each branch: the variables that were the output of a convolution, and the convolutions; those that led
        # to modules, and these.
        self.outputs: defaultdict[tuple[Key, int], set[tuple[str, int]]] = defaultdict(set)
        self.held: defaultdict[tuple[Key, int], set[tuple[str, nn.Module]]] = defaultdict(set)

    def __enter__(self) -> "CodeRun":
        self.outer = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.outer)

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        if not _is_of_a_model(str(frame.f_globals.get("__name__"))):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        key = (code, first if issubclass(type(first), nn.Module) else None)
        executed, branches = self.executed[key], _branches(code)

        def run(frame: FrameType, event: str, _argument: Any) -> Any:
            if event == "opcode":
                executed.add(frame.f_lasti)
                if frame.f_lasti in branches:
                    for name, value in frame.f_locals.items():
                        module = convolution_called(value)
                        if module is not None:
                            self.outputs[key, frame.f_lasti].add((name, id(module)))
                        if value is not key[1]:
                            self.held[key, frame.f_lasti] |= {(name, part) for part in _modules_in(value)}
            return run

        return run

    def uses(self, not_followed: dict[int, set[str]]) -> dict[int, str]:
        """What code that did not run might use, as far as it can be told from the names in it.

        Args:
            not_followed: Ids of the modules whose forwards may use whatever they name, and which modules inside they
                call: not what is inside of these, nor inside of those that another number in the name leads to.

        Returns:
            For modules, by id, the code that might use them.
        """
        used = dict(self._used_by_functions_held())
        for key, executed in self.executed.items():
            code, owner = key[0], self.originals.get(key[1]) if key[1] is not None else None
            parts = [] if owner is None else self._named_in(code, owner, not_followed.get(id(owner)))
            for branch, condition, untaken in _untaken(code, executed):
                parts += self._on_the_other_way(key, branch, condition, untaken)
            told = f"in {code.co_qualname}, on a way that no exploration took"
            used |= {part: used.get(part, told) for part in parts}
        return used

    def _named_in(self, code: CodeType, owner: nn.Module, called: set[str] | None) -> list[int]:
        """What a forward may use that was not followed: whatever its code names."""
        if called is None:
            return []
        seen = set(map(_any_number, called))
        named = [(_any_number(name), part) for name, part in self._named(_names(_instructions(code)), owner)]
        inside = tuple(f"{name}.#" for name in seen)
        return [id(part) for name, part in named if name in seen or not name.startswith(inside)]

    def _on_the_other_way(
        self, key: Key, branch: int, condition: list[dis.Instruction], untaken: list[dis.Instruction]
    ) -> Iterator[int]:
        """What the other way of a branch may use: of the module that the code is of, and of its variables."""
        if _asks_whether_tensors(condition, {name for name, _ in self.outputs[key, branch]}):
            return
        loaded = {name for instruction in untaken for name in _variables(instruction)}
        yield from (module for name, module in self.outputs[key, branch] if name in loaded)
        # A loop over no items would be over what its condition names.
        names = _names([*untaken, *(condition if _is_loop(key[0], branch) else ())])
        roots = {self.originals.get(root, root) for name, root in self.held[key, branch] if name in loaded}
        yield from map(id, roots)
        if key[1] in self.originals and names:
            roots.add(self.originals[key[1]])
        for root in roots:
            yield from (id(part) for _, part in self._named(names, root))

    def _named(self, names: set[str], root: nn.Module) -> Iterator[tuple[str, Any]]:
        """What code reaches from a module by names, and by those in the methods that these may be; each with a name."""
        names = _names_with_those_of_methods(names, root)
        yield from _reached_by(names, root)
        for name in {name.removesuffix("()") for name in names} - _OF_EVERY_MODULE:
            for part in reached_from(vars(root).get(name)).values():
                yield name, part

    def _used_by_functions_held(self) -> Iterator[tuple[int, str]]:
        """What functions might use that modules have as attributes of their own, like methods, and that did not run."""
        ran = {code for code, _ in self.executed}
        for module in self.originals.values():
            held = [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
            held = [value.__func__ if type(value) is MethodType else value for value in held]
            for function in (each for value in held for each in _own_functions(value)):
                if function.__code__ not in ran:
                    names = _names_with_those_of_methods(_names(_instructions(function.__code__)), module)
                    for _, part in _reached_by(names, module):
                        yield id(part), f"in {function.__qualname__}, which no exploration ran"

    def methods_that_did_not_run(self, module: nn.Module) -> Iterator[str]:
        """The methods of a module's class that call what is inside of it, and are no part of its forward.

        Those that the forward names are parts of it, run or not. Those that every module has do what they do to every
        module. Those that speak of fusing are for when the batch norm is gone, by everyone's convention, as it is.
        """
        ran = {code for code, of in self.executed if of is None or self.originals.get(of) is module}
        parts = {name.removesuffix("()") for name in _names_with_those_of_methods({"forward"}, module)}
        for name, made_of in _functions(type(module)).items():
            is_method = isinstance(inspect.getattr_static(type(module), name), FunctionType)
            left_out = name in parts or name.startswith("__") or "fuse" in name or hasattr(nn.Module, name)
            has_run = all(each.__code__ in ran for each in made_of)
            if is_method and not left_out and not has_run and _may_call_a_part(made_of, module):
                yield name


def _may_call_a_part(functions: list[FunctionType], module: nn.Module) -> bool:
    """Whether a method calls a module inside its own, an item of one, or what leads to one, as far as names tell."""
    instructions = [each for function in functions for each in _instructions(function.__code__)]
    names = _names_with_those_of_methods(_names(instructions) - {"forward()"}, module)
    called = {name.removesuffix("()") for name in names if name.endswith("()")}
    if any(isinstance(inspect.getattr_static(type(module), name, None), property) for name in called):
        called = {name.removesuffix("()") for name in names}  # what is called is what that reads
    if any(name.rpartition(".")[2] in called for name, _ in module.named_modules(remove_duplicate=False)):
        return True
    takes_items = any(each.opname in ("BINARY_SUBSCR", "BINARY_OP", "FOR_ITER") for each in instructions)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return max(function.__code__.co_argcount for function in functions) > 1 and any(
        name in module._parameters
        or (takes_items and isinstance(module._modules.get(name), containers))
        or any(issubclass(type(part), nn.Module) for part in reached_from(vars(module).get(name)).values())
        for name in {name.removesuffix("()") for name in names} - _OF_EVERY_MODULE
    )


_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


#: No model's code is in these; PyTorch imports some of them when it first needs them, which would be watched, too.
_OF_NO_MODEL: Final = {
    "torch",
    "sympy",
    "mpmath",
    "numpy",
    "networkx",
    "triton",
    "thop",  # counts operations
    "transformers.modeling_utils",  # the base class, which loads and saves
    "convbn_fx",
    *sys.stdlib_module_names,
}


@cache
def _is_of_a_model(name: str) -> bool:
    """Whether a Python module is neither PyTorch's, nor what it is made with, nor Python's, nor ours."""
    top, _, _ = name.partition(".")
    return top == "__main__" or _OF_NO_MODEL.isdisjoint((top, name))


def _functions(cls: type[nn.Module]) -> dict[str, list[FunctionType]]:
    """The model's own functions of which attributes of a class are made: methods, what they decorate, properties."""
    return {
        name: found
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if (found := _own_functions(value))
    }


def _own_functions(value: Any) -> list[FunctionType]:
    return [each for each in functions_in(value) if _is_of_a_model(str(each.__globals__.get("__name__")))]


# --- Bytecode ----------------------------------------------------------------------------------------------------


@cache
def _instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(dis.get_instructions(code))


@cache
def _branches(code: CodeType) -> frozenset[int]:
    return frozenset(each.offset for each in _instructions(code) if _is_branch(each))


def _is_branch(instruction: dis.Instruction) -> bool:
    name = instruction.opname  # POP_JUMP_FORWARD_IF_FALSE, say
    return ("JUMP" in name and "_IF_" in name) or name in ("FOR_ITER", "SEND")


def _untaken(
    code: CodeType, executed: set[int]
) -> Iterator[tuple[int, list[dis.Instruction], list[dis.Instruction]]]:
    """The branches that were taken one way only, their conditions, and what runs on the other way until they meet.

    Those that depend on attributes alone would need these to change.
    """
    instructions = _instructions(code)
    place = {each.offset: number for number, each in enumerate(instructions)}
    for number, each in enumerate(instructions):
        if each.offset not in executed or not _is_branch(each):
            continue
        condition = _condition(instructions, number)
        if _asks_attributes_alone(condition):
            continue
        todo, found = [number + 1, place[each.argval]], {}
        while todo:
            index = todo.pop()
            instruction = instructions[index]
            if index in found or instruction.offset in executed:
                continue
            found[index] = instruction
            if "JUMP" in instruction.opname or _is_branch(instruction):
                todo.append(place[instruction.argval])
            if not instruction.opname.startswith(
                ("JUMP_FORWARD", "JUMP_BACKWARD", "RETURN", "RAISE", "RERAISE")
            ):
                todo.append(index + 1)
        if found:
            yield each.offset, condition, list(found.values())


def _is_loop(code: CodeType, offset: int) -> bool:
    return dis.opname[code.co_code[offset]] == "FOR_ITER"


def _condition(instructions: tuple[dis.Instruction, ...], branch: int) -> list[dis.Instruction]:
    """What computes the condition of a branch."""
    found = []
    for each in reversed(instructions[:branch]):
        if _is_branch(each) or each.opname.startswith(("STORE", "POP_TOP", "JUMP", "RESUME", "RETURN")):
            break
        found.append(each)
    return found


def _asks_attributes_alone(condition: list[dis.Instruction]) -> bool:
    """Whether a condition reads no variable but the first, `self`, and calls nothing that tells what is around it."""
    return all(name in ("self", "cls") for each in condition for name in _variables(each)) and not any(
        each.opname in ("LOAD_METHOD", "LOAD_ATTR") and each.argval in _AROUND_A_CALL for each in condition
    )


#: What a forward may ask about its surroundings, and goes another way by, with the same modules and arguments.
_AROUND_A_CALL: Final = frozenset(
    {
        "get_autocast_dtype",
        "is_autocast_cache_enabled",
        "is_autocast_enabled",
        "is_grad_enabled",
        "is_inference_mode_enabled",
    }
)


def _asks_whether_tensors(condition: list[dis.Instruction], outputs: set[str]) -> bool:
    """Whether a condition asks nothing but whether outputs of convolutions are tensors, as they always are."""
    variables = {name for each in condition for name in _variables(each)}
    words = {each.argval for each in condition if each.opname in ("LOAD_GLOBAL", "LOAD_METHOD", "LOAD_ATTR")}
    return (
        bool(variables)
        and variables <= outputs
        and (words <= {"torch", "is_tensor"} or words <= {"isinstance", "torch", "Tensor"})
    )


def _variables(instruction: dis.Instruction) -> Iterable[str]:
    """The variables that an instruction reads; those that a function made by it may read."""
    if isinstance(instruction.argval, CodeType):
        return instruction.argval.co_freevars
    if not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "STORE_FAST_LOAD")):
        return ()
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


def _is_called(instruction: dis.Instruction) -> bool:
    """Whether an attribute is read to be called at once."""
    return instruction.opname == "LOAD_METHOD" or (
        instruction.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)
    )


def _names(instructions: Iterable[dis.Instruction]) -> set[str]:
    """Names of attributes that are read, and strings that may be such; `name()` where it is called at once."""
    names: set[str] = set()
    for each in instructions:
        if isinstance(each.argval, CodeType):
            names |= _names(_instructions(each.argval))
        elif _is_called(each):
            names.add(f"{each.argval}()")
        elif each.opname == "LOAD_ATTR" or (isinstance(each.argval, str) and "CONST" in each.opname):
            names.add(each.argval)
    return names


def _names_with_those_of_methods(names: set[str], module: nn.Module) -> set[str]:
    """The names, and those in the methods of the module's class that have one of them.

    Not in what it has of `nn.Module`'s: code that calls a tensor's `to`, say, does not mean it.
    """
    inherited = vars(nn.Module).keys() - {"forward"}
    functions = {name: made_of for name, made_of in _functions(type(module)).items() if name not in inherited}
    todo, known = list(names), set(names)
    while todo:
        made_of = functions.get(todo.pop().removesuffix("()"), [])
        new = _names(each for function in made_of for each in _instructions(function.__code__)) - known
        known |= new
        todo += new
    return known


def _reached_by(names: set[str], module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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


def _any_number(name: str) -> str:
    return ".".join("#" if step.isdigit() else step for step in name.split("."))


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """A module, or those in a container."""
    if issubclass(type(value), nn.Module):
        yield value
    elif type(value) in (list, tuple, dict):
        parts = value.values() if type(value) is dict else value
        yield from (part for part in parts if issubclass(type(part), nn.Module))
