"""What a report tells of a model, against what one can count and compute by hand."""

import copy
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from models import KINDS, LAYOUTS, Functional, Pair, data, net, prepared
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.ops.misc import FrozenBatchNorm2d

from convbn_fx import deploy, report, tune
from convbn_fx.cli.report.coefficients import LARGEST, SMALLEST_NORMAL, coefficients_of, float16_range_of
from convbn_fx.cli.report.inspection import SavedBytes, inspect_model
from convbn_fx.memory import saved_bytes

#: An image, its bytes, and those of what `Pair` makes of it.
IMAGE = torch.zeros(2, 3, 8, 8)
X, Y = 2 * 3 * 8 * 8 * 4, 2 * 4 * 6 * 6 * 4


def inspect(model, *inputs, **options):
    return inspect_model(model, inputs, **options)


def sizes_of_calls(model, *inputs):
    """Bytes of the input and of the output of each call of a convolution, by name, from a real run."""
    sizes = {}

    def noted(name):
        def hook(module, args, output):
            sizes.setdefault(name, []).append((args[0].nbytes, output.nbytes))

        return hook

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            module.register_forward_hook(noted(name))
    with torch.no_grad():
        model(*inputs)
    return sizes


def modes(count):
    """A pair that keeps its input and its output in Eval mode, and its input otherwise."""
    x, y = count
    return SavedBytes(x + y, x, x)


# --- Bytes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = prepared(resnet18(), torch.float32)
    return model, inspect(model, torch.empty(()).expand(2, 3, 64, 64))


def test_a_network_pair_by_pair(resnet):
    model, inspection = resnet
    sizes = sizes_of_calls(model, torch.zeros(2, 3, 64, 64))
    assert len(inspection.pairs) == 20
    shared = [
        f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)
    ]  # read what the block's first convolution reads
    for row in inspection.pairs:
        ((x, y),) = sizes[row.pair.convolution]
        x = 0 if row.pair.convolution in shared else x
        weight = model.get_submodule(row.pair.convolution).weight
        in_tune_mode = x if weight.nbytes <= 16 * y else x + y  # an output that small is saved as well
        assert row.saved == SavedBytes(x + y, in_tune_mode, x), row.pair
        assert row.calls == 1


def test_rows_and_what_other_layers_keep_add_up_to_the_total(resnet):
    """What two pairs keep counts in one of them; what is kept outside of pairs is the same in all modes."""
    others = resnet[1].others
    assert others.eval == others.tune == others.deploy > 0
    assert all(min(row.saved) >= 0 for row in resnet[1].pairs)


def test_totals_are_those_of_the_whole_models(resnet):
    model, inspection = resnet
    image = torch.randn(2, 3, 64, 64)
    assert inspection.saved == SavedBytes(
        *(saved_bytes(each, image) for each in (model, tune(model), deploy(model)))
    )
    assert inspection.saved.tune < inspection.saved.eval
    assert inspection.inputs == ("float32[2, 3, 64, 64]",)
    assert inspection.model == "ResNet"
    assert not inspection.note
    assert inspection.report == report(tune(model))


def test_any_batch_fits():
    inspection = inspect(prepared(Pair(), torch.float32), torch.empty(()).expand(100_000, 3, 224, 224))
    x, y = (100_000 * channels * size**2 * 4 for channels, size in ((3, 224), (4, 222)))
    assert inspection.saved == inspection.pairs[0].saved == modes((x, y))


@pytest.mark.parametrize("name", [*KINDS, *LAYOUTS])
def test_every_kind_and_layout(name):
    layer = {**KINDS, **LAYOUTS}[name]
    model, x = layer.model(), layer.input()
    inspection = inspect(model, x)
    (row,) = inspection.pairs
    ((x_bytes, y_bytes),) = sizes_of_calls(model, x)["conv"]
    assert row.saved.eval == x_bytes + y_bytes
    assert row.saved.deploy == x_bytes
    assert row.saved.tune == x_bytes
    assert row.saved == inspection.saved


