"""What PyTorch offers around a model works on a tuned one: compile, export, functions, checkpoints, threads."""

import functools
import threading

import pytest
import torch
from blocks import Chain, ConvLast, NormFirst
from models import data, net, pair, prepared, tuned_with
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import convbn_fx
from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")


def gradients(model, run, x=X):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = run(x)
    output.sin().sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    model = net()
    compiled = torch.compile(tune(model), backend="eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 6, 6), (3, 3, 7, 5)):
        assert_equivalent(model, compiled, data(*shape))
    with torch.no_grad():
        assert_equivalent(model, compiled, X)
        model.stem.norm.weight.mul_(3)
    assert_equivalent(model, compiled, X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_backend_fuses_what_was_tuned():
    tuned = tune(net())
    compiled = torch.compile(tuned, backend="convbn", fullgraph=True)
    assert_equivalent(net(), compiled, X)
    assert saved_bytes(compiled, X) < saved_bytes(net(), X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_follows_modes():
    model = pair()
    tuned = tune(model)
    compiled = torch.compile(tuned, backend="eager")
    for mode in (False, True, False):
        model.train(mode)
        tuned.train(mode)
        assert_equivalent(model, compiled, X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_pairs_across_borders(crossing):
    assert_equivalent(crossing, torch.compile(tune(crossing), backend="eager", fullgraph=True), X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks():
    model = net()
    tuned = tune(model)
    tuned.block.compile(backend="eager", fullgraph=True)
    assert_equivalent(model, tuned, X)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_export(crossing, strict):
    exported = torch.export.export(tune(crossing), (X,), strict=strict)
    assert set(exported.state_dict) == set(crossing.state_dict())
    torch.testing.assert_close(exported.module()(X), crossing(X))
    assert len(report(convbn_fx.transform(exported.module())).fused) == len(report(tune(crossing)).fused)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    model = net()
    tuned = tune(model)

    def step(x):
        return torch.autograd.grad(tuned(x).sin().sum(), [x])

    x = X.clone().requires_grad_()
    captured = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(captured(x)[0], torch.autograd.grad(model(x).sin().sum(), x)[0])


def test_jit_trace():
    model = net()
    traced = torch.jit.trace(tune(model), X)
    torch.testing.assert_close(traced(data(3, 3, 7, 7)), model(data(3, 3, 7, 7)))


def test_fake_tensors():
    tuned = tune(net())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert tuned(torch.empty(7, 3, 6, 6, dtype=torch.float64)).shape == (7, 5)
    assert saved_bytes(tuned, X, fake=True) == saved_bytes(tuned, X)


def test_functional_call():
    model = net()
    tuned = tune(model)
    tensors = {
        name: data(*value.shape, seed=4).abs() for name, value in model.state_dict().items() if value.ndim
    }
    expected = functional_call(model, tensors, (X,))
    torch.testing.assert_close(functional_call(tuned, tensors, (X,)), expected)
    assert not torch.allclose(tuned(X), expected)


def loss_of(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).sin().sum()


TRANSFORMS = {
    "grad": lambda m, p: grad(loss_of(m), argnums=(0, 1))(p, X),
    "per sample": lambda m, p: vmap(grad(loss_of(m)), in_dims=(None, 0))(p, X[:, None]),
    "vmap": lambda m, p: vmap(m)(torch.stack([X, X.sin()])),
    "jvp": lambda m, p: jvp(m, (X,), (X.cos(),)),
    "jvp of parameters": lambda m, p: jvp(
        lambda p: loss_of(m)(p, X), (p,), ({k: torch.ones_like(v) for k, v in p.items()},)
    ),
    "hessian": lambda m, p: hessian(lambda x: m(x[None]).sum())(X[0, :, :2, :2]),
    "grad of grad": lambda m, p: grad(lambda x: grad(lambda z: m(z).sin().sum())(x).sum())(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform):
    model = net()
    tuned = tune(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("unused")}
    torch.testing.assert_close(
        TRANSFORMS[transform](tuned, parameters), TRANSFORMS[transform](model, parameters)
    )


def test_an_ensemble():
    models = [pair() for _ in range(3)]
    parameters, buffers = stack_module_state([tune(model) for model in models])
    base = tune(models[0])
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in models]))


def test_double_backward():
    model = pair()
    tuned = tune(model)

    def penalty(m):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *m.parameters()], allow_unused=True)

    torch.testing.assert_close(penalty(tuned), penalty(model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model = net()
    tuned = tune(model)
    with context():
        torch.testing.assert_close(tuned(X), model(X))
        assert tuned(X).is_inference() == model(X).is_inference()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around(use_reentrant):
    model = net()
    tuned = tune(model)
    expected = gradients(model, model)
    run = functools.partial(checkpoint, use_reentrant=use_reentrant)
    torch.testing.assert_close(gradients(tuned, functools.partial(run, tuned)), expected)
    for block in (tuned.stem, tuned.block.second):
        block.forward = functools.partial(run, functools.partial(type(block).forward, block))
    torch.testing.assert_close(gradients(tuned, tuned), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_segments_that_a_pair_crosses(use_reentrant):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(ConvLast(), NormFirst(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    tuned = tuned_with(model, 2)
    expected = gradients(model, model)

    def run(x):
        return checkpoint_sequential(tuned, 4, x, use_reentrant=use_reentrant)

    torch.testing.assert_close(gradients(tuned, run), expected)


def test_checkpoint_wrappers_on_blocks_that_a_pair_crosses():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    model = prepared(Chain(ConvLast(), NormFirst()))
    expected = gradients(model, model)
    for position in (0, 1):
        tuned = tune(model)
        tuned.blocks[position] = checkpoint_wrapper(tuned.blocks[position])
        torch.testing.assert_close(gradients(tuned, tuned), expected)
        model.blocks[position] = checkpoint_wrapper(model.blocks[position])
        torch.testing.assert_close(gradients(model, tune(model)), expected)


def test_saved_tensors_hooks():
    model = net()
    tuned = tune(model)
    with torch.autograd.graph.save_on_cpu():
        assert_equivalent(model, tuned, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = net(torch.float32)
    tuned = tune(model)
    with torch.autocast("cpu", dtype):
        assert tuned(X.float()).dtype == model(X.float()).dtype
        assert_equivalent(model, tuned, X.float(), rtol=5e-2)


def test_two_threads():
    model = net()
    tuned = tune(model)
    inputs = [data(2, 3, 6, 6, seed=seed) for seed in range(8)]
    expected = [model(x) for x in inputs]
    results = {}

    def work(first):
        for _ in range(5):
            for index in range(first, len(inputs), 2):
                results[index] = tuned(inputs[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([results[index] for index in range(len(inputs))], expected)
