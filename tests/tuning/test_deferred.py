"""What stands for a convolution's output: its shape, its gradients, and how long it keeps what it needs for them."""

import weakref

import pytest
import torch
from models import FUSED_NODE, Functional, Pair, data, prepared, tuned_with
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tree_parts import Swish

from convbn_fx.functional import native
from convbn_fx.operands import Convolution
from convbn_fx.testing import assert_equivalent
from convbn_fx.tuning import deferred as deferral
from convbn_fx.tuning.deferred import Pairing

X = data(2, 3, 6, 6)


class DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Tangent(torch.autograd.Function):
    """Knows forward-mode AD."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


class Unforeseen(Pair):
    """Does with the convolution's output, on a path that no exploration sees, what `reader` does."""

    def __init__(self, reader):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.reader = reader
        self.flag = False

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(x)
        if self.flag:
            return self.reader(self, y) + x.sum()
        return self.norm(y)


def both(reader):
    """A model and the same tuned, both on the path that was not foreseen."""
    torch.manual_seed(0)
    model = prepared(Unforeseen(reader))
    tuned = tuned_with(model, 1)
    model.flag = tuned.flag = True
    return model, tuned


@pytest.fixture(params=["in C++", "in Python"])
def made(request, monkeypatch):
    """What stands for an output is made in both ways, whichever there are."""
    if request.param == "in Python":
        monkeypatch.setattr(native, "calls", None)


READERS = {
    "function": lambda m, y: Swish.apply(y),
    "function, then the norm": lambda m, y: Swish.apply(y) + m.norm(y),
    "the norm of what a function returns": lambda m, y: m.norm(Swish.apply(y)),
    "vmap": lambda m, y: torch.vmap(lambda z: z * z.sum())(y),
    "in place, then a function": lambda m, y: Swish.apply(y.mul_(2)),
    "of a view": lambda m, y: Swish.apply(y[:, 1:]),
}


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("reader", READERS)
def test_gradients_of_gradients_past_python(reader):
    model, tuned = both(READERS[reader])
    parameters = [[*net.stem.parameters(), *net.conv.parameters()] for net in (model, tuned)]
    outcomes = []
    for net, wanted in zip((model, tuned), parameters, strict=True):
        x = X.clone().requires_grad_()
        gradients = torch.autograd.grad(net(x).sin().sum(), [x, *wanted], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, *wanted])
        outcomes.append([*gradients, *second])
    torch.testing.assert_close(*outcomes)


@pytest.mark.usefixtures("made")
def test_a_gradient_of_something_upstream_alone():
    model, tuned = both(READERS["function"])
    expected, actual = (torch.autograd.grad(net(X).sum(), net.stem.weight)[0] for net in (model, tuned))
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("made")
def test_hooks_on_a_parameter_are_called_once():
    model, tuned = both(READERS["function"])
    tuned.conv.weight.register_hook(lambda gradient: 2 * gradient)
    assert_equivalent(model, tuned, X)
    assert model.conv.weight is tuned.conv.weight


#: These raise where they are not computed.
IN_PLACE = {
    "function": lambda m, y: DoubleInPlace.apply(y),
    "function, then the norm": lambda m, y: m.norm(DoubleInPlace.apply(y)),
    "function, then a read": lambda m, y: (DoubleInPlace.apply(y), y.sin())[1],
    "after a function": lambda m, y: (Swish.apply(y), y.mul_(2))[0],
    "before a function": lambda m, y: (y.mul_(2), Swish.apply(y))[1],
    "of what a function returns": lambda m, y: Swish.apply(y).mul_(2) + y,
    "under vmap": lambda m, y: (torch.vmap(lambda z: z.mul_(2))(y), m.norm(y))[1],
}


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("change", IN_PLACE)
def test_changes_in_place_past_python_are_right_or_an_error(change):
    model, tuned = both(IN_PLACE[change])
    outcomes = []
    for net in (model, tuned):
        net.zero_grad()
        try:
            output = net(X)
            output.sin().sum().backward()
        except RuntimeError:
            outcomes.append(None)
        else:
            parameters = [*net.stem.parameters(), *net.conv.parameters()]
            outcomes.append([output.detach(), *(p.grad.clone() for p in parameters)])
    if None not in outcomes:
        torch.testing.assert_close(*outcomes)
    assert outcomes[1] is None or outcomes[0] is not None


