"""What the report of a compiled model tells."""

import io

import pytest
import torch
from compiled import INNER, NET, compiled, no_recompilation, pairs, skips
from models import ConvNormAct, Functional, Pair, data, net, prepared
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    # Dynamo looks at .grad of every input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def test_a_report_by_qualified_names_of_whatever_one_has_in_hand():
    model = net()
    candidate = compiled(model)
    candidate(X)
    assert pairs(candidate) == pairs(model) == NET
    assert pairs(candidate.block) == {("first.conv", "first.norm"), ("second.conv", "second.norm")}
    assert pairs(model.stem) == {("conv", "norm")}
    assert all(pair.mode_is_constant for pair in report(model).fused)
    assert {pair.convolution_kind for pair in report(model).fused} == {"conv2d"}
    assert [pair.batch_norm for pair in report(model).fused] == [
        "stem.norm",
        "block.first.norm",
        "block.second.norm",
    ]
    assert "stem.norm" in str(report(candidate))
    assert "_orig_mod" not in str(report(candidate))


def test_compiled_in_place():
    model = net()
    other = net()
    model.compile(backend="convbn", fullgraph=True)
    assert_equivalent(other, model, X)
    assert pairs(model) == NET


def test_a_compiled_function_around_the_model():
    model = net()

    @torch.compile(backend="convbn", fullgraph=True)
    def loss(x):
        return model(x).sin().sum()

    expected = torch.autograd.grad(model(X).sin().sum(), [*model.stem.parameters()])
    torch.testing.assert_close(torch.autograd.grad(loss(X), [*model.stem.parameters()]), expected)
    assert pairs(model) == NET


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_of_a_model_that_is_not(in_place):
    model = net()
    if in_place:
        model.block.compile(backend="convbn")
    else:
        model.block = compiled(model.block)
    assert_equivalent(net(), model, X)
    assert pairs(model) == {name for name in NET if name[0].startswith("block.")}


def test_a_compiled_part_of_a_compiled_model():
    model = net()
    model.block.first = compiled(model.block.first)
    candidate = compiled(model)
    assert_equivalent(net(), candidate, X)
    assert pairs(candidate) == pairs(model) == NET


def test_a_compiled_layer_of_a_compiled_model():
    model = prepared(Pair())
    model.conv, model.norm = compiled(model.conv), compiled(model.norm)
    candidate = compiled(model)
    torch.testing.assert_close(candidate(X), model(X))
    assert pairs(candidate) == {("conv", "norm")}


def test_a_compiled_pair_whose_layers_were_tuned_in_a_part():
    """Records of two ways in one model: each pair once, all names alike."""
    model = net()
    model.stem = tune(model.stem)
    model.block = compiled(model.block)
    model(X)
    assert pairs(model) == NET


def test_two_models_of_different_classes_are_not_mixed_up():
    model, other = net(), prepared(Pair())
    candidate, another = compiled(model), compiled(other)
    candidate(X)
    with pytest.raises(ValueError, match="nothing in this"):
        report(another)
    another(X)
    assert pairs(candidate) == NET
    assert pairs(another) == {("conv", "norm")}


def test_two_models_of_one_class():
    """Dynamo runs the second on the graph of the first, and calls no backend for it."""
    model, other = prepared(Pair()), prepared(Pair())
    first, second = compiled(model), compiled(other)
    first(X)
    with pytest.raises(ValueError, match="nothing in this"):
        report(second)
    second(X)
    assert saved_bytes(second, X) < saved_bytes(other, X)  # it is fused
    assert pairs(first) == pairs(second) == {("conv", "norm")}


def test_blocks_compiled_one_by_one():
    """What PyTorch calls regional compilation: one graph for all blocks of a kind."""
    model = prepared(nn.Sequential(*[ConvNormAct(3, 3) for _ in range(4)]))
    other = prepared(nn.Sequential(*[ConvNormAct(3, 3) for _ in range(4)]))
    other.load_state_dict(model.state_dict())
    for block in model:
        block.compile(backend="convbn")
    assert_equivalent(other, model, X)
    assert pairs(model) == {(f"{i}.conv", f"{i}.norm") for i in range(4)}


