"""Python's bytecode: which instructions branch, where these lead, what computes what they take."""

import dis
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from types import CodeType

Instructions = tuple[dis.Instruction, ...]


@cache
def instructions_of(code: CodeType) -> Instructions:
    """The instructions of code, not of what is defined in it."""
    return tuple(dis.get_instructions(code))


@cache
def places_of(code: CodeType) -> dict[int, int]:
    """Which instruction has which offset."""
    return {each.offset: place for place, each in enumerate(instructions_of(code))}


def is_branch(instruction: dis.Instruction) -> bool:
    """Whether an instruction leads to one of two others."""
    name = instruction.opname  # POP_JUMP_FORWARD_IF_FALSE, say
    return ("JUMP" in name and "_IF_" in name) or name in ("FOR_ITER", "SEND")


@cache
def branches_of(code: CodeType) -> dict[int, frozenset[int]]:
    """The offsets of the branches, and of where they lead."""
    instructions, places = instructions_of(code), places_of(code)
    found = {}
    for place, each in enumerate(instructions):
        if is_branch(each):
            target = places[each.argval]
            target += instructions[target].opname == "END_FOR"  # as Python 3.12 goes
            found[each.offset] = frozenset({instructions[place + 1].offset, instructions[target].offset})
    return found


@cache
def stores_of(code: CodeType) -> dict[int, str]:
    """The offsets of what stores a variable, and its name."""
    kinds = ("STORE_FAST", "STORE_DEREF")
    return {each.offset: each.argval for each in instructions_of(code) if each.opname.startswith(kinds)}


@cache
def reached(code: CodeType, offset: int, branch: int = -1) -> frozenset[dis.Instruction]:
    """What may run from an offset on, until a branch is come to again."""
    instructions, places = instructions_of(code), places_of(code)
    todo, found = [places[offset]], set[int]()
    while todo:
        place = todo.pop()
        each = instructions[place]
        if place in found or each.offset == branch:
            continue
        found.add(place)
        if "JUMP" in each.opname or is_branch(each):
            todo.append(places[each.argval])
        if not each.opname.startswith(("JUMP_FORWARD", "JUMP_BACKWARD", "RETURN", "RAISE", "RERAISE")):
            todo.append(place + 1)
    return frozenset(instructions[place] for place in found)


def computing(instructions: Instructions, place: int) -> list[dis.Instruction]:
    """What computes that which an instruction takes: the condition of a branch, say."""
    found = []
    for each in reversed(instructions[:place]):
        if is_branch(each) or each.opname.startswith(("STORE", "POP_TOP", "JUMP", "RESUME", "RETURN")):
            break
        found.append(each)
    return found


def variables(instructions: Iterable[dis.Instruction]) -> set[str]:
    """The variables that instructions read; those that functions made by them may read."""
    found = set[str]()
    for each in instructions:
        if isinstance(each.argval, CodeType):
            found.update(each.argval.co_freevars)
        elif each.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "STORE_FAST_LOAD")):
            found.update(each.argval if isinstance(each.argval, tuple) else (each.argval,))
    return found


def gathering(code: CodeType) -> set[str]:
    """The variables of `*args` and `**kwargs`."""
    first = code.co_argcount + code.co_kwonlyargcount
    count = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return set(code.co_varnames[first : first + count])


def line(code: CodeType, offset: int) -> int:
    """The line in the source."""
    return max(line for begin, _, line in code.co_lines() if begin <= offset and line)


def reads_to_call(instruction: dis.Instruction) -> bool:
    """Whether an attribute is read to be called at once."""
    return instruction.opname == "LOAD_METHOD" or (
        instruction.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)
    )


def call_of(instructions: Instructions, place: int) -> int | None:
    """Which instruction calls the function that one loads; None if it is not called at once."""
    begin = instructions[place].positions
    for end in range(place + 1, len(instructions)):
        at = instructions[end].positions if instructions[end].opname == "CALL" else None
        if begin and at and (at.lineno, at.col_offset) == (begin.lineno, begin.col_offset):
            return end
    return None


def beginning(instructions: Instructions, end: int) -> int:
    """Where the expression begins that ends before an instruction."""
    depth = 0
    while depth < 1 and end > 0:
        end -= 1
        depth += dis.stack_effect(instructions[end].opcode, instructions[end].arg)
    return end