@pytest.mark.usefixtures("made")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # PyTorch's own use
def test_forward_mode_past_python():
    model, tuned = both(lambda m, y: Tangent.apply(y))
    outcomes = [torch.func.jvp(net, (X,), (torch.ones_like(X),)) for net in (model, tuned)]
    torch.testing.assert_close(*outcomes)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_past_python_in_a_transform_is_right_or_an_error(transform):
    model, tuned = both(lambda m, y: torch.ops.aten.alias(y.as_subclass(torch.Tensor)).sin())
    x = X if transform is torch.func.grad else torch.stack([X, X])
    expected = transform(lambda x: model(x).sum())(x)
    try:
        actual = transform(lambda x: tuned(x).sum())(x)
    except RuntimeError:
        return
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("made")
def test_read_in_inference_mode_before_the_norm():
    def reader(m, y):
        with torch.inference_mode():
            float(y.mean())
        return m.norm(y)

    assert_equivalent(*both(reader), X)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("reader", ["function", "function, then the norm", "in place, then a function"])
def test_read_where_all_is_in_inference_mode(reader):
    model, tuned = both(READERS[reader])
    with torch.inference_mode():
        torch.testing.assert_close(tuned(X), model(X))


# --- What is known before it is computed -------------------------------------------------------------------------

METADATA = {
    "shape": lambda y: y.shape,
    "size": lambda y: y.size(),
    "a size": lambda y: y.size(dim=1),
    "ndim": lambda y: (y.ndim, y.dim(), y.ndimension()),
    "numel": lambda y: (y.numel(), y.nelement(), torch.numel(y)),
    "len": len,
    "dtype": lambda y: (y.dtype, y.is_floating_point(), torch.is_floating_point(y)),
    "device": lambda y: (y.device, y.is_cuda),
    "requires_grad": lambda y: y.requires_grad,
}


def convolved(m, x):
    return F.conv2d(x, m.weight, m.bias)


def one_norm(m, x):
    return m.norm(m.read(m.conv(x)))


def several_norms(m, x):
    y = m.read(m.conv(x))
    return m.norm(y) if x.sum() > 0 else m.other(y)


def functions(m, x):
    return m.normalize(m.read(convolved(m, x)))


class Reading(Functional):
    """Reads something of every convolution's output, foreseen or not."""

    def __init__(self, function, read):
        super().__init__(function, (4, 3, 3, 3), 4)
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.what, self.seen, self.reads = read, [], False

    def read(self, y):
        if self.reads:
            self.seen.append(self.what(y))
        return y


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("function", [one_norm, several_norms, functions], ids=lambda f: f.__name__)
@pytest.mark.parametrize("read", METADATA)
def test_metadata_never_computes_the_convolution(read, function, mode, monkeypatch):
    torch.manual_seed(0)
    model = prepared(Reading(function, METADATA[read]))
    tuned = tuned_with(model, 2 if function is several_norms else 1)
    model.reads = tuned.reads = True
    computed = []
    original = deferral.convolution
    monkeypatch.setattr(deferral, "convolution", lambda *args: computed.append(args) or original(*args))
    with mode():
        x = data(2, 3, 16, 16).abs()
        torch.testing.assert_close(tuned(x), model(x))
    assert tuned.seen == model.seen
    assert computed == []


@pytest.mark.parametrize("function", [one_norm, several_norms, functions], ids=lambda f: f.__name__)
def test_a_pair_whose_convolution_s_shape_is_read_is_fused(function):
    model = prepared(Reading(lambda m, x: function(m, x) * m.factor, lambda y: None))
    model.read = lambda y: (setattr(model, "factor", y.shape[-1] + y.size(1)), y)[1]
    tuned = tuned_with(model, 2 if function is several_norms else 1)
    assert_equivalent(model, tuned, X)


# --- One convolution a call --------------------------------------------------------------------------------------


