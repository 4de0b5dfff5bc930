"""What decides in a model's code and no exploration sees, and what such code could use.

An exploration follows what a forward asks a tensor. What it asks of anything else (whether an object is another,
`**kwargs`, the grad mode) has one answer in every exploration. So the code is read: whether there are such questions,
and what it may do where the answer is another one.
"""

import dis
import enum
import inspect
import itertools
import operator
import sys
from collections import defaultdict
from collections.abc import Iterator, Set
from functools import cache
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import nn

from convbn_fx.fx.copying import reached_from
from convbn_fx.tuning.exploring.bytecode import (
    branches_of,
    call_of,
    computing,
    gathering,
    instructions_of,
    is_branch,
    line,
    places_of,
    reached,
    stores_of,
    variables,
)
from convbn_fx.tuning.exploring.exploration import beside_data
from convbn_fx.tuning.exploring.naming import (
    OF_EVERY_MODULE,
    functions_of,
    is_of_a_model,
    named_in,
    names_in,
    names_in_code,
    own_functions,
    reached_by,
    with_those_of_methods,
)


class _Seen:
    """What was seen of code that ran for a module."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {}  # its globals
        self.is_given_modules = False
        self.is_given_constants = True  # and nothing else
        self.followed: set[tuple[int, int]] = set()  # from which branches to where
        # At each branch, the variables that were something else than data, and what; those that may be others in
        # another call; those that led to modules, and these.
        self.others: defaultdict[int, set[tuple[str, int]]] = defaultdict(set)
        self.open: defaultdict[int, set[str]] = defaultdict(set)
        self.held: defaultdict[int, set[tuple[str, nn.Module]]] = defaultdict(set)
        self.not_data: set[tuple[int, int]] = set()  # where something else was stored or returned, and what

    def called(self, frame: FrameType) -> None:
        """Notes what it is called with."""
        self.namespace = frame.f_globals
        values = list(frame.f_locals.values())
        self.is_given_modules |= any(True for value in values for _ in _modules_in(value))
        self.is_given_constants &= all(issubclass(type(value), _PLAIN) for value in values)

    def at_branch(self, frame: FrameType) -> None:
        """Notes what the variables are."""
        here, values = frame.f_lasti, frame.f_locals
        self.others[here] |= {
            (name, id(what)) for name, value in values.items() if (what := beside_data(value)) is not None
        }
        self.open[here] |= {name for name, value in values.items() if not _is_constant(value)}
        self.held[here] |= {(name, part) for name, value in values.items() for part in _modules_in(value)}

    def made(self, place: int, value: Any) -> None:
        """Notes what was stored or returned somewhere."""
        if (what := beside_data(value)) is not None:
            self.not_data.add((place, id(what)))


class CodeRun:
    """Watches which instructions of the model's own code run in this thread while it is entered."""

    def __init__(self) -> None:
        self.originals: dict[nn.Module, nn.Module] = {}  # of the modules that the code ran for
        #: By code, and the module that it ran for: its first argument, or that of the nearest caller that has one.
        self.seen: defaultdict[tuple[CodeType, nn.Module | None], _Seen] = defaultdict(_Seen)

    def __enter__(self) -> "CodeRun":
        self.outer = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.outer)

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        if not is_of_a_model(str(frame.f_globals.get("__name__"))):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        code = frame.f_code
        seen, branches, stores, last = (
            self.seen[code, _on_whose_behalf(frame)],
            branches_of(code),
            stores_of(code),
            -1,
        )
        seen.called(frame)

        def run(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "return":
                seen.made(last, argument)
            elif event == "opcode":
                here = frame.f_lasti
                if last in branches:
                    seen.followed.add((last, here))
                if last in stores:
                    seen.made(last, frame.f_locals.get(stores[last]))
                if here in branches:
                    seen.at_branch(frame)
                last = here
            return run

        return run

    def _seen_of_modules(self) -> Iterator[tuple[CodeType, nn.Module, _Seen]]:
        for (code, module), seen in self.seen.items():
            owner = None if module is None else self.originals.get(module)
            if owner is not None:
                yield code, owner, seen

    def unseen(self, guessing: Set[int], unpaired: Set[int]) -> tuple[dict[int, str], dict[int, str]]:
        """What may happen that no exploration shows.

        Args:
            guessing: Ids of modules whose forwards were not followed to their ends, or not without guessing numbers.
            unpaired: Ids of convolutions whose output no batch norm is waiting for: it is data.

        Returns:
            The modules, by id, in whose code something decides on what is not known, and what decides; those that may
            be used on a way that was not taken, by id, and by whom.
        """
        deciding: dict[int, str] = {}
        used: dict[int, str] = {}
        for code, owner, seen in self._seen_of_modules():
            if told := _asks(code, seen.is_given_constants):
                deciding.setdefault(id(owner), told)
            for way in () if seen.is_given_constants else _ways_left_out(code, seen.followed):
                is_open = any(name in seen.open[way.branch] or name[:1] == "@" for name in way.asked)
                # Else it is the same in every call, unless it comes of something that is told of.
                if not is_open and id(owner) not in guessing:
                    continue
                told = f"{_place(code, way.branch)}, has a way that no exploration took"
                others = {name for name, what in seen.others[way.branch] if what not in unpaired}
                not_data = {place for place, what in seen.not_data if what not in unpaired}
                if is_open and not way.leads_to_the_same(others, not_data):
                    deciding.setdefault(id(owner), told)
                used |= {what: told for name, what in seen.others[way.branch] if name in way.loaded}
                used |= dict.fromkeys(self._used_on(way, owner, seen), told)
        return deciding, used

    def _used_on(self, way: "_Way", owner: nn.Module, seen: _Seen) -> Iterator[int]:
        """What a way may use that was not taken: of the module that runs it, and of its variables."""
        if not seen.is_given_modules:
            return
        names = names_in_code(way.code, seen.namespace, way.using)
        held = {self.originals.get(part, part) for name, part in seen.held[way.branch] if name in way.loaded}
        held -= {owner}
        yield from map(id, held)
        for root in {*held, owner} if names else held:
            yield from named_in(names, root)

    def uses(self, not_followed: dict[int, set[str]]) -> dict[int, str]:
        """What forwards that were not followed might use, as far as it can be told from the names in their code.

        Args:
            not_followed: Ids of their modules, and which modules inside they call.

        Returns:
            For modules, by id, the code that might use them.
        """
        used = dict(self._used_by_functions_held())
        for code, owner, seen in self._seen_of_modules():
            if seen.is_given_modules and id(owner) in not_followed:
                names = names_in_code(code, seen.namespace)
                for part in named_in(names, owner, not_followed[id(owner)]):
                    used.setdefault(part, f"in {code.co_qualname}, on a way that no exploration took")
        return used

    def _used_by_functions_held(self) -> Iterator[tuple[int, str]]:
        """What functions might use that modules have as attributes of their own, like methods, and that did not run."""
        ran = {code for code, _ in self.seen}
        for module in self.originals.values():
            held = [value for name, value in vars(module).items() if name not in OF_EVERY_MODULE]
            held = [value.__func__ if type(value) is MethodType else value for value in held]
            for function in (each for value in held for each in own_functions(value)):
                if function.__code__ not in ran:
                    for _, part in reached_by(with_those_of_methods(names_in([function]), module), module):
                        yield id(part), f"in {function.__qualname__}, which no exploration ran"

    def methods_that_did_not_run(self, module: nn.Module) -> Iterator[str]:
        """The methods of a module's class that call what is inside of it, and are no part of its forward.

        Those that the forward names are parts of it, run or not. Those that every module has do what they do to every
        module. Those that speak of fusing are for when the batch norm is gone, by everyone's convention, as it is.
        """
        ran = {code for code, of in self.seen if of is None or self.originals.get(of) is module}
        parts = {name.removesuffix("()") for name in with_those_of_methods({"forward"}, module)}
        for name, made_of in functions_of(type(module)).items():
            is_method = isinstance(inspect.getattr_static(type(module), name), FunctionType)
            left_out = name in parts or name.startswith("__") or "fuse" in name or hasattr(nn.Module, name)
            has_run = all(each.__code__ in ran for each in made_of)
            if is_method and not left_out and not has_run and _may_call_a_part(made_of, module):
                yield name


def _may_call_a_part(functions: list[FunctionType], module: nn.Module) -> bool:
    """Whether a method calls a module inside its own, an item of one, or what leads to one, as far as names tell."""
    instructions = [each for function in functions for each in instructions_of(function.__code__)]
    names = with_those_of_methods(names_in(functions) - {"forward()"}, module)
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
        for name in {name.removesuffix("()") for name in names} - OF_EVERY_MODULE
    )


