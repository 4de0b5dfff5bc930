"""The oracle must find every difference, and leave no trace."""

import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from convbn_fx.testing import Comparison, assert_equivalent, compare, randomize_batchnorms


class Net(nn.Module):
    """Convolution, batch norm, dropout; ``finish`` makes the mistakes that a test is about."""

    def __init__(self, finish=lambda net, x, y: y):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.25)
        self.finish = finish

    def forward(self, x):
        return self.finish(self, x, self.dropout(self.bn(self.conv(x)).relu()))


def make(finish=lambda net, x, y: y, dtype=torch.float64):
    torch.manual_seed(0)
    return randomize_batchnorms(Net(finish)).to(dtype)


def sharing(model, finish):
    """A second model on the parameters and buffers of the first."""
    other = Net(finish).train(model.training)
    for name, child in model.named_children():
        setattr(other, name, child)
    return other


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def everything(model):
    """All that a call could change, as comparable values."""
    return {
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "ids": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "grads": [id(parameter.grad) for parameter in model.parameters()],
        "flags": [module.training for module in model.modules()],
        "versions": [parameter._version for parameter in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def scaled_gradient(tensor, factor):
    """The same values, with a gradient that is wrong by a factor."""
    return tensor * factor + (tensor * (1 - factor)).detach()


# ---------------------------------------------------------------- what is equal passes


@pytest.mark.parametrize("training", [True, False])
def test_a_model_equals_itself_and_a_copy(x, training):
    model, copy = make().train(training), make().train(training)
    assert_equivalent(model, model, x)
    assert_equivalent(model, copy, x)
    assert_equivalent(model, sharing(model, lambda net, x, y: y.clone()), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_tolerance_follows_the_dtype(x, dtype):
    model = make(dtype=dtype).eval()
    step = 1 + 2 * torch.finfo(dtype).eps
    assert_equivalent(model, sharing(model, lambda net, x, y: y * step), x.to(dtype))
    with pytest.raises(AssertionError, match="output differs"):
        assert_equivalent(model, sharing(model, lambda net, x, y: y * 1.1), x.to(dtype))


def test_a_gradient_of_rounding_errors_is_measured_by_its_module(x):
    class Biased(Net):  # Train mode removes the bias again: its gradient is 0 but for rounding
        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if self.finish is None else y + 1e-16 * (self.conv.bias * 3)[:, None, None]

    model = Biased(None).double().train()
    candidate = Biased(True).double().train()
    candidate.load_state_dict(model.state_dict())
    assert_equivalent(model, candidate, x)
    with pytest.raises(AssertionError, match=r"gradient of conv\.bias differs"):
        assert_equivalent(model, candidate, x, atol=0.0)


def test_nan_equals_nan_and_infinity_equals_infinity(x):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=torch.float64)

    def spoil(values):
        return make(lambda net, x, y: y * values[:, None, None]).eval()

    assert_equivalent(spoil(values), spoil(values), x)
    for position in range(4):
        other = values.clone()
        other[position] = 2.0
        with pytest.raises(AssertionError, match="output differs"):
            assert_equivalent(spoil(values), spoil(other), x)


def test_outputs_of_any_nesting_and_inputs_of_any_nesting():
    Pair = namedtuple("Pair", "first second")

    class Nested(nn.Module):
        def forward(self, batch, *, scale=None, flag=False):
            y = batch["image"] * (1 if scale is None else scale)
            return OrderedDict(
                a=[y, (y.sum().item(), None, "text")], b=Pair(y.argmax(), batch["index"]), c=flag, d=1j
            )

    batch = {"image": torch.randn(3), "index": torch.arange(3)}
    assert_equivalent(Nested(), Nested(), batch, kwargs={"scale": torch.tensor(2.0), "flag": True})
    measured = compare(Nested(), Nested(), batch, kwargs={"scale": torch.tensor(2.0)})
    assert set(measured.gradients) == {"gradient of input 0['image']", "gradient of input scale"}
    assert {"output['a'][0]", "output['a'][1][0]", "output['b'].first"} <= set(measured.outputs)


def test_registered_containers_without_keys_and_plain_dataclasses_are_opened():
    class Box:
        def __init__(self, *items):
            self.items = items

    @dataclass
    class Record:
        box: Box

    pytree.register_pytree_node(Box, lambda box: (list(box.items), None), lambda items, _: Box(*items))
    assert_equivalent(lambda x: Record(Box(x, 2 * x)), lambda x: Record(Box(x, x + x)), torch.ones(2))
    with pytest.raises(AssertionError, match=r"output\.box<leaf 1> differs"):
        assert_equivalent(lambda x: Record(Box(x, x)), lambda x: Record(Box(x, -x)), torch.ones(2))
    with pytest.raises(AssertionError, match="structure of output differs"):
        assert_equivalent(lambda x: Record(Box(x)), lambda x: [Box(x)], torch.ones(2))


def test_callables_without_parameters_or_differentiable_outputs():
    assert_equivalent(torch.argsort, lambda x: x.sort().indices, torch.randn(9))
    assert_equivalent(nn.ReLU(), torch.relu, torch.randn(9))
    assert_equivalent(lambda: None, lambda: None)
    assert_equivalent(lambda x: x + 1, lambda x: 1 + x, torch.arange(3))
    with pytest.raises(AssertionError, match=r"reference 0\.5, candidate 0\.75"):
        assert_equivalent(lambda: 0.5, lambda: 0.75)
    with pytest.raises(AssertionError, match=r"reference \(1\+1j\), candidate 1j"):
        assert_equivalent(lambda: 1 + 1j, lambda: 1j)
    with pytest.raises(AssertionError, match=r"at \(1,\) reference 3\.0, candidate 2\.0"):
        assert_equivalent(lambda x: x + 1, lambda x: x.clamp(2), torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="device of output differs"):
        assert_equivalent(lambda x: x, lambda x: x.to("meta"), torch.arange(3))
    large = torch.tensor(2**62)
    with pytest.raises(AssertionError, match="output differs"):  # equal as float64
        assert_equivalent(lambda x: x, lambda x: x + 1, large)


def test_one_tensor_passed_twice_stays_one_tensor(x):
    def add(a, b):
        return a.add_(1) + b

    assert_equivalent(add, lambda a, b: 2 * a.add_(1), x, x)


def test_memory_format_is_kept(x):
    seen = []

    def look(x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x

    assert_equivalent(look, look, x.to(memory_format=torch.channels_last))
    assert seen == [True, True]


def test_without_grad_mode_outputs_and_buffers_are_compared(x):
    model = make().train()
    wrong_gradient = sharing(model, lambda net, x, y: y.detach())
    wrong_buffer = sharing(model, lambda net, x, y: (net.bn.running_mean.add_(1), y)[1])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = everything(model)
            assert_equivalent(model, wrong_gradient, x)
            with pytest.raises(AssertionError, match=r"buffer bn\.running_mean after the call"):
                assert_equivalent(model, wrong_buffer, x)
            assert everything(model) == before


def test_inputs_that_need_no_gradient(x):
    model = make()
    detached = sharing(model, lambda net, x, y: y)
    detached.forward = lambda x: type(detached).forward(detached, x.detach())
    assert_equivalent(model, detached, x, input_gradients=False)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_equivalent(model, detached, x)


def test_wrapped_and_checkpointed_models(x):
    def checkpointed(net, x, y):
        return checkpoint(net.bn, net.conv(x), use_reentrant=False)

    model = make(lambda net, x, y: net.bn(net.conv(x)))
    candidate = sharing(model, checkpointed)
    assert_equivalent(model.eval(), torch.compile(model, backend="eager"), x)
    assert_equivalent(model, candidate.eval(), x)
    with pytest.raises(AssertionError, match=r"buffer bn\.\w+ after the call"):  # updated once more
        assert_equivalent(model.train(), candidate.train(), x)


def test_shared_and_reparametrised_parameters(x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = parametrizations.weight_norm(nn.Linear(6, 6))
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = Tied().double()
    assert_equivalent(model, model, x)
    assert "gradient of second.bias" in compare(model, model, x).gradients


# ---------------------------------------------------------------- what differs is named

WRONG = {
    "output": (lambda net, x, y: y * (1 + 1e-8), "output differs"),
    "weight gradient": (
        lambda net, x, y: y + (scaled_gradient(net.conv.weight, 1e-6) - net.conv.weight.detach()).sum(),
        r"gradient of conv\.weight differs",
    ),
    "input gradient": (
        lambda net, x, y: y + (scaled_gradient(x, 1e-6) - x).sum(),
        "gradient of input 0 differs",
    ),
    "detached": (lambda net, x, y: y.detach(), "requires_grad of output differs"),
    "missing gradient": (
        lambda net, x, y: y.detach() + 0 * net.conv.weight.sum(),
        r"gradient of input 0 differs: reference tensor.*, candidate None",
    ),
    "num_batches_tracked": (
        lambda net, x, y: (net.bn.num_batches_tracked.add_(1), y)[1],
        r"buffer bn\.num_batches_tracked after the call differs",
    ),
    "replaced buffer": (
        lambda net, x, y: (setattr(net.bn, "running_var", net.bn.running_var + 1), y)[1],
        r"buffer bn\.running_var after the call differs",
    ),
    "changed parameter": (
        lambda net, x, y: (net.bn.bias.data.mul_(2), y)[1],
        r"parameter bn\.bias after the call differs",
    ),
    "changed input": (lambda net, x, y: (x.data.add_(1), y)[1], "input 0 after the call differs"),
    "container": (lambda net, x, y: [y], "structure of output differs"),
    "None": (lambda net, x, y: None, "output differs"),
    "dtype": (lambda net, x, y: y.float(), "dtype of output differs"),
    "shape": (lambda net, x, y: y[None], "shape of output differs"),
    "layout": (lambda net, x, y: y.to_sparse(), "layout of output differs"),
    "random numbers": (lambda net, x, y: (torch.rand(1), y)[1], "random state of cpu after the call"),
    "Python's random numbers": (
        lambda net, x, y: (random.random(), y)[1],
        "random state of Python after the call",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("shared", [True, False])
def test_a_mistake_is_found_and_leaves_no_trace(x, mistake, message, shared):
    model = make().train()
    candidate = sharing(model, mistake) if shared else make(mistake).train()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = everything(model), everything(candidate), x.clone()
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(model, candidate, x)
    assert (everything(model), everything(candidate)) == before[:2]
    assert torch.equal(x, before[2])
    assert not x.requires_grad


def test_container_types_are_compared():
    x = torch.ones(2)
    for candidate in (lambda x: (x, x), lambda x: {"a": x, "b": x}, lambda x: [x], lambda x: [x, [x]]):
        with pytest.raises(AssertionError, match="structure of output differs"):
            assert_equivalent(lambda x: [x, x], candidate, x)
    for candidate in (lambda x: [x, 1], lambda x: [x, True], lambda x: [x, None], lambda x: [x, 1.1]):
        with pytest.raises(AssertionError, match=r"output\[1\] differs"):
            assert_equivalent(lambda x: [x, 1.0], candidate, x)


def test_a_changed_input_container_is_found(x):
    with pytest.raises(AssertionError, match="structure of input 0 after the call"):
        assert_equivalent(lambda batch: batch["x"], lambda batch: batch.pop("x"), {"x": x})


@pytest.mark.parametrize("register", ["register_parameter", "register_buffer"])
def test_a_missing_or_additional_name_is_named(x, register):
    model, candidate = make().train(), make().train()
    value = torch.zeros(4, dtype=torch.float64)
    value = nn.Parameter(value) if register == "register_parameter" else value
    getattr(model.bn, register)("mine", value)
    kind = "gradient of" if register == "register_parameter" else "buffer"
    with pytest.raises(AssertionError, match=rf"{kind} bn\.mine.*: the candidate has none"):
        assert_equivalent(model, candidate, x)
    with pytest.raises(AssertionError, match=rf"{kind} bn\.mine.*: the reference has none"):
        assert_equivalent(candidate, model, x)


def test_the_message_shows_the_worst_element():
    def candidate(x):
        return x + torch.tensor([[0.0, 0.25], [0.0, 1.0]])

    with pytest.raises(AssertionError) as error:
        assert_equivalent(lambda x: x + 0, candidate, torch.full((2, 2), 4.0))
    assert str(error.value) == (
        "output differs: worst absolute error 1, relative error 0.25, at (1, 1) reference 4.0, "
        "candidate 5.0; tolerance 0.000404 (atol 4e-06 + rtol 0.0001 * 4)"
    )
    assert_equivalent(lambda x: x + 0, candidate, torch.full((2, 2), 4.0), rtol=0.25)
    assert_equivalent(lambda x: x + 0, candidate, torch.full((2, 2), 4.0), rtol=0.0, atol=1.0)


# ---------------------------------------------------------------- errors


def half_way(net, x, y):
    net.bn.running_mean.zero_()
    net.eval()
    net.note = "gone astray"
    torch.rand(1)
    raise ZeroDivisionError("half-way")


def test_an_exception_must_be_matched_and_leaves_no_trace(x):
    model = make().train()
    broken = sharing(model, half_way)
    mistyped = sharing(model, lambda net, x, y: y + None)
    before = everything(model), everything(broken)
    with pytest.raises(AssertionError, match="reference returned, but the candidate raised ZeroDivision"):
        assert_equivalent(model, broken, x)
    with pytest.raises(AssertionError, match=r"reference raised ZeroDivisionError\('half-way'\), but"):
        assert_equivalent(broken, model, x)
    with pytest.raises(AssertionError, match="raised TypeError"):
        assert_equivalent(broken, mistyped, x)
    assert (everything(model), everything(broken)) == before
    assert not hasattr(broken, "note")


def test_an_exception_of_both_is_raised_on_if_they_left_the_same_behind(x):
    model = make().train()
    with pytest.raises(ZeroDivisionError):
        assert_equivalent(sharing(model, half_way), sharing(model, half_way), x)
    with pytest.raises(TypeError):  # not a pass: nothing has been compared
        assert_equivalent(model, model)

    def straight(net, x, y):
        raise ZeroDivisionError

    with pytest.raises(AssertionError, match=r"buffer bn\.running_mean after the call"):
        assert_equivalent(sharing(model, half_way), sharing(model, straight), x)


def test_an_exception_in_the_backward_pass_counts(x):
    def stale(net, x, y):
        y = y.exp()
        return y + y.detach().add_(1)  # exp wanted its result for the backward pass

    with pytest.raises(AssertionError, match="candidate raised RuntimeError"):
        assert_equivalent(make(), make(stale), x)


def test_an_interrupt_passes_and_leaves_no_trace(x):
    def interrupt(net, x, y):
        raise KeyboardInterrupt

    model = make().train()
    interrupted = sharing(model, interrupt)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        assert_equivalent(model, interrupted, x)
    assert everything(model) == before


def test_graphs_of_the_caller_stay_valid(x):
    model = make().train()
    model.bn.eval()  # saves its running statistics for the backward pass
    loss = model(x).sum()
    model.bn.train()
    assert_equivalent(model, model, x)
    loss.backward()


# ---------------------------------------------------------------- compare


def test_compare_measures_outputs_gradients_and_state(x):
    model = make().eval()
    measured = compare(model, sharing(model, lambda net, x, y: y * 1.5), x)
    assert isinstance(measured, Comparison)
    assert measured.outputs == {"output": pytest.approx(0.5)}
    assert set(measured.gradients) == {
        f"gradient of {name}" for name in ("input 0", "conv.weight", "conv.bias", "bn.weight", "bn.bias")
    }
    assert all(error == pytest.approx(0.5) for error in measured.gradients.values())
    assert set(measured.state.values()) == {0.0}
    assert "buffer bn.running_mean after the call" in measured.state


def test_compare_leaves_out_what_one_model_lacks(x):
    model, deployed = make().eval(), make().eval()
    deployed.bn = nn.Identity()
    measured = compare(model, deployed, x)
    assert measured.outputs["output"] > 0.1
    assert set(measured.gradients) == {f"gradient of {n}" for n in ("input 0", "conv.weight", "conv.bias")}


def test_compare_measures_infinity_and_raises_where_there_is_no_distance(x):
    assert compare(torch.zeros_like, torch.ones_like, x).outputs == {"output": float("inf")}
    with pytest.raises(AssertionError, match="shape of output"):
        compare(make(), make(lambda net, x, y: y[None]), x)
    with pytest.raises(ZeroDivisionError):
        compare(make(half_way), make(half_way), x)


# ---------------------------------------------------------------- randomize_batchnorms


def test_every_tensor_of_every_kind_of_batch_norm_becomes_non_trivial():
    model = nn.ModuleList(
        [
            nn.BatchNorm1d(64),
            nn.SyncBatchNorm(64),
            BatchNormAct2d(64),
            FrozenBatchNorm2d(64),
            nn.BatchNorm3d(64, track_running_stats=False),
            nn.BatchNorm2d(64, affine=False),
        ]
    )
    assert randomize_batchnorms(model) is model
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            assert tensor == 0
        else:
            assert tensor.unique().numel() == 64, name
        if name.endswith(("weight", "bias", "mean")):
            assert tensor.sign().unique().tolist() == [-1, 1], name
        if name.endswith("var"):
            assert (tensor >= 0.5).all(), name
    everything_else = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3))
    before = [parameter.clone() for parameter in everything_else.parameters()]
    randomize_batchnorms(everything_else)
    assert all(map(torch.equal, before, everything_else.parameters()))


def test_the_values_depend_on_the_seed_alone():
    def drawn(dtype, seed, ambient):
        torch.manual_seed(ambient)
        model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)).to(dtype)
        state = torch.get_rng_state()
        randomize_batchnorms(model, seed)
        assert torch.equal(state, torch.get_rng_state())
        return torch.cat([tensor.float() for tensor in model.state_dict().values() if tensor.ndim])

    torch.testing.assert_close(drawn(torch.float64, 3, 0), drawn(torch.float32, 3, 1))
    torch.testing.assert_close(drawn(torch.float64, 3, 0), drawn(torch.bfloat16, 3, 1), rtol=1e-2, atol=1e-2)
    assert not torch.isclose(drawn(torch.float32, 3, 0), drawn(torch.float32, 4, 0)).any()


def test_shared_modules_are_drawn_once():
    bn = nn.BatchNorm2d(4)
    randomize_batchnorms(nn.ModuleList([bn, bn]), seed=5)
    assert torch.equal(bn.weight, randomize_batchnorms(nn.BatchNorm2d(4), seed=5).weight)


def test_meta_and_fake_tensors_are_left_alone():
    randomize_batchnorms(nn.BatchNorm2d(4, device="meta"))
    with FakeTensorMode():
        model = nn.BatchNorm2d(4)
        randomize_batchnorms(model)
    randomize_batchnorms(model)


def test_a_deep_network_neither_explodes_nor_collapses():
    torch.manual_seed(0)
    model = randomize_batchnorms(resnet18()).eval()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert 1e-2 < (outputs[0] - outputs[1]).abs().max() < 1e4


def test_constants_of_a_traced_candidate_are_its_own_business():
    class Adds(nn.Module):
        def forward(self, x):
            return x + torch.arange(3, dtype=x.dtype)

    class AddsTraced(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.register_buffer("constant", torch.arange(3, dtype=torch.float64), persistent=persistent)

        def forward(self, x):
            return x + self.constant

    x = torch.randn(2, 3, dtype=torch.float64)
    assert_equivalent(Adds(), AddsTraced(persistent=False), x)
    with pytest.raises(AssertionError, match="buffer constant after the call: the reference has none"):
        assert_equivalent(Adds(), AddsTraced(persistent=True), x)


class Attention(nn.Module):
    """Its key bias moves all scores of a query alike, which a softmax does not see: the gradient is rounding alone."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        scores = self.queries(x) @ self.keys(x).transpose(-1, -2)
        return scores.softmax(-1) @ self.values(x)


class Recomputed(nn.Module):
    """The same function of the same parameters, its sums taken in another order."""

    def __init__(self, model, factor=1.0):
        super().__init__()
        self.queries, self.keys, self.values, self.factor = model.queries, model.keys, model.values, factor

    def forward(self, x):
        keys = (x @ (3 * self.keys.weight.T) + 3 * self.keys.bias) / 3 + (
            self.factor - 1
        ) * self.keys.bias.sin().detach()
        scores = (keys @ self.queries(x).transpose(-1, -2)).transpose(-1, -2)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return weights @ self.values(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_that_is_zero_but_for_rounding(dtype):
    torch.manual_seed(0)
    for _ in range(5):
        model = Attention().to(dtype)
        model.values.weight.data.mul_(1e-3)  # so that no other gradient of its module lends it a scale
        assert_equivalent(model, Recomputed(model), torch.randn(2, 5, 8, dtype=dtype))


def test_a_gradient_that_should_be_zero_and_is_not_is_found():
    class Wrong(Recomputed):
        def forward(self, x):
            return super().forward(x) + 1e-7 * (self.keys.bias.sum() - self.keys.bias.sum().detach())

    torch.manual_seed(0)
    model = Attention().double()
    with pytest.raises(AssertionError, match=r"gradient of keys.bias differs: .*per_module=True"):
        assert_equivalent(model, Wrong(model), torch.randn(2, 5, 8, dtype=torch.float64))


class Cache:
    """What language models return beside their outputs: an object that equals itself alone."""

    def __init__(self, keys, length):
        self.layers = [{"keys": keys}]
        self.length = length
        self.owner = self


class WithCache(nn.Module):
    def __init__(self, model, length=3, scale=1.0):
        super().__init__()
        self.model, self.length, self.scale = model, length, scale

    def forward(self, x):
        y = self.model(x)
        return y, Cache(self.scale * y.exp(), self.length)


def test_objects_without_equality_are_compared_by_attribute():
    model = nn.Linear(4, 4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_equivalent(WithCache(model), WithCache(model), x)
    with pytest.raises(AssertionError, match=r"output\[1\]\.length differs: reference 3, candidate 4"):
        assert_equivalent(WithCache(model), WithCache(model, 4), x)
    with pytest.raises(AssertionError, match=r"output\[1\]\.layers\[0\]\['keys'\] differs"):
        assert_equivalent(WithCache(model), WithCache(model, scale=2.0), x)


class Tokens(nn.Module):
    """The gradient of what it returns has the layout channels_last when it reaches the batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).flatten(2).transpose(1, 2)


class TokensRight(Tokens):
    """The same without PyTorch's batch norm."""

    def forward(self, x):
        norm = self.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        return (self.conv(x) * scale[:, None, None] + shift[:, None, None]).flatten(2).transpose(1, 2)


def test_a_fault_of_pytorch_is_told_from_one_of_the_candidate():
    model, right = randomize_batchnorms(Tokens().double().eval()), TokensRight().double().eval()
    right.load_state_dict(model.state_dict())
    assert_equivalent(model, right, torch.randn(2, 3, 4, 5, dtype=torch.float64))
    one = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(AssertionError, match="The reference is wrong, and the candidate is not"):
        assert_equivalent(model, right, one)
    right.norm.eps = 0.1
    with pytest.raises(AssertionError, match=r"^(?!.*The reference is wrong)"):
        assert_equivalent(model, right, one)
    assert not model.norm._forward_hooks
