"""What the pass tells its user: plain strings and flags, to be copied, pickled, compared and printed."""

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from html import escape
from typing import Any


class SkipReason(StrEnum):
    """Why a batch norm was left as it was. The value is the explanation that reports print."""

    def __new__(cls, value: str, cure: str) -> "SkipReason":
        """Makes a member whose value is the explanation and which carries the cure beside it."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.cure = cure
        return member

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles by name, so that an explanation may be reworded."""
        return getattr, (SkipReason, self.name)

    cure: str

    TRAINING_MODE = (
        "the batch norm is in Train mode",
        "call eval() on the batch norm before the pass, or pass include_training=True",
    )
    NO_RUNNING_STATISTICS = (
        "the batch norm has no running statistics and normalises by the batch's own",
        "build it with track_running_stats=True; batch statistics cannot be folded into a weight",
    )
    NOT_AFTER_CONVOLUTION = (
        "the batch norm's input is not the output of a convolution or linear layer",
        "none needed: there is nothing to fold it into",
    )
    CONVOLUTION_OUTPUT_USED_ELSEWHERE = (
        "the convolution's output is also used by something other than the batch norm",
        "none needed: the convolution's own output has to be computed anyway",
    )
    BATCH_NORM_OUTPUTS_USED = (
        "the batch norm's saved statistics are used, not only its normalised output",
        "trace the forward without its backward",
    )
    CHANNELS_DIFFER = (
        "the channels that the batch norm normalises are not the convolution's output channels",
        "use the batch norm that matches the layer: BatchNorm1d after Linear and Conv1d, BatchNorm2d after Conv2d, ...",
    )
    MODIFIED_IN_BETWEEN = (
        "something that may change tensors in place runs between the convolution and the batch norm",
        "call the batch norm directly after its convolution",
    )
    CONTEXTS_DIFFER = (
        "the convolution and the batch norm run under different autocast, or one in a checkpoint of its own",
        "call both inside of the same with-statements and checkpoints",
    )
    UNKNOWN_CONVOLUTION = (
        "the convolution's forward is not a known one: a subclass, or a patched instance",
        "register_conv(cls, ...) if its forward is linear in the weight",
    )
    UNKNOWN_BATCH_NORM = (
        "the batch norm's forward is not a known one: a subclass, or a patched instance",
        "register_batch_norm(cls, ...) if its forward in Eval mode is a batch norm and nothing more",
    )
    UNINITIALIZED = (
        "the convolution or the batch norm is lazy and has no parameters yet",
        "run the model on one batch first",
    )
    UNUSUAL_CALL = (
        "the batch norm or the convolution is called with arguments that are not understood",
        "call them with their documented arguments, with training= a constant",
    )
    INSIDE_LEAF_MODULE = (
        "the batch norm is inside a module that tracing kept whole",
        "trace with convbn_fx.symbolic_trace, remove hooks from the module, or rewrite the module by itself",
    )
    HAS_HOOKS = (
        "the convolution or the batch norm has hooks, which a folded one could not run",
        "remove them before deploy(); old-style weight_norm by torch.nn.utils.remove_weight_norm",
    )
    SHARED = (
        "convolutions and batch norms are shared so that no convolution of each use's own could take their places",
        "give each use a convolution or a batch norm of its own, or use tune()",
    )
    MAY_BE_USED_ELSEWHERE = (
        "something else can reach the convolution or the batch norm, and may use it by itself",
        "none needed: the pair runs as one all the same, as tune() makes it",
    )
    OUT_OF_RANGE = (
        "the folded parameters are beyond the range of the convolution's dtype",
        "deploy the model in float32 first, or use tune()",
    )
    FUNCTION_CALL = (
        "the convolution or the batch norm is a function that the forward calls itself, not a module",
        "transform(symbolic_trace(module)) for the module around it, or torch.compile(model, backend='convbn')",
    )
    NOT_SELECTED = (
        "the batch norm is outside of the modules that were to be tuned",
        "name a module around it in tune(model, modules=[...])",
    )
    CLASS_ASKED_FOR = (
        "the model's code asks for the exact class of a module or tensor, and fusing makes it a subclass",
        "ask isinstance(...) there",
    )
    NOT_FOLLOWED = (
        "a forward that may call the batch norm could not be followed to its end",
        "keep what the detail names out of the forward that runs the pair: in a module of its own, say",
    )
    CHANGED_SINCE = (
        "a module of the pair was exchanged, wrapped or patched after it had been tuned",
        "change the model first, and tune it then; or tune the result again",
    )
    NOT_CALLED = (
        "the batch norm is not called in this graph",
        "none needed; if it should be called, trace the model in the mode and with the arguments that use it",
    )


