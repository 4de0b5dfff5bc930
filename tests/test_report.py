"""What the pass says: pairs, skips, reasons and cures; and what it does to a graph, node for node."""

import copy
import operator
import pickle
from html.parser import HTMLParser

import pytest
import torch
from models import (
    NET_PAIRS,
    Functional,
    Pair,
    data,
    fused,
    fused_nodes,
    in_train_mode,
    net,
    prepared,
    reasons,
    through_pickle,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import convbn_fx
from convbn_fx import Pair as PairRecord
from convbn_fx import Report, Skip, SkipReason, deploy, report, symbolic_trace, transform, tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 5, 5)
ITSELF = {"trace": lambda captured: captured}


# --- Every reason -------------------------------------------------------------------------------------------------


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input if input.sum() > 0 else -input)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def with_hook(model):
    model[0].register_forward_hook(lambda module, args, output: output)
    return model


def call_with_too_much(model):
    graph = torch.fx.Graph()
    y = graph.call_module("conv", (graph.placeholder("x"),))
    graph.output(graph.call_module("norm", (y,), {"extra": 1}))
    return torch.fx.GraphModule(model, graph)


def function_with_too_little(model):
    graph = torch.fx.Graph()
    y = graph.call_module("conv", (graph.placeholder("x"),))
    graph.output(graph.call_function(F.batch_norm, (y, None)))
    return torch.fx.GraphModule(model, graph)


def conv_with_too_much():
    graph = torch.fx.Graph()
    y = graph.call_function(F.conv2d, (graph.placeholder("x"), 1), {"extra": 1})
    graph.output(graph.call_module("norm", (y,)))
    return torch.fx.GraphModule(Pair(), graph)


def with_backward_pass():
    """The gradient of gamma, as `make_fx` writes it down: it uses what the batch norm saves."""
    model = Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight)), (4, 3, 3, 3), 4).double()

    def step(x, gamma):
        gamma = gamma.detach().requires_grad_()
        y = F.conv2d(x, model.weight.detach())
        z, mean, rstd = torch.ops.aten._native_batch_norm_legit.default(
            y, gamma, None, model.mean, model.var, False, 0.1, 1e-5
        )
        return z, mean, rstd

    return make_fx(step)(X, torch.ones(4, dtype=torch.float64))


def module(build, **options):
    return lambda: symbolic_trace(prepared(build()), **options)


def functional(function):
    return lambda: symbolic_trace(Functional(function, (4, 3, 3, 3), 4).double())


CASES = {
    "a module in Train mode": ("TRAINING_MODE", lambda: symbolic_trace(Pair())),
    "a function in Train mode": (
        "TRAINING_MODE",
        functional(lambda m, x: F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var, training=True)),
    ),
    "no statistics": (
        "NO_RUNNING_STATISTICS",
        module(lambda: Pair(norm=nn.BatchNorm2d(4, track_running_stats=False))),
    ),
    "no statistics in a function": (
        "NO_RUNNING_STATISTICS",
        functional(lambda m, x: F.batch_norm(F.conv2d(x, m.weight), None, None)),
    ),
    "after an activation": (
        "NOT_AFTER_CONVOLUTION",
        module(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))),
    ),
    "of an input": (
        "NOT_AFTER_CONVOLUTION",
        module(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))),
    ),
    "after pooling": (
        "NOT_AFTER_CONVOLUTION",
        module(lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3))),
    ),
    "of a sum": (
        "NOT_AFTER_CONVOLUTION",
        module(lambda: Pair(forward=lambda m, x: m.norm(m.conv(x) + m.conv(-x)))),
    ),
    "used elsewhere": (
        "CONVOLUTION_OUTPUT_USED_ELSEWHERE",
        module(lambda: Pair(forward=lambda m, x: [y := m.conv(x), m.norm(y) + y][1])),
    ),
    "saved statistics used": ("BATCH_NORM_OUTPUTS_USED", with_backward_pass),
    "other ranks": ("CHANNELS_DIFFER", module(lambda: Pair(norm=nn.BatchNorm1d(4)))),
    "changed in place": (
        "MODIFIED_IN_BETWEEN",
        module(lambda: Pair(forward=lambda m, x: [y := m.conv(x), x.mul_(2), m.norm(y)][2])),
    ),
    "an unknown conv": ("UNKNOWN_CONVOLUTION", module(lambda: Pair(OwnConv(3, 4, 3)))),
    "an unknown norm": (
        "UNKNOWN_BATCH_NORM",
        module(lambda: Pair(norm=OwnNorm(4))),
    ),
    "a lazy conv": ("UNINITIALIZED", lambda: symbolic_trace(Pair(nn.LazyConv2d(4, 3)).eval())),
    "a lazy norm": ("UNINITIALIZED", lambda: symbolic_trace(Pair(norm=nn.LazyBatchNorm2d()).eval())),
    "a module called with more": ("UNUSUAL_CALL", lambda: call_with_too_much(prepared(Pair()))),
    "a function called with less": ("UNUSUAL_CALL", lambda: function_with_too_little(Pair().eval())),
    "a conv called with more": ("UNUSUAL_CALL", lambda: conv_with_too_much().eval()),
    "training is an argument": (
        "UNUSUAL_CALL",
        functional(lambda m, x: F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var, training=x)),
    ),
    "inside a leaf": (
        "INSIDE_LEAF_MODULE",
        lambda: symbolic_trace(with_hook(prepared(nn.Sequential(Pair())))),
    ),
    "not called": ("NOT_CALLED", module(lambda: Pair(forward=lambda m, x: m.conv(x)))),
}


