"""The pipeline, phase by phase: what users call."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from convbn_fx import kinds
from convbn_fx.deploying.baking import Baked, bake, bake_graph
from convbn_fx.deploying.checking import check_example_inputs, check_outputs
from convbn_fx.functional import native
from convbn_fx.fx.activations import save_as_written, save_less
from convbn_fx.fx.graph_module import GraphModule, make_plain
from convbn_fx.fx.matching import find_pairs, hooks_note
from convbn_fx.fx.notes import compiled_report
from convbn_fx.fx.pairs import OwnedPair
from convbn_fx.fx.private_copy import private_copy
from convbn_fx.fx.rewriting import copied, rewrite, unfuse, unfuse_activations
from convbn_fx.kinds.modes import batch_norms, selected
from convbn_fx.records import Report, SavedLess, Skip, SkipReason, without_wrappers
from convbn_fx.tuning.cloning import Model, clone, untuned_class
from convbn_fx.tuning.exploring.changed_ways import goes_another_way
from convbn_fx.tuning.exploring.discovery import Discovery, Explored, discover
from convbn_fx.tuning.exploring.exploration import GuessedTensor
from convbn_fx.tuning.exploring.other_uses import refusals
from convbn_fx.tuning.exploring.untaken import CodeRun
from convbn_fx.tuning.linking import file_report, keep_in_eval_mode, link, orphaned, save_less_in
from convbn_fx.tuning.tuned_classes import REPORT, STAYS_IN_EVAL_MODE

META_KEY: Final = "convbn_fx"


def transform(
    graph_module: torch.fx.GraphModule, *, include_training: bool = False, activations: bool = True
) -> GraphModule:
    """Fuses every convolution and Eval-mode batch norm of a graph into one convolution (Tune mode).

    Outputs and all gradients stay the same (arXiv 2305.11624, section 3); the feature map between convolution and
    batch norm is no longer saved for the backward pass. Pairs follow their batch norm's mode from then on: switched to
    Train mode, they run convolution and batch norm as before.

    Args:
        graph_module: Any GraphModule: from [`symbolic_trace`][convbn_fx.symbolic_trace] or
            `torch.fx.symbolic_trace`, from `torch.export.export(...).module()`, from `make_fx`, from Dynamo.
            It is left untouched; the result shares its modules, parameters and buffers.
        include_training: Rewrite pairs whose batch norm is in Train mode now as well; they fuse as soon as it is
            switched to Eval mode.
        activations: Where a pair was fused, let the activations and the batch norms that stay save less, too.

    Returns:
        A new GraphModule with the same `state_dict` keys. [`report`][convbn_fx.report] tells what was fused in it.

    Raises:
        TypeError: `graph_module` is not a `torch.fx.GraphModule`, or its forward is not its graph's.

    Example:
        ```python
        import torch
        import convbn_fx

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        gm = convbn_fx.transform(torch.fx.symbolic_trace(model))
        assert convbn_fx.report(gm).summary == "1 pair fused, 0 batch norms left"
        torch.testing.assert_close(gm(x := torch.randn(2, 3, 8, 8)), model(x))
        ```
    """
    if not isinstance(graph_module, torch.fx.GraphModule):
        raise TypeError(
            f"transform: expected a torch.fx.GraphModule, got {type(graph_module).__name__}. "
            "Trace the model first: transform(convbn_fx.symbolic_trace(model))"
        )
    if "forward" in vars(graph_module):
        raise TypeError(
            "transform: this GraphModule has a forward of its own as an instance attribute, which is not its graph's. "
            "Remove it, or trace a module that calls it."
        )
    native.ensure()
    result = rewritten(graph_module, include_training, activations)
    _warn_of_train_mode(
        "transform",
        result,
        [""],
        "call eval() on the model before it is traced, or pass include_training=True (pairs fuse once their batch "
        "norms are in Eval mode)",
    )
    return result


def rewritten(
    graph_module: torch.fx.GraphModule, include_training: bool = False, activations: bool = True
) -> GraphModule:
    """What `transform` returns, without its checks and its warning: Dynamo traces a model in whatever mode it is.

    Args:
        graph_module: Any GraphModule. It is left untouched.
        include_training: As there.
        activations: As there.

    Returns:
        A new GraphModule.
    """
    result = copied(graph_module)
    for name, part in _called_graph_modules(result):
        setattr(result, name, rewritten(part, include_training, activations))
    _fuse(result, include_training, activations)
    return result


def _fuse(graph_module: GraphModule, include_training: bool, activations: bool) -> None:
    """Rewrites the pairs of one graph in place and files the report."""
    if not activations:
        unfuse_activations(graph_module)
    known = graph_module.meta.get(META_KEY, Report())
    fused = list(known.fused)
    while True:  # the second time round for the skips: they speak of the graph as it is in the end
        matches, skips = find_pairs(graph_module, include_training)
        if not matches:
            break
        rewrite(graph_module, matches)
        fused += [match.pair for match in matches]
    less: list[SavedLess] = []
    if fused and activations:
        less = list(dict.fromkeys(known.activations + save_less(graph_module)))
    elif fused:
        save_as_written(graph_module)
    graph_module.meta[META_KEY] = Report(fused, skips, less)


def _called_graph_modules(graph_module: GraphModule) -> list[tuple[str, torch.fx.GraphModule]]:
    """The graphs inside the graph: bodies of higher-order operators, parts that were split off."""
    targets = {node.target for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    return [
        (name, part)
        for name, part in graph_module.named_children()
        if name in targets and isinstance(part, torch.fx.GraphModule)
    ]


def tune(
    model: Model,
    modules: Iterable[str] | None = None,
    *,
    norm_eval: bool = False,
    include_training: bool = False,
    activations: bool = True,
) -> Model:
    """The same model, with every convolution and Eval-mode batch norm of it run as one convolution (Tune mode).

    Outputs and all gradients stay the same (arXiv 2305.11624, section 3); the feature map between convolution and
    batch norm is no longer saved for the backward pass. Every forward runs as it is written, whatever it does, so the
    model need not be traceable: a convolution waits for the batch norm after it, and where something else takes its
    output, it runs as before. Batch norms switched to Train mode run as before too, for as long as they are. A warning
    tells where nothing was fused because they are in Train mode already.

    Args:
        model: Any model. It is left untouched.
        modules: Names of the sub-modules to tune, such as `["backbone"]`; all by default.
        norm_eval: Put the batch norms of the result in Eval mode, and keep them there when `train()` is called on it
            (what detectors call `norm_eval`). [`batchnorm_mode`][convbn_fx.batchnorm_mode] can still switch them.
        include_training: Take pairs whose batch norm is in Train mode now as well; they fuse as soon as it is
            switched to Eval mode.
        activations: Where a pair was fused, let the activations and the batch norms that stay save less for the
            backward pass, too: what the next convolution saves anyway, or what it is recomputed from. Values are the
            same to the bit. Needs the operator in C++.

    Returns:
        A model of the same class, with copies of the modules that share all parameters and buffers with those of
        `model`, and the same `state_dict`. [`report`][convbn_fx.report] tells what is fused in it.

    Raises:
        TypeError: `model` is not a module, or `modules` is a single string.
        ValueError: One of `modules` names no sub-module.

    Example:
        ```python
        import timm
        import convbn_fx

        model = timm.create_model("resnet18", pretrained=False).eval()
        tuned = convbn_fx.tune(model)
        print(convbn_fx.report(tuned))
        assert len(convbn_fx.report(tuned).fused) == 20
        assert isinstance(tuned, timm.models.ResNet) and tuned.conv1.weight is model.conv1.weight
        ```
    """
    names = selected(model, modules, "tune")
    native.ensure()
    tuned = clone(model)
    if norm_eval:
        keep_in_eval_mode(batch_norms(tuned, names))
    for name, module in tuned.named_modules():
        if isinstance(module, GraphModule) and _is_inside(name, names):
            _fuse(module, include_training, activations)
    _linked(tuned, names, discover(tuned, include_training), activations)
    _warn_of_train_mode(
        "tune",
        tuned,
        names,
        "call eval() on the model first, or pass norm_eval=True (batch norms stay in Eval mode while the model trains) "
        "or include_training=True (pairs fuse once their batch norms are in Eval mode)",
    )
    return tuned


def untune(model: Model) -> Model:
    """The way back from `tune` and `transform`: a plain model of the original classes, with the same tensors.

    For tools that look for exact classes, such as `torch.jit.script`, `torch.ao.quantization.fuse_modules`,
    `prepare_qat`, a quantisable model's own `fuse_model()`, or `torch.fx.experimental.optimization.fuse`; and for
    `torch.optim.swa_utils.update_bn` where `norm_eval=True` keeps the batch norms in Eval mode.

    Args:
        model: What [`tune`][convbn_fx.tune] or [`transform`][convbn_fx.transform] returned, or a model that holds such.
            It is left untouched. Of others, a copy is made. What [`deploy`][convbn_fx.deploy] has folded stays folded.

    Returns:
        A copy whose parameters, buffers, modes, hooks and attributes are those of `model`, and nothing of this library:
        `train()` takes batch norms along that `norm_eval=True` kept in Eval mode, and pairs of graphs are two calls
        again.

    Raises:
        TypeError: `model` is not a module, or FSDP has sharded it.

    Example:
        ```python
        import torch
        import convbn_fx

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        tuned = convbn_fx.tune(model)
        plain = convbn_fx.untune(tuned)
        assert type(plain[0]) is torch.nn.Conv2d and plain[0].weight is tuned[0].weight
        fused = torch.ao.quantization.fuse_modules(plain, [["0", "1", "2"]])
        assert type(fused[1]) is torch.nn.Identity
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"untune: expected a torch.nn.Module, got {type(model).__name__}")
    plain = clone(model)
    for module in plain.modules():
        if vars(module).pop(STAYS_IN_EVAL_MODE, False):
            module.__class__ = untuned_class(module)
        if isinstance(module, GraphModule):
            unfuse(module)
            module.meta.pop(META_KEY, None)
            make_plain(module)
    return plain


def _linked(model: Model, names: Iterable[str], found: Discovery, activations: bool) -> Model:
    """Gives the modules of a model their parts in the pairs that were found inside those with these names."""
    chosen = [pair for pair in found.pairs if _is_inside(pair.owner, names)]
    linked = [(pair, link(model, pair)) for pair in chosen]
    less = []
    if linked and activations:
        less = save_less_in(model, lambda name: _is_inside(name, names), found.questions)
    file_report(model, linked, found.skips + _outside(found.pairs, chosen), less)
    return model


def deploy(
    model: Model,
    modules: Iterable[str] | None = None,
    *,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
) -> Model:
    """The same model for inference and export, with Eval-mode batch norms baked into their convolutions (Deploy mode).

    Where a pair was, there is a plain `nn.Conv*d` or `nn.Linear` with parameters of its own, and `nn.Identity` (or
    the activation that was part of it) in the place of the batch norm; attributes that are no tensors are kept. Outputs
    are those of Eval mode. What cannot be proved to be used as that pair alone stays as [`tune`][convbn_fx.tune] makes
    it, and is told in the report. Training the result is possible and unstable: weights and gradients scale
    inversely (arXiv 2305.11624, section 3). A weight trains if the convolution's did, a bias if the convolution's or
    the batch norm's did.

    Args:
        model: Any model in Eval mode, as it was built or tuned. It is left untouched.
        modules: Names of the sub-modules to deploy; all by default.
        example_inputs: Recommended: a tensor, a tuple of positional arguments or a dictionary of keyword arguments.
            The result and `model` are then called with them once, without gradients and with everything but batch
            norms in Eval mode. Both are left as they were, and so are buffers and random numbers.

    Returns:
        A model of the same class, which shares with `model` only what was not folded.
        [`report`][convbn_fx.report] tells what was folded in it.

    Raises:
        TypeError: `model` is not a module, or is wrapped in `DistributedDataParallel`; `modules` is a single string;
            `example_inputs` is something else.
        ValueError: One of `modules` names no sub-module; or an output for `example_inputs` differs beyond rounding,
            which is told with its place in what the model returns.

    Example:
        ```python
        import torch
        import convbn_fx

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        deployed = convbn_fx.deploy(model)
        print(deployed)  # a convolution with a bias, an identity, a ReLU
        assert isinstance(deployed[1], torch.nn.Identity)
        torch.testing.assert_close(deployed(x := torch.randn(2, 3, 8, 8)), model(x))
        ```
    """
    names = selected(model, modules, "deploy")
    native.ensure()
    check_example_inputs(example_inputs)
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in model.modules()):
        raise TypeError(
            "deploy: the model is wrapped in DistributedDataParallel, which holds on to its parameters. Deploy what is "
            "inside: deploy(model.module)"
        )
    deployed = _deployed(model, names)
    _warn_of_train_mode("deploy", deployed, names, "call eval() on the model first")
    if example_inputs is not None:
        check_outputs(model, deployed, example_inputs)
    return deployed


@torch.inference_mode(False)  # what is made in it could neither train nor be loaded into
def _deployed(model: Model, names: Iterable[str]) -> Model:
    deployed = clone(model)
    for name, module in list(deployed.named_modules()):
        if isinstance(module, GraphModule) and _is_inside(name, names):
            _fuse(module, include_training=False, activations=False)
            skips = bake_graph(module)
            left = {skip.batch_norm for skip in skips}
            fused, others = module.meta[META_KEY].fused, module.meta[META_KEY].skipped
            module.meta[META_KEY] = Report(
                [replace(pair, is_baked=True) for pair in fused if pair.batch_norm not in left],
                others + skips,
            )
    with CodeRun() as code:
        found = discover(deployed)
    return _baked(deployed, names, found, code)


def _baked(model: Model, names: Iterable[str], found: Discovery, code: CodeRun) -> Model:
    """Bakes the pairs that were found in this very model, inside its modules with these names, and links the others."""
    chosen = [pair for pair in found.pairs if _is_inside(pair.owner, names)]
    computed = [pair for pair in chosen if pair.to_function or isinstance(pair.operands, str)]
    others = [pair for pair in chosen if pair not in computed]
    baked, skips = bake(model, others, refusals(model, found, others, code))
    skips += [
        Skip(pair.record.batch_norm, SkipReason.FUNCTION_CALL, "" if pair.to_function else str(pair.operands))
        for pair in computed
    ]
    baked, seen = _unseen(model, baked, found.explored)
    pairs = [pair for group in baked for pair in group.pairs]
    for pair in chosen:
        if pair not in pairs:
            link(model, pair)
    told = [replace(pair, record=replace(pair.record, is_baked=True)) for pair in chosen if pair in pairs]
    file_report(
        model, [(pair, None) for pair in told], found.skips + skips + seen + _outside(found.pairs, chosen)
    )
    return model


def _unseen(model: nn.Module, baked: list[Baked], explored: list[Explored]) -> tuple[list[Baked], list[Skip]]:
    """Undoes what a forward looks at; returns what no forward does, and a `Skip` for the rest."""
    skips: list[Skip] = []
    while True:
        changed: dict[int, tuple[Baked, Explored]] = {}
        with private_copy(model, GuessedTensor) as private:
            for each in explored:
                parts = set(map(id, each.module.modules()))
                groups = [
                    group for group in baked if any(id(module) in parts for module, *_ in group.originals)
                ]
                biases = {key: names for group in groups for key, names in group.biases(model).items()}
                if groups and goes_another_way(each, private, biases):
                    changed |= {id(group): (group, each) for group in groups}
        if not changed:
            return baked, skips
        for group, each in changed.values():
            group.undo()
            detail = f"{type(each.module).__name__} looks at what it is"
            reason = SkipReason.MAY_BE_USED_ELSEWHERE
            skips += [Skip(pair.record.batch_norm, reason, detail) for pair in group.pairs]
        baked = [group for group in baked if id(group) not in changed]


def tuned_and_deployed(model: Model) -> tuple[Model, Model]:
    """What `tune(model)` and `deploy(model)` return; its forwards are explored once for both, which takes longest.

    Args:
        model: Any model in Eval mode. It is left untouched.

    Returns:
        The model in Tune mode, and in Deploy mode.
    """
    if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
        # Their graphs are rewritten, in two ways, before the rest is explored.
        return tune(model), deploy(model)
    tuned, deployed = clone(model), clone(model)
    with CodeRun() as code:
        found = discover(deployed)
    return _linked(tuned, [""], found, activations=True), _baked(deployed, [""], found, code)


def _warn_of_train_mode(function: str, model: nn.Module, names: Iterable[str], cure: str) -> None:
    """Tells who called the function where nothing was done inside the named modules for want of an `eval()`."""
    if not any(part.training for part in model.modules()):
        return  # a function that some path calls with training=True is nobody's mistake
    told = report(model)
    left = [skip for skip in told.skipped if skip.reason is SkipReason.TRAINING_MODE]
    count = sum(_is_inside(skip.batch_norm, names) for skip in left)
    if count and not told.fused:
        warnings.warn(
            f"{function}: no pair was fused, and {count} of the batch norms of {type(model).__name__} are in Train "
            f"mode, in which they normalise by the statistics of the batch. Cure: {cure}",
            stacklevel=3,
        )


def _outside(pairs: list[OwnedPair], chosen: list[OwnedPair]) -> list[Skip]:
    return [Skip(pair.record.batch_norm, SkipReason.NOT_SELECTED) for pair in pairs if pair not in chosen]


def _is_inside(name: str, selected: Iterable[str]) -> bool:
    return any(not prefix or f"{name}.".startswith(f"{prefix}.") for prefix in selected)


def report(model: nn.Module) -> Report:
    """What the pass did to a model and what it left alone, with reasons.

    It speaks of the model as it is now: a pair that was taken apart after it had been tuned, by a module exchanged or
    wrapped, is told with a reason.

    Args:
        model: What [`transform`][convbn_fx.transform], [`tune`][convbn_fx.tune] or [`deploy`][convbn_fx.deploy]
            returned, a model compiled with `backend="convbn"` that has been called, or a model that holds such as
            sub-modules, whose reports are added up under their qualified names.

    Returns:
        The report; `print` it for a table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: Nothing in the model was rewritten by this library.

    Example:
        ```python
        import torch
        import convbn_fx

        layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.BatchNorm2d(8)]
        report = convbn_fx.report(convbn_fx.tune(torch.nn.Sequential(*layers).eval()))
        print(report)
        assert [(pair.convolution, pair.batch_norm) for pair in report.fused] == [("0", "1")]
        assert [(skip.batch_norm, skip.reason.name) for skip in report.skipped] == [("3", "NOT_AFTER_CONVOLUTION")]
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: expected a torch.nn.Module, got {type(model).__name__}")
    reports = [
        part.prefixed(without_wrappers(name))
        for name, module in model.named_modules()
        for part in _filed_with(module)
    ]
    if (compiled := compiled_report(model)) is not None:
        known = {(pair.convolution, pair.batch_norm) for part in reports for pair in part.fused}
        new = [pair for pair in compiled.fused if (pair.convolution, pair.batch_norm) not in known]
        reports.append(Report(new, [] if known else compiled.skipped))
    if left := list(orphaned(model)):
        reports.append(Report([], left))
    if not reports:
        raise ValueError(
            f"report: nothing in this {type(model).__name__} was rewritten by convbn_fx. Pass the model that tune, "
            "deploy or transform returned; one compiled with backend='convbn' has to be called first."
        )
    return sum(reports, Report())


