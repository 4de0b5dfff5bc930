"""Everything that PyTorch offers around a model works on the result."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from models import KINDS, LAYOUTS, NET_PAIRS, Pair, data, fused, fused_nodes, net, prepared
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

# torch's own rules of forward-mode differentiation are scripted
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

ALL_KINDS = KINDS | {
    name: LAYOUTS[name]
    for name in (
        "grouped2d",
        "depthwise1d",
        "grouped_transpose2d",
        "depthwise_transpose1d",
        "strided_transpose",
        "heavy",
        "heavy_transpose",
        "heavy_linear",
    )
}
X = data(2, 3, 6, 6)


@pytest.fixture(params=ALL_KINDS)
def layer(request):
    return ALL_KINDS[request.param]


def as_function(model):
    """The model as a function of its input and all its parameters."""
    names = [name for name, _ in model.named_parameters()]
    return lambda x, *values: functional_call(model, dict(zip(names, values, strict=True)), (x,))


def leaves(model, x):
    return [
        x.detach().clone().requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in model.parameters()),
    ]


# --- Autograd -----------------------------------------------------------------------------------------------------


def test_gradcheck(layer):
    model = layer.model()
    graph_module = fused(model)
    assert torch.autograd.gradcheck(as_function(graph_module), leaves(model, layer.input()), fast_mode=True)


def test_gradcheck_of_forward_mode(layer):
    model = layer.model()
    graph_module = fused(model)
    assert torch.autograd.gradcheck(
        as_function(graph_module),
        leaves(model, layer.input()),
        fast_mode=True,
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
    )


def test_gradgradcheck(layer):
    model = layer.model()
    graph_module = fused(model)
    assert torch.autograd.gradgradcheck(
        as_function(graph_module), leaves(model, layer.input()), fast_mode=True
    )


@pytest.mark.parametrize("frozen", ["conv", "norm", "input"])
def test_double_backward_with_a_part_frozen(layer, frozen):
    def second(net, x):
        x = x.clone().requires_grad_(frozen != "input")
        sources = [p for p in (x, *net.parameters()) if p.requires_grad]
        first = torch.autograd.grad(net(x).sin().sum(), sources, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), sources, allow_unused=True)

    model = layer.model()
    graph_module = fused(model)
    if frozen != "input":
        model.get_submodule(frozen).requires_grad_(False)
    torch.testing.assert_close(second(graph_module, layer.input()), second(model, layer.input()))


def test_a_graph_used_twice(layer):
    model = layer.model()
    graph_module = fused(model)

    def twice(net):
        net.zero_grad()
        output = net(layer.input()).sin().sum()
        output.backward(retain_graph=True)
        output.backward()
        return [p.grad for p in net.parameters()]

    expected = [gradient.clone() for gradient in twice(model)]
    torch.testing.assert_close(twice(graph_module), expected)


@pytest.mark.parametrize("frozen", ["gamma", "nothing"])
def test_batched_gradients(layer, frozen):
    """`is_grads_batched` runs the backward pass under the older vmap."""
    model = layer.model()
    graph_module = fused(model)
    model.norm.weight.requires_grad_(frozen != "gamma")
    x = layer.input().requires_grad_()
    sources = [x, *(p for p in model.parameters() if p.requires_grad)]
    cotangents = data(3, *model(x).shape, seed=5)
    expected, actual = (
        torch.autograd.grad(candidate(x), sources, cotangents, is_grads_batched=True)
        for candidate in (model, graph_module)
    )
    torch.testing.assert_close(actual, expected)


def test_forward_mode(layer):
    model = layer.model()
    graph_module = fused(model)
    x, tangent = layer.input(), layer.input(seed=1)
    parameter_tangents = {name: data(*p.shape, seed=2) for name, p in model.named_parameters()}

    def derivative(net):
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(p.detach(), parameter_tangents[name])
                for name, p in net.named_parameters()
            }
            output = functional_call(net, duals, (forward_ad.make_dual(x, tangent),))
            return forward_ad.unpack_dual(output)

    torch.testing.assert_close(tuple(derivative(graph_module)), tuple(derivative(model)))


def test_vjp_of_jvp_and_the_other_way_round():
    model = KINDS["conv2d"].model()
    graph_module = fused(model)
    x, tangent = KINDS["conv2d"].input(), KINDS["conv2d"].input(seed=1)

    def both(net):
        return (
            vjp(lambda x: jvp(net, (x.sin(),), (tangent,))[1], x)[1](torch.ones_like(model(x))),
            jvp(grad(lambda x: net(x).sin().sum()), (x,), (tangent,)),
        )

    torch.testing.assert_close(both(graph_module), both(model))


AUTOGRAD_FUNCTIONAL = {
    "jacobian": torch.autograd.functional.jacobian,
    "forward jacobian": lambda net, x: torch.autograd.functional.jacobian(
        net, x, vectorize=True, strategy="forward-mode"
    ),
    "vectorized jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x, vectorize=True),
    "hessian": lambda net, x: torch.autograd.functional.hessian(lambda x: net(x).sin().sum(), x),
    "vectorized hessian": lambda net, x: torch.autograd.functional.hessian(
        lambda x: net(x).sin().sum(), x, vectorize=True
    ),
    "hvp": lambda net, x: torch.autograd.functional.hvp(lambda x: net(x).sin().sum(), x, torch.ones_like(x)),
    "jvp": lambda net, x: torch.autograd.functional.jvp(net, x, torch.ones_like(x)),
}


@pytest.mark.parametrize("compute", AUTOGRAD_FUNCTIONAL)
def test_autograd_functional(compute):
    model = KINDS["conv1d"].model()
    graph_module = fused(model)
    x = KINDS["conv1d"].input()[:1, :, :4]
    compute = AUTOGRAD_FUNCTIONAL[compute]
    torch.testing.assert_close(compute(graph_module, x), compute(model, x))


@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled:UserWarning"
)  # it warns that it is slow
def test_anomaly_mode(layer):
    model = layer.model()
    graph_module = fused(model)
    with torch.autograd.detect_anomaly():
        assert_equivalent(model, graph_module, layer.input())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(layer, context):
    model = layer.model()
    graph_module = fused(model)
    with context():
        assert_equivalent(model, graph_module, layer.input())
        output = graph_module(layer.input())
        assert not output.requires_grad
        assert output.is_inference() == (context is torch.inference_mode)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = prepared(Pair())
        graph_module = fused(model)
        assert_equivalent(model, graph_module, X)
    for candidate in (model, graph_module):
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
            candidate(X).sum().backward()


def test_saved_tensors_hooks(layer):
    model = layer.model()
    graph_module = fused(model)
    kept = []

    def pack(tensor):
        kept.append(tensor.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: kept[index]):
        assert_equivalent(model, graph_module, layer.input())
    with torch.autograd.graph.save_on_cpu():
        assert_equivalent(model, graph_module, layer.input())
    assert kept


def test_gradients_are_accumulated():
    model = net()
    graph_module = fused(model, NET_PAIRS)
    found = []
    for candidate in (model, graph_module):
        candidate.zero_grad(set_to_none=False)
        for seed in range(3):
            candidate(data(2, 3, 6, 6, seed=seed)).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0])


# --- Layouts and sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True], ids=["input", "input and weights"])
@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose2d", "depthwise2d", "grouped_transpose2d"])
def test_channels_last(kind, weights):
    layer = (KINDS | LAYOUTS)[kind]
    model = layer.model()
    graph_module = fused(model)
    if weights:
        graph_module.to(memory_format=torch.channels_last)
    x = layer.input().to(memory_format=torch.channels_last)
    assert_equivalent(model, graph_module, x)
    assert graph_module(x).stride() == model(x).stride()
    with torch.no_grad():
        assert graph_module(x).stride() == model(x).stride()


def test_strides_of_gradients(layer):
    model = layer.model()
    graph_module = fused(model)
    for parameter in model.parameters():
        model.zero_grad()
        graph_module(layer.input()).sum().backward()
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("view", ["transposed", "expanded", "strided", "offset"])
def test_inputs_that_are_not_contiguous(view):
    model = KINDS["conv2d"].model()
    graph_module = fused(model)
    x = {
        "transposed": data(2, 2, 5, 4).transpose(2, 3),
        "expanded": data(1, 2, 4, 5).expand(3, -1, -1, -1),
        "strided": data(2, 2, 8, 10)[..., ::2, ::2],
        "offset": data(2, 4, 4, 5)[:, 1:3],
    }[view]
    assert_equivalent(model, graph_module, x)


def test_an_empty_batch(layer):
    model = layer.model()
    graph_module = fused(model)
    assert_equivalent(model, graph_module, layer.input()[:0])
    with torch.no_grad():
        assert_equivalent(model, graph_module, layer.input()[:0])


# --- Checkpointing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(layer, use_reentrant):
    model = layer.model()
    graph_module = fused(model)

    def gradients(run):
        model.zero_grad()
        x = layer.input().requires_grad_()
        run(x).sin().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters())]

    expected = gradients(model)
    actual = gradients(lambda x: checkpoint(graph_module, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(actual, expected)


def test_checkpoint_saves_no_more_than_its_input():
    graph_module = fused(net(), NET_PAIRS)
    wrapped = Pair(forward=lambda m, x: checkpoint(graph_module, x, use_reentrant=False))
    assert saved_bytes(wrapped, X) <= X.nbytes


def test_checkpoint_sequential():
    torch.manual_seed(0)
    model = prepared(
        nn.Sequential(*[Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(4)])
    )
    parts = nn.Sequential(*[fused(part) for part in model])
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])
    output = checkpoint_sequential(parts, 2, x, use_reentrant=False)
    actual = torch.autograd.grad(output.sin().sum(), [x, *model.parameters()])
    torch.testing.assert_close(actual, expected)


# --- torch.func ---------------------------------------------------------------------------------------------------


def test_functional_call_with_other_tensors(layer):
    model = layer.model()
    graph_module = fused(model)
    tensors = {
        name: data(*value.shape, seed=4).abs() for name, value in model.state_dict().items() if value.ndim
    }
    expected = functional_call(model, tensors, (layer.input(),))
    torch.testing.assert_close(functional_call(graph_module, tensors, (layer.input(),)), expected)
    assert not torch.allclose(graph_module(layer.input()), expected)


def test_grad(layer):
    model = layer.model()
    graph_module = fused(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(net):
        return lambda parameters, x: functional_call(net, parameters, (x,)).sin().sum()

    expected = grad(loss(model), argnums=(0, 1))(parameters, layer.input())
    torch.testing.assert_close(grad(loss(graph_module), argnums=(0, 1))(parameters, layer.input()), expected)


def test_gradients_per_sample(layer):
    model = layer.model()
    graph_module = fused(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def per_sample(net):
        def loss(parameters, sample):
            return functional_call(net, parameters, (sample.unsqueeze(0),)).sin().sum()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, layer.input())

    torch.testing.assert_close(per_sample(graph_module), per_sample(model))


def test_vmap(layer):
    model = layer.model()
    graph_module = fused(model)
    xs = torch.stack([layer.input(seed=seed) for seed in range(3)])
    torch.testing.assert_close(vmap(graph_module)(xs), vmap(model)(xs))
    torch.testing.assert_close(vmap(graph_module)(xs), torch.stack([model(x) for x in xs]))


def test_an_ensemble():
    models = [prepared(Pair()) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = fused(copy.deepcopy(models[0])).to("meta")

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    output = vmap(call, in_dims=(0, 0, None))(parameters, buffers, X)
    torch.testing.assert_close(output, torch.stack([model(X) for model in models]))


def test_higher_derivatives():
    model = KINDS["linear"].model()
    graph_module = fused(model)
    x = KINDS["linear"].input()[:2]
    torch.testing.assert_close(jacrev(graph_module)(x), jacrev(model)(x))
    torch.testing.assert_close(
        hessian(lambda x: graph_module(x).sin().sum())(x), hessian(lambda x: model(x).sin().sum())(x)
    )


# --- Compilers ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    model = net()
    graph_module = fused(model, NET_PAIRS)
    compiled = torch.compile(graph_module, backend=backend, fullgraph=True)
    assert_equivalent(model, compiled, X)
    with torch.no_grad():
        assert_equivalent(model, compiled, X)
    with torch.no_grad():
        model.stem.norm.weight.mul_(3)
    assert_equivalent(model, compiled, X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_every_kind(layer):
    model = layer.model()
    compiled = torch.compile(fused(model), backend="aot_eager", fullgraph=True)
    assert_equivalent(model, compiled, layer.input())


# By default PyTorch lets compiled code ignore hooks that come later; version 2.13 does, of every module.
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_follows_modes_and_hooks():
    model = prepared(Pair())
    graph_module = fused(model)
    compiled = torch.compile(graph_module, backend="aot_eager")
    assert_equivalent(model, compiled, X)
    model.train()
    assert_equivalent(model, compiled, X)
    model.eval()
    assert_equivalent(model, compiled, X)
    model.norm.eps = 0.5
    assert_equivalent(model, compiled, X)
    handle = model.norm.register_forward_hook(lambda module, args, output: output.sin())
    assert_equivalent(model, compiled, X)
    handle.remove()
    assert_equivalent(model, compiled, X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_with_dynamic_shapes():
    model = prepared(Pair())
    compiled = torch.compile(fused(model), backend="aot_eager", dynamic=True, fullgraph=True)
    for shape in ((2, 3, 6, 6), (3, 3, 7, 5), (5, 3, 9, 9)):
        assert_equivalent(model, compiled, data(*shape))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_under_autocast(dtype):
    model = prepared(Pair(), torch.float32)
    compiled = torch.compile(fused(model), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        assert_equivalent(model, compiled, X.float(), rtol=3e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export(layer, strict):
    model = layer.model()
    graph_module = fused(model)
    exported = torch.export.export(graph_module, (layer.input(),), strict=strict)
    assert set(exported.state_dict) == set(model.state_dict())
    torch.testing.assert_close(exported.module()(layer.input()), model(layer.input()))
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert not {target for target in targets if "batch_norm" in str(target)}


def test_export_with_a_dynamic_batch():
    model = net()
    graph_module = fused(model, NET_PAIRS)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(graph_module, (X,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(data(5, 3, 6, 6)), model(data(5, 3, 6, 6)))


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")  # deprecated, and still used
def test_jit_trace():
    model = prepared(Pair())
    traced = torch.jit.trace(fused(model), X)
    torch.testing.assert_close(traced(data(3, 3, 7, 7)), model(data(3, 3, 7, 7)))


# --- torch.fx -----------------------------------------------------------------------------------------------------


def test_traced_again():
    model = net()
    graph_module = fused(model, NET_PAIRS)
    again = torch.fx.symbolic_trace(graph_module)
    assert len(fused_nodes(again)) == NET_PAIRS
    torch.testing.assert_close(again(X), model(X))


def test_interpreter():
    graph_module = fused(net(), NET_PAIRS)
    torch.testing.assert_close(torch.fx.Interpreter(graph_module).run(X), graph_module(X))


def test_shape_propagation_and_fake_tensors():
    graph_module = fused(net(), NET_PAIRS)
    ShapeProp(graph_module).propagate(X)
    shapes = [
        node.meta["tensor_meta"].shape for node in graph_module.graph.nodes if node.name == "conv_batch_norm"
    ]
    assert shapes == [(2, 4, 6, 6)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert graph_module(torch.empty(7, 3, 6, 6, dtype=torch.float64)).shape == (7, 5)


def test_modules_exchanged_after_the_rewrite():
    model = prepared(Pair())
    graph_module = fused(model)
    graph_module = nn.SyncBatchNorm.convert_sync_batchnorm(graph_module)
    assert isinstance(graph_module.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(graph_module(X), model(X))
    graph_module.norm = nn.Identity()
    torch.testing.assert_close(graph_module(X), model.conv(X))
    graph_module.conv = nn.Sequential(model.conv, nn.ReLU())
    torch.testing.assert_close(graph_module(X), model.conv(X).relu())


def test_an_averaged_model():
    graph_module = fused(net(), NET_PAIRS)
    averaged = torch.optim.swa_utils.AveragedModel(graph_module)
    averaged.update_parameters(graph_module)
    torch.testing.assert_close(averaged.eval()(X), graph_module(X))
    before = averaged.module.stem.norm.running_mean.clone()
    torch.optim.swa_utils.update_bn([X, X.sin()], averaged)
    assert not torch.allclose(averaged.module.stem.norm.running_mean, before)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_of_the_result_and_its_gradients(tracing_mode):
    model = prepared(Pair())
    graph_module = fused(model)

    def step(x):
        return torch.autograd.grad(graph_module(x).sin().sum(), [x])

    x = X.clone().requires_grad_()
    captured = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(captured(x)[0], torch.autograd.grad(model(x).sin().sum(), x)[0])


def test_split_into_stages():
    graph_module = fused(net(), NET_PAIRS)
    positions = {node: index // 6 for index, node in enumerate(graph_module.graph.nodes)}
    stages = split_module(graph_module, None, positions.__getitem__)
    assert len(list(stages.named_children())) > 1
    torch.testing.assert_close(stages(X), graph_module(X))


# --- Distributed --------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def _process_group(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    output = model(x)
    output.sin().sum().backward()
    found = [p.grad for p in model.parameters()]
    return output.detach(), [
        g.full_tensor() if hasattr(g, "full_tensor") else g for g in found if g is not None
    ]


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_ddp(options):
    model = net()
    model.unused.requires_grad_(False)
    graph_module = fused(model, NET_PAIRS)
    expected = gradients_of(model, X)
    wrapped = nn.parallel.DistributedDataParallel(graph_module, **options)
    torch.testing.assert_close(gradients_of(wrapped, X), expected)
    wrapped.train()
    model.dropout.eval()
    wrapped(X).sum().backward()
    assert model.stem.norm.num_batches_tracked == 1


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("per_module", [False, True])
def test_fsdp2(per_module):
    model = net()
    expected = gradients_of(model, X)
    expected_output = model(X).detach()
    graph_module = fused(model, NET_PAIRS)
    mesh = init_device_mesh("cpu", (1,))
    if per_module:  # its hooks make these pairs run unfused
        fully_shard(graph_module.stem.conv, mesh=mesh)
        fully_shard(graph_module.block.second.norm, mesh=mesh)
        fully_shard(graph_module.head, mesh=mesh)
    fully_shard(graph_module, mesh=mesh)
    torch.testing.assert_close(graph_module(X).detach(), expected_output)
    torch.testing.assert_close(gradients_of(graph_module, X), expected)
    optimizer = torch.optim.SGD(graph_module.parameters(), 0.1)
    optimizer.step()
    assert not torch.allclose(graph_module(X), expected_output)


def one_of_two(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = net()
        model.unused.requires_grad_(False)
        wrapped = nn.parallel.DistributedDataParallel(fused(model, NET_PAIRS))
        results[rank] = gradients_of(wrapped, data(4, 3, 6, 6)[rank::2])[1]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_with_two_processes():
    manager = torch.multiprocessing.get_context("spawn").Manager()
    results = manager.dict()
    torch.multiprocessing.spawn(one_of_two, (free_port(), results), nprocs=2)
    model = net()
    model.unused.requires_grad_(False)
    expected = [gradient / 2 for gradient in gradients_of(model, data(4, 3, 6, 6))[1]]
    for rank in range(2):
        torch.testing.assert_close(results[rank], expected)
