"""What is a node: the rules for leaves, what is opened, and what tracing leaves behind."""

from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from functools import partial

import pytest
import torch
from models import ConvNormAct, Net, Pair, data, fused, prepared, reasons
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import convbn_fx
from convbn_fx import TracingError, symbolic_trace
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


def modules_called(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


# --- Leaves -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Reads its mode and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0).view_as(x)


LEAVES = {
    "dropout": lambda: nn.Dropout(0.5),
    "stochastic depth": lambda: pytest.importorskip("torchvision.ops").StochasticDepth(0.5, "row"),
    "drop path": lambda: pytest.importorskip("timm.layers").DropPath(0.5),
    "squeeze and excitation": lambda: pytest.importorskip("torchvision.ops").SqueezeExcitation(4, 2),
    "attention": Attention,
    "mlp": lambda: pytest.importorskip("timm.layers").Mlp(6, 6),
    "activation": nn.RReLU,
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(0.5)),
    "a container": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Dropout(0.5), nn.ReLU())),
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_modules_without_batch_norm_follow_their_own_mode(leaf):
    model = prepared(
        nn.Sequential(OrderedDict(pair=Pair(nn.Conv2d(3, 4, 3, padding=1)), leaf=LEAVES[leaf]()))
    )
    graph_module = fused(model)
    assert modules_called(graph_module) == ["leaf"]
    assert_equivalent(model, graph_module, X)
    model.train()
    assert_equivalent(model, graph_module, X)
    model.pair.eval()
    assert_equivalent(model, graph_module, X)


def test_batch_norms_and_convolutions_are_nodes():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1), nn.SyncBatchNorm(4)
    )
    assert modules_called(symbolic_trace(model)) == ["0", "1", "2", "3"]
    assert modules_called(symbolic_trace(Net())) == [
        "stem.conv",
        "stem.norm",
        "stem.act",
        "block.first.conv",
        "block.first.norm",
        "block.first.act",
        "block.second.conv",
        "block.second.norm",
        "block.second.act",
        "dropout",
        "head",
    ]


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_convolutions_are_leaves(change):
    model = Pair()
    change(model.conv)
    prepared(model)
    assert modules_called(symbolic_trace(model)) == ["conv", "norm"]
    assert_equivalent(model, fused(model), X)


def test_containers_with_hooks_are_leaves():
    model = prepared(nn.Sequential(ConvNormAct(3, 4), ConvNormAct(4, 4)))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert modules_called(symbolic_trace(model)) == ["0.conv", "0.norm", "0.act", "1"]
    graph_module = fused(model)
    assert reasons(graph_module) == {"1.norm": "INSIDE_LEAF_MODULE"}
    assert_equivalent(model, graph_module, X)


@pytest.mark.parametrize(
    "root", [nn.Conv2d(3, 4, 3), nn.Linear(6, 2), nn.ReLU(), nn.Sequential(), ConvNormAct(3, 4)]
)
def test_any_module_may_be_the_root(root):
    prepared(root)
    assert_equivalent(root, fused(root, int(isinstance(root, ConvNormAct))), X)


def test_a_batch_norm_as_the_root_looks_at_ranks():
    with pytest.raises(TracingError, match=r"^BatchNorm2d cannot be traced"):
        symbolic_trace(nn.BatchNorm2d(3))


# --- A pair that crosses a module's border ------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Holds a convolution and no batch norm."""

    def __init__(self, function=lambda conv, x: conv(x)):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.conv, x)


def pad(conv, x):
    return conv(F.pad(x, (1, 0, 1, 0)))


@pytest.mark.parametrize("function", [lambda conv, x: conv(x), pad], ids=["plain", "pads"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_wrapped_convolution_is_opened(function, depth):
    wrapped = Wrapper(function)
    for _ in range(depth):
        wrapped = nn.Sequential(nn.Identity(), wrapped)
    model = prepared(Pair(wrapped))
    graph_module = fused(model)
    assert not any("function" in name for name in modules_called(graph_module))
    assert_equivalent(model, graph_module, X)


def test_only_what_feeds_a_batch_norm_is_opened():
    model = prepared(
        nn.Sequential(
            OrderedDict(first=Wrapper(), norm=nn.BatchNorm2d(4), last=nn.Sequential(nn.Conv2d(4, 2, 1)))
        )
    )
    graph_module = fused(model)
    assert modules_called(graph_module) == ["last"]
    assert_equivalent(model, graph_module, X)


def test_a_wrapper_before_two_batch_norms():
    model = prepared(Pair(Wrapper(), forward=lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x.sin()))))
    assert_equivalent(model, fused(model, 2), X)