@pytest.mark.parametrize("case", CASES)
@in_train_mode
def test_every_reason_is_given(case):
    name, capture = CASES[case]
    captured = capture()
    graph_module = fused(captured, 0, **ITSELF)
    assert list(reasons(graph_module).values()) == [name]
    assert graph_module.code == captured.code


def convolution_shared_crosswise(m, x):
    return m.net.norm(m.net.conv(x)) + m.other.norm(m.net.conv(x)) + m.net.norm(m.other.conv(x))


class Two(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.net, self.other = Pair(), Pair()
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def first_pair(m, x):
    return m.other(m.net(x))


def with_reference(model):
    model.other.norm = nn.Identity()
    model.other.conv = nn.Conv2d(4, 4, 1)
    model.other.neighbours = [model.net]
    return model


def with_huge_gamma(model):
    model.norm.weight.data.fill_(6e4)
    model.conv.weight.data.fill_(4)
    return model.half()


CASES_OF_MODELS = {
    "outside of the modules named": (
        "NOT_SELECTED",
        lambda: tune(nn.Sequential(Pair(), nn.ReLU()).eval(), modules=["1"]),
    ),
    "functions baked": (
        "FUNCTION_CALL",
        lambda: deploy(Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight)), (4, 3, 3, 3), 4).eval()),
    ),
    "hooks baked": ("HAS_HOOKS", lambda: deploy(with_hook_on_conv(Pair().eval()))),
    "a class asked for": (
        "CLASS_ASKED_FOR",
        lambda: tune(Pair(forward=lambda m, x: m.norm(m.conv(x)) * (type(m.conv) is nn.Conv2d)).eval()),
    ),
    "a norm in a checkpoint": (
        "CONTEXTS_DIFFER",
        lambda: tune(
            Pair(forward=lambda m, x: checkpoint(m.norm, m.conv(x), use_reentrant=False)).eval(),
        ),
    ),
    "a forward that breaks off": (
        "NOT_FOLLOWED",
        lambda: tune(Pair(forward=lambda m, x: m.norm(m.conv(x) * {5: 1}[x.shape[-1]])).eval()),
    ),
    "changed since": ("CHANGED_SINCE", lambda: with_another_norm(tune(Pair().eval()))),
    "shared crosswise": ("SHARED", lambda: deploy(Two(convolution_shared_crosswise).eval())),
    "reached by a part beside it": (
        "MAY_BE_USED_ELSEWHERE",
        lambda: deploy(with_reference(Two(first_pair)).eval()),
    ),
    "beyond float16": ("OUT_OF_RANGE", lambda: deploy(with_huge_gamma(prepared(Pair())))),
}


def with_another_norm(model):
    model.norm = nn.BatchNorm2d(4).eval()
    return model


def with_hook_on_conv(model):
    model.conv.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("case", CASES_OF_MODELS)
def test_every_reason_is_given_for_models(case):
    name, build = CASES_OF_MODELS[case]
    assert set(reasons(build()).values()) == {name}


