"""Who else uses a convolution or a batch norm: `deploy` has to know, as a baked model cannot look at its calls.

Judged by identity, over every way in which a module can be reached. A pair's modules may be exchanged if all forwards
that reach them were followed to their ends and use them as that pair alone, and if nothing else reaches them.
"""

import dis
import gc
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.parameter import is_lazy

from convbn_fx import kinds
from convbn_fx.fx.copying import referent
from convbn_fx.fx.matching import find_pairs_in, reads_metadata
from convbn_fx.fx.pairs import OwnedPair
from convbn_fx.fx.private_copy import PrivateCopy, private_copy
from convbn_fx.fx.proxies import READ_BY_NAME
from convbn_fx.records import SkipReason
from convbn_fx.tuning.exploring.discovery import Discovery, Explored
from convbn_fx.tuning.exploring.exploration import (
    GuessedTensor,
    Path,
    explore,
    explore_again,
    kept_by_someone,
)
from convbn_fx.tuning.exploring.untaken import CodeRun


def doubts(
    model: nn.Module, found: Discovery, pairs: Iterable[OwnedPair], code: CodeRun
) -> dict[int, tuple[SkipReason, str]]:
    """Which convolutions and batch norms of pairs may also be used in another way.

    Args:
        model: The model that was explored.
        found: What its forwards do.
        pairs: The pairs that are to be baked.
        code: What of the model's code ran while it was explored.

    Returns:
        For each such module, by id, why it is to stay, and who may use it.
    """
    pairs = list(pairs)
    members = [
        (model.get_submodule(pair.convolution_module), model.get_submodule(pair.record.batch_norm))
        for pair in pairs
    ]
    calling = {id(conv) for pair, (conv, _) in zip(pairs, members, strict=True) if pair.site is not None}
    code.originals = found.originals
    explored = found.explored + _other_methods(model, found, code)
    uses = _Uses(model, explored, {(id(conv), id(norm)) for conv, norm in members}, calling)
    refusals = {
        identity: (SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, detail)
        for identity, detail in uses.apart.items()
    }
    for conv, norm in members:
        # Where each of several batch norms becomes a convolution, there is no such output.
        if id(conv) in uses.read and any(conv is other and norm is not its for other, its in members):
            refusals.setdefault(id(conv), (SkipReason.SHARED, "the shape of its output is read"))
    paired = {id(conv) for conv, _ in members}
    guessing = {id(each.module): _lost(each) for each in found.explored if not _are_all(each)}
    unseen, used = code.unseen(guessing.keys(), {id(module) for module in model.modules()} - paired)
    lost = guessing | unseen
    called = {
        id(each.module): {
            str(node.target) for path in each.paths for node in path.graph.nodes if node.op == "call_module"
        }
        for each in found.explored
        if id(each.module) not in unseen
    }
    possible = used | code.uses(
        {key: called.get(key, set()) for key in lost if key in unseen or key not in calling}
    )
    for pair, (conv, _) in zip(pairs, members, strict=True):
        # To call a block that ends in the convolution, or begins with the batch norm, is to call that.
        for name in pair.between:
            if told := possible.get(id(model.get_submodule(name))):
                refusals.setdefault(id(conv), (SkipReason.MAY_BE_USED_ELSEWHERE, told))
    references = _References(model)
    followed = {id(each.module): each for each in found.explored}
    owners = {id(model.get_submodule(pair.owner)) for pair in pairs}
    lost_owners = {key: told for key, told in lost.items() if key in owners}
    for module in {id(module): module for pair in members for module in pair}.values():
        doubt = possible.get(id(module)) or references.doubt(module, followed.keys(), lost_owners)
        if id(module) in calling and not doubt:
            doubt = _doubt_about_its_call(followed[id(module)])
        if doubt:
            refusals.setdefault(id(module), (SkipReason.MAY_BE_USED_ELSEWHERE, doubt))
    return refusals


def _other_methods(model: nn.Module, found: Discovery, code: CodeRun) -> list[Explored]:
    """Methods that run a part of a module, and that somebody may call in the place of its forward."""
    methods = [
        (each.module, name) for each in found.explored for name in code.methods_that_did_not_run(each.module)
    ]
    if not methods:
        return []
    others = []
    with code, private_copy(model, GuessedTensor) as private:
        for module, name in methods:
            paths = explore(module, found.borders, private, name)
            matches = [find_pairs_in(path.graph, module)[0] for path in paths]
            others.append(Explored(module, paths, matches, name))
    return others


