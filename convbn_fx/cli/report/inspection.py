"""What `convbn-fx report` tells of a model: its pairs, the bytes they keep, their coefficients, what was left and why.

Everything is counted on fake tensors, so that any batch and any size of images fits on a laptop.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convbn_fx._torch import pytree
from convbn_fx.api import report, tuned_and_deployed
from convbn_fx.cli.report.coefficients import (
    FLOAT16_CURE,
    Coefficients,
    Float16Range,
    coefficients_of,
    float16_range_of,
)
from convbn_fx.cli.report.pair_bytes import SavedBytes, storages_by_module
from convbn_fx.cli.zoo.results import in_one_line
from convbn_fx.fx.side_effects import random_state_as_found
from convbn_fx.kinds import batch_norm_kind, convolution_kind
from convbn_fx.kinds.modes import selected
from convbn_fx.records import Pair, Report, without_wrappers
from convbn_fx.tuning.cloning import clone


@dataclass(frozen=True)
class PairInspection:
    """One fused pair.

    Attributes:
        pair: Its record in the report.
        calls: How often its batch norm is called with these inputs, as far as that is known.
        saved: What it keeps and no pair before it; None where it is not two modules, or is not called with these
            inputs.
        coefficients: Of its batch norm; None where that is a function.
        float16: How its folded parameters lie in float16's range; None where it is not two modules.
    """

    pair: Pair
    calls: int = 0
    saved: SavedBytes | None = None
    coefficients: Coefficients | None = None
    float16: Float16Range | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "convolution": self.pair.convolution,
            "batch_norm": self.pair.batch_norm,
            "convolution_kind": self.pair.convolution_kind,
            "batch_norm_kind": self.pair.batch_norm_kind,
            "mode_is_constant": self.pair.mode_is_constant,
            "note": self.pair.note,
            "calls": self.calls,
            "saved_bytes": _bytes_to_json(self.saved),
            "coefficients": None if self.coefficients is None else self.coefficients.to_json(),
            "float16": None if self.float16 is None else self.float16.to_json(),
        }


@dataclass(frozen=True)
class Inspection:
    """What `convbn-fx report` tells of a model.

    Attributes:
        model: Its name.
        inputs: What it was called with: dtype and shape of each tensor.
        body: The sub-module that was called in its place; empty for the model itself.
        report: The pairs that [`tune`][convbn_fx.tune] fuses, and the batch norms that it leaves.
        saved: Bytes saved for the backward pass by one call; None where it cannot run on fake tensors.
        note: Why it cannot; empty if it can.
        pairs: One record per fused pair, in the order in which they run; the last are those that are not known to.
    """

    model: str
    inputs: tuple[str, ...]
    body: str
    report: Report
    saved: SavedBytes | None
    note: str
    pairs: list[PairInspection]

    @property
    def coefficients(self) -> Coefficients:
        """Those of all pairs, each batch norm once."""
        by_norm = {
            row.pair.batch_norm: row.coefficients for row in self.pairs if row.coefficients is not None
        }
        return Coefficients(tuple(value for each in by_norm.values() for value in each.values))

    @property
    def others(self) -> SavedBytes | None:
        """What is kept outside of the pairs: with theirs it adds up to `saved`."""
        if self.saved is None:
            return None
        rows = [row.saved for row in self.pairs if row.saved is not None]
        return SavedBytes(*(total - sum(parts) for total, *parts in zip(self.saved, *rows, strict=True)))

    @property
    def warnings(self) -> list[tuple[Pair, str]]:
        """The pairs that Deploy mode puts at risk in float16, and why."""
        return [(row.pair, row.float16.warning) for row in self.pairs if row.float16 and row.float16.warning]

    def to_json(self) -> dict[str, Any]:
        """Plain types: no NaN, no infinity, the same keys for every model."""
        return {
            "model": self.model,
            "inputs": list(self.inputs),
            "body": self.body,
            "note": self.note,
            "fused": len(self.report.fused),
            "left": len(self.report.skipped),
            "saved_bytes": _bytes_to_json(self.saved),
            "coefficients": self.coefficients.to_json(),
            "float16_warnings": len(self.warnings),
            "float16_cure": FLOAT16_CURE,
            "pairs": [row.to_json() for row in self.pairs],
            "skipped": [
                {
                    "batch_norm": skip.batch_norm,
                    "reason": skip.reason.name,
                    "explanation": skip.reason.value,
                    "detail": skip.detail,
                    "cure": skip.reason.cure,
                }
                for skip in self.report.skipped
            ],
        }


def _bytes_to_json(saved: SavedBytes | None) -> dict[str, int | None]:
    return dict.fromkeys(SavedBytes._fields) if saved is None else saved._asdict()


def inspect_model(model: nn.Module, inputs: tuple[Any, ...], *, body: str = "") -> Inspection:
    """Tunes and deploys copies of a model, and looks at each pair.

    Args:
        model: Any model, in the mode that it is to be used in; it is left untouched.
        inputs: Positional arguments of one call, of any nesting. Their tensors need hold no memory:
            `torch.empty(()).expand(256, 3, 224, 224)` is a full batch.
        body: Qualified name of a sub-module that is called with the inputs in the place of the model: a detector's
            `"backbone"`, where the rest looks at values that fake tensors lack.

    Returns:
        What was found.

    Raises:
        TypeError: `model` is not a module, `inputs` is not a tuple, or FSDP has sharded the model.
        ValueError: `body` names no sub-module.
    """
    (body,) = selected(model, [body], "inspect_model")
    if not isinstance(inputs, tuple):
        raise TypeError(
            f"inspect_model: inputs is the tuple of a call's arguments, got a {type(inputs).__name__}"
        )
    original, (tuned, deployed) = clone(model), tuned_and_deployed(model)
    result = report(tuned)
    members = _members(original, result.fused)
    names = {name for pair in members for name in (pair.convolution, pair.batch_norm)}
    calls: Counter[str] = Counter()
    for name in {pair.batch_norm for pair in members}:
        original.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    saved: list[dict[str | None, dict[int, int]]] = []
    note = ""
    with random_state_as_found():
        try:
            saved = [
                storages_by_module(variant, inputs, names, body=body)
                for variant in (original, tuned, deployed)
            ]
        except Exception as error:  # noqa: BLE001 - a forward may raise anything where values are missing
            note = in_one_line(error)
            calls.clear()
    places = {name: place for place, name in enumerate(calls)}
    fused = sorted(result.fused, key=lambda pair: places.get(pair.batch_norm, len(places)))
    sizes = [_sizes(each, fused) for each in saved]
    rows = []
    for pair in fused:
        if pair not in members:
            rows.append(PairInspection(pair))
            continue
        conv, norm = members[pair]
        count = calls[pair.batch_norm]
        kept = SavedBytes(*(each[pair] for each in sizes)) if count else None
        rows.append(PairInspection(pair, count, kept, coefficients_of(norm), float16_range_of(conv, norm)))
    total = None if note else SavedBytes(*(each[None] for each in sizes))
    return Inspection(type(model).__name__, _described(inputs), body, result, total, note, rows)


def _sizes(saved: Mapping[str | None, dict[int, int]], pairs: Iterable[Pair]) -> dict[Pair | None, int]:
    """The bytes that each pair keeps and no pair before it; for None, those of the whole model."""
    sizes: dict[Pair | None, int] = {}
    seen: dict[int, int] = {}
    for pair in pairs:
        before = sum(seen.values())
        seen |= saved.get(pair.convolution, {}) | saved.get(pair.batch_norm, {})
        sizes[pair] = sum(seen.values()) - before
    for each in saved.values():
        seen |= each
    return sizes | {None: sum(seen.values())}


def _members(model: nn.Module, pairs: Iterable[Pair]) -> dict[Pair, tuple[nn.Module, nn.Module]]:
    """The modules of each pair that consists of modules."""
    modules = {without_wrappers(name): module for name, module in model.named_modules(remove_duplicate=False)}
    members = {}
    for pair in pairs:
        conv, norm = modules.get(pair.convolution), modules.get(pair.batch_norm)
        if conv is None or norm is None:
            continue
        names = [kind and kind.name for kind in (convolution_kind(conv), batch_norm_kind(norm))]
        if names == [
            pair.convolution_kind,
            pair.batch_norm_kind,
        ]:  # else a function's node has a module's name
            members[pair] = conv, norm
    return members


def _described(inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """Such as `float32[2, 3, 224, 224]`, for each tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return tuple(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)
