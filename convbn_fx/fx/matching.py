"""find_pairs: which batch norms of a graph can be fused into the convolution before them. Reads only.

One small predicate per reason to refuse, in the order in which a user would ask.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, Final

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.lazy import LazyModuleMixin

from convbn_fx import _torch, kinds
from convbn_fx.functional.activations import product
from convbn_fx.functional.arithmetic import output_channels
from convbn_fx.functional.dispatch import FUNCTIONAL_BATCH_NORM
from convbn_fx.functional.norms import FUSED, batch_norm_that_stays
from convbn_fx.fx.pairs import Match, Refusal
from convbn_fx.kinds import BatchNormKind, ConvolutionKind
from convbn_fx.operands import BatchNorm, Convolution
from convbn_fx.records import Pair, Skip, SkipReason


def find_pairs(graph_module: GraphModule, include_training: bool = False) -> tuple[list[Match], list[Skip]]:
    """Finds the pairs of a graph, and every batch norm that is none.

    Args:
        graph_module: The graph to read; it is not changed.
        include_training: Take pairs whose batch norm is in Train mode too (their calls look at the mode).

    Returns:
        The pairs in graph order, and a `Skip` for every other batch norm that the model holds.

    Example:
        ```python
        import torch
        import convbn_fx
        from convbn_fx.fx.matching import find_pairs

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        matches, skips = find_pairs(convbn_fx.symbolic_trace(model))
        assert [(match.pair.convolution, match.pair.batch_norm) for match in matches] == [("0", "1")]
        assert skips == []
        ```
    """
    matches, skips = find_pairs_in(graph_module.graph, graph_module, include_training)
    return matches, skips + _out_of_sight(graph_module)


def find_pairs_in(
    graph: Graph, root: nn.Module, include_training: bool = False
) -> tuple[list[Match], list[Skip]]:
    """As `find_pairs`, of a graph alone.

    Args:
        graph: The graph to read.
        root: What the targets of its nodes are qualified names in.
        include_training: As there.

    Returns:
        The pairs in graph order, and a `Skip` for every other batch norm that the graph calls.
    """
    matches: list[Match] = []
    skips: list[Skip] = []
    for node in graph.nodes:
        name = _batch_norm_name(node, root)
        if name is None:
            continue
        try:
            matches.append(_match(node, name, root, include_training))
        except Refusal as refusal:
            skips.append(Skip(name, refusal.reason, refusal.detail))
    return matches, skips


# --- The batch norm ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BatchNormCall:
    """A batch norm's call in the normal form that modules and functions share."""

    kind: BatchNormKind
    input: Any
    operands: str | BatchNorm[Node]  # a module by its qualified name
    mode_is_constant: bool


def _batch_norm_name(node: Node, root: nn.Module) -> str | None:
    if node.op == "call_module" and kinds.resembles_batch_norm(_module_of(node, root)):
        return str(node.target)
    if node.op == "call_function" and node.target in kinds.BATCH_NORM_FUNCTIONS:
        return node.name
    if node.target is batch_norm_that_stays:
        return _called_batch_norm(node) or node.name
    return None


def _called_batch_norm(node: Node) -> str | None:
    """The batch-norm module that a node calls: itself, or in a graph that was rewritten before."""
    if node.op == "call_module":
        return str(node.target)
    operands = node.args[0] if node.target is batch_norm_that_stays else None
    return str(operands.target) if isinstance(operands, Node) else None


def _match(node: Node, name: str, root: nn.Module, include_training: bool) -> Match:
    module = _called_batch_norm(node)
    batch_norm = (
        _batch_norm_function_call(node)
        if module is None
        else _batch_norm_module_call(node, module, root.get_submodule(module), include_training)
    )
    convolution_node = batch_norm.input
    if not isinstance(convolution_node, Node):
        raise Refusal(SkipReason.NOT_AFTER_CONVOLUTION)
    convolution = _convolution_call(convolution_node, root)
    _check_channels(convolution, batch_norm, root)
    position = _position(convolution_node, node, batch_norm)
    for between in _nodes_between(convolution_node, node):
        if _may_write(between, root):
            raise Refusal(SkipReason.MODIFIED_IN_BETWEEN, between.name)
    return Match(
        Pair(
            convolution.name,
            name,
            convolution.kind.name,
            batch_norm.kind.name,
            batch_norm.mode_is_constant,
            hooks_note(
                _module_of(each, root) for each in (convolution_node, node) if each.op == "call_module"
            ),
        ),
        convolution_node,
        node,
        _output_node(node, batch_norm.kind),
        position,
        convolution.operands,
        batch_norm.operands,
        convolution.args,
        convolution.kwargs,
    )