def outcome(model, x):
    """The output, all gradients, and how many convolutions were computed, those of the operator included."""
    model.zero_grad()
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = model(x)
        output.sin().sum().backward()
    computed = sum(event.name == "aten::convolution" for event in profile.events())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return {"output": output, "input": x.grad, "convolutions": computed} | gradients


class Regions(Pair):
    """Its batch norm is called in a region of its own, perhaps one that no exploration has seen."""

    def __init__(self, inner, foreseen):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1))
        self.inner, self.foreseen = inner, foreseen
        self.conv2 = nn.Conv2d(4, 4, 3)

    def activated(self, y):
        return self.norm(y).relu()

    def forward(self, x):
        y = self.conv(x)
        return self.conv2(self.inner(self.activated, y) if self.foreseen else self.activated(y))


class Around(nn.Module):
    """Calls a model in a region."""

    def __init__(self, outer, model):
        super().__init__()
        self.outer, self.model = outer, model

    def forward(self, x):
        return self.outer(self.model, x)


def called(function, y):
    return function(y)


def checkpointed(function, y):
    return checkpoint(function, y, use_reentrant=False)


def reentrant(function, y):
    return checkpoint(function, y, use_reentrant=True)


def offloaded(function, y):
    with torch.autograd.graph.save_on_cpu():
        return function(y)


def lower_precision(function, y):
    with torch.autocast("cpu", torch.bfloat16):
        return function(y)


def without_gradients(function, y):
    with torch.no_grad():
        return function(y)


def regions(*names):
    return pytest.mark.parametrize(names[0], names[1:], ids=lambda region: region.__name__)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("foreseen", [True, False])
@regions("outer", called, checkpointed, reentrant)
@regions("inner", checkpointed, reentrant, offloaded, lower_precision, without_gradients)
# A reentrant checkpoint runs without gradients, and one in it says so.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_a_batch_norm_in_a_region_of_its_own(inner, outer, foreseen):
    model = prepared(Regions(inner, foreseen), torch.float32)
    tuned = tuned_with(model, 0 if foreseen else 1)
    model.foreseen = tuned.foreseen = True
    expected, actual = (outcome(Around(outer, net), X) for net in (model, tuned))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@regions("outer", called, checkpointed, reentrant, offloaded, lower_precision)
def test_a_pair_in_one_region(outer, monkeypatch):
    model = prepared(Regions(called, foreseen=True), torch.float32)
    tuned = tuned_with(model, 1)
    expected, actual = (outcome(Around(outer, net), X) for net in (model, tuned))
    tolerance = 3e-2 if outer is lower_precision else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    computed = []
    original = deferral.convolution
    monkeypatch.setattr(deferral, "convolution", lambda *args: computed.append(args) or original(*args))
    Around(outer, tuned)(X.float().requires_grad_()).sum().backward()
    assert computed == []  # the convolution's own output


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_past_python_is_one_convolution(reader):
    model, tuned = both(READERS[reader])
    expected, actual = (outcome(net, X) for net in (model, tuned))
    torch.testing.assert_close(actual, expected)