@pytest.mark.parametrize("compiling", [compiled, lambda model: model.compile(backend="convbn") or model])
def test_compiled_and_not_called_yet(compiling):
    model = net()
    candidate = compiling(model)
    with pytest.raises(ValueError, match=r"has to be called first"):
        report(candidate)
    with pytest.raises(ValueError, match=r"has to be called first"):
        report(model)
    candidate(X)
    assert pairs(candidate) == NET


def test_another_backend_leaves_no_report():
    model = net()
    torch.compile(model, backend="eager")(X)
    with pytest.raises(ValueError, match="nothing in this"):
        report(model)


def test_recompilations_do_not_repeat_records():
    model = net()
    candidate = compiled(model, dynamic=False)
    for batch in (1, 3):
        candidate(data(batch, 3, 6, 6))
    model.stem.conv.requires_grad_(False)
    candidate(X)
    with torch.no_grad():
        candidate(X)
    assert len(report(candidate).fused) == len(NET)
    assert not report(candidate).skipped


def used_elsewhere(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def pre_activation(m, x):
    return m.conv(m.norm(x).relu())


SKIPPED = {
    "CONVOLUTION_OUTPUT_USED_ELSEWHERE": lambda: Pair(forward=used_elsewhere),
    "NOT_AFTER_CONVOLUTION": lambda: Pair(norm=nn.BatchNorm2d(3), forward=pre_activation),
    "TRAINING_MODE": Pair,
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("reason", SKIPPED)
def test_reasons(reason, inner):
    """Every Eval-mode batch norm that stays has a reason, under its own name."""
    model = prepared(SKIPPED[reason]())
    if reason == "TRAINING_MODE":
        model.norm.train()
    candidate = compiled(model, inner, fullgraph=True)
    assert_equivalent(model, candidate, X)
    assert not report(candidate).fused
    assert skips(candidate) == {("norm", reason)}


STATISTICS = {
    "attributes": lambda m, mean, var: vars(m).update(mean=mean, var=var),
    "in a list": lambda m, mean, var: vars(m).update(statistics=[mean, var]),
    "in a dictionary": lambda m, mean, var: vars(m).update(statistics={"mean": mean, "var": var}),
}


@pytest.mark.parametrize("where", STATISTICS)
def test_statistics_that_are_plain_tensors(where):
    def forward(m, x):
        held = getattr(m, "statistics", None)
        mean, var = (m.mean, m.var) if held is None else held.values() if isinstance(held, dict) else held
        return F.batch_norm(m.conv(x), mean, var)

    model = Pair(forward=forward).double().eval()
    STATISTICS[where](model, data(4), data(4).square())
    candidate = compiled(model)
    assert_equivalent(model, candidate, X)
    (pair,) = report(candidate).fused
    assert (pair.convolution, pair.batch_norm) == ("conv", "batch_norm")


MEAN, VAR, WEIGHT = data(4), data(4).square(), data(4, 3, 3, 3)


def normalised_by_globals(y):
    return F.batch_norm(y, MEAN, VAR)


NAMED_BY_CODE = {
    "statistics": lambda m, x: F.batch_norm(m.conv(x), MEAN, VAR),
    "statistics that a function names": lambda m, x: normalised_by_globals(m.conv(x)),
    "all operands": lambda m, x: F.batch_norm(F.conv2d(x, WEIGHT), MEAN, VAR),
    "all operands, some of a function": lambda m, x: normalised_by_globals(F.conv2d(x, WEIGHT)),
}


@pytest.mark.parametrize("forward", NAMED_BY_CODE)
def test_operands_that_are_global_tensors(forward, monkeypatch):
    for name in ("MEAN", "VAR", "WEIGHT"):  # what two models name alike is told of both
        monkeypatch.setitem(globals(), name, globals()[name].clone())

    class Model(Pair):
        def forward(self, x):
            return NAMED_BY_CODE[forward](self, x)

    model = Model().double().eval()
    candidate = compiled(model)
    assert_equivalent(model, candidate, X)
    (pair,) = report(candidate).fused
    assert pair.batch_norm == "batch_norm"


def test_blocks_that_share_global_statistics():
    class Block(Pair):
        def forward(self, x):
            return F.batch_norm(self.conv(x), MEAN, VAR)

    model = nn.Sequential(*(Block(nn.Conv2d(channels, 4, 3)) for channels in (3, 4))).double().eval()
    candidate, another = compiled(model, fullgraph=True), compiled(Block().double().eval())
    candidate(X)
    assert [pair.convolution for pair in report(candidate).fused] == ["0.conv", "1.conv"]
    with pytest.raises(ValueError, match="nothing in this"):
        report(another)


def test_statistics_that_are_constants_of_the_graph():
    def forward(m, x):
        y = m.conv(x)
        return F.batch_norm(y, torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype))

    candidate = compiled(Pair(forward=forward).double().eval())
    candidate(X)
    assert report(candidate).summary == "1 pair fused, 0 batch norms left"


@pytest.mark.xfail(strict=True, reason="a skip of a batch norm that is also fused is not told")
def test_a_batch_norm_that_is_fused_in_one_call_and_left_in_another():
    def forward(m, x):
        return m.norm(m.conv(x)) + m.norm(x)

    model = prepared(Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), forward))
    candidate = compiled(model)
    assert_equivalent(model, candidate, X)
    assert pairs(candidate) == {("conv", "norm")}
    assert skips(candidate) == {("norm", "NOT_AFTER_CONVOLUTION")}