# --- Values -------------------------------------------------------------------------------------------------------

#: What leads to no module, and what a function that is given nothing else does the same for in every call.
_PLAIN: Final = (
    *(str, bytes, int, float, complex, type(None), type, ModuleType, enum.Enum),
    *(torch.dtype, torch.device),
)


def _is_constant(value: Any) -> bool:
    """Whether a value has no part that is a tensor, or is not known."""
    if type(value) in (list, tuple, set, frozenset, dict):
        return all(map(_is_constant, value.values() if type(value) is dict else value))
    return issubclass(type(value), (*_PLAIN, nn.Module))


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """A module, or those in a container."""
    if issubclass(type(value), nn.Module):
        yield value
    elif type(value) in (list, tuple, dict):
        parts = value.values() if type(value) is dict else value
        yield from (part for part in parts if issubclass(type(part), nn.Module))


def _on_whose_behalf(frame: FrameType | None) -> nn.Module | None:
    """The module whose method runs, or has called what does."""
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if issubclass(type(first), nn.Module):
            return first
        frame = frame.f_back
    return None


# --- Questions ----------------------------------------------------------------------------------------------------

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
#: What may follow where `*args` or `**kwargs` are handed on.
_HANDING_ON: Final = frozenset({"BUILD_MAP", "CALL_FUNCTION_EX", "DICT_MERGE", "LIST_EXTEND"})