def _doubt_about_its_call(explored: Explored) -> str:
    """Whether a forward that calls a function with its module's weight may call it in another way; empty if not."""
    paths, module = explored.paths, explored.module
    if not all(path.is_whole for path in paths):
        return f"{_told(module)} could not be followed to its end"
    has_others = len(_tensors(module)) > 2 or len(module._modules) > 0  # beside a weight and a bias
    if any(path.has_guessed_a_number and (path.loops or has_others) for path in paths):
        return f"how {_told(module)} calls the function depends on a number that was guessed"
    return ""


# --- Uses that were seen -----------------------------------------------------------------------------------------


class _Uses:
    """What the forwards do with convolutions and batch norms outside of the pairs.

    Args:
        model: The model.
        explored: Its forwards.
        pairs: Ids of the convolutions and batch norms that are pairs.
        calling: Ids of those convolutions that are functions, called by the forward of the module itself.

    Attributes:
        apart: For each module, by id, who uses it apart.
        read: Ids of the convolutions of pairs whose output is looked at before it is normalised.
    """

    def __init__(
        self, model: nn.Module, explored: list[Explored], pairs: set[tuple[int, int]], calling: set[int]
    ) -> None:
        self.apart: dict[int, str] = {}
        self.read: set[int] = set()
        self.pairs = pairs
        self.calling = calling
        held = [
            (tensor, module)
            for module in model.modules()
            for tensor in _tensors(module)
            if tensor.is_floating_point()  # which a count of batches is not, that loading looks at
        ]
        memory = _in_one_memory(tensor for tensor, _ in held)
        self.holders: defaultdict[int, dict[int, nn.Module]] = defaultdict(dict)  # of tensors
        for tensor, module in held:
            for other in memory[id(tensor)]:
                self.holders[id(other)][id(module)] = module
        # Convolutions that forwards return the output of, and batch norms of what they are given: their callers may
        # pair them.
        self.last: defaultdict[int, set[int]] = defaultdict(set)
        self.first: defaultdict[int, set[int]] = defaultdict(set)
        self.calls: list[tuple[nn.Module, Node, Explored]] = []
        self.called: set[int] = set()
        for each in explored:
            for path, matches in zip(each.paths, each.matches, strict=True):
                self._look_at(path, {node for match in matches for node in self._members(match, path)}, each)
        self._resolve_ends(model, explored)

    def _members(self, match: Any, path: Path) -> Iterable[Node]:
        conv, norm = match.convolution_node, match.batch_norm_node
        if norm.op != "call_module":
            return ()
        normalising = id(path.root.get_submodule(str(norm.target)))
        called = self._called(conv, path)
        return (conv, norm) if called is not None and (id(called), normalising) in self.pairs else ()

    def _called(self, node: Node, path: Path) -> nn.Module | None:
        """The module that is called, or whose forward calls a function with the module's own weight."""
        if node.op == "call_module":
            return path.root.get_submodule(str(node.target))
        if node.target not in kinds.CONVOLUTION_FUNCTIONS:
            return None
        weight = weight_of(node)
        holders = self.holders[id(_tensor(str(weight.target), path.root))] if weight is not None else {}
        (holder,) = holders.values() if len(holders) == 1 else (None,)
        return holder if id(holder) in self.calling else None

    def _look_at(self, path: Path, paired: set[Node], each: Explored) -> None:
        root = path.root
        self.called |= {id(root.get_submodule(name)) for name in path.opened}
        for node in path.graph.nodes:
            if node.op == "get_attr":  # the forward reads a parameter itself
                # What another method does with all of them, it does with those of a baked model: loads them, say.
                if each.method == "forward" or (READ_BY_NAME in node.meta and node.users):
                    self._look_at_read(node, path)
            elif node in paired:
                if len(node.users) > 1 and any(user in paired for user in node.users):
                    self.read.add(id(self._called(node, path)))
            elif (called := self._called(node, path)) is not None:
                self.calls.append((called, node, each))

    def _look_at_read(self, node: Node, path: Path) -> None:
        """Notes whose parameter is read for more than what is known of it, or than a call that may be a pair's."""
        readers = [user for user in node.users if not reads_metadata(user)]
        for identity, holder in self.holders[id(_tensor(str(node.target), path.root))].items():
            if any(self._called(user, path) is not holder for user in readers) or not node.users:
                self.apart.setdefault(identity, f"{node.target} is read in {_told(path.root)}")

    def _resolve_ends(self, model: nn.Module, explored: list[Explored]) -> None:
        """Hands what is at the end of a forward to those who call it."""
        self.called |= {id(module) for module, _, _ in self.calls}
        while True:
            before = sum(map(len, (*self.last.values(), *self.first.values())))
            for module, node, each in self.calls:
                is_last = each.method == "forward" and {user.op for user in node.users} <= {"output"}
                sources = {source.op for source in node.all_input_nodes}
                is_first = each.method == "forward" and sources <= {"placeholder"}
                self._hand_on(self._lasts(module), is_last, self.last[id(each.module)], each)
                self._hand_on(self._firsts(module), is_first, self.first[id(each.module)], each)
            if before == sum(map(len, (*self.last.values(), *self.first.values()))):
                break
        for each in explored:
            if each.module is model or id(each.module) not in self.called:
                for identity in self.last[id(each.module)] | self.first[id(each.module)]:
                    self.apart.setdefault(identity, f"at an end of {_told(each.module)}")

    def _lasts(self, module: nn.Module) -> set[int]:
        is_convolution = kinds.resembles_convolution(module) or id(module) in self.calling
        return {id(module)} if is_convolution else self.last[id(module)]

    def _firsts(self, module: nn.Module) -> set[int]:
        return {id(module)} if kinds.resembles_batch_norm(module) else self.first[id(module)]

    def _hand_on(self, identities: set[int], is_at_the_end: bool, borders: set[int], each: Explored) -> None:
        if is_at_the_end:
            borders |= identities
        else:
            for identity in identities:
                self.apart.setdefault(identity, f"on a path of {_told(each.module)}")