def _batch_norm_module_call(
    node: Node, name: str, module: nn.Module, include_training: bool
) -> _BatchNormCall:
    if isinstance(module, LazyModuleMixin):
        raise Refusal(SkipReason.UNINITIALIZED, type(module).__name__)
    kind = kinds.batch_norm_kind(module)
    if module.training and not include_training and not (kind is not None and kind.always_frozen):
        raise Refusal(SkipReason.TRAINING_MODE)
    if kind is None:
        raise Refusal(SkipReason.UNKNOWN_BATCH_NORM, type(module).__name__)
    if not kind.has_statistics(module):
        raise Refusal(SkipReason.NO_RUNNING_STATISTICS)
    match node.args[node.op != "call_module" :], node.kwargs:
        case ((input,), {**rest}) if not rest:
            return _BatchNormCall(kind, input, name, False)
        case ((), {"input": input, **rest}) | ((), {"x": input, **rest}) if not rest:
            return _BatchNormCall(kind, input, name, False)
    raise Refusal(SkipReason.UNUSUAL_CALL, node.format_node() or node.name)


def _batch_norm_function_call(node: Node) -> _BatchNormCall:
    if node.target is batch_norm_that_stays:
        operands, input = node.args
        return _BatchNormCall(FUNCTIONAL_BATCH_NORM, input, operands, True)  # type: ignore[arg-type] # of nodes
    kind = kinds.BATCH_NORM_FUNCTIONS[node.target]
    try:
        input, training, operands = kind.operands(*node.args, **node.kwargs)
    except TypeError as error:
        raise Refusal(SkipReason.UNUSUAL_CALL, str(error)) from error
    if training is True:
        raise Refusal(SkipReason.TRAINING_MODE, "a constant of the graph")
    if training is not False:
        raise Refusal(SkipReason.UNUSUAL_CALL, f"training={training}")
    if operands.running_mean is None or operands.running_var is None:
        raise Refusal(SkipReason.NO_RUNNING_STATISTICS)
    return _BatchNormCall(kind, input, operands, True)


def _output_node(node: Node, kind: BatchNormKind) -> Node:
    if kind.output_index is None:
        return node
    used = [user for user in node.users if user.users or user.target is not operator.getitem]
    if len(used) == 1 and used[0].args == (node, kind.output_index):
        return used[0]
    raise Refusal(SkipReason.BATCH_NORM_OUTPUTS_USED, ", ".join(user.name for user in used))


# --- The convolution ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ConvolutionCall:
    """A convolution's call in the normal form that modules and functions share."""

    name: str
    kind: ConvolutionKind
    operands: str | Convolution[Node]  # a module by its qualified name
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _convolution_call(node: Node, root: nn.Module) -> _ConvolutionCall:
    if node.op == "call_module":
        module = _module_of(node, root)
        if isinstance(module, LazyModuleMixin) and kinds.resembles_convolution(module):
            raise Refusal(SkipReason.UNINITIALIZED, type(module).__name__)
        kind = kinds.convolution_kind(module)
        if kind is not None:
            return _ConvolutionCall(str(node.target), kind, str(node.target), node.args, dict(node.kwargs))
        if kinds.resembles_convolution(module):
            raise Refusal(SkipReason.UNKNOWN_CONVOLUTION, type(module).__name__)
    if node.op == "call_function" and node.target in kinds.CONVOLUTION_FUNCTIONS:
        kind = kinds.CONVOLUTION_FUNCTIONS[node.target]
        try:
            input, operands = kind.operands(*node.args, **node.kwargs)
        except TypeError as error:
            raise Refusal(SkipReason.UNUSUAL_CALL, str(error)) from error
        return _ConvolutionCall(node.name, kind, operands, (input,), {})
    raise Refusal(SkipReason.NOT_AFTER_CONVOLUTION, f"of {node.name}")