def test_the_size_that_a_transposed_convolution_is_asked_for():
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2)
    model = prepared(Pair(conv, forward=lambda m, x: m.norm(m.conv(x, output_size=[12, 12]))))
    (row,) = inspect(model, data(2, 3, 5, 5)).pairs
    assert row.saved == modes((2 * 3 * 5 * 5 * 8, 2 * 4 * 12 * 12 * 8))


def test_what_needs_no_gradient_is_not_kept():
    convs = [nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False) for _ in range(2)]
    model = nn.Sequential(convs[0], nn.BatchNorm2d(3), convs[1], nn.BatchNorm2d(3))
    first, second = inspect(prepared(model, torch.float32), IMAGE).pairs
    assert (
        first.saved.eval == X
    )  # the output, for gamma: the image wants no gradient, nor does the convolution
    assert second.saved.eval == 2 * X


def test_an_image_that_wants_a_gradient():
    model = prepared(Pair(), torch.float32).requires_grad_(False)
    without, with_gradient = (
        inspect(model, torch.zeros(2, 3, 8, 8, requires_grad=wanted)).pairs[0].saved
        for wanted in (False, True)
    )
    assert without == SavedBytes(0, 0, 0)
    assert with_gradient.tune == 0
    assert with_gradient.eval == X + Y


class Pyramid(nn.Module):
    """One head for all levels: a convolution and a batch norm that are called several times."""

    def __init__(self):
        super().__init__()
        self.head = Pair()
        self.own = nn.BatchNorm2d(4)

    def forward(self, levels):
        outputs = [self.head(level).sum() for level in levels]
        return sum(outputs) + self.own(self.head.conv(levels[0])).sum()


def test_calls_are_added_up_and_told_apart():
    levels = [torch.empty(()).expand(2, 3, size, size) for size in (8, 16, 32)]
    head, own = inspect(prepared(Pyramid(), torch.float32), levels).pairs
    x, y = (
        sum(2 * channels * (size - less) ** 2 * 4 for size in (8, 16, 32))
        for channels, less in ((3, 0), (4, 2))
    )
    assert (head.calls, head.saved) == (3, modes((x, y)))
    assert (own.calls, own.saved) == (1, modes((0, Y)))  # its input is the first level, which the head keeps


def test_pairs_come_in_the_order_in_which_they_run():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.last, self.last_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.block = Pair()
            self.rest = Pair()

        def forward(self, x, rest=False):
            x = self.block(self.stem_norm(self.stem(x)))
            x = self.last_norm(self.last(x))
            return self.rest(x) if rest else x

    inspection = inspect(prepared(Network()), data(2, 3, 8, 8))
    assert [row.pair.convolution for row in inspection.pairs] == ["stem", "block.conv", "last", "rest.conv"]
    uncalled = inspection.pairs[-1]
    assert (uncalled.calls, uncalled.saved) == (0, None)
    assert uncalled.coefficients is not None


def test_functions_have_no_row_of_their_own():
    model = Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight)), (4, 3, 3, 3), 4).eval()
    inspection = inspect(model, IMAGE)
    (row,) = inspection.pairs
    assert (row.saved, row.coefficients, row.float16) == (None, None, None)
    assert inspection.saved.eval == X + Y
    assert inspection.saved.tune == X


def test_a_function_that_is_called_like_a_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, 1, 1))
            self.conv2d, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv2d(self.norm(F.conv2d(x, self.weight)))

    (row,) = inspect(prepared(Both()), data(2, 3, 8, 8)).pairs
    assert row.pair.convolution == "conv2d"
    assert (row.saved, row.float16) == (None, None)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_pair_is_called_in_the_surroundings_that_it_had(name):
    class Surrounded(nn.Sequential):
        def forward(self, x):
            with SURROUNDINGS[name]():
                return super().forward(x)

    inspection = inspect(prepared(Surrounded(Pair()), torch.float32), IMAGE)
    (row,) = inspection.pairs
    assert row.calls == 1
    assert row.saved == inspection.saved
    assert row.saved.eval < X + Y