def test_two_convolutions_into_one_batch_norm():
    model = prepared(Pair(forward=lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x))))
    model.other = nn.Conv2d(3, 4, 3).double()
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    assert pairs(candidate) == {("conv", "norm"), ("other", "norm")}


def two_functional_pairs(m, x):
    return m.normalize(F.conv2d(x, m.weight, padding=1)) + m.normalize(F.conv2d(-x, m.weight, m.bias, 1, 1))


def test_functional_pairs_are_named_by_their_nodes():
    """Functions have no qualified names, and two of them must not become one record."""
    model = Functional(two_functional_pairs, (4, 3, 3, 3), 4).double()
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    names = [(pair.convolution, pair.batch_norm) for pair in report(candidate).fused]
    assert len(names) == 2
    assert all(name and "_orig_mod" not in name for pair in names for name in pair)


class FunctionalHead(nn.Module):
    """A functional pair inside a block."""

    def __init__(self):
        super().__init__()
        self.head = Functional(two_functional_pairs, (4, 3, 3, 3), 4)

    def forward(self, x):
        return self.head(x)


def test_functional_pairs_inside_a_block():
    model = FunctionalHead().double()
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    assert len(report(candidate).fused) == 2
    assert all(pair.convolution != pair.batch_norm for pair in report(candidate).fused)


def test_a_parametrised_convolution_in_the_report():
    """The weight is computed: no module's tensor tells which convolution it is; the batch norm's does."""
    model = prepared(Pair(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))))
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    (pair,) = report(candidate).fused
    assert pair.batch_norm == "norm"


def test_a_report_outlives_statistics_and_parameters_put_in_place_of_others():
    """The graph is not compiled again for them, and so nothing else could tell."""
    model = net()
    candidate = compiled(model)
    candidate(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with no_recompilation():
        torch.testing.assert_close(candidate(X), net()(X))
    assert pairs(candidate) == NET


def test_a_model_without_batch_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, X)
    with pytest.raises(ValueError, match="nothing in this"):
        report(candidate)


def test_the_model_is_left_as_it_is():
    def attributes(backend):
        model = net()
        candidate = torch.compile(model, backend=backend)
        candidate(X).sum().backward()
        if backend == "convbn":
            report(candidate)
        torch.save(model.state_dict(), io.BytesIO())
        return list(candidate.state_dict()), [set(vars(module)) for module in model.modules()]

    assert attributes("convbn") == attributes("eager")


@pytest.mark.parametrize("backend", ["eager", "convbn"])
def test_parameters_can_be_swapped(backend):
    """`torch.utils.swap_tensors`, by which modules may be converted, refuses tensors with weak references."""
    model = prepared(Pair())
    candidate = torch.compile(model, backend=backend)
    candidate(X)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(candidate(X.float()), model(X.float()))
