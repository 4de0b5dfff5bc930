"""Which pairs a model's forwards run: every module's own forward is explored, and its ways are compared.

What is found decides only which convolutions may do the work of a batch norm, and what the report says. What runs is
always the forward itself (see [`deferred`][convbn_fx.tuning.deferred]).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.lazy import LazyModuleMixin

from convbn_fx import kinds
from convbn_fx.fx.copying import reached_from
from convbn_fx.fx.graph_module import GraphModule
from convbn_fx.fx.matching import find_pairs_in
from convbn_fx.fx.pairs import Match, OwnedPair
from convbn_fx.fx.private_copy import private_copy
from convbn_fx.operands import Convolution
from convbn_fx.records import Skip, SkipReason
from convbn_fx.tuning.exploring.exact_classes import Question, questions_in
from convbn_fx.tuning.exploring.exploration import Borders, GuessedTensor, Path, explore, kept_by_someone


@dataclass(frozen=True)
class Explored:
    """The forward of a module, as it was explored.

    Attributes:
        module: The module.
        paths: The ways through its forward.
        matches: For each way, the pairs on it.
        method: Name of the method, if it is another than the forward.
    """

    module: nn.Module
    paths: list[Path]
    matches: list[list[Match]]
    method: str = "forward"


@dataclass
class Discovery:
    """What the forwards of a model do with convolutions and batch norms.

    Attributes:
        pairs: The pairs, in the order of the forwards.
        skips: A `Skip` for every Eval-mode batch norm that is in no pair.
        explored: The forwards, children first.
        borders: How the forwards begin and end.
        originals: The model's module for each module of the copy that was explored.
        questions: What the model's code asks about exact classes.
    """

    pairs: list[OwnedPair]
    skips: list[Skip]
    explored: list[Explored]
    borders: Borders
    originals: dict[nn.Module, nn.Module]
    questions: list[Question]


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
    decided: dict[int | str, Skip] = {}  # those that no other way through a forward outvotes
    explored: list[Explored] = []
    lost: dict[int, str] = {}  # modules that may be called where no exploration led
    questions = questions_in(model)
    borders = Borders(set(), set())
    with private_copy(model, GuessedTensor) as private:
        # Children first: how their forwards begin and end decides whether their parent looks inside them.
        for name, module in _with_forwards_of_their_own(model):
            explored.append(Explored(module, explore(module, borders, private), []))
            for path in explored[-1].paths:
                borders.learn(path)
                path.broke_off = path.broke_off or _misled(path, questions)
                matches, refusals = find_pairs_in(path.graph, module, include_training)
                judged = [(match, _refusal(match, path)) for match in matches]
                taken = [match for match, refusal in judged if refusal is None]
                refusals += [refusal for _, refusal in judged if refusal is not None]
                for pair in (_owned(match, path, name) for match in taken):
                    key = pair.record.convolution, pair.record.batch_norm
                    pairs[key] = pairs[key].also(pair) if key in pairs else pair
                # The outermost forward knows best.
                for skip in (refusal.prefixed(name) for refusal in refusals):
                    skips[skip.batch_norm] = skip
                    if skip.reason in (SkipReason.MODIFIED_IN_BETWEEN, SkipReason.CONTEXTS_DIFFER):
                        decided[identity(model, skip.batch_norm)] = skip
                for output in _kept_outputs(path):
                    decided[identity(model, _joined(name, output))] = _KEPT
                explored[-1].matches.append(taken)
            for part, told in _lost(explored[-1].paths, module):
                lost.setdefault(id(part), f"{name or 'the model'}: {told}")
    _leave_out(pairs, decided, skips, model)
    _leave_out(pairs, _asked_for(model, pairs.values(), questions), skips, model)
    fused = {identity(model, pair.record.batch_norm) for pair in pairs.values()}
    by_module = {identity(model, name): skip for name, skip in skips.items()}
    left = [skip for module, skip in by_module.items() if module not in fused]
    left += _never_called(model, fused | by_module.keys(), lost)
    place = {name: number for number, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return Discovery(
        sorted(pairs.values(), key=lambda pair: place[pair.owner]),
        sorted(left, key=lambda skip: place[skip.batch_norm.rpartition(".")[0]]),
        explored,
        borders,
        private.originals,
        [question for _, question in questions],
    )


def _leave_out(
    pairs: dict[tuple[str, str], OwnedPair],
    decided: dict[int | str, Skip],
    skips: dict[str, Skip],
    model: nn.Module,
) -> None:
    """Makes skips of the pairs of which one way through a forward has decided that they are none."""
    for key, pair in list(pairs.items()):
        name = pair.record.batch_norm
        members = (identity(model, name), identity(model, pair.record.convolution))
        decision = next((decided[member] for member in members if member in decided), None)
        if decision is not None:
            del pairs[key]
            skips[name] = replace(decision, batch_norm=name)


def _asked_for(
    model: nn.Module, pairs: Iterable[OwnedPair], questions: list[tuple[nn.Module, Question]]
) -> dict[int | str, Skip]:
    """The batch norms of pairs, of whose modules code around them asks whether they are exactly of a class."""
    found = {}
    for asking, question in questions:
        parts = reached_from(asking)
        for pair in pairs:
            names = (pair.record.batch_norm, pair.record.convolution, pair.owner)
            members = [model.get_submodule(name) for name in names if identity(model, name) != name]
            changed = {kinds.class_of(member) for member in members if id(member) in parts}
            if changed and question.is_answered_otherwise(changed | {Tensor}):
                found[identity(model, names[0])] = Skip("", SkipReason.CLASS_ASKED_FOR, question.told)
    return found


def _misled(path: Path, questions: list[tuple[nn.Module, Question]]) -> str:
    """What the forward asked that an exploration cannot see, and may have answered otherwise than a call would."""
    followed = [path.root, *map(path.root.get_submodule, path.opened)] if questions else []
    told = [
        question.told
        for asking, question in questions
        if asking in followed and question.is_answered_otherwise({Tensor})
    ]
    return told[0] if told else ""


def _lost(paths: list[Path], root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that the root's forward may call where none of the ways leads, and why none does."""
    told = [path.broke_off for path in paths if path.broke_off]
    told += ["how often a loop runs was guessed" for path in paths if path.has_guessed_a_number]
    yield from ((part, told[0]) for part in root.modules() if told)
    for path in paths:
        for module in path.elsewhere:
            yield from ((part, "it calls what is not part of it") for part in module.modules())


