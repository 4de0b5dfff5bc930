"""Deploy mode: the fused parameters computed once and put into a plain convolution, in a model or in a graph."""

import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from convbn_fx import kinds
from convbn_fx._torch import ConvTransposeBase, FakeTensor
from convbn_fx.functional.arithmetic import output_channels
from convbn_fx.functional.folding import fold
from convbn_fx.functional.norms import FUSED
from convbn_fx.fx.graph_module import GraphModule
from convbn_fx.fx.pairs import OwnedPair, Refusal
from convbn_fx.fx.rewriting import BATCH_NORM
from convbn_fx.operands import BatchNorm, Convolution
from convbn_fx.records import Skip, SkipReason


class Folded(nn.Identity):
    """Stands where a batch norm stood whose channels are the convolution's in inputs of one rank only.

    Args:
        rank: Number of dimensions of that input.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """Returns the input.

        Raises:
            ValueError: It has another rank: the batch norm would have normalised another dimension.
        """
        if input.ndim != self.rank:
            raise ValueError(
                f"a batch norm was folded for inputs of {self.rank} dimensions, and this one has {input.ndim}. "
                "Use tune() in place of deploy(), which looks at every call"
            )
        return input

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.rank}"


# --- In a model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baked:
    """Pairs that were baked together, because they share modules.

    Attributes:
        pairs: The pairs.
        originals: The modules that were exchanged, the classes they had, and their attributes.
    """

    pairs: list[OwnedPair]
    originals: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]

    def biases(self, model: nn.Module) -> dict[int, tuple[str, str]]:
        """For modules whose own forwards run on, by id, the names of the weight and the bias that were baked."""
        named = ((_members(model, pair)[0], _named(pair)) for pair in self.pairs)
        return {id(conv): (str(call.weight), _bias_name(call)) for conv, call in named if call is not None}

    def undo(self) -> None:
        """Makes the modules what they were."""
        for module, cls, attributes in self.originals:
            vars(module).clear()
            vars(module).update(attributes)
            module.__class__ = cls


def bake(
    model: nn.Module, pairs: Iterable[OwnedPair], doubts: dict[int, tuple[SkipReason, str]]
) -> tuple[list[Baked], list[Skip]]:
    """Turns the convolutions of pairs into plain ones with baked parameters, and their batch norms into nothing.

    A batch norm that follows several convolutions is baked into each. A convolution that several batch norms follow
    moves into their places, once for each. Where a forward calls the function itself, it runs on as it is, with baked
    parameters.

    Args:
        model: The model, changed in place; its modules must be nobody else's.
        pairs: The pairs to bake: of modules, or of a function that a forward calls with its module's own parameters.
        doubts: For convolutions and batch norms, by id, that may also be used outside of these pairs, who may use them.

    Returns:
        The pairs that were baked, and a `Skip` for each that could not be.
    """
    baked: list[Baked] = []
    skips: list[Skip] = []
    for group in _sharing_modules(model, pairs):
        try:
            _check_what_is_between(model, group)
            replacements = _replacements([(*_members(model, pair), _named(pair)) for pair in group], doubts)
        except Refusal as refusal:
            skips += [Skip(pair.record.batch_norm, refusal.reason, refusal.detail) for pair in group]
            continue
        baked.append(Baked(group, [(module, type(module), dict(vars(module))) for module, _ in replacements]))
        for module, replacement in replacements:
            _turn_into(module, replacement)
    return baked, skips


def _members(model: nn.Module, pair: OwnedPair) -> tuple[nn.Module, nn.Module]:
    return model.get_submodule(pair.convolution_module), model.get_submodule(pair.record.batch_norm)


def _named(pair: OwnedPair) -> Convolution[str] | None:
    return pair.operands if isinstance(pair.operands, Convolution) else None


def _sharing_modules(model: nn.Module, pairs: Iterable[OwnedPair]) -> list[list[OwnedPair]]:
    """The pairs in groups that have no module in common."""
    groups: list[tuple[set[int], list[OwnedPair]]] = []
    for pair in pairs:
        modules, members = set(map(id, _members(model, pair))), [pair]
        apart = []
        for other_modules, others in groups:
            if modules & other_modules:
                modules, members = modules | other_modules, others + members
            else:
                apart.append((other_modules, others))
        groups = [*apart, (modules, members)]
    return [members for _, members in groups]


def _check_what_is_between(model: nn.Module, pairs: list[OwnedPair]) -> None:
    for name in (name for pair in pairs for name in pair.between):
        if kinds.has_hooks(model.get_submodule(name)):
            raise Refusal(SkipReason.HAS_HOOKS, f"{name}, out of or into which the output goes")


def _replacements(
    members: list[tuple[nn.Module, nn.Module, Convolution[str] | None]],
    doubts: dict[int, tuple[SkipReason, str]],
) -> list[tuple[nn.Module, nn.Module]]:
    """Each module of a group, and what takes its place."""
    members = list({(id(conv), id(norm), call): (conv, norm, call) for conv, norm, call in members}.values())
    convs, norms = (
        {id(module): module for module in side}.values() for side in list(zip(*members, strict=True))[:2]
    )
    baked = [(conv, norm, _baked(conv, norm, call)) for conv, norm, call in members]
    for module in (*convs, *norms):
        if id(module) in doubts:
            raise Refusal(*doubts[id(module)])
    rank = baked[0][2].rank
    if len(norms) == 1 and len(baked) == len(convs):
        (norm,) = norms
        return [
            *((conv, plain) for conv, _, (plain, _) in baked),
            (norm, _remainder(norm, _with_neutral_statistics(norm, _check(rank, norms)))),
        ]
    # What takes more than the input, or does more than call the function, cannot move.
    can_move = not isinstance(baked[0][2].module, ConvTransposeBase) and all(
        call is None for *_, call in members
    )
    if len(convs) == 1 and can_move:
        (conv,) = convs
        return [
            *((norm, _remainder(norm, plain)) for _, norm, (plain, _) in baked),
            (conv, _check(rank, norms)),
        ]
    raise Refusal(SkipReason.SHARED)


#: Attributes of every module, beside its parameters, buffers and children.
_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


def _turn_into(module: nn.Module, replacement: nn.Module) -> None:
    """Changes the very object, so that whoever refers to it refers to the replacement, and finds its attributes."""
    kept = {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and name not in dir(replacement)
    }
    training = module.training
    vars(module).clear()
    vars(module).update(kept)
    vars(module).update(vars(replacement))
    module.__class__ = type(replacement)
    module.training = training


def _check(rank: int, norms: Iterable[nn.Module | BatchNorm]) -> nn.Module:
    """What stands where nothing is left to do, unless an input of another rank would be normalised in another way."""
    modules = [norm for norm in norms if isinstance(norm, nn.Module)]
    norm_kinds = [kinds.batch_norm_kind(norm) for norm in modules]
    strict = len(modules) > 0 and not any(
        kind is None or kind.always_frozen or kind.accepts(rank - 1) or kind.accepts(rank + 1)
        for kind in norm_kinds
    )
    return nn.Identity() if strict else Folded(rank)


def _with_neutral_statistics(norm: nn.Module, check: nn.Module) -> nn.Module:
    """Gives what stands in a batch norm's place statistics by which folding it once more changes nothing.

    A library's own `fuse()` folds whatever is there. PyTorch's functions take missing affine parameters for ones and
    zeros. Formulas that would forget the convolution's new bias raise an error at them.
    """
    kind = kinds.batch_norm_kind(norm)
    if kind is not None:
        operands: BatchNorm = kind.operands(norm)
        check.register_buffer("running_mean", torch.zeros_like(operands.running_mean), persistent=False)
        variance = torch.full_like(operands.running_var, 1 - operands.eps)
        check.register_buffer("running_var", variance, persistent=False)
        vars(check).update(weight=None, bias=None)
    return check


def _remainder(norm: nn.Module, first: nn.Module) -> nn.Module:
    """What is to run in the place of a batch norm: `first`, then what its class does after normalising."""
    kind = kinds.batch_norm_kind(norm)
    if kind is None or kind.epilogue is None:
        return first
    parts = {name: part for name in ("drop", "act") if (part := getattr(norm, name, None)) is not None}
    if not all(isinstance(part, nn.Module) for part in parts.values()):
        raise Refusal(SkipReason.UNKNOWN_BATCH_NORM, "its activation is no module")
    return nn.Sequential(OrderedDict({"folded": first, **parts})) if parts else first


# --- The baked convolution ---------------------------------------------------------------------------------------

_CONSTRUCTOR: Final = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding"),
    *("output_padding", "dilation", "groups", "padding_mode"),
)


class _WithRank(NamedTuple):
    """A module, and the number of dimensions of its weight."""

    module: nn.Module
    rank: int


def _baked(
    conv: nn.Module | Convolution, norm: nn.Module | BatchNorm, call: Convolution[str] | None = None
) -> _WithRank:
    """A plain module that computes what the two compute one after the other, with parameters of its own.

    Where the convolution's forward makes a call of a function with parameters of these names, a module like it.

    Raises:
        Refusal: There is none.
    """
    for module in (conv, norm):
        if isinstance(module, nn.Module) and kinds.has_hooks(module):
            raise Refusal(SkipReason.HAS_HOOKS, type(module).__name__)
    names = ("weight", "bias") if call is None else (str(call.weight), _bias_name(call))
    plain: Any
    if call is not None:
        plain, operands = _like(conv, call)
        trains = bool(operands.weight.requires_grad)
    else:
        cls, operands, arguments = (
            _plain_form(conv) if isinstance(conv, nn.Module) else _plain_form_of_call(conv)
        )
        trains = _trains(conv, operands)
        plain = cls(**arguments, bias=True, device="meta")
        # This is what the forward pads by, whatever the padding was changed to since.
        if (padding := getattr(conv, "_reversed_padding_repeated_twice", None)) is not None:
            plain._reversed_padding_repeated_twice = padding
    norm_operands = _frozen_operands(norm, operands) if isinstance(norm, nn.Module) else norm
    weight, bias = _fold(operands, norm_operands)
    # As PyTorch's own fusion has it: what was frozen stays frozen.
    shifts = (operands.bias, norm_operands.bias)
    shift_trains = any(shift is not None and shift.requires_grad for shift in shifts)
    plain._parameters |= {names[0]: nn.Parameter(weight, trains), names[1]: nn.Parameter(bias, shift_trains)}
    return _WithRank(plain, weight.ndim)


def _bias_name(call: Convolution[str]) -> str:
    """Where a forward that passes no bias may look for one."""
    return "bias" if call.bias is None else str(call.bias)


def _like(conv: Any, call: Convolution[str]) -> tuple[nn.Module, Convolution]:
    """A copy of a module that is to have parameters of its own, and the operands to fold."""
    name = _bias_name(call)
    weight, bias = conv._parameters.get(call.weight), conv._parameters.get(name)
    if weight is None:
        raise Refusal(SkipReason.FUNCTION_CALL, "its weight is no parameter")
    if (None if call.bias is None else bias) is not getattr(conv, name, None):
        raise Refusal(SkipReason.FUNCTION_CALL, f"its bias is not the {name} of {type(conv).__name__}")
    copied = object.__new__(type(conv))
    vars(copied).update(vars(conv), _parameters=dict(conv._parameters))
    vars(copied).pop(name, None)
    return copied, Convolution(call.op, weight, bias, *call[3:])


def _trains(conv: nn.Module | Convolution, operands: Convolution) -> bool:
    """Whether the weight, or what it is computed from, trains."""
    if not isinstance(conv, nn.Module):
        return bool(operands.weight.requires_grad)
    return any(tensor.requires_grad for tensor in conv.parameters() if tensor is not operands.bias)


def _plain_form(conv: Any) -> tuple[type[nn.Module], Convolution, dict[str, Any]]:
    """The class of a plain module like `conv`, the operands to fold, and the arguments of its constructor."""
    kind = kinds.convolution_kind(conv)
    if kind is None or kind.plain is None:
        raise Refusal(SkipReason.UNKNOWN_CONVOLUTION, f"{type(conv).__name__} has no plain form")
    training = conv.training
    conv.eval()  # a parametrisation may update what it keeps when it is read in Train mode
    cls, weight = kind.plain(conv)
    conv.train(training)
    operands = Convolution(
        "",
        weight,
        conv.bias,
        transposed=issubclass(cls, ConvTransposeBase),
        groups=getattr(conv, "groups", 1),
    )
    parameters = signature(cls.__init__).parameters
    arguments = {name: getattr(conv, name) for name in _CONSTRUCTOR if name in parameters}
    if "in_channels" in arguments:  # a pruned convolution may say what it had before
        inputs = weight.shape[0] if operands.transposed else weight.shape[1] * operands.groups
        arguments |= {"in_channels": inputs, "out_channels": output_channels(operands)}
    return cls, operands, arguments


def _plain_form_of_call(conv: Convolution) -> tuple[type[nn.Module], Convolution, dict[str, Any]]:
    """As `_plain_form`, for the call of a function."""
    inputs, outputs = conv.weight.shape[0 if conv.transposed else 1], output_channels(conv)
    if conv.op == "linear":
        return nn.Linear, conv, {"in_features": inputs, "out_features": outputs}
    name = f"Conv{'Transpose' if conv.transposed else ''}{conv.weight.ndim - 2}d"
    arguments = {
        "in_channels": inputs if conv.transposed else inputs * conv.groups,
        "out_channels": outputs,
        "kernel_size": tuple(conv.weight.shape[2:]),
        **{field: getattr(conv, field) for field in ("stride", "padding", "dilation", "groups")},
    }
    if conv.transposed:
        arguments["output_padding"] = conv.output_padding
    return getattr(nn, name), conv, arguments


def _frozen_operands(norm: nn.Module, conv: Convolution) -> BatchNorm:
    kind = kinds.frozen_kind(norm)
    if kind is None:
        raise Refusal(SkipReason.TRAINING_MODE)
    operands: BatchNorm = kind.operands(norm)
    if kind.promotes and operands.running_var.dtype != conv.weight.dtype:
        raise Refusal(SkipReason.UNUSUAL_CALL, "the result is of another dtype than the convolution's")
    return operands


def _fold(conv: Convolution, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    vectors = [vector for vector in norm[:4] if vector is not None]
    if any(vector.shape != (output_channels(conv),) for vector in vectors):
        raise Refusal(SkipReason.CHANNELS_DIFFER)
    with torch.no_grad():
        weight, bias = fold(conv, norm)
    has_data = not (weight.is_meta or isinstance(weight, FakeTensor))
    if has_data and not (weight.isfinite().all() and bias.isfinite().all()):
        raise Refusal(SkipReason.OUT_OF_RANGE, str(weight.dtype))
    return weight, bias


# --- In a graph --------------------------------------------------------------------------------------------------


_NAMING: Final = ("call_module", "get_attr")


def bake_graph(graph_module: GraphModule) -> list[Skip]:
    """Replaces the fused calls of a rewritten graph by calls of plain modules with baked parameters.

    Args:
        graph_module: The graph, changed in place.

    Returns:
        A `Skip` for each fused call that could not be baked.
    """
    skips: list[Skip] = []
    folded_away: set[str] = set()
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in FUSED:
            continue
        names = [str(operand.target) for operand in node.args[:2] if isinstance(operand, Node)]
        try:
            conv, norm = (_constant(operand, graph_module) for operand in node.args[:2])
            plain, rank = _baked(conv, norm)
        except Refusal as refusal:
            name = node.meta.get(BATCH_NORM) or (names[-1] if names else node.name)
            skips.append(Skip(name, refusal.reason, refusal.detail))
            continue
        check = _check(rank, [norm])
        rest = _remainder(norm, check) if isinstance(norm, nn.Module) else check
        with graph.inserting_before(node):
            folded = graph.call_module(_added(graph_module, node, plain), node.args[2:], node.kwargs)
            if type(rest) is not nn.Identity:
                folded = graph.call_module(_added(graph_module, node, rest), (folded,))
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
        graph.erase_node(node)
        folded_away |= set(names)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            folded_away.add(str(node.target))
            graph.erase_node(node)
    named = [str(node.target) for node in graph.nodes if node.op in _NAMING]
    still_called = {
        id(part)
        for node in graph.nodes
        if node.op == "call_module"
        for part in graph_module.get_submodule(str(node.target)).modules()
    }
    for name in folded_away:
        owner, _, last = name.rpartition(".")
        if id(graph_module.get_submodule(owner)) not in still_called and not any(
            f"{other}.".startswith(f"{name}.") for other in named
        ):
            for members in _members_of(graph_module.get_submodule(owner)):
                members.pop(last, None)
    graph.lint()
    graph_module.recompile()
    return skips


def _members_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Its children, parameters and buffers; a dictionary of buffers is shared with the original."""
    module._buffers = dict(module._buffers)
    return module._modules, module._parameters, module._buffers


def _added(graph_module: GraphModule, node: Node, module: nn.Module) -> str:
    """Adds a module to a graph under a name that is free, and tells the name."""
    name = next(
        name
        for count in itertools.count()
        if not hasattr(graph_module, name := f"{node.name}_folded_{count}")
    )
    graph_module.add_module(name, module)
    return name


def _constant(operand: Any, graph_module: GraphModule) -> Any:
    """The module that an operand of a fused call names, or the operands with the tensors that its nodes name."""
    if isinstance(operand, (Convolution, BatchNorm)):
        return type(operand)(*(_constant(value, graph_module) for value in operand))
    if not isinstance(operand, Node):
        return operand
    if operand.op != "get_attr":
        raise Refusal(SkipReason.UNUSUAL_CALL, f"{operand.name} is computed at every call")
    return operator.attrgetter(str(operand.target))(graph_module)
