"""What `tune` changes in a model: gives modules their parts in the pairs that were discovered, and files the report."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from convbn_fx.deferral import Pairing, Scope
from convbn_fx.discovery import OwnedPair, identity
from convbn_fx.records import Pair, Report, Skip
from convbn_fx.roles import FUNCTION_CALLS, PAIRING, REPORT, SCOPE, STAYS_IN_EVAL_MODE, ScopeHooks, become


def link(model: nn.Module, pair: OwnedPair) -> None:
    """Makes a pair's convolution wait for its batch norm while the owner's forward runs.

    Args:
        model: What the names in the pair are qualified names in.
        pair: The pair.
    """
    owner = model.get_submodule(pair.owner)
    if SCOPE not in vars(owner):
        vars(owner)[SCOPE] = Scope()
        if isinstance(owner, torch.fx.GraphModule):
            hooks = ScopeHooks(vars(owner)[SCOPE])
            owner.register_forward_pre_hook(hooks.enter)
            owner.register_forward_hook(hooks.leave, always_call=True)
    if not isinstance(owner, torch.fx.GraphModule):
        become(owner, "owner", pair.methods)
    pairing = _pairing(model, pair, owner)
    pairing.to_function |= pair.to_function
    _add(pairing.scopes, vars(owner)[SCOPE])
    names = [*pair.between, *([] if pair.site else [pair.record.convolution])]
    if not pair.to_function:
        names.append(pair.record.batch_norm)
        norm = model.get_submodule(pair.record.batch_norm)
        become(norm, "batch_norm")
        _add(pairing.norms, norm)
    for name in names:
        _add(pairing.watched, model.get_submodule(name))
        pairing.places += [place for place in _places(model, name, pair.owner) if place not in pairing.places]


def _pairing(model: nn.Module, pair: OwnedPair, owner: nn.Module) -> Pairing:
    """Where the convolution looks up what it knows: on the module, or by the place in the owner that calls it."""
    if pair.site or pair.to_function:
        vars(owner).setdefault(FUNCTION_CALLS, {})
    if pair.site:
        return vars(owner)[FUNCTION_CALLS].setdefault(pair.site, Pairing())  # type: ignore[no-any-return]
    conv = model.get_submodule(pair.record.convolution)
    become(conv, "convolution")
    return vars(conv).setdefault(PAIRING, Pairing())  # type: ignore[no-any-return]


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
        become(norm, "batch_norm")


def file_report(model: nn.Module, pairs: Iterable[OwnedPair], skips: Iterable[Skip]) -> None:
    """Files each record with the module whose forward it speaks of, so that sub-modules have reports of their own."""
    fused: defaultdict[str, list[Pair]] = defaultdict(list)
    left: defaultdict[str, list[Skip]] = defaultdict(list)
    told: dict[tuple[object, object], OwnedPair] = {}
    for pair in pairs:
        told.setdefault(
            (identity(model, pair.record.convolution), identity(model, pair.record.batch_norm)), pair
        )
    for pair in told.values():
        fused[pair.owner].append(pair.record.without_prefix(pair.owner))
    for skip in skips:
        owner = skip.batch_norm.rpartition(".")[0]
        left[owner].append(skip.without_prefix(owner))
    for owner in {"", *fused, *left}:
        vars(model.get_submodule(owner))[REPORT] = Report(fused[owner], left[owner])