def test_a_wrapper_that_cannot_be_traced_stays_a_leaf():
    model = prepared(Pair(Wrapper(lambda conv, x: conv(x if x.sum() > 0 else -x))))
    graph_module = fused(model, 0)
    assert modules_called(graph_module) == ["conv", "norm"]
    assert reasons(graph_module) == {"norm": "NOT_AFTER_CONVOLUTION"}
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


def test_a_part_of_a_wrapper_that_cannot_be_traced():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    wrapped = nn.Sequential(OrderedDict(gate=Gate(), wrapper=Wrapper()))
    model = prepared(Pair(wrapped))
    graph_module = fused(model)
    assert modules_called(graph_module) == ["conv.gate"]
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


def test_one_of_two_wrappers_cannot_be_traced():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Pair(Wrapper(lambda conv, x: conv(x if x.sum() > 0 else -x)))
            self.second = Pair(Wrapper())

        def forward(self, x):
            return self.first(x) + self.second(x)

    model = prepared(Two())
    graph_module = fused(model, 1)
    assert reasons(graph_module) == {"first.norm": "NOT_AFTER_CONVOLUTION"}
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


def test_a_wrapper_with_hooks_stays_a_leaf():
    model = prepared(Pair(Wrapper()))
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    graph_module = fused(model, 0)
    assert modules_called(graph_module) == ["conv", "norm"]
    assert_equivalent(model, graph_module, X)


def test_dropout_inside_a_wrapper_stays_a_module():
    model = prepared(Pair(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3))))
    graph_module = fused(model)
    assert modules_called(graph_module) == ["conv.0"]
    model.conv.train()
    assert_equivalent(model, graph_module, X)


# --- What is read when ---------------------------------------------------------------------------------------------


def test_buffers_are_read_at_every_call():
    model = prepared(Pair(forward=lambda m, x: m.norm(m.conv(x * m.scale))))
    model.register_buffer("scale", torch.ones(1, dtype=torch.float64))
    graph_module = fused(model)
    before = graph_module(X)
    model.scale.mul_(2)
    assert not torch.allclose(graph_module(X), before)
    assert_equivalent(model, graph_module, X)
    graph_module.load_state_dict(model.state_dict() | {"scale": torch.full((1,), 3.0)})
    assert_equivalent(model, graph_module, X)


def test_buffers_changed_in_forward_are_changed_at_every_call():
    def forward(m, x):
        m.calls.add_(1)
        return m.norm(m.conv(x)) * m.calls

    model = Pair(forward=forward)
    model.register_buffer("calls", torch.zeros((), dtype=torch.float64))
    prepared(model)
    graph_module = fused(model)
    assert model.calls == 0
    assert_equivalent(model, graph_module, X)
    graph_module(X)
    assert model.calls == 1


def test_parameters_replaced_on_the_original_are_seen_where_modules_are_shared():
    model = prepared(nn.Sequential(Pair(forward=lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum())))
    graph_module = fused(model)
    model[0].conv.weight = nn.Parameter(model[0].conv.weight.detach() * 2)
    assert_equivalent(model, graph_module, X)


def adds_up(m, x):
    total = torch.zeros(4, 1, 1, dtype=X.dtype)
    total += x.mean()
    return m.norm(m.conv(x)) + total


def adds_up_in_an_operation(m, x):
    total = torch.zeros((), dtype=X.dtype)
    torch.add(total, x.mean(), out=total)
    return m.norm(m.conv(x)) + total


def counts_in_an_attribute(m, x):
    m.calls.add_(1)
    return m.norm(m.conv(x)) * m.calls


@pytest.mark.parametrize("forward", [adds_up, adds_up_in_an_operation, counts_in_an_attribute])
def test_writing_to_what_a_graph_keeps(forward):
    model = prepared(Pair(forward=forward))
    model.calls = torch.zeros((), dtype=X.dtype)
    with pytest.raises(TracingError, match="writes to a tensor that is no buffer"):
        symbolic_trace(model)
    assert model.calls == 0


