"""Who else uses a convolution or a batch norm: `deploy` has to know, as a baked model cannot look at its calls.

Judged by identity, over every way in which a module can be reached. A pair's modules may be exchanged if all forwards
that reach them were followed to their ends and use them as that pair alone, and if nothing else reaches them.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.fx import Node

from convbn_fx import kinds
from convbn_fx.fx.matching import find_pairs_in, reads_metadata
from convbn_fx.fx.pairs import OwnedPair
from convbn_fx.fx.private_copy import private_copy
from convbn_fx.fx.proxies import READ_BY_NAME
from convbn_fx.records import SkipReason
from convbn_fx.tuning.exploring.changed_ways import weight_of
from convbn_fx.tuning.exploring.discovery import Discovery, Explored
from convbn_fx.tuning.exploring.exploration import GuessedTensor, Path, explore
from convbn_fx.tuning.exploring.references import References, in_one_memory, tensors_of
from convbn_fx.tuning.exploring.untaken import CodeRun


def refusals(
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
    refused = {
        identity: (SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, detail)
        for identity, detail in uses.apart.items()
    }
    for conv, norm in members:
        # Where each of several batch norms becomes a convolution, there is no such output.
        if id(conv) in uses.read and any(conv is other and norm is not its for other, its in members):
            refused.setdefault(id(conv), (SkipReason.SHARED, "the shape of its output is read"))
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
                refused.setdefault(id(conv), (SkipReason.MAY_BE_USED_ELSEWHERE, told))
    references = References(model)
    followed = {id(each.module): each for each in found.explored}
    owners = {id(model.get_submodule(pair.owner)) for pair in pairs}
    lost_owners = {key: told for key, told in lost.items() if key in owners}
    for module in {id(module): module for pair in members for module in pair}.values():
        doubt = possible.get(id(module)) or references.doubt(module, followed.keys(), lost_owners)
        if id(module) in calling and not doubt:
            doubt = _doubt_about_its_call(followed[id(module)])
        if doubt:
            refused.setdefault(id(module), (SkipReason.MAY_BE_USED_ELSEWHERE, doubt))
    return refused


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
        return f"{type(module).__name__} could not be followed to its end"
    has_others = len(tensors_of(module)) > 2 or len(module._modules) > 0  # beside a weight and a bias
    if any(path.has_guessed_a_number and (path.loops or has_others) for path in paths):
        return f"how {type(module).__name__} calls the function depends on a number that was guessed"
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
            for tensor in tensors_of(module)
            if tensor.is_floating_point()  # which a count of batches is not, that loading looks at
        ]
        memory = in_one_memory(tensor for tensor, _ in held)
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
                self.apart.setdefault(identity, f"{node.target} is read in {type(path.root).__name__}")

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
                    self.apart.setdefault(identity, f"at an end of {type(each.module).__name__}")

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
                self.apart.setdefault(identity, f"on a path of {type(each.module).__name__}")


def _tensor(name: str, root: nn.Module) -> Any:
    """The tensor of this name; None where a trace made it up."""
    owner, _, last = name.rpartition(".")
    return getattr(root.get_submodule(owner), last, None)


def _lost(explored: Explored) -> str:
    name = type(explored.module).__name__
    return f"{name} could not be followed to its end, or a guessed number decides on what it does"


def _are_all(explored: Explored) -> bool:
    """Whether nothing can happen in a forward that none of its ways shows; how a guessed number went proves nothing."""
    return all(path.is_whole and not path.has_guessed_a_number for path in explored.paths)
