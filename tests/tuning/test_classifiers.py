"""Whole classifiers of torchvision and timm: the rest of a tuned model lives on."""

import copy
from functools import partial

import pytest
import timm
import torch
from models import data, prepared, with_slow
from originals import pairs_run, with_frozen_norms
from torch import nn
from torchvision import models

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

CLASSES = 4
X = data(2, 3, 32, 32)


def of_torchvision(name, **options):
    return getattr(models, name)(weights=None, num_classes=CLASSES, **options)


def of_timm(name, **options):
    return timm.create_model(name, pretrained=False, **{"num_classes": CLASSES} | options)


AUXILIARY = {"aux_logits": True, "init_weights": False}

#: How each is built, its number of pairs, and the shape of its images.
CLASSIFIERS = {
    "resnet18": (partial(of_torchvision, "resnet18"), 20, X.shape),
    "densenet121, dropout": (partial(of_torchvision, "densenet121", drop_rate=0.3), 59, X.shape),
    "densenet121, memory efficient": (
        partial(of_torchvision, "densenet121", memory_efficient=True),
        59,
        X.shape,
    ),
    "googlenet, auxiliary heads": (partial(of_torchvision, "googlenet", **AUXILIARY), 59, X.shape),
    "inception_v3, auxiliary head": (  # the smallest side that its auxiliary head takes
        partial(of_torchvision, "inception_v3", **AUXILIARY),
        96,
        (1, 3, 299, 299),
    ),
    "efficientnet_b0, stochastic depth": (
        partial(of_torchvision, "efficientnet_b0", stochastic_depth_prob=0.5),
        49,
        X.shape,
    ),
    "timm resnet50, dropout and stochastic depth": (
        partial(of_timm, "resnet50", drop_rate=0.3, drop_path_rate=0.5),
        53,
        X.shape,
    ),
    "timm resnetv2_50": (
        partial(of_timm, "resnetv2_50", layers=(1, 2, 1, 1), drop_path_rate=0.5),
        10,
        X.shape,
    ),
    "timm mobilenetv3_small_050": (partial(of_timm, "mobilenetv3_small_050", drop_rate=0.3), 34, X.shape),
    "timm efficientnet_b0, stochastic depth": (
        partial(of_timm, "efficientnet_b0", drop_rate=0.3, drop_path_rate=0.5),
        49,
        X.shape,
    ),
}


#: Left for `make test-all`.
SLOW = {
    "densenet121, memory efficient",
    "inception_v3, auxiliary head",
    "timm resnet50, dropout and stochastic depth",
    "timm efficientnet_b0, stochastic depth",
}


@pytest.fixture(
    scope="module",
    params=with_slow(CLASSIFIERS, SLOW),
)
def classifier(request):
    """The original, the tuned one, the number of pairs, and images."""
    torch.manual_seed(0)
    build, pairs, shape = CLASSIFIERS[request.param]
    original = prepared(build())
    return original, tune(original, norm_eval=True), pairs, data(*shape)


def test_the_pairs_of_a_classifier(classifier):
    original, tuned, pairs, x = classifier
    assert len(report(tuned).fused) == pairs_run(with_frozen_norms(original), x) == pairs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients(classifier, training):
    original, tuned, _, x = classifier
    with_frozen_norms(original) if training else original.eval()
    assert_equivalent(original, tuned.train(training), x)


def test_less_is_saved_for_the_backward_pass(classifier):
    original, tuned, _, x = classifier
    before, after = (saved_bytes(model, x) for model in (with_frozen_norms(original), tuned.train()))
    assert after < before


@pytest.mark.parametrize(
    "build",
    [
        partial(of_timm, "convnext_atto"),
        partial(of_timm, "resnetv2_50d_gn", layers=(1, 1, 1, 1)),
        partial(of_timm, "test_vit", img_size=32),
    ],
    ids=lambda build: build.args[0],
)
def test_a_model_without_batch_norms(build):
    original = build(drop_rate=0.1).double()
    tuned = tune(original, norm_eval=True)
    assert not report(tuned).fused
    assert not report(tuned).skipped
    for model in (original, tuned):
        model.train()
    assert_equivalent(original, tuned, X)


# --- What timm offers on its models -------------------------------------------------------------------------------

TIMM_MODELS = {"resnet18": 20, "mobilenetv3_small_050": 34, "regnety_002": 44}


@pytest.fixture(
    scope="module",
    params=["resnet18", "mobilenetv3_small_050", pytest.param("regnety_002", marks=pytest.mark.slow)],
)
def timm_model(request):
    torch.manual_seed(0)
    return prepared(of_timm(request.param, drop_rate=0.2))


def test_the_pairs_of_a_timm_model(timm_model):
    pairs = TIMM_MODELS[timm_model.default_cfg["architecture"]]
    assert len(report(tune(timm_model)).fused) == pairs_run(timm_model, X) == pairs


def checkpointing(model):
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradient_checkpointing_switched_on_after_tune(timm_model, training):
    tuned = tune(timm_model, norm_eval=True).train(training)
    tuned.set_grad_checkpointing(True)
    assert checkpointing(tuned)
    assert not checkpointing(timm_model)
    original = with_frozen_norms(timm_model) if training else timm_model.eval()
    assert_equivalent(original, tuned, X)


def test_gradient_checkpointing_saves_still_less(timm_model):
    tuned = tune(timm_model.eval()).train(False)
    x = data(4, 3, 32, 32)
    before = saved_bytes(tuned, x)
    tuned.set_grad_checkpointing(True)
    assert saved_bytes(tuned, x) < before


