"""A pair as it was found: in a graph, and in a model of which the graph is one forward."""

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from convbn_fx.operands import BatchNorm, Convolution
from convbn_fx.records import Pair, SkipReason


class Refusal(Exception):
    """Raised where a batch norm turns out to be one that stays; who asked makes a `Skip` of it."""

    def __init__(self, reason: SkipReason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Match:
    """A pair together with the nodes it was found at; what matching hands to rewriting.

    Attributes:
        pair: The record for the report.
        convolution_node: The convolution's call.
        batch_norm_node: The batch norm's call.
        output_node: The node that holds the normalised tensor: the batch norm's call, or the `getitem` on it.
        position: The node before which the fused call goes: the convolution's call, so that nothing changes places
            with it; the batch norm's where its operands are computed in between.
        convolution: Qualified module name, or a `Convolution` of nodes.
        batch_norm: Qualified module name, or a `BatchNorm` of nodes.
        args: Positional arguments of the convolution's call (for a function: its input alone).
        kwargs: Keyword arguments of the convolution's call.
    """

    pair: Pair
    convolution_node: Node
    batch_norm_node: Node
    output_node: Node
    position: Node
    convolution: str | Convolution[Node]
    batch_norm: str | BatchNorm[Node]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Site:
    """Which call of a function it is. All names are qualified names in the same module.

    Attributes:
        caller: The module whose forward calls it.
        numbers: The methods of the caller that may have been entered first, and how many convolutions each has called
            as functions before.
        callees: Modules that the caller calls.
    """

    caller: str
    numbers: frozenset[tuple[str, int]]
    callees: frozenset[str]

    def prefixed(self, prefix: str) -> "Site":
        """The same call with its names under the sub-module `prefix` of a larger module."""

        def joined(name: str) -> str:
            return ".".join(filter(None, (prefix, name)))

        return replace(self, caller=joined(self.caller), callees=frozenset(map(joined, self.callees)))


@dataclass(frozen=True)
class OwnedPair:
    """A pair, and whose forward runs it. All names are qualified names in the model.

    Attributes:
        record: The record for the report.
        owner: The module whose own forward runs both.
        methods: Names of the owner's methods that run both.
        between: Modules inside the owner out of or into which the convolution's output goes on its way.
        site: Which call it is, if the convolution is a function.
        operands: Of such a call, with the names of the caller's own parameters in the place of tensors; or what of it
            is something else.
        to_function: Whether the batch norm is a function.
    """

    record: Pair
    owner: str
    methods: frozenset[str]
    between: frozenset[str]
    site: Site | None = None
    operands: Convolution[str] | str | None = None
    to_function: bool = False

    @property
    def convolution_module(self) -> str:
        """The convolution, or the module whose forward calls the function."""
        return self.record.convolution if self.site is None else self.site.caller

    def also(self, other: "OwnedPair") -> "OwnedPair":
        """The pair, which another way through the forward runs as well, where its call may have another number."""
        if self.site is None or other.site is None:
            return self
        numbers, callees = self.site.numbers | other.site.numbers, self.site.callees | other.site.callees
        operands = self.operands if self.operands == other.operands else "it is called in several ways"
        return replace(self, site=replace(self.site, numbers=numbers, callees=callees), operands=operands)