def test_every_reason_has_a_test():
    names = {name for name, _ in (*CASES.values(), *CASES_OF_MODELS.values())}
    assert names == set(SkipReason.__members__)


@pytest.mark.parametrize("reason", SkipReason, ids=lambda reason: reason.name)
def test_every_reason_has_an_explanation_and_a_cure(reason):
    assert len(reason.value) > 20
    assert len(reason.cure) > 20
    assert str(reason) == reason.value
    assert SkipReason(reason.value) is reason
    assert pickle.loads(pickle.dumps(reason)) is reason
    assert copy.deepcopy(reason) is reason


# --- A model that has changed since -------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What adapters make of a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 0 * x.mean()


def replace_forward(model):
    model.conv.forward = model.conv.forward


CHANGES = {
    "a wrapped convolution": (
        lambda m: setattr(m, "conv", Wrapped(m.conv)),
        "conv is another module now, a Wrapped",
    ),
    "another convolution": (
        lambda m: setattr(m, "conv", nn.Conv2d(3, 4, 3)),
        "conv is another module now, a Conv2d",
    ),
    "another batch norm": (with_another_norm, "norm is another module now, a BatchNorm2d"),
    "no batch norm": (lambda m: setattr(m, "norm", None), "norm is gone"),
    "another forward": (replace_forward, "the forward of a Conv2d was replaced"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_pair_that_was_taken_apart_is_no_longer_said_to_be_fused(case):
    change, detail = CHANGES[case]
    tuned = tune(nn.ModuleDict({"block": prepared(Pair()), "other": prepared(Pair())}))
    before = report(tuned)
    change(tuned["block"])
    assert [pair.batch_norm for pair in report(tuned).fused] == ["other.norm"]
    assert report(tuned).skipped == [Skip("block.norm", SkipReason.CHANGED_SINCE, detail)]
    assert len(before.fused) == 2


def test_a_graph_whose_batch_norm_was_exchanged():
    """The graph reads its modules at every call: one that folds is told by its kind, another is no longer fused."""
    graph_module = fused(prepared(Pair()))
    graph_module.norm = prepared(FrozenBatchNorm2d(4))
    (pair,) = report(graph_module).fused
    assert pair.batch_norm_kind == "FrozenBatchNorm2d"
    graph_module.norm.register_forward_hook(lambda *_: None)
    (pair,) = report(graph_module).fused
    assert pair.note == "runs unfused while it has hooks"
    graph_module.norm = nn.GroupNorm(2, 4)
    detail = "norm is another module now, a GroupNorm"
    assert report(graph_module) == Report([], [Skip("norm", SkipReason.CHANGED_SINCE, detail)])


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_the_report_of_a_copy_looks_at_the_copy(copied):
    tuned = tune(prepared(Pair()))
    duplicate = copied(tuned)
    tuned.norm = nn.BatchNorm2d(4).eval()
    assert report(duplicate).summary == "1 pair fused, 0 batch norms left"
    duplicate.conv = Wrapped(duplicate.conv)
    assert set(reasons(duplicate).values()) == {"CHANGED_SINCE"}


def test_what_was_changed_is_told_until_it_is_tuned_again():
    model = nn.Sequential(prepared(Pair()))
    tuned = tune(model)
    tuned[0].norm = prepared(nn.BatchNorm2d(4))
    assert set(reasons(tuned).values()) == {"CHANGED_SINCE"}
    again = tune(tuned)
    assert report(again).summary == "1 pair fused, 0 batch norms left"
    assert_equivalent(tuned, again, X)


def test_hooks_are_noted_while_they_are_there():
    tuned = tune(prepared(Pair()))
    assert report(tuned).fused[0].note == ""
    hook = tuned.norm.register_forward_hook(lambda *_: None)
    assert report(tuned).fused[0].note == "runs unfused while it has hooks"
    assert report(copy.deepcopy(tuned)).fused[0].note == "runs unfused while it has hooks"
    hook.remove()
    assert report(tuned).fused[0].note == ""


def test_the_detail_says_what_stood_in_the_way():
    def detail(case):
        (skip,) = report(fused(CASES[case][1](), 0, **ITSELF)).skipped
        return skip.detail

    assert detail("used elsewhere") == "by add"
    assert detail("changed in place") == "mul_"
    assert detail("an unknown conv") == "OwnConv"
    assert detail("an unknown norm") == "OwnNorm"
    assert detail("inside a leaf") == "0: Pair"
    assert detail("other ranks") == "BatchNorm1d after Conv2d"


def test_norms_in_train_mode_that_nobody_calls_are_no_matter():
    model = prepared(Pair())
    model.unused = nn.BatchNorm2d(3)
    assert not report(fused(model)).skipped


# --- The records --------------------------------------------------------------------------------------------------


def test_pairs_name_modules_and_kinds():
    assert report(fused(net(), NET_PAIRS)).fused == [
        PairRecord(f"{name}.conv", f"{name}.norm", "Conv2d", "BatchNorm2d")
        for name in ("stem", "block.first", "block.second")
    ]


def test_pairs_name_nodes_where_there_are_no_modules():
    model = Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight)), (4, 3, 3, 3), 4).double()
    assert report(fused(model)).fused == [
        PairRecord("conv2d", "batch_norm", "conv2d", "batch_norm", mode_is_constant=True)
    ]


