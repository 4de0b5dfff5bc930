"""What a compiled model saves for the backward pass."""

import gc
import weakref

import pytest
import torch
from compiled import INNER, NET, compiled, pairs
from models import ConvNormAct, Pair, data, net, prepared
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from convbn_fx import deploy, symbolic_trace, transform, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
    # Dynamo looks at .grad of every input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.mark.parametrize("inner", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_training_saves_what_the_transformed_graph_saves(inner):
    model = net()
    candidate = compiled(model, inner)
    candidate(X)
    x = data(4, 3, 12, 12)
    candidate(x)
    assert saved_bytes(candidate, x) < saved_bytes(model, x)
    assert saved_bytes(candidate, x) <= saved_bytes(transform(symbolic_trace(model)), x)


@pytest.mark.parametrize("inner", ["aot_eager", "aot_eager_decomp_partition"])
def test_the_partitioner_saves_no_fused_weight(inner):
    """Left to itself it saves that of every pair, which here weighs more than all that flows."""
    model = prepared(
        nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Tanh()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Tanh()),
            *(nn.ConvTranspose2d(64, 16, 3, groups=2), nn.BatchNorm2d(16)),
        )
    )
    candidate = compiled(model, inner)
    x = data(2, 3, 6, 6)
    assert_equivalent(model, candidate, x)
    assert saved_bytes(candidate, x) == saved_bytes(deploy(model), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_saves_the_input_alone_where_gammas_gradient_is_safe(dtype):
    """As in eager mode, to the byte, in bfloat16; in float16 what Eval mode saves."""
    model = prepared(nn.Sequential(*(ConvNormAct(8, 8) for _ in range(3))), torch.float32)
    candidate = compiled(model, "aot_eager")
    x = data(2, 8, 16, 16).float()
    with torch.autocast("cpu", dtype):
        assert torch.equal(candidate(x), model(x))
        assert_equivalent(model, candidate, x, rtol=2e-2, atol=2e-2)
        counts = {name: saved_bytes(each, x) for name, each in (("eval", model), ("tune", tune(model)))}
        expected = counts["tune" if dtype is torch.bfloat16 else "eval"]
        assert saved_bytes(candidate, x) == expected
        assert counts["tune"] < counts["eval"]


def test_an_export_in_bfloat16_can_be_trained():
    model = prepared(Pair(), torch.bfloat16)
    x = X.bfloat16()
    exported = torch.export.export(transform(symbolic_trace(model)), (x,)).module()
    exported(x).float().square().sum().backward()
    model(x).float().square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=3e-2, atol=3e-2, msg=name)


def test_a_gradient_inside_a_compiled_graph_in_bfloat16():
    model = prepared(Pair(), torch.bfloat16)
    x = X.bfloat16()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, x).float().square().mean()

    expected = grad(loss)(parameters, x)
    found = torch.compile(grad(loss), backend="convbn", options={"inner": "aot_eager"})(parameters, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=3e-2, atol=3e-2)


def test_a_region_that_is_recomputed_as_a_whole_stays_one():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3))
            self.last = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.last(checkpoint(self.inside, x, use_reentrant=False))

    model = prepared(Checkpointed())
    candidate = compiled(model, "aot_eager")
    x = data(2, 3, 12, 12)
    assert_equivalent(model, candidate, x)
    assert saved_bytes(candidate, x) < saved_bytes(compiled(model.inside, "aot_eager"), x)


def test_training_a_large_layer_saves_its_input_alone():
    model = prepared(Pair(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)))
    candidate = compiled(model)
    x = data(2, 3, 16, 16)
    candidate(x)
    assert saved_bytes(candidate, x) == x.nbytes
    assert saved_bytes(model, x) >= x.nbytes + 2 * 16 * 16 * 16 * 8


@pytest.mark.parametrize("inner", INNER)
def test_dead_models_are_freed(inner):
    """As with any other backend, once Dynamo has let go."""

    def run():
        model = net()
        candidate = compiled(model, inner)
        candidate(X).sum().backward()
        assert pairs(candidate) == NET
        return [weakref.ref(model), weakref.ref(model.stem.norm), weakref.ref(model.stem.conv.weight)]

    references = run()
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