def test_half_precision_and_gradients_past_python():
    model, tuned = both(READERS["function"])
    model.bfloat16(), tuned.bfloat16()
    assert_equivalent(model, tuned, X.bfloat16(), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("made")
def test_an_error_in_the_gradients_is_the_caller_s():
    _, tuned = both(lambda m, y: Swish.apply(y))
    output = tuned(X)
    with torch.no_grad():
        tuned.conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()


def test_what_takes_its_memory_raises():
    if native.calls is None:
        pytest.skip("the operator is not built: make setup")
    conv = Convolution("conv2d", torch.ones(4, 3, 3, 3))
    x = X.float().requires_grad_()
    output = native.calls.stand_in(None, x, conv)
    with pytest.raises(RuntimeError, match="data"):
        output.data_ptr()
    with pytest.raises(TypeError, match="3 arguments"):
        native.calls.stand_in(None)
    with pytest.raises(TypeError, match="expected a tensor, got int"):
        native.calls.stand_in(None, 1, conv)
    with pytest.raises(TypeError, match="expected numbers, got str"):
        native.calls.stand_in(None, x, conv._replace(padding="same"))
    with pytest.raises(TypeError, match="9 operands"):
        native.calls.stand_in(None, x, conv[1:])


SIZES = {
    "1d": (Convolution("conv1d", torch.ones(4, 3, 3), stride=(2,), padding=(1,)), (2, 3, 6)),
    "a list": (Convolution("conv2d", torch.ones(4, 3, 3, 2), stride=[2, 1], padding=[1, 0]), (2, 3, 6, 7)),
    "3d": (Convolution("conv3d", torch.ones(6, 1, 3, 1, 2), dilation=2, groups=3), (1, 3, 6, 7, 8)),
    "transposed": (
        Convolution("conv_transpose2d", torch.ones(6, 2, 3, 3), None, 3, 1, 2, True, (1, 2), 3),
        (2, 6, 5, 4),
    ),
    "linear": (Convolution("linear", torch.ones(4, 3)), (2, 3)),
    "channels differ": (Convolution("conv2d", torch.ones(4, 2, 3, 3)), (2, 3, 6, 6)),
    "channels of a transposed one differ": (
        Convolution("conv_transpose2d", torch.ones(4, 2, 3, 3), transposed=True),
        (2, 3, 6, 6),
    ),
    "ranks differ": (Convolution("conv2d", torch.ones(4, 3, 3, 3)), (3, 6, 6)),
    "dtypes differ": (Convolution("conv2d", torch.ones(4, 3, 3, 3).double()), (2, 3, 6, 6)),
    "the bias's dtype differs": (
        Convolution("conv2d", torch.ones(4, 3, 3, 3), torch.ones(4).double()),
        (2, 3, 6, 6),
    ),
    "nothing in the batch": (Convolution("conv2d", torch.ones(4, 3, 3, 3)), (0, 3, 6, 6)),
    "the kernel is larger": (Convolution("conv2d", torch.ones(4, 3, 3, 3), stride=2), (1, 3, 2, 6)),
    "the kernel is larger by one": (Convolution("conv2d", torch.ones(4, 3, 3, 3)), (1, 3, 2, 6)),
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_stand_in_has_the_sizes_of_the_output(sizes, trains, monkeypatch):
    conv, shape = SIZES[sizes]
    x = torch.ones(shape, requires_grad=trains)
    try:
        expected = deferral.convolution(conv, x).shape
    except RuntimeError:
        expected = None
    for _ in ("in C++", "in Python"):
        with monkeypatch.context() as patch:
            patch.setattr(deferral, "convolution", lambda *_: None)
            made = deferral.defer(x, conv, Pairing(), deferral._surroundings())
        is_smaller = expected is not None and expected.numel() < x.numel()
        waits = (
            expected is not None
            and 0 not in expected
            and (trains or not is_smaller)
            and x.ndim == conv.weight.ndim
        )
        assert (None if made is None else made.shape) == (expected if waits else None)
        assert not waits or made.requires_grad == trains
        monkeypatch.setattr(native, "calls", None)


# --- How long it lives -------------------------------------------------------------------------------------------


def nodes_behind(tensor):
    """The names of all nodes of a tensor's history."""
    seen, pending = set(), [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def test_nothing_of_the_stand_in_is_in_the_history_of_a_pair():
    tuned = tuned_with(prepared(Pair()), 1)
    assert nodes_behind(tuned(X)) == {FUSED_NODE, "torch::autograd::AccumulateGrad"}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_name_that_keeps_an_output_keeps_no_larger_input(frozen):
    alive = []

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2)
            self.conv2, self.norm2 = nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            x = x.sin()
            input = weakref.ref(x)
            y = self.conv(x)
            del x
            z = self.norm(y)
            w = self.conv2(z)
            alive.append(input() is not None)
            return self.norm2(w)

    model = prepared(Named()).requires_grad_(not frozen)
    x = data(2, 8, 6, 6)
    tuned = tuned_with(model, 2)
    alive.clear()
    with torch.set_grad_enabled(frozen):
        torch.testing.assert_close(tuned(x), model(x))
    assert alive == [False] * 2