def test_the_graph_order_is_kept():
    model = prepared(Pair(forward=lambda m, x: m.norm2(m.conv2(m.norm(m.conv(x))))))
    model.conv2, model.norm2 = nn.Conv2d(4, 4, 1).double(), nn.BatchNorm2d(4).double().eval()
    assert [pair.batch_norm for pair in report(fused(model, 2)).fused] == ["norm", "norm2"]


def test_records_are_frozen_and_comparable():
    pair = PairRecord("conv", "norm", "Conv2d", "BatchNorm2d")
    skip = Skip("norm", SkipReason.NOT_CALLED)
    with pytest.raises(AttributeError):
        pair.convolution = "other"
    with pytest.raises(AttributeError):
        skip.reason = SkipReason.UNUSUAL_CALL
    assert pickle.loads(pickle.dumps(Report([pair], [skip]))) == Report([pair], [skip])
    assert len({pair, PairRecord("conv", "norm", "Conv2d", "BatchNorm2d")}) == 1


SMALL = Report(
    [
        PairRecord("stem.conv", "stem.norm", "Conv2d", "BatchNorm2d"),
        PairRecord("conv2d", "batch_norm", "conv2d", "batch_norm", True, "a note"),
    ],
    [
        Skip("norm1", SkipReason.TRAINING_MODE),
        Skip("norm2", SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE, "by add"),
        Skip("norm3", SkipReason.TRAINING_MODE),
    ],
)


def test_totals():
    assert SMALL.summary == "2 pairs fused, 3 batch norms left"
    assert Report().summary == "0 pairs fused, 0 batch norms left"
    assert Report(SMALL.fused[:1], SMALL.skipped[:1]).summary == "1 pair fused, 1 batch norm left"
    assert SMALL.reasons == {SkipReason.TRAINING_MODE: 2, SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE: 1}


def test_the_table():
    assert str(Report()) == "0 pairs fused, 0 batch norms left"
    lines = str(SMALL).splitlines()
    assert lines[0] == SMALL.summary
    assert lines[2].split() == ["convolution", "batch", "norm", "kinds", "mode"]
    assert lines[4] == "stem.conv    stem.norm   Conv2d + BatchNorm2d  read at every call"
    assert lines[5] == "conv2d       batch_norm  conv2d + batch_norm   constant: Eval; a note"
    assert lines[7].split() == ["left", "reason", "because"]
    assert lines[9].startswith("norm1  TRAINING_MODE")
    assert lines[10].endswith("batch norm (by add)")
    assert lines[13] == f"2 x TRAINING_MODE: {SkipReason.TRAINING_MODE.cure}"
    assert len(lines) == 15
    starts = [line.index(word) for line, word in zip(lines[2:6:2], ("batch norm", "stem.norm"), strict=True)]
    assert starts[0] == starts[1]
    assert not any(line.endswith(" ") for line in lines)


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.texts, self.unclosed = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data)


def read(html):
    parser = Cells()
    parser.feed(html)
    assert not parser.open
    return parser.texts


def test_the_table_for_notebooks():
    texts = read(SMALL._repr_html_())
    assert texts[0] == SMALL.summary
    for pair in SMALL.fused:
        assert pair.convolution in texts
        assert pair.batch_norm in texts
    for skip in SMALL.skipped:
        assert skip.batch_norm in texts
        assert skip.reason.name in texts
    assert f"TRAINING_MODE: {SkipReason.TRAINING_MODE.cure}" in texts
    assert read(Report()._repr_html_()) == [Report().summary]