def without_wrappers(name: str) -> str:
    """A qualified name without the steps that `torch.compile` puts into it."""
    return ".".join(step for step in name.split(".") if step != "_orig_mod")


@dataclass(frozen=True)
class Pair:
    """A convolution and the batch norm after it, fused.

    Attributes:
        convolution: Qualified name of the convolution module, or the node's name where it was a function.
        batch_norm: Qualified name of the batch-norm module, or the node's name where it was a function.
        convolution_kind: Name of the convolution's row in the table of kinds, such as `Conv2d`.
        batch_norm_kind: Name of the batch norm's row in the table of kinds, such as `BatchNorm2d`.
        mode_is_constant: True where the graph holds a functional batch norm, whose `training=False` is a constant;
            False where each call looks at the batch norm module's mode.
        note: Anything more a user should know, such as hooks because of which the pair runs unfused for now.
        is_baked: Whether there is no batch norm any more: its statistics of then are in the convolution's parameters.
    """

    convolution: str
    batch_norm: str
    convolution_kind: str
    batch_norm_kind: str
    mode_is_constant: bool = False
    note: str = ""
    is_baked: bool = False

    def prefixed(self, prefix: str) -> "Pair":
        """The same pair with its names under the sub-module `prefix` of a larger model."""
        start = f"{prefix}." if prefix else ""
        return replace(self, convolution=start + self.convolution, batch_norm=start + self.batch_norm)

    def without_prefix(self, prefix: str) -> "Pair":
        """The same pair with names in the sub-module `prefix`."""
        start = len(prefix) + 1 if prefix else 0
        return replace(self, convolution=self.convolution[start:], batch_norm=self.batch_norm[start:])


@dataclass(frozen=True)
class Skip:
    """A batch norm that was left as it was.

    Attributes:
        batch_norm: Qualified name of the batch-norm module, or the node's name where it was a function.
        reason: Why, with its cure.
        detail: What exactly stood in the way, such as the node or the class.
    """

    batch_norm: str
    reason: SkipReason
    detail: str = ""

    def prefixed(self, prefix: str) -> "Skip":
        """The same batch norm with its name under the sub-module `prefix` of a larger model."""
        return replace(self, batch_norm=f"{prefix}.{self.batch_norm}" if prefix else self.batch_norm)

    def without_prefix(self, prefix: str) -> "Skip":
        """The same batch norm with its name in the sub-module `prefix`."""
        return replace(self, batch_norm=self.batch_norm[len(prefix) + 1 if prefix else 0 :])


@dataclass(frozen=True)
class SavedLess:
    """An activation, or a batch norm that stays, that saves less for the backward pass than PyTorch's own.

    Attributes:
        name: Qualified name of the module, or the node's name where it was a function.
        kind: Its name in the table of kinds, such as `SiLU`.
        saves: What it saves. Where nothing before it trains, one whose derivative is one of two numbers saves a mask of
            one byte an element instead.
    """

    name: str
    kind: str
    saves: str

    def prefixed(self, prefix: str) -> "SavedLess":
        """The same record with its name under the sub-module `prefix` of a larger model."""
        return replace(self, name=f"{prefix}.{self.name}" if prefix else self.name)