def identity(model: nn.Module, name: str) -> int | str:
    """What tells a module, whatever its names, or a function from all others."""
    try:
        return id(model.get_submodule(name))
    except AttributeError:
        return name


def _kept_outputs(path: Path) -> Iterator[str]:
    """The convolutions whose output is put where the forward's own variables do not reach."""
    for node in path.graph.nodes:
        readers = [user for user in node.users if user.target is kept_by_someone or _is_stored_by(user, node)]
        if readers and node in path.methods:
            yield path.name_of(node)


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
            or _may_convolve(part)
            for part in module.modules()
        )
    )


def _may_convolve(module: nn.Module) -> bool:
    """Whether the module is of a class of somebody's own and has a parameter that may be a function's weight."""
    if type(module).__module__.startswith("torch.nn.modules."):
        return False
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())


_NO_FORWARD: Final = nn.Module.forward


def _never_called(model: nn.Module, known: set[int | str], lost: dict[int, str]) -> list[Skip]:
    """Skips for the Eval-mode batch norms that no exploration saw; those in graphs are in the graphs' own reports."""
    in_graphs = {id(part) for graph in _graphs(model) for part in graph.modules()}
    patched = {name for name, module in model.named_modules() if "forward" in vars(module)}
    skips = []
    for name, module in model.named_modules():
        if not kinds.resembles_batch_norm(module) or module.training or id(module) in known | in_graphs:
            continue
        if not patched.isdisjoint({"", *_enclosing(name)}):
            skips.append(Skip(name, SkipReason.INSIDE_LEAF_MODULE, "the forward of an instance was replaced"))
        elif id(module) in lost:
            skips.append(Skip(name, SkipReason.NOT_FOLLOWED, lost[id(module)]))
        else:
            skips.append(Skip(name, SkipReason.NOT_CALLED))
    return skips


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# --- One way through a forward -----------------------------------------------------------------------------------


def _refusal(match: Match, path: Path) -> Skip | None:
    """Why a pair that a graph could fuse cannot wait for its batch norm in a forward."""
    name = match.pair.batch_norm
    if match.convolution_node.op == "call_function" and isinstance(path.root, torch.fx.GraphModule):
        return Skip(name, SkipReason.FUNCTION_CALL)
    convolution, batch_norm = (
        path.contexts[node] for node in (match.convolution_node, match.batch_norm_node)
    )
    if {convolution.records_gradients, batch_norm.records_gradients} != {path.own_context.records_gradients}:
        return Skip(name, SkipReason.UNUSUAL_CALL, "inside a with-statement that changes the grad mode")
    if convolution.autocast != batch_norm.autocast:
        return Skip(name, SkipReason.CONTEXTS_DIFFER, "autocast around one of them")
    # In a region that the batch norm is not in, the convolution does not wait.
    if batch_norm.saved_by not in (convolution.saved_by, path.own_context.saved_by):
        return Skip(
            name, SkipReason.CONTEXTS_DIFFER, "a checkpoint, or another saver, around the batch norm alone"
        )
    return None


def _owned(match: Match, path: Path, owner: str) -> OwnedPair:
    calls = path.methods.get(match.convolution_node, set()) & path.methods.get(match.batch_norm_node, set())
    methods = {name for _, name in calls}
    convolution = path.name_of(match.convolution_node)
    between = _enclosing(convolution) ^ _enclosing(path.name_of(match.batch_norm_node))
    site, call = path.sites.get(match.convolution_node), match.convolution
    return OwnedPair(
        replace(match.pair, convolution=convolution).prefixed(owner),
        owner,
        frozenset(methods | {"forward"}),
        frozenset(_joined(owner, name) for name in between & path.opened),
        None if site is None else site.prefixed(owner),
        None if site is None or isinstance(call, str) else _named_operands(call, site.caller),
        match.batch_norm_node.op == "call_function",
    )


def _named_operands(call: Convolution[Node], caller: str) -> Convolution[str] | str:
    """The operands of a function, if its tensors are nothing but the caller's own; else what is not."""
    names: dict[str, str] = {}
    for field in ("weight", "bias"):
        value = getattr(call, field)
        if isinstance(value, Node) and value.op == "get_attr":
            owner, _, names[field] = str(value.target).rpartition(".")
            if owner != caller:
                return f"its {field} is that of another module"
        elif value is not None:
            return f"its {field} is computed at every call"
    if isinstance(call.groups, Node) or isinstance(call.transposed, Node):
        return "its groups are computed at every call"
    return Convolution(
        call.op, names["weight"], names.get("bias"), transposed=call.transposed, groups=call.groups
    )


def _enclosing(name: str) -> frozenset[str]:
    """The qualified names of the modules around one."""
    return frozenset(name[:end] for end, letter in enumerate(name) if letter == ".")
