"""What `tune` changes in a model: gives modules their parts in the pairs that were discovered, and files the report."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from convbn_fx.deferral import PAIRING, REPORT, SCOPE, STAYS_IN_EVAL_MODE, Pairing, Scope, ScopeHooks, become
from convbn_fx.discovery import OwnedPair
from convbn_fx.records import Pair, Report, Skip


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
    conv, norm = (model.get_submodule(name) for name in (pair.record.convolution, pair.record.batch_norm))
    become(conv, "convolution")
    become(norm, "batch_norm")
    pairing = vars(conv).setdefault(PAIRING, Pairing())
    _add(pairing.scopes, vars(owner)[SCOPE])
    _add(pairing.norms, norm)
    for name in pair.between:
        _add(pairing.between, model.get_submodule(name))


def _add(values: list[object], value: object) -> None:
    if not any(value is other for other in values):
        values.append(value)


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
    for pair in pairs:
        fused[pair.owner].append(pair.record.without_prefix(pair.owner))
    for skip in skips:
        owner = skip.batch_norm.rpartition(".")[0]
        left[owner].append(skip.without_prefix(owner))
    for owner in {"", *fused, *left}:
        vars(model.get_submodule(owner))[REPORT] = Report(fused[owner], left[owner])