def _check_channels(convolution: _ConvolutionCall, batch_norm: _BatchNormCall, root: nn.Module) -> None:
    detail = f"{batch_norm.kind.name} after {convolution.kind.name}"
    rank = convolution.kind.batched_rank
    if rank is not None and not batch_norm.kind.accepts(rank):
        raise Refusal(SkipReason.CHANNELS_DIFFER, detail)
    outputs, normalised = _output_channels(convolution, root), _normalised_channels(batch_norm, root)
    if outputs is not None and normalised is not None and outputs != normalised:
        raise Refusal(SkipReason.CHANNELS_DIFFER, f"{detail}, {normalised} after {outputs} channels")


def _output_channels(convolution: _ConvolutionCall, root: nn.Module) -> int | None:
    """How many channels a convolution has now; None where only a call tells."""
    operands = convolution.operands
    if isinstance(operands, str):
        module: Any = root.get_submodule(operands)
        weight = module._parameters.get("weight") if _is_read_plainly(convolution.kind) else None
        transposed, groups = getattr(module, "transposed", False), getattr(module, "groups", 1)
    else:
        weight = _constant(operands.weight, root)
        transposed, groups = operands.transposed, operands.groups
    if not (isinstance(weight, torch.Tensor) and weight.ndim > 1):
        return None
    if not (isinstance(transposed, bool) and isinstance(groups, int)):
        return None
    return output_channels(Convolution("", weight, transposed=transposed, groups=groups))


def _normalised_channels(batch_norm: _BatchNormCall, root: nn.Module) -> int | None:
    operands = batch_norm.operands
    if isinstance(operands, BatchNorm):
        mean = _constant(operands.running_mean, root)
    elif _is_read_plainly(batch_norm.kind):
        mean = root.get_submodule(operands)._buffers.get("running_mean")
    else:
        mean = None
    return mean.shape[0] if isinstance(mean, torch.Tensor) and mean.ndim == 1 else None


def _is_read_plainly(kind: ConvolutionKind | BatchNormKind) -> bool:
    """Whether a call of the module reads what its dictionaries of parameters and buffers hold."""
    return bool(kind.reads) and not kind.by_attribute


def _constant(value: Any, root: nn.Module) -> Any:
    """What a `get_attr` names; None for what is computed."""
    if not (isinstance(value, Node) and value.op == "get_attr"):
        return None
    *path, name = str(value.target).split(".")
    owner: Any = root
    for part in path:
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
    return owner._parameters.get(name, owner._buffers.get(name)) if isinstance(owner, nn.Module) else None


def _position(convolution_node: Node, batch_norm_node: Node, batch_norm: _BatchNormCall) -> Node:
    """Where the fused call goes, if nothing but the batch norm needs the convolution's own output.

    It takes the convolution's place, so that nothing changes places with the convolution, its parameters or its random
    numbers. The batch norm moves up to it, for which its operands must be known there.
    The output's shape is that of the normalised output, and most often its dtype, so whoever reads them can read them
    there.

    Raises:
        Refusal: Something else needs it.
    """
    readers = set(convolution_node.users) - {batch_norm_node}
    promotes = batch_norm.kind.promotes
    others = [
        user.name for user in readers if not reads_metadata(user) or (promotes and "dtype" in user.args)
    ]
    if others:
        raise Refusal(SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, f"by {', '.join(sorted(others))}")
    operands = batch_norm.operands if isinstance(batch_norm.operands, BatchNorm) else ()
    # What the batch norm must not move over: where its operands are computed, and where the module is called itself,
    # which may be in Train mode by then.
    obstacles = [
        node
        for node in _nodes_between(convolution_node, batch_norm_node)
        if (node in operands and node.op != "get_attr")
        or (node.op in ("call_module", "get_attr") and node.target == batch_norm.operands)
    ]
    if not obstacles:
        return convolution_node
    if any(reader < batch_norm_node for reader in readers):
        detail = f"by {min(readers).name}, before {obstacles[-1].name}"
        raise Refusal(SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, detail)
    return batch_norm_node