def test_names_are_escaped():
    name = "<b>&\"'"
    html = Report([PairRecord(name, name, name, name, note=name)], [Skip(name, SkipReason.NOT_CALLED, name)])
    texts = read(html._repr_html_())
    assert "<b>&\"'" in texts
    assert "<b>&" not in html._repr_html_().replace("<p><b>", "")


def test_reports_are_added_and_prefixed():
    other = Report([], [Skip("norm4", SkipReason.NOT_CALLED)])
    total = SMALL + other.prefixed("head")
    assert total.fused == SMALL.fused
    assert [skip.batch_norm for skip in total.skipped] == ["norm1", "norm2", "norm3", "head.norm4"]
    assert SMALL.prefixed("") == SMALL
    assert SMALL.prefixed("a.b").fused[0] == PairRecord(
        "a.b.stem.conv", "a.b.stem.norm", "Conv2d", "BatchNorm2d"
    )
    assert len(SMALL.skipped) == 3


# --- report(...) of models ----------------------------------------------------------------------------------------


def test_a_model_with_several_rewritten_parts():
    model = nn.ModuleDict(
        {
            "backbone": fused(net(), NET_PAIRS),
            "heads": nn.ModuleList([nn.Linear(2, 2), fused(prepared(Pair(norm=nn.BatchNorm1d(4))), 0)]),
        }
    )
    total = report(model)
    assert [pair.batch_norm for pair in total.fused] == [
        "backbone.stem.norm",
        "backbone.block.first.norm",
        "backbone.block.second.norm",
    ]
    assert {skip.batch_norm: skip.reason.name for skip in total.skipped} == {
        "backbone.unused.1": "NOT_CALLED",
        "heads.1.norm": "CHANNELS_DIFFER",
    }


def test_a_rewritten_part_within_a_model_that_is_rewritten_in_turn():
    inner = fused(prepared(Pair()))
    model = prepared(nn.Sequential(inner, Pair(nn.Conv2d(4, 4, 3))))
    graph_module = transform(symbolic_trace(model))
    assert len(fused_nodes(graph_module)) == 2
    total = report(graph_module)
    assert sorted(pair.batch_norm for pair in total.fused) == ["0.norm", "1.norm"]
    assert not total.skipped
    assert_equivalent(model, graph_module, data(2, 3, 7, 7))


def test_a_traced_model_around_a_rewritten_part():
    """The part stays what it is when it has nothing to do with any other batch norm."""
    model = nn.Sequential(fused(prepared(Pair())), nn.ReLU()).double().eval()
    graph_module = transform(symbolic_trace(model))
    assert report(graph_module).summary == "1 pair fused, 0 batch norms left"
    assert_equivalent(model, graph_module, X)


@pytest.mark.parametrize("model", [net(), symbolic_trace(net()), torch.fx.symbolic_trace(net()), nn.ReLU()])
def test_a_model_that_was_not_rewritten(model):
    name = type(model).__name__
    with pytest.raises(
        ValueError, match=rf"report: nothing in this {name} was rewritten by convbn_fx. .*transform"
    ):
        report(model)


@pytest.mark.parametrize("thing", [None, "model", torch.ones(1), nn.ReLU])
def test_what_is_no_module(thing):
    name = type(thing).__name__
    with pytest.raises(TypeError, match=f"report: expected a torch.nn.Module, got {name}"):
        report(thing)
    with pytest.raises(TypeError, match=f"symbolic_trace: expected a torch.nn.Module, got {name}"):
        symbolic_trace(thing)
    with pytest.raises(
        TypeError, match=f"transform: expected a torch.fx.GraphModule, got {name}.*symbolic_trace"
    ):
        transform(thing)


def test_a_model_that_was_not_traced():
    with pytest.raises(
        TypeError, match=r"got Net. Trace the model first: transform\(convbn_fx.symbolic_trace"
    ):
        transform(net())


# --- The graph ----------------------------------------------------------------------------------------------------


def targets(graph_module):
    return [(node.op, node.target) for node in graph_module.graph.nodes]


FUSED = ("call_function", convbn_fx.functional.conv_batch_norm)


