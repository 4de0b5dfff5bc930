"""What `tune` changes in a model: gives modules their parts in the pairs that were discovered, and files the report."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from convbn_fx import kinds
from convbn_fx.functional.activations import what_is_saved
from convbn_fx.fx.graph_module import keep_all_in_copies
from convbn_fx.fx.matching import hooks_note
from convbn_fx.fx.pairs import OwnedPair, Site
from convbn_fx.records import Pair, Report, SavedLess, Skip, SkipReason, without_wrappers
from convbn_fx.tuning.deferred import Pairing, Scope
from convbn_fx.tuning.exploring.discovery import identity
from convbn_fx.tuning.exploring.exact_classes import Question
from convbn_fx.tuning.tuned_classes import (
    FUNCTION_CALLS,
    PAIRING,
    REPORT,
    SCOPE,
    STAYS_IN_EVAL_MODE,
    ScopeHooks,
    give_role,
)


def link(model: nn.Module, pair: OwnedPair) -> Pairing:
    """Makes a pair's convolution wait for its batch norm while the owner's forward runs.

    Args:
        model: What the names in the pair are qualified names in.
        pair: The pair.

    Returns:
        What the convolution looks up when it is called.
    """
    owner = model.get_submodule(pair.owner)
    if SCOPE not in vars(owner):
        vars(owner)[SCOPE] = Scope()
        if isinstance(owner, torch.fx.GraphModule):
            hooks = ScopeHooks(vars(owner)[SCOPE])
            owner.register_forward_pre_hook(hooks.enter)
            owner.register_forward_hook(hooks.leave, always_call=True)
            keep_all_in_copies(owner)
    if not isinstance(owner, torch.fx.GraphModule):
        give_role(owner, "owner", pair.methods)
    pairing = _pairing(model, pair, owner)
    pairing.to_function |= pair.to_function
    _add(pairing.scopes, vars(owner)[SCOPE])
    names = [*pair.between, *([] if pair.site else [pair.record.convolution])]
    if not pair.to_function:
        names.append(pair.record.batch_norm)
        norm = model.get_submodule(pair.record.batch_norm)
        give_role(norm, "batch_norm")
        _add(pairing.norms, norm)
    for name in names:
        _add(pairing.watched, model.get_submodule(name))
        pairing.places += [place for place in _places(model, name, pair.owner) if place not in pairing.places]
    return pairing


def _pairing(model: nn.Module, pair: OwnedPair, owner: nn.Module) -> Pairing:
    """Where the convolution looks up what it knows: on the module, or by its number in the forward that calls it."""
    if pair.to_function:
        vars(owner).setdefault(FUNCTION_CALLS, {})
    if pair.site is not None:
        return _pairing_of_calls(model, pair.site)
    conv = model.get_submodule(pair.record.convolution)
    give_role(conv, "convolution")
    return vars(conv).setdefault(PAIRING, Pairing())  # type: ignore[no-any-return]


def _pairing_of_calls(model: nn.Module, site: Site) -> Pairing:
    caller = model.get_submodule(site.caller)
    give_role(caller, "owner")
    calls: dict[tuple[str, int], Pairing] = vars(caller).setdefault(FUNCTION_CALLS, {})
    known = [calls[call] for call in sorted(site.numbers) if call in calls]
    pairing = known[0] if known else Pairing()
    calls |= dict.fromkeys(site.numbers, pairing)
    for callee in map(model.get_submodule, site.callees):
        if _may_call_convolutions(callee):
            give_role(callee, "owner")  # so that what it calls is not counted
    return pairing


def _may_call_convolutions(module: nn.Module) -> bool:
    """Whether convolutions may be called inside a module that has no part yet; each of the table's calls just one."""
    return (
        kinds.convolution_kind(module) is None
        and kinds.batch_norm_kind(module) is None
        and not isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule))
        and any(parameter.ndim > 1 for parameter in module.parameters())
    )


def _add(values: list[Any], value: object) -> None:
    if not any(value is other for other in values):
        values.append(value)