def test_writing_to_what_the_forward_makes():
    def forward(m, x):
        scale = torch.zeros(4, 1, 1, dtype=X.dtype)
        scale[1:] = 2.0
        return m.norm(m.conv(x)) * scale.mul_(3)

    model = prepared(Pair(forward=forward))
    assert_equivalent(model, fused(model), X)


@pytest.mark.parametrize("changed", ["input", "alias"])
def test_augmented_assignment(changed):
    def forward(m, x):
        z = m.norm(m.conv(x))
        alias = x if changed == "input" else z.flatten()
        if changed == "input":
            x += 1
        else:
            z *= 2
        return z, alias

    model = prepared(Pair(forward=forward)).requires_grad_(False)
    graph_module = fused(model)
    with torch.no_grad():
        assert_equivalent(model, graph_module, X)


# --- What stays behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "container",
    [
        list,
        dict,
        set,
        OrderedDict,
        Counter,
        partial(defaultdict, int),
        deque,
    ],
    ids=str,
)
def test_what_a_forward_stores_on_its_module_is_gone(container):
    def forward(m, x):
        if isinstance(m.stored, dict):
            m.stored["key"] = x
        elif isinstance(m.stored, set):
            m.stored.add(x)
        else:
            m.stored.append(x)
        return m.norm(m.conv(x))

    model = prepared(Pair(forward=forward))
    model.stored = container()
    stored = model.stored
    symbolic_trace(model)
    assert model.stored is stored
    assert not stored


class Config(UserDict):
    """As OmegaConf's in struct mode: no key may go."""

    def __delitem__(self, key):
        raise TypeError("struct mode")


@pytest.mark.parametrize("inner", [False, True])
def test_containers_that_cannot_be_emptied(inner):
    model = prepared(nn.Sequential(Pair()))
    holder = model[0] if inner else model
    holder.config = Config(depth=3)
    config = holder.config
    graph_module = fused(model)
    assert holder.config is config
    assert config == {"depth": 3}
    assert_equivalent(model, graph_module, X)


def test_features_kept_as_attributes_are_no_proxies_afterwards():
    def forward(m, x):
        m.features = m.conv(x)
        return m.norm(m.features)

    model = prepared(Pair(forward=forward))
    model(X)
    features = model.features
    graph_module = fused(model)
    assert model.features is features
    torch.testing.assert_close(graph_module(X), model(X))


def test_an_instance_with_a_forward_of_its_own():
    model = prepared(Pair())
    model.forward = lambda x: x
    with pytest.raises(TracingError, match=r"(?s)^Pair cannot be traced.*forward"):
        symbolic_trace(model)
    inner = prepared(nn.Sequential(model))
    graph_module = fused(inner, 0)
    assert_equivalent(inner, graph_module, X)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_innermost_module_at_fault_is_named(depth):
    def fail(m, x):
        raise KeyError("a mistake in the model")

    model = Pair(forward=fail)
    for _ in range(depth):
        model = nn.Sequential(nn.Identity(), model)
    prepared(model)
    with pytest.raises(TracingError, match="KeyError: 'a mistake in the model'") as raised:
        symbolic_trace(model)
    assert raised.value.module == (".".join(["1"] * depth) or None)
    assert isinstance(raised.value.__cause__, KeyError)


def test_the_patches_of_torch_fx_are_undone_after_an_error():
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(TracingError):
        symbolic_trace(Pair(forward=lambda m, x: x.no_such_method() if x else x))
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattribute
    model = prepared(Pair())
    assert_equivalent(model, fused(model), X)


def test_the_tracer_works_with_the_machinery_of_torch_fx():
    model = prepared(Net())
    graph = convbn_fx.fx.tracing.Tracer().trace(model)
    graph_module = fused(torch.fx.GraphModule(model, graph), 3, trace=lambda captured: captured)
    torch.testing.assert_close(graph_module(X), model(X))


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile"])
def test_sub_modules_with_names_that_a_graph_module_has_itself(name):
    model = prepared(nn.Sequential(OrderedDict({name: Pair()})))
    try:
        graph_module = fused(model)
        assert_equivalent(model, graph_module, X)
    except TracingError as error:
        assert name in str(error)  # noqa: PT017 - either is right