def test_the_graph_of_a_pair_of_modules():
    assert targets(fused(prepared(Pair()))) == [
        ("placeholder", "x"),
        ("get_attr", "conv"),
        ("get_attr", "norm"),
        FUSED,
        ("output", "output"),
    ]


def test_the_graph_of_a_pair_of_functions():
    model = Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight, padding=1)), (4, 3, 3, 3), 4)
    graph_module = fused(model)
    assert targets(graph_module)[0] == ("placeholder", "x")
    assert targets(graph_module)[-2:] == [FUSED, ("output", "output")]
    assert {target for op, target in targets(graph_module) if op == "get_attr"} == {
        "weight",
        "gamma",
        "beta",
        "mean",
        "var",
    }
    assert len(targets(graph_module)) == 8


def test_the_graph_of_a_pair_whose_shape_is_read():
    model = prepared(Pair(forward=lambda m, x: [y := m.conv(x), m.norm(y).reshape(y.shape[0], -1)][1]))
    assert targets(fused(model)) == [
        ("placeholder", "x"),
        ("get_attr", "conv"),
        ("get_attr", "norm"),
        FUSED,
        ("call_function", getattr),
        ("call_function", operator.getitem),
        ("call_method", "reshape"),
        ("output", "output"),
    ]


def test_the_graph_of_the_network():
    names = [node.name for node in fused(net(), NET_PAIRS).graph.nodes if node.op != "get_attr"]
    assert names == [
        "x",
        "conv_batch_norm",
        "stem_act",
        "conv_batch_norm_1",
        "block_first_act",
        "conv_batch_norm_2",
        "block_second_act",
        "add",
        "mean",
        "dropout",
        "head",
        "mul",
        "output",
    ]


def test_node_metadata_is_that_of_the_batch_norm():
    traced = symbolic_trace(prepared(Pair()))
    (norm,) = [node for node in traced.graph.nodes if node.target == "norm"]
    norm.meta["mark"] = "kept"
    graph_module = transform(traced)
    assert fused_nodes(graph_module)[0].meta["mark"] == "kept"
    fused_nodes(graph_module)[0].meta["mark"] = "changed"
    assert norm.meta["mark"] == "kept"


def test_users_of_a_replaced_node_read_the_fused_one():
    graph_module = fused(net(), NET_PAIRS)
    for node in fused_nodes(graph_module):
        assert [user.op for user in node.users] == ["call_module"]
    graph_module.graph.lint()


@pytest.mark.parametrize("capture", [symbolic_trace, torch.fx.symbolic_trace], ids=["ours", "torch.fx"])
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train(),
        nn.Identity(),
    ],
    ids=["no norm", "norm first", "training", "nothing"],
)
@in_train_mode
def test_a_graph_with_nothing_to_do_is_left_as_it_is(model, capture):
    captured = capture(model)
    graph_module = fused(captured, 0, **ITSELF)
    assert graph_module.code == captured.code
    assert [node.name for node in graph_module.graph.nodes] == [node.name for node in captured.graph.nodes]
    assert graph_module is not captured
    assert graph_module.graph is not captured.graph


@pytest.mark.parametrize("capture", [symbolic_trace, torch.fx.symbolic_trace], ids=["ours", "torch.fx"])
def test_the_pass_applied_twice_is_the_pass_applied_once(capture):
    once = fused(net(), NET_PAIRS, capture)
    twice = fused(once, NET_PAIRS, **ITSELF)
    assert twice.code == once.code
    assert report(twice) == report(once)
    assert_equivalent(once, twice, data(2, 3, 6, 6))


def test_the_graph_given_is_not_changed():
    captured = symbolic_trace(net())
    code = captured.code
    fused(captured, NET_PAIRS, **ITSELF)
    assert captured.code == code
    assert "convbn_fx" not in captured.meta


def test_the_generated_code_names_the_public_function():
    assert "= convbn_fx_functional_conv_batch_norm(" in fused(prepared(Pair())).code


def test_an_attribute_called_meta_is_no_report():
    model = prepared(Pair())
    model.meta = None
    assert len(report(tune(model)).fused) == 1


def test_a_wrapper_that_passes_attributes_on_adds_no_pairs():
    compiled = torch.compile(fused(net(), NET_PAIRS), backend="eager")
    assert len(report(compiled).fused) == NET_PAIRS