def reads_metadata(node: Node) -> bool:
    """Whether a node reads of a tensor what is known without its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("ndim", "shape", "dtype", "device", "is_cuda")
    return node.target is torch.is_tensor or node.target in (
        "dim",
        "ndimension",
        "size",
        "numel",
        "is_floating_point",
    )


# --- What happens in between -------------------------------------------------------------------------------------


def _nodes_between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _may_write(node: Node, root: nn.Module) -> bool:
    """Whether the node may write to a tensor that a convolution or a batch norm reads: whatever is not known does."""
    target: Any = node.target
    if node.op in ("placeholder", "get_attr") or _is_number(node) or target in kinds.CONVOLUTION_FUNCTIONS:
        return False
    if target in kinds.BATCH_NORM_FUNCTIONS:
        try:
            _batch_norm_function_call(node)
        except Refusal:
            return True
        return False
    if target is product:
        return False
    if node.op == "call_module" or target in FUSED or target is batch_norm_that_stays:
        called = [node] if node.op == "call_module" else node.args[: 1 + (target in FUSED)]
        modules = [
            _module_of(part, root) for part in called if isinstance(part, Node) and part.op != "call_function"
        ]
        return not all(_is_known_and_frozen(part) for module in modules for part in module.modules())
    operators = _operators(node)
    return not operators or "out" in node.kwargs or any(_writes(operator, node) for operator in operators)


def _operators(node: Node) -> list[Any]:
    """The overloads of the ATen operator that a node calls; none where it may call something else."""
    target: Any = node.target
    if isinstance(target, _torch.OpOverload):
        return [target]
    name = str(target)
    if node.op == "call_function":
        if not (isinstance(target, BuiltinFunctionType) and target.__module__ in _BUILTIN_IN):
            return []
        name = target.__name__
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


# Functions of these modules are named like the ATen operators that they call.
_BUILTIN_IN: Final = ("torch", "torch._C._nn", "_operator")


def _writes(operator: Any, node: Node) -> bool:
    """By its schema, which does not tell of running statistics; what it would write to may be left out of a call."""
    return "norm" in operator._opname or any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and (not argument.kwarg_only or argument.name in node.kwargs)
        for argument in operator._schema.arguments
    )


def _is_number(value: Any) -> bool:
    """Whether the value is computed from shapes and constants alone."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float, str, type(None)))  # a tuple may hold a tensor
    if reads_metadata(value):
        return True
    is_known = getattr(value.target, "__module__", None) in ("_operator", "math", "torch")
    return is_known and not value.kwargs and all(_is_number(arg) for arg in value.args)


def _is_known_and_frozen(module: nn.Module) -> bool:
    known = kinds.convolution_kind(module) or kinds.frozen_kind(module)
    return known is not None and not kinds.has_hooks(module)


# --- What the report adds ----------------------------------------------------------------------------------------


def _module_of(node: Node, root: nn.Module) -> nn.Module:
    return root.get_submodule(str(node.target))


def hooks_note(modules: Iterable[nn.Module]) -> str:
    """What a report notes of a pair of these modules, if they have hooks now."""
    return "runs unfused while it has hooks" if any(map(kinds.has_hooks, modules)) else ""


def _out_of_sight(graph_module: GraphModule) -> list[Skip]:
    """Skips for the Eval-mode batch norms that no node of the graph calls."""
    referred = [
        str(node.target) for node in graph_module.graph.nodes if node.op in ("call_module", "get_attr")
    ]
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    seen = {id(graph_module.get_submodule(name)) for name in called}
    seen |= {id(module) for name in referred for module in _owners(name, graph_module)}
    skips = []
    for name, module in graph_module.named_modules():
        if not kinds.resembles_batch_norm(module) or module.training:
            continue
        if id(module) in seen:
            # Tracing has walked through it.
            if name not in called and kinds.multiplies_and_adds(module) and not kinds.batch_norm_kind(module):
                skips.append(Skip(name, SkipReason.UNKNOWN_BATCH_NORM, type(module).__name__))
            continue
        prefixes = [name[:end] for end, letter in enumerate(name) if letter == "."]
        if any(isinstance(graph_module.get_submodule(prefix), GraphModule) for prefix in prefixes):
            continue  # that graph has a report of its own
        leaf = next((prefix for prefix in prefixes if prefix in called), None)
        if leaf is None:
            skips.append(Skip(name, SkipReason.NOT_CALLED))
        else:
            skips.append(
                Skip(
                    name,
                    SkipReason.INSIDE_LEAF_MODULE,
                    f"{leaf}: {type(graph_module.get_submodule(leaf)).__name__}",
                )
            )
    return skips


def _owners(target: str, graph_module: GraphModule) -> list[nn.Module]:
    """The module that a get_attr names, or the one whose parameter or buffer it names."""
    owner: Any = graph_module
    *path, last = target.split(".")
    for name in path:
        owner = getattr(owner, name, None)
    named = getattr(owner, last, None)
    return [module for module in (owner, named) if isinstance(module, nn.Module)]