@dataclass(frozen=True)
class Report:
    """What the pass did to a model: the pairs it fused, the batch norms it left and why.

    `str()` is a readable table; notebooks show an HTML one.

    Attributes:
        fused: One record per fused pair, in graph order.
        skipped: One record per batch norm that stayed.
        activations: One record per activation, and batch norm that stayed, that saves less.
    """

    fused: list[Pair] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    activations: list[SavedLess] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[SkipReason]:
        """How many batch norms were left for each reason."""
        return Counter(skip.reason for skip in self.skipped)

    @property
    def summary(self) -> str:
        """One line: how many pairs were fused, how many batch norms were left."""
        pairs = "1 pair" if len(self.fused) == 1 else f"{len(self.fused)} pairs"
        left = "1 batch norm" if len(self.skipped) == 1 else f"{len(self.skipped)} batch norms"
        return f"{pairs} fused, {left} left"

    def prefixed(self, prefix: str) -> "Report":
        """The same report with every name under the sub-module `prefix` of a larger model."""
        return Report(
            [pair.prefixed(prefix) for pair in self.fused],
            [skip.prefixed(prefix) for skip in self.skipped],
            [each.prefixed(prefix) for each in self.activations],
        )

    def __add__(self, other: "Report") -> "Report":
        """The report of two parts of a model together."""
        return Report(
            self.fused + other.fused, self.skipped + other.skipped, self.activations + other.activations
        )

    def __str__(self) -> str:
        """A table in plain text: fused pairs first, then what was left, then the cures."""
        sections = [self.summary]
        if self.fused:
            sections.append(_text_table(_PAIR_HEADER, [_pair_row(pair) for pair in self.fused]))
        if self.skipped:
            sections.append(_text_table(_SKIP_HEADER, [_skip_row(skip) for skip in self.skipped]))
            sections.append(
                "\n".join(
                    f"{count} x {reason.name}: {reason.cure}" for reason, count in self.reasons.most_common()
                )
            )
        if self.activations:
            sections.append("\n".join(self._told_of_activations()))
        return "\n\n".join(sections)

    def _told_of_activations(self) -> list[str]:
        """A line for each kind of activation."""
        counts = Counter((each.kind, each.saves) for each in self.activations)
        return [f"{count} x {kind}: {saves}" for (kind, saves), count in counts.most_common()]

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        parts = [f"<p><b>{escape(self.summary)}</b></p>"]
        if self.fused:
            parts.append(_html_table(_PAIR_HEADER, [_pair_row(pair) for pair in self.fused]))
        if self.skipped:
            parts.append(_html_table(_SKIP_HEADER, [_skip_row(skip) for skip in self.skipped]))
            cures = "".join(f"<li>{reason.name}: {escape(reason.cure)}</li>" for reason in self.reasons)
            parts.append(f"<ul>{cures}</ul>")
        if self.activations:
            lines = "".join(f"<li>{escape(line)}</li>" for line in self._told_of_activations())
            parts.append(f"<ul>{lines}</ul>")
        return "\n".join(parts)


_PAIR_HEADER = ("convolution", "batch norm", "kinds", "mode")
_SKIP_HEADER = ("left", "reason", "because")


def _pair_row(pair: Pair) -> tuple[str, ...]:
    mode = "constant: Eval" if pair.mode_is_constant else "read at every call"
    if pair.is_baked:
        mode = "baked: Eval"
    if pair.note:
        mode = f"{mode}; {pair.note}"
    return (pair.convolution, pair.batch_norm, f"{pair.convolution_kind} + {pair.batch_norm_kind}", mode)


def _skip_row(skip: Skip) -> tuple[str, ...]:
    because = f"{skip.reason.value} ({skip.detail})" if skip.detail else skip.reason.value
    return (skip.batch_norm, skip.reason.name, because)


def _text_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _html_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