def _places(model: nn.Module, name: str, owner: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and child of each step from the owner to a module inside it."""
    parent = model.get_submodule(owner)
    for step in name[len(owner) + 1 if owner else 0 :].split("."):
        child = parent.get_submodule(step)
        yield parent, step, child
        parent = child


def keep_in_eval_mode(norms: Iterable[nn.Module]) -> None:
    """Puts batch norms in Eval mode, where `train()` then leaves them."""
    for norm in norms:
        norm.training = False
        vars(norm)[STAYS_IN_EVAL_MODE] = True
        give_role(norm, "batch_norm")


def save_less_in(
    model: nn.Module, is_chosen: Callable[[str], bool], questions: Iterable[Question]
) -> list[SavedLess]:
    """Lets activations, and the batch norms that are in no pair, save less for the backward pass.

    Args:
        model: A model whose pairs are linked.
        is_chosen: Whether a module of this name is to be changed.
        questions: What the model's code asks about exact classes: no class that it asks for becomes another.

    Returns:
        A record of each.
    """
    records = []
    for name, module in model.named_modules():
        record = what_is_saved(name, module) if is_chosen(name) else None
        if record is None or hasattr(type(module), kinds.TUNED_FROM) or "forward" in vars(module):
            continue
        if any(question.is_answered_otherwise({kinds.class_of(module)}) for question in questions):
            continue
        if kinds.is_gated(module):
            *_, gate = module.children()
            give_role(gate, "gate")
            give_role(module, "gated")
        else:
            is_activation = kinds.activation_kind(module) is not None
            give_role(module, "activation" if is_activation else "batch_norm_that_stays")
        records.append(record)
    return records


@dataclass
class FiledReport:
    """What was done in one forward, of which a report can be made as long as the module lives.

    Attributes:
        fused: Each pair with what its convolution looks up when it is called; None where it is baked.
        skipped: The batch norms that were left.
        activations: What saves less.
    """

    fused: list[tuple[Pair, Pairing | None]] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    activations: list[SavedLess] = field(default_factory=list)

    def now(self) -> Report:
        """The report of the modules as they are by now: exchanged, wrapped, or with hooks."""
        fused, skipped = [], list(self.skipped)
        for pair, pairing in self.fused:
            if pairing is None:
                fused.append(pair)
            elif change := pairing.changed_since():
                skipped.append(Skip(pair.batch_norm, SkipReason.CHANGED_SINCE, change))
            else:
                fused.append(replace(pair, note=hooks_note(pairing.watched)))
        return Report(fused, skipped, self.activations)


def orphaned(model: nn.Module) -> Iterator[Skip]:
    """The batch norms of tuned pairs whose forward is not in a model: an extractor calls their modules itself."""
    names = {id(module): without_wrappers(name) for name, module in model.named_modules()}
    scopes = {id(vars(module)[SCOPE]) for module in model.modules() if SCOPE in vars(module)}
    for pairing in (vars(module).get(PAIRING) for module in model.modules()):
        if pairing is not None and scopes.isdisjoint(map(id, pairing.scopes)):
            for norm in pairing.norms:
                if id(norm) in names:
                    detail = "the forward that was tuned is not in this model: extract first, then tune"
                    yield Skip(names[id(norm)], SkipReason.CHANGED_SINCE, detail)


def file_report(
    model: nn.Module,
    pairs: Iterable[tuple[OwnedPair, Pairing | None]],
    skips: Iterable[Skip],
    activations: Iterable[SavedLess] = (),
) -> None:
    """Files each record with the module whose forward it speaks of, so that sub-modules have reports of their own."""
    filed: defaultdict[str, FiledReport] = defaultdict(FiledReport, {"": FiledReport()})
    told: dict[tuple[object, object], tuple[OwnedPair, Pairing | None]] = {}
    for pair, pairing in pairs:
        key = identity(model, pair.record.convolution), identity(model, pair.record.batch_norm)
        told.setdefault(key, (pair, pairing))
    for pair, pairing in told.values():
        filed[pair.owner].fused.append((pair.record.without_prefix(pair.owner), pairing))
    for skip in skips:
        owner = skip.batch_norm.rpartition(".")[0]
        filed[owner].skipped.append(skip.without_prefix(owner))
    for each in activations:
        owner, _, name = each.name.rpartition(".")
        filed[owner].activations.append(replace(each, name=name))
    for owner, report in filed.items():
        vars(model.get_submodule(owner))[REPORT] = report