def weight_of(node: Node) -> Node | None:
    """The weight of a function's call, if a parameter is the weight itself."""
    try:
        _, call = kinds.CONVOLUTION_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
    except TypeError:  # a call that raises
        return None
    weight: Any = call.weight
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [
        tensor
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    ]


def _in_one_memory(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """For tensors, by id, all that lie in the same memory, at least in part; itself, too."""
    groups = {id(tensor): [tensor] for tensor in tensors}
    places: list[tuple[int, int, int, int]] = []
    for (tensor,) in groups.values():
        if tensor.layout is torch.strided and not is_lazy(tensor) and tensor.numel():
            size, begin = tensor.element_size(), int(tensor.storage_offset())
            lengths = zip(tensor.shape, tensor.stride(), strict=True)
            end = begin + 1 + sum((length - 1) * stride for length, stride in lengths)
            places.append((tensor.untyped_storage()._cdata, begin * size, end * size, id(tensor)))
    before, reach = (0, 0), 0  # the storage and the id of the last one, and how far they went
    for storage, begin, end, identity in sorted(places):
        if before[0] == storage and begin < reach:
            groups[before[1]] += groups[identity]
            groups[identity] = groups[before[1]]
            end = max(end, reach)
        before, reach = (storage, identity), end
    return groups


def _tensor(name: str, root: nn.Module) -> Any:
    """The tensor of this name; None where a trace made it up."""
    owner, _, last = name.rpartition(".")
    return getattr(root.get_submodule(owner), last, None)


def _lost(explored: Explored) -> str:
    return f"{_told(explored.module)} could not be followed to its end, or a guessed number decides on what it does"


def _are_all(explored: Explored) -> bool:
    """Whether nothing can happen in a forward that none of its ways shows; how a guessed number went proves nothing."""
    return all(path.is_whole and not path.has_guessed_a_number for path in explored.paths)


# --- What has changed ---------------------------------------------------------------------------------------------


def goes_another_way(explored: Explored, private: PrivateCopy, biases: dict[int, tuple[str, str]]) -> bool:
    """Whether a forward, explored again, is not the one it was: it looks at what was exchanged.

    Args:
        explored: What it was.
        private: A copy of the model as it is now.
        biases: For modules, by id, the names of a weight that was exchanged, and of the bias that now goes with it.
    """
    again = explore_again(explored.paths, private, explored.method)
    names = {
        f"{name}.{weight}".lstrip("."): f"{name}.{bias}".lstrip(".")
        for name, module in explored.module.named_modules()
        for weight, bias in [biases.get(id(module), ("", ""))]
        if weight
    }
    before = [_written(path, names, names) for path in explored.paths]
    return [_written(path, names, {}) for path in again] != before


def _written(path: Path, biases: dict[str, str], given: dict[str, str]) -> list[object]:
    """What is compared of a way: its nodes without those that read a bias that may be new; as if it were given."""
    written: list[object] = [path.is_whole]
    for node in path.graph.nodes:
        is_bias = node.op == "get_attr" and node.target in biases.values()
        if node.target is kept_by_someone or is_bias:
            continue
        arguments: tuple[Any, ...] = (node.args, node.kwargs)
        weight = weight_of(node) if node.target in kinds.CONVOLUTION_FUNCTIONS else None
        if weight is not None and weight.target in biases:
            input, call = kinds.CONVOLUTION_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
            bias = given.get(str(weight.target), getattr(call.bias, "target", None))
            arguments = (input, call._replace(bias=bias))
        written.append((node.op, node.target, str(arguments)))
    return written


# --- Who can reach what ------------------------------------------------------------------------------------------

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: In what cannot lead back to an instance of a model, or not by what a forward does.
_NOT_ENTERED: Final = (
    type,
    ModuleType,
    CodeType,
    FrameType,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
)


class _HooksOf:
    """Stands for the hooks of a module in the graph of references."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class _References:
    """The graph of references between the modules of a model, its tensors, and whatever else they hold.

    Args:
        model: Where to start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sources: defaultdict[int, list[Any]] = defaultdict(list)
        self.inside: dict[int, set[int]] = {}
        known: dict[int, Any] = {}
        todo: list[Any] = [model]
        while todo:
            value = todo.pop()
            if id(value) in known:
                continue
            known[id(value)] = value
            for target in _targets(value):
                if not issubclass(type(target), _NOT_ENTERED) and target is not None:
                    self.sources[id(target)].append(value)
                    todo.append(target)
        self.kept_alive = known
        tensors = [value for value in known.values() if issubclass(type(value), Tensor)]
        for identity, others in _in_one_memory(tensors).items():
            self.sources[identity] += [other for other in others if id(other) != identity]

    def doubt(self, member: nn.Module, followed: Set[int], lost: dict[int, str]) -> str:
        """Who may use a convolution or a batch norm in a way that was not followed; empty if nobody."""
        for target in (member, *_tensors(member)):
            for module in self._reaching(target, member):
                doubt = self._doubt_about(module, target, followed, lost)
                if doubt:
                    return doubt
        return ""

    def _reaching(self, target: Any, member: nn.Module) -> Iterator[Any]:
        """Modules and hooks from which a reference leads to the target, not by way of the member."""
        known, todo = {id(member)} if target is not member else set(), [target]
        while todo:
            for source in self.sources[id(todo.pop())]:
                if id(source) not in known:
                    known.add(id(source))
                    todo.append(source)
                    # By its type: a weak proxy passes for what it stands for.
                    if issubclass(type(source), (nn.Module, _HooksOf)):
                        yield source

    def _doubt_about(self, module: Any, target: Any, followed: Set[int], lost: dict[int, str]) -> str:
        if isinstance(module, _HooksOf):
            return f"a hook of {_told(module.module)} reaches it"
        if _runs_only_what_it_is_known_for(module):
            return ""
        if id(target) not in self._inside(module):
            return f"{_told(module)} reaches it, and is not around it"
        if id(module) not in followed:
            return f"{_told(module)}, whose forward was not explored, is around it"
        return lost.get(id(module), "")

    def _inside(self, module: nn.Module) -> set[int]:
        """Ids of the modules and tensors that are registered inside a module."""
        if id(module) not in self.inside:
            parts = list(module.modules())
            tensors = [tensor for part in parts for tensor in _tensors(part)]
            self.inside[id(module)] = {*map(id, parts), *map(id, tensors)}
        return self.inside[id(module)]


def _runs_only_what_it_is_known_for(module: nn.Module) -> bool:
    """Whether the module's own forward uses nothing but its own parameters, or there is none."""
    if vars(module).get("forward") is not None:
        return False
    known = kinds.convolution_kind(module) is not None or kinds.batch_norm_kind(module) is not None
    if known or type(module).forward is nn.Module.forward:
        return True
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def _told(module: nn.Module) -> str:
    return type(module).__name__


def _targets(value: Any) -> Iterable[Any]:
    """What a value refers to, in ways that a forward can follow."""
    if issubclass(type(value), (weakref.ReferenceType, *weakref.ProxyTypes)):
        return [referent(value)]
    if isinstance(value, Tensor):
        return ()
    if isinstance(value, nn.Module):
        attributes = [part for name, part in vars(value).items() if name not in _HOOKS]
        return [*attributes, *_slots(value), *([_HooksOf(value)] if kinds.has_hooks(value) else ())]
    if isinstance(value, _HooksOf):
        hooks = [hook for name in _HOOKS for hook in vars(value.module).get(name, {}).values()]
        return [*hooks, *([value.module] if any(map(_uses_its_module, hooks)) else ())]
    if isinstance(value, FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
    return gc.get_referents(value)


def _slots(module: nn.Module) -> list[Any]:
    names = [name for cls in type(module).__mro__ for name in vars(cls).get("__slots__", ())]
    return [getattr(module, name) for name in names if hasattr(module, name)]


def _uses_its_module(hook: Any) -> bool:
    """Whether a hook may do anything with the module that it is called with."""
    if not isinstance(hook, FunctionType) or hook.__code__.co_argcount == 0:
        return True
    first = hook.__code__.co_varnames[0]
    return any(
        instruction.argval == first or (isinstance(instruction.argval, tuple) and first in instruction.argval)
        for instruction in dis.get_instructions(hook)
        if instruction.opname.startswith("LOAD")
    )
