"""Whether a forward goes another way since modules were exchanged: it looks at what they are."""

from typing import Any

from torch.fx import Node

from convbn_fx import kinds
from convbn_fx.fx.private_copy import PrivateCopy
from convbn_fx.tuning.exploring.discovery import Explored
from convbn_fx.tuning.exploring.exploration import Path, explore_again, kept_by_someone


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


def weight_of(node: Node) -> Node | None:
    """The weight of a function's call, if a parameter is the weight itself."""
    try:
        _, call = kinds.CONVOLUTION_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
    except TypeError:  # a call that raises
        return None
    weight: Any = call.weight
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None