def test_an_attribute_called_meta():
    model = prepared(Pair())
    model.meta = "data"
    assert_equivalent(model, fused(model), X)


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: nn.ReLU()(m.norm(m.conv(x))), lambda m, x: m.hidden[0](x)],
    ids=["made in forward", "in a list"],
)
def test_modules_that_are_not_registered(forward):
    model = prepared(Pair(forward=forward))
    model.hidden = [nn.ReLU()]
    with pytest.raises(TracingError, match="not installed as a submodule"):
        symbolic_trace(model)


def test_functions_wrapped_for_torch_fx_stay_calls():
    model = prepared(Pair(forward=lambda m, x: clip(m.norm(m.conv(x)))))
    graph_module = fused(model)
    assert clip in {node.target for node in graph_module.graph.nodes}
    assert_equivalent(model, graph_module, X)


@torch.fx.wrap
def clip(x):
    return x.clamp(max=float(x.detach().mean()))


class Called(nn.Conv2d):
    """A convolution that does more than its forward when it is called."""

    def __call__(self, input):
        return super().__call__(input + 1) * 2


class CalledContainer(nn.Sequential):
    def __call__(self, input):
        return super().__call__(input.sin()) + 1


@pytest.mark.parametrize(
    "change", [lambda module: None, parametrizations.weight_norm], ids=["plain", "weight norm"]
)
def test_a_class_with_a_call_of_its_own(change):
    conv = Called(3, 4, 3)
    leaf = CalledContainer(nn.Conv2d(3, 3, 1), nn.Dropout())
    model = prepared(nn.Sequential(OrderedDict(leaf=leaf, opened=CalledContainer(Pair(conv)))))
    change(conv)
    assert modules_called(symbolic_trace(model))[0] == "leaf"
    assert_equivalent(model, fused(model, 0), X)
    assert_equivalent(model, convbn_fx.tune(model), X)
    assert_equivalent(model, convbn_fx.deploy(model), X)


def test_a_root_whose_class_has_a_call_of_its_own():
    with pytest.raises(TracingError, match=r"CalledContainer cannot be traced(?s:.*)__call__"):
        symbolic_trace(prepared(CalledContainer(Pair())))


ASKING = {
    "isinstance": lambda m, x: m.norm(m.conv(x)) if isinstance(x, torch.Tensor) else x,
    "not isinstance": lambda m, x: None if not isinstance(x, torch.Tensor) else m.norm(m.conv(x)),
    "several classes": lambda m, x: m.norm(m.conv(x)) if isinstance(x, (torch.Tensor, str)) else x,
    "is_tensor": lambda m, x: m.norm(m.conv(x)) if torch.is_tensor(x) else x,
    "a list": lambda m, x: x if isinstance(x, list) else m.norm(m.conv(x)),
    "an output": lambda m, x: m.norm(y) if isinstance(y := m.conv(x), torch.Tensor) else y,
    "a size": lambda m, x: m.norm(m.conv(x)) * (0 if isinstance(x.shape[0], torch.Tensor) else x.size(1)),
    "what is computed": lambda m, x: m.norm(m.conv(y if isinstance(y := x.sin(), torch.Tensor) else x)),
    "a parameter": lambda m, x: m.norm(m.conv(x)) * isinstance(m.conv.weight, torch.Tensor),
}


@pytest.mark.parametrize("asking", ASKING)
def test_a_forward_that_asks_for_classes(asking):
    model = prepared(Pair(forward=ASKING[asking]))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    with pytest.raises((AssertionError, TypeError, AttributeError)):
        graph_module([X])


def test_an_argument_that_is_asked_for_its_class_is_what_it_is_if_left_out():
    class Scaled(Pair):
        def forward(self, x, mode=None, scale="large"):
            y = self.norm(self.conv(x))
            return y * (2 if isinstance(mode, str) else 1) * (3 if isinstance(scale, str) else 1)

    model = prepared(Scaled())
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X)
    for options in ({"mode": "other"}, {"scale": None}):
        with pytest.raises(AssertionError, match="which it was taken for when the model was traced"):
            graph_module(X, **options)


def test_a_parameter_that_its_class_computes_is_no_node():
    class Doubled(nn.Conv2d):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return 2 * value if name == "weight" else value

    model = prepared(
        Pair(Doubled(3, 3, 1), nn.BatchNorm2d(3), lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum())
    )
    with pytest.raises(TracingError, match=r"reads conv\.weight, which Doubled computes"):
        symbolic_trace(model)