def test_a_user_s_hooks_run_once_and_the_pair_runs_unfused():
    model = prepared(Pair(), torch.float32)
    model.conv.register_forward_pre_hook(lambda module, args: (args[0][:, :, 1:],))
    inspection = inspect(model, torch.zeros(2, 3, 9, 8))
    (row,) = inspection.pairs
    assert row.saved == inspection.saved
    assert row.saved.eval == row.saved.tune == 2 * 3 * 9 * 8 * 4 + Y  # what is cut is a view of the whole


def test_channels_last_counts_the_same():
    model, image = prepared(Pair(), torch.float32), IMAGE
    expected = inspect(model, image).pairs[0].saved
    last = inspect(model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last))
    assert last.pairs[0].saved == expected


FROZEN = {"torchvision": FrozenBatchNorm2d, "timm": partial(FrozenBatchNormAct2d, apply_act=False)}


@pytest.mark.parametrize("library", FROZEN)
def test_frozen_batch_norms(library):
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), FROZEN[library](4)), torch.float32).train()
    inspection = inspect(model, IMAGE)
    (row,) = inspection.pairs
    assert row.saved.eval > row.saved.tune == X
    assert row.saved == inspection.saved
    assert row.coefficients.values == pytest.approx(formula(model[1]), rel=1e-6)
    assert row.float16 is not None


def test_an_activation_that_is_part_of_the_batch_norm_is_part_of_the_pair():
    inspection = inspect(prepared(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), torch.float32), IMAGE)
    assert inspection.pairs[0].saved == inspection.saved == SavedBytes(X + 2 * Y, X + Y, X + Y)


def test_a_tuned_model_is_inspected_as_the_model_it_was():
    model, image = net(torch.float32), IMAGE
    assert inspect(tune(model), image) == inspect(model, image)


def test_a_traced_model():
    model, image = net(torch.float32), IMAGE
    inspection = inspect(torch.fx.symbolic_trace(model), image)
    expected = inspect(model, image)
    assert inspection.pairs == [row for row in expected.pairs if row.calls]
    assert inspection.saved == expected.saved


def test_the_meta_device_has_no_coefficients():
    with torch.device("meta"):
        model, image = Pair().eval(), torch.zeros(2, 3, 8, 8)
    inspection = inspect(model, image)
    (row,) = inspection.pairs
    assert row.saved == inspection.saved
    assert row.saved.tune == X
    assert (row.coefficients, row.float16) == (None, None)