class Calling(nn.Module):
    """Calls something of a model in place of its forward."""

    def __init__(self, model, method):
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, x):
        return self.method(self.model, x)


METHODS = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head": lambda model, x: model.forward_head(model.forward_features(x)),
    "pre_logits": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, indices=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_a_timm_model(timm_model, method):
    tuned = tune(timm_model.eval())
    assert_equivalent(Calling(timm_model, METHODS[method]), Calling(tuned, METHODS[method]), X)


def test_what_a_timm_model_says_of_itself(timm_model):
    tuned = tune(timm_model)
    assert isinstance(tuned, type(timm_model))
    assert tuned.default_cfg == timm_model.default_cfg
    assert tuned.num_features == timm_model.num_features
    assert type(tuned.get_classifier()) is type(timm_model.get_classifier())
    assert tuned.get_classifier().weight is timm_model.get_classifier().weight


def test_a_new_classifier(timm_model):
    tuned = tune(timm_model.eval())
    tuned.reset_classifier(7)
    assert tuned.double()(X).shape == (2, 7)
    assert timm_model(X).shape == (2, CLASSES)
    tuned.reset_classifier(0)
    torch.testing.assert_close(tuned(X), METHODS["pre_logits"](timm_model, X))


FEATURES = {
    "list": (partial(of_timm, "resnet18"), 20),
    "dict": (partial(of_timm, "resnet18", feature_cls="dict"), 20),
    "hook": (partial(of_timm, "resnet18", feature_cls="hook"), 20),
    "getter": (partial(of_timm, "resnet18", feature_cls="getter"), 20),
    "fewer": (partial(of_timm, "resnet18", out_indices=(1, 2)), 10),
    "mobilenet": (partial(of_timm, "mobilenetv3_small_050"), 34),
    "mobilenet, hook": (partial(of_timm, "mobilenetv3_small_050", feature_cls="hook"), 34),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", FEATURES)
def test_features(kind, training):
    build, pairs = FEATURES[kind]
    model = prepared(build(features_only=True))
    tuned = tune(model, norm_eval=True).train(training)
    assert len(report(tuned).fused) == pairs_run(model, X) == pairs
    assert tuned.feature_info.channels() == model.feature_info.channels()
    assert_equivalent(with_frozen_norms(model) if training else model, tuned, X)


# --- Hooks on a block, as explanations and feature extractors place them ------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return prepared(of_torchvision("resnet18"))


def by_tensor_hook(layer, seen):
    def hook(module, args, output):
        seen["activations"] = output.detach().clone()
        output.register_hook(lambda gradient: seen.update(gradient=gradient.clone()))

    layer.register_forward_hook(hook)


def by_backward_hook(layer, seen):
    layer.register_forward_hook(lambda module, args, output: seen.update(activations=output.detach().clone()))
    layer.register_full_backward_hook(lambda module, _, gradients: seen.update(gradient=gradients[0].clone()))


WATCHED = [
    *((by_tensor_hook, name) for name in ("layer4", "layer4.1", "layer4.1.bn2", "layer4.1.conv2", "bn1")),
    *((by_backward_hook, name) for name in ("layer4", "layer4.1", "layer4.1.conv2", "layer3")),
]


@pytest.mark.parametrize(("watch", "name"), WATCHED)
@pytest.mark.parametrize("first", ["hooked", "tuned"])
def test_activations_and_their_gradients(resnet, watch, name, first):
    """What Grad-CAM takes: a map of the activations, weighted by the mean gradient of one class's score."""
    original, seen = copy.deepcopy(resnet), {}
    if first == "tuned":
        tuned = tune(original)
        watch(tuned.get_submodule(name), seen)
    watch(original.get_submodule(name), seen)
    if first == "hooked":
        tuned = tune(original)

    def explained(model):
        seen.clear()
        model(X)[:, 2].sum().backward()
        importance = seen["gradient"].mean([2, 3], keepdim=True)
        return {"map": (importance * seen["activations"]).sum(1), **seen}

    expected = explained(original)
    assert expected["map"].any()
    torch.testing.assert_close(explained(tuned), expected)


def test_hooks_on_a_block_leave_its_pairs_fused(resnet):
    tuned, x = tune(resnet), data(4, 3, 64, 64)
    saved = saved_bytes(tuned, x)
    by_tensor_hook(tuned.layer4, {})
    by_tensor_hook(tuned.layer1[0], {})
    assert saved_bytes(tuned, x) == saved < saved_bytes(resnet, x)


# --- Transfer learning --------------------------------------------------------------------------------------------


def test_a_new_head_and_a_frozen_backbone(resnet):
    original = copy.deepcopy(resnet)
    tuned = tune(original, norm_eval=True)
    for model in (original, tuned):
        torch.manual_seed(1)
        model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 3)).double()
    tuned.requires_grad_(False)
    tuned.layer4.requires_grad_()
    for model in (original, tuned):
        model.fc.requires_grad_()
    assert_equivalent(with_frozen_norms(original), tuned.train(), X)


def test_blocks_that_are_replaced_and_removed(resnet):
    original = copy.deepcopy(resnet)
    tuned = tune(original)
    block = prepared(models.resnet.BasicBlock(128, 128))
    for model in (original, tuned):
        model.layer2[1] = block
        model.layer3[1] = nn.Identity()
        del model.layer4[1]
    assert_equivalent(original, tuned, X)