def _filed_with(module: nn.Module) -> Iterator[Report]:
    if (filed := vars(module).get(REPORT)) is not None:
        yield filed.now()
    if isinstance(module, torch.fx.GraphModule):  # torchvision has some that lack `meta`
        filed = getattr(module, "meta", {}).get(META_KEY)
        if filed is not None:
            yield _graph_as_it_is_now(module, filed)


def _graph_as_it_is_now(graph_module: torch.fx.GraphModule, filed: Report) -> Report:
    """The report of a graph with the modules that it reads by now: exchanged, wrapped, or with hooks."""
    fused, skipped = [], list(filed.skipped)
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    modules = {
        name: part for name, part in graph_module.named_modules(remove_duplicate=False) if name in read
    }
    for pair in filed.fused:
        # A function has no module of its name.
        parts = {name: modules[name] for name in (pair.convolution, pair.batch_norm) if name in modules}
        rows = {
            name: kinds.convolution_kind(part) or kinds.batch_norm_kind(part) for name, part in parts.items()
        }
        if None in rows.values():
            name = next(name for name, row in rows.items() if row is None)
            detail = f"{name} is another module now, a {type(parts[name]).__name__}"
            skipped.append(Skip(pair.batch_norm, SkipReason.CHANGED_SINCE, detail))
            continue
        names = {name: row.name for name, row in rows.items() if row is not None}
        now = replace(
            pair,
            convolution_kind=names.get(pair.convolution, pair.convolution_kind),
            batch_norm_kind=names.get(pair.batch_norm, pair.batch_norm_kind),
            note=hooks_note(parts.values()) if parts else pair.note,
        )
        fused.append(now)
    return Report(fused, skipped, filed.activations)