class Detector(nn.Module):
    """Its backbone can be counted, its choice of boxes cannot."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Pair(), nn.ReLU())
        self.head = Pair(nn.Conv2d(4, 4, 3))

    def forward(self, images):
        features = self.head(self.backbone(images))
        return features[features > 0] if features.sum() > 0 else features


def test_a_model_that_looks_at_values_gets_a_note():
    inspection = inspect(prepared(Detector()), data(2, 3, 8, 8))
    assert inspection.saved is None
    assert inspection.note.startswith("DataDependentOutputException: ")
    assert [row.saved for row in inspection.pairs] == [None, None]
    assert [row.calls for row in inspection.pairs] == [0, 0]
    assert len(inspection.coefficients.values) == 8


def test_a_sub_module_can_be_counted_in_its_place():
    model, images = prepared(Detector(), torch.float32), IMAGE
    inspection = inspect(model, images, body="backbone")
    assert not inspection.note
    assert inspection.body == "backbone"
    parts = (each.backbone for each in (model, tune(model), deploy(model)))
    assert inspection.saved == SavedBytes(*(saved_bytes(part, images) for part in parts))
    assert [row.pair.convolution for row in inspection.pairs] == ["backbone.0.conv", "head.conv"]
    backbone, head = (row.saved for row in inspection.pairs)
    assert backbone == modes((X, Y))
    assert head is None


# --- Coefficients and float16's range -----------------------------------------------------------------------------


def formula(norm):
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    return ((1 if norm.weight is None else norm.weight.detach().double()) / deviation).tolist()


def test_coefficients(resnet):
    model, inspection = resnet
    for row in inspection.pairs:
        assert row.coefficients.values == pytest.approx(
            formula(model.get_submodule(row.pair.batch_norm)), rel=1e-12
        )
    everything = [value for row in inspection.pairs for value in row.coefficients.values]
    assert list(inspection.coefficients.values) == everything
    assert len(everything) == sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_summary_of_coefficients():
    norm = nn.BatchNorm2d(5).eval()
    norm.weight.data = torch.tensor([1.0, -2.0, 0.0, -0.0, 4.0])
    norm.running_var = torch.full((5,), 4.0)
    norm.eps = 0.0
    found = coefficients_of(norm)
    assert found.values == (0.5, -1.0, 0.0, 0.0, 2.0)
    assert found.to_json() == {
        "channels": 5,
        "smallest": 0.0,
        "median": 0.5,
        "largest": 2.0,
        "negative": 1,
        "zero": 2,
        "not_finite": 0,
    }


def test_without_affine_parameters():
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_var = torch.tensor([0.25, 1.0, 4.0])
    assert coefficients_of(norm).values == pytest.approx((2.0, 1.0, 0.5), rel=1e-4)


def test_coefficients_of_what_is_not_known():
    assert coefficients_of(nn.GroupNorm(1, 3)) is None
    assert coefficients_of(nn.BatchNorm2d(3, track_running_stats=False)) is None
    assert float16_range_of(nn.Embedding(3, 3), nn.BatchNorm2d(3)) is None
    assert float16_range_of(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)) is None


def test_a_batch_norm_of_several_pairs_is_listed_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    inspection = inspect(prepared(Shared()), data(2, 3, 8, 8))
    assert len(inspection.pairs) == 2
    assert len(inspection.coefficients.values) == 4


@pytest.mark.parametrize("name", [*KINDS, *LAYOUTS])
def test_the_range_is_that_of_the_deployed_parameters(name):
    model = {**KINDS, **LAYOUTS}[name].model()
    deployed = deploy(model).conv
    found = float16_range_of(model.conv, model.norm)
    assert found.largest_weight == pytest.approx(deployed.weight.abs().max().item(), rel=1e-12)
    assert found.largest_bias == pytest.approx(deployed.bias.abs().max().item(), rel=1e-12)
    assert not found.warning


def layer(gamma=1.0, mean=0.0, var=1.0, weight=0.5):
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0)
    conv.weight.data.fill_(weight)
    norm.weight.data.fill_(gamma)
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(var)
    return nn.Sequential(conv, norm).eval()


RISKS = {
    "the weight is too large": (
        layer(gamma=2e5),
        "overflows",
        "the folded weight reaches 1e+05, beyond 65504",
    ),
    "the bias is too large": (layer(mean=1e5), "overflows", "the folded bias reaches 1e+05, beyond 65504"),
    "the weight loses digits": (
        layer(var=1e10),
        "underflows",
        "folding puts 100.0% of the weights below 6.1e-05",
    ),
    "the variance is no number": (
        layer(var=math.nan),
        "overflows",
        "the folded weight reaches inf, beyond 65504",
    ),
}


@pytest.mark.parametrize("name", RISKS)
def test_what_leaves_float16(name):
    model, flag, words = RISKS[name]
    inspection = inspect(model, torch.zeros(1, 3, 8, 8))
    (row,) = inspection.pairs
    assert getattr(row.float16, flag)
    assert words in row.float16.warning
    assert inspection.warnings == [(row.pair, row.float16.warning)]
    assert json.dumps(inspection.to_json(), allow_nan=False)


SAFE = {
    "an ordinary one": layer(),
    "the largest that fits": layer(gamma=LARGEST * 2),
    "a gamma of zero": layer(gamma=0.0),
    "a weight of zero": layer(weight=0.0),
    "small already": layer(weight=SMALLEST_NORMAL / 2, gamma=0.1),
}


@pytest.mark.parametrize("name", SAFE)
def test_what_stays_in_float16(name):
    with torch.no_grad():
        SAFE[name][0].bias.zero_()
    inspection = inspect(SAFE[name], torch.zeros(1, 3, 8, 8))
    assert not inspection.warnings


def test_one_weight_in_ten_may_lose_digits():
    model = layer()
    model[0].weight = nn.Parameter(torch.ones(4, 50, 1, 1))
    model[1].weight.data[:] = 0.01
    model[0].weight.data.view(-1)[:20] = 0.001
    assert not float16_range_of(*model).warning
    model[0].weight.data.view(-1)[:21] = 0.001
    assert "10.5% of the weights" in float16_range_of(*model).warning


def test_tune_in_float16_is_not_concerned_by_the_warning_and_deploy_is():
    model = layer(gamma=2e5)
    image = torch.full((1, 3, 3, 3), 0.01)
    expected = model(image)
    half = copy.deepcopy(model)
    half[0].half()
    assert torch.isfinite(tune(half)(image.half())).all()
    assert torch.allclose(tune(half)(image.half()).float(), expected, rtol=0.01)
    assert report(deploy(half)).skipped[0].reason.name == "OUT_OF_RANGE"
    assert deploy(model).half()[0].weight.isinf().all()


# --- JSON ---------------------------------------------------------------------------------------------------------


def shape_of(value):
    """The keys of nested dictionaries; lists are as their first element."""
    if isinstance(value, dict):
        return {key: shape_of(part) for key, part in value.items()}
    return [shape_of(value[0])] if isinstance(value, list) and value else None


def test_json_is_of_plain_types_and_has_the_same_keys_for_every_model():
    refused = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    facts = inspect(refused, IMAGE).to_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["fused"] == facts["left"] == 1
    assert facts["pairs"][0]["saved_bytes"] == {"eval": 1536 + 1152, "tune": 1536, "deploy": 1536}
    (skip,) = facts["skipped"]
    assert (skip["batch_norm"], skip["reason"]) == ("3", "NOT_AFTER_CONVOLUTION")
    assert "not the output of a convolution" in skip["explanation"]
    assert skip["cure"] == "none needed: there is nothing to fold it into"
    unknown = inspect(prepared(Detector()), data(2, 3, 8, 8)).to_json()
    assert unknown["saved_bytes"] == {"eval": None, "tune": None, "deploy": None}
    assert unknown["note"]
    assert facts.keys() == unknown.keys()
    for key in ("saved_bytes", "coefficients"):
        assert shape_of(facts[key]) == shape_of(unknown[key])
        assert shape_of(facts["pairs"][0][key]) == shape_of(unknown["pairs"][0][key])
    assert facts["pairs"][0].keys() == unknown["pairs"][0].keys()


def test_a_model_without_pairs():
    inspection = inspect(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.zeros(2, 3))
    assert inspection.saved.eval == inspection.saved.tune > 0
    facts = inspection.to_json()
    assert facts["pairs"] == facts["skipped"] == []
    assert facts["coefficients"]["median"] is None


# --- The caller's model -------------------------------------------------------------------------------------------


def snapshot(model):
    return {
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "tensors": {
            name: (id(value), value._version, value.tolist())
            for name, value in model.state_dict(keep_vars=True).items()
        },
        "hooks": [
            dict(vars(module)[name])
            for module in model.modules()
            for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


class Random(nn.Module):
    """Draws from every generator, counts its calls, then does what it is told."""

    def __init__(self, end):
        super().__init__()
        self.pair = Pair()
        self.end = end
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.manual_seed(random.randrange(100))
        np.random.rand()
        return self.end(self.pair(F.dropout(x)))


def fails(x):
    raise ZeroDivisionError


ENDS = {"well": torch.relu, "badly": fails, "with a look at values": lambda x: x if x.sum() > 0 else -x}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_behind(end):
    model = prepared(Random(ENDS[end]))
    model.pair.conv.train().register_forward_hook(lambda module, args, output: None)
    before = snapshot(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x = data(2, 3, 8, 8)
    inspection = inspect(model, x)
    assert bool(inspection.note) == (end != "well")
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(x, data(2, 3, 8, 8))


def test_what_is_not_asked_well():
    model, image = prepared(Pair()), data(2, 3, 8, 8)
    with pytest.raises(TypeError, match="inputs is the tuple of a call's arguments, got a Tensor"):
        inspect_model(model, image)
    with pytest.raises(ValueError, match="Pair has no sub-module 'backbone'"):
        inspect_model(model, (image,), body="backbone")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got Tensor"):
        inspect_model(image, (image,))