@cache
def _asks(code: CodeType, is_given_constants: bool) -> str:
    """What code asks of neither tensors nor attributes, where it is no branch that shows it; empty if nothing."""
    instructions, gathered, answers = instructions_of(code), gathering(code), set(_answers_kept(code))
    for place, (each, after) in enumerate(itertools.pairwise(instructions)):
        told = ""
        if each.opname in ("LOAD_METHOD", "LOAD_ATTR", "LOAD_GLOBAL") and each.argval in _AROUND_A_CALL:
            told = str(each.argval)
        elif is_given_constants:
            continue
        elif (
            each.opname == "IS_OP"
            and not is_branch(after)
            and instructions[place - 1].argval not in (True, False)
        ):
            told = "what an object is" if variables(computing(instructions, place)) - {"self", "cls"} else ""
        elif each.offset in answers:
            told = "what something is"
        elif each.opname == "PUSH_EXC_INFO" and after.opname != "WITH_EXCEPT_START":
            told = "whether something raises"
        elif gathered & variables([each]) and after.opname not in _HANDING_ON:
            told = f"what is in {each.argval}"
        if told:
            return f"{_place(code, each.offset)}, asks {told}"
    return ""


def _answers_kept(code: CodeType) -> Iterator[int]:
    """Where code asks for classes or attributes of objects in other ways than to branch at once, or to raise."""
    instructions = instructions_of(code)
    for place, each in enumerate(instructions):
        if each.opname == "LOAD_GLOBAL" and each.argval in ("callable", "hasattr", "isinstance"):
            end = call_of(instructions, place)
            while end and instructions[end + 1].opname == "UNARY_NOT":
                end += 1
            after = instructions[end + 1] if end else each
            is_asserted = after.opname == "STORE_FAST" and after.argval[:1] == "@"  # as pytest rewrites it
            returns = any(later.opname.startswith("RETURN") for later in reached(code, each.offset))
            if not is_branch(after) and not is_asserted and returns:
                yield each.offset


def _place(code: CodeType, offset: int) -> str:
    return f"{code.co_qualname}, line {line(code, offset)}"


# --- Ways ---------------------------------------------------------------------------------------------------------


def _ways_left_out(code: CodeType, followed: set[tuple[int, int]]) -> Iterator["_Way"]:
    """Those of branches that were taken one way alone."""
    branches, places, instructions = branches_of(code), places_of(code), instructions_of(code)
    for branch in sorted({here for here, _ in followed}):
        taken = {there for here, there in followed if here == branch} & branches[branch]
        if len(taken) == 1 and not _asks_whether_tensor(computing(instructions, places[branch])):
            yield _Way(code, branch, *taken, *(branches[branch] - taken or taken))


def _asks_whether_tensor(condition: list[dis.Instruction]) -> bool:
    """Whether a condition asks nothing but whether something is a tensor, which an exploration answers."""
    words = {each.argval for each in condition if each.opname in ("LOAD_GLOBAL", "LOAD_METHOD", "LOAD_ATTR")}
    return words in ({"torch", "is_tensor"}, {"isinstance", "torch", "Tensor"}, {"isinstance", "Tensor"})


class _Way:
    """What runs on a way that was not taken, and not on the one that was.

    Attributes:
        code: The code.
        branch: Where the two part.
        asked: The variables that decide which is taken.
        using: What runs on this alone, and what it takes from before.
        loaded: The variables that it reads.
    """

    def __init__(self, code: CodeType, branch: int, taken: int, other: int) -> None:
        here, there = reached(code, taken, branch), reached(code, other, branch)
        self.code, self.branch = code, branch
        self.apart, self.taken, self.common = there - here, here - there, here & there
        place = places_of(code)[branch]
        condition = computing(instructions_of(code), place)
        self.asked = variables(condition)
        # A loop over no items would be over what it is over.
        is_over_none = bool(self.apart) and instructions_of(code)[place].opname == "FOR_ITER"
        self.using = self.apart.union(condition if is_over_none else ())
        self.loaded = variables(self.using)

    def leads_to_the_same(self, others: set[str], not_data: set[int]) -> bool:
        """Whether it raises, or what comes after does the same as after the other way, with other data.

        Args:
            others: The variables that are not data where the ways part.
            not_data: Where the other way stored, or returned, what is not data.
        """
        returns = [each for each in self.apart if each.opname.startswith("RETURN")]
        if self.apart and not self.common and not returns:
            return True
        read = variables(self.common)
        changed = {each.argval for each in self.apart | self.taken if each.opname.startswith("STORE_FAST")}
        merged = [each for each in self.taken if each.opname.startswith("STORE") and each.argval in read]
        if any(map(_leaves_a_value, (self.apart, self.taken))):  # of which one is taken where they meet
            join = min(self.common, key=_OFFSET, default=None)
            if join is None or not join.opname.startswith(("STORE_FAST", "RETURN")):
                return join is None
            merged.append(join)
        if returns:
            merged += [each for each in self.taken | self.common if each.opname.startswith("RETURN")]
        constants = {each.argval for each in self.apart if each.opname == "LOAD_CONST"} - {None}
        return (
            others.isdisjoint(changed & read)
            and not_data.isdisjoint(each.offset for each in merged)
            and (bool(self.loaded) or not constants)
            and all(map(_computes, self.apart))
        )


_OFFSET: Final = operator.attrgetter("offset")


def _leaves_a_value(instructions: frozenset[dis.Instruction]) -> bool:
    """Whether what runs ends in the midst of a statement."""
    ends = [each.opname for each in sorted(instructions, key=_OFFSET) if "JUMP" not in each.opname]
    complete = ("STORE", "POP_TOP", "RETURN", "RAISE", "RERAISE", "LIST_APPEND")
    return bool(ends) and not ends[-1].startswith(complete)


def _computes(instruction: dis.Instruction) -> bool:
    """Whether an instruction makes data of data: no number of a tensor, no function, and nothing that is kept."""
    if instruction.opname in ("LOAD_METHOD", "LOAD_ATTR"):
        return instruction.argval not in ("shape", "size", "ndim", "dim", "numel", "item", "tolist")
    return instruction.opname not in ("MAKE_FUNCTION", "STORE_ATTR", "STORE_GLOBAL")
