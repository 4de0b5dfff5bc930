"""Attacks, trainers, averages and feature extractors find in a tuned model the model that they know."""

import copy
import warnings
from functools import partial

import pytest
import timm
import torch
from models import data, in_train_mode, modes, net, prepared, with_slow
from originals import pairs_run, with_frozen_norms
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

CLASSES = 4
IMAGES = data(2, 3, 32, 32).sigmoid()
LABELS = torch.tensor([1, 3])


def resnet(**options):
    torch.manual_seed(0)
    return prepared(timm.create_model("resnet18", pretrained=False, num_classes=CLASSES, **options))


# --- Adversarial attacks ------------------------------------------------------------------------------------------


@pytest.fixture
def foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports scipy's old names
        import foolbox
    return foolbox


ATTACKS = {
    "FGSM": lambda foolbox: foolbox.attacks.LinfFastGradientAttack(),
    "PGD": lambda foolbox: foolbox.attacks.LinfPGD(steps=3),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_foolbox_finds_the_same_adversarial_examples(foolbox, attack):
    original = resnet()

    def attacked(model):
        torch.manual_seed(1)
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return ATTACKS[attack](foolbox)(target, IMAGES, LABELS, epsilons=0.05)

    expected = attacked(original)
    assert not torch.equal(expected[1], IMAGES)
    torch.testing.assert_close(attacked(tune(original)), expected)


class Attack:
    """One gradient step, with the model's mode set before and put back after, as torchattacks does it."""

    def __init__(self, model, model_training):
        self.model = model
        self.model_training = model_training

    def __call__(self, images, labels):
        given = self.model.training
        self.set_mode()
        images = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(images), labels), images)
        self.model.train(given)
        return (images + 0.03 * gradient.sign()).clamp(0, 1).detach()

    def set_mode(self):
        self.model.train(self.model_training)
        for module in self.model.modules():
            if "BatchNorm" in type(module).__name__ or "Dropout" in type(module).__name__:
                module.eval()


@pytest.mark.parametrize("norm_eval", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_training", [False, True])
def test_attacks_that_flip_modes_during_training(norm_eval, training, model_training):
    original = net()
    tuned = tune(original, norm_eval=norm_eval).train(training)
    before, buffers = modes(tuned), copy.deepcopy(dict(tuned.named_buffers()))
    original.train(training)
    torch.testing.assert_close(
        Attack(tuned, model_training)(IMAGES, LABELS), Attack(original, model_training)(IMAGES, LABELS)
    )
    assert modes(tuned) == before
    torch.testing.assert_close(dict(tuned.named_buffers()), buffers)
    if norm_eval and training:
        with_frozen_norms(original)
    assert_equivalent(original, tuned, IMAGES)


# --- Lightning ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Found 20 module")  # in Eval mode: the batch norms
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_lightning_trains_a_tuned_backbone_as_it_trains_the_original():
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, backbone, freeze):
            super().__init__()
            self.backbone = backbone
            self.head = nn.Linear(512, CLASSES)
            self.freeze = freeze
            self.losses = []

        def train(self, mode=True):
            super().train(mode)
            for module in self.modules():
                if self.freeze and isinstance(module, nn.BatchNorm2d):
                    module.training = False
            return self

        def training_step(self, batch, index):
            images, labels = batch
            loss = F.cross_entropy(self.head(self.backbone(images)), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def fit(backbone, freeze):
        torch.manual_seed(1)
        module = Classifier(backbone, freeze).double().train()
        batches = [(data(2, 3, 32, 32, seed=seed), LABELS) for seed in range(2)]
        trainer = lightning.Trainer(
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            precision="64-true",
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        assert trainer.global_step == len(module.losses) == 2
        return module

    original = resnet(drop_path_rate=0.3).train()
    original.reset_classifier(0)
    copied = copy.deepcopy(original)
    tuned = fit(tune(original, norm_eval=True), freeze=False)
    expected = fit(copied, freeze=True)
    assert len(report(tuned).fused) == 20
    torch.testing.assert_close(tuned.losses, expected.losses)
    torch.testing.assert_close(tuned.state_dict(), expected.state_dict())


# --- timm's utilities ---------------------------------------------------------------------------------------------


def test_a_moving_average_of_a_tuned_model():
    original = resnet()
    tuned = tune(original)
    expected, average = (timm.utils.ModelEmaV3(model, decay=0.5) for model in (original, tuned))
    for _ in range(2):
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(1.01)
        expected.update(original)
        average.update(tuned)
    torch.testing.assert_close(average.module.state_dict(), expected.module.state_dict())
    assert_equivalent(expected.module, average.module, IMAGES)
    assert len(report(average.module).fused) == 20
    assert saved_bytes(average.module, IMAGES) == saved_bytes(tuned, IMAGES)
    assert average.module.conv1.weight is not tuned.conv1.weight


#: Whose batch norms become FrozenBatchNorm2d, and FrozenBatchNormAct2d.
FREEZABLE = {"resnet18": 20, "mobilenetv3_small_050": 34}


@pytest.fixture(params=FREEZABLE)
def freezable(request):
    torch.manual_seed(0)
    model = prepared(timm.create_model(request.param, pretrained=False, num_classes=CLASSES))
    return model, FREEZABLE[request.param]


def frozen(model):
    return timm.utils.model.freeze_batch_norm_2d(copy.deepcopy(model))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norms_that_timm_froze_before_tune(freezable, training):
    model, pairs = freezable
    original = frozen(model).train(training)
    tuned = tune(original)
    assert len(report(tuned).fused) == pairs_run(original, IMAGES) == pairs
    assert_equivalent(original, tuned, IMAGES)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norms_that_timm_freezes_in_a_tuned_model(freezable, training):
    model, pairs = freezable
    original = frozen(model).train(training)
    tuned = frozen(tune(model)).train(training)
    assert_equivalent(original, tuned, IMAGES)
    again = tune(tuned)
    assert len(report(again).fused) == pairs
    assert_equivalent(original, again, IMAGES)


def test_one_block_frozen_by_timm_and_thawed():
    original = resnet()
    tuned = tune(original)
    timm.utils.freeze(tuned, "layer1")
    expected = copy.deepcopy(original)
    timm.utils.freeze(expected, "layer1")
    assert_equivalent(expected, tuned, IMAGES)
    timm.utils.unfreeze(tuned, "layer1")
    timm.utils.unfreeze(expected, "layer1")
    assert_equivalent(expected, tuned, IMAGES)


# --- torchvision's feature extraction -----------------------------------------------------------------------------

#: The nodes that are returned, and the number of pairs before them.
EXTRACTED = {
    "resnet18": (models.resnet18, ["layer2", "layer4.1.bn2", "fc"], 20),
    "efficientnet_b0": (
        partial(models.efficientnet_b0, dropout=0.3, stochastic_depth_prob=0.5),
        ["features.3", "features.6.2", "classifier"],
        49,
    ),
    "the output of a convolution": (models.resnet18, ["layer1.0.conv1", "layer2.0.bn1"], 5),
}


@pytest.fixture(params=with_slow(EXTRACTED, {"efficientnet_b0"}))
def extracted(request):
    torch.manual_seed(0)
    build, nodes, pairs = EXTRACTED[request.param]
    return prepared(build(weights=None, num_classes=CLASSES)), nodes, pairs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_feature_extractor_that_is_tuned(extracted, training):
    """It holds two graphs, and swaps them as its mode changes."""
    model, nodes, pairs = extracted
    original = create_feature_extractor(model, nodes).eval()
    tuned = tune(original, norm_eval=True).train(training)
    with_frozen_norms(original) if training else original.eval()
    assert len(report(tuned).fused) == pairs_run(original, IMAGES) == pairs
    assert_equivalent(original, tuned, IMAGES)
    assert saved_bytes(tuned, IMAGES) < saved_bytes(original, IMAGES)


def test_a_feature_extractor_goes_on_swapping_its_graphs(extracted):
    model, nodes, _ = extracted
    original = create_feature_extractor(model, nodes).eval()
    tuned = tune(original)
    for training in (True, False, True):
        assert_equivalent(original.train(training), tuned.train(training), IMAGES)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@in_train_mode
def test_a_feature_extractor_of_a_tuned_model(extracted, training):
    model, nodes, pairs = extracted
    original = create_feature_extractor(model, nodes).train(training)
    of_tuned = create_feature_extractor(tune(model), nodes).train(training)
    assert_equivalent(original, of_tuned, IMAGES)
    again = tune(of_tuned.eval(), norm_eval=True)
    assert len(report(again).fused) == pairs
    assert_equivalent(with_frozen_norms(original), again.train(), IMAGES)


@pytest.mark.parametrize("extractor", [create_feature_extractor, IntermediateLayerGetter])
def test_an_extractor_of_a_tuned_model_tells_what_it_takes_apart(extractor):
    tuned = tune(prepared(models.resnet18()))
    extracted = extractor(tuned, {"layer1": "features"})
    assert "bn1" in {skip.batch_norm for skip in report(extracted).skipped if "extract first" in skip.detail}
    assert report(tuned).skipped == report(tuned.layer1).skipped == []
    again = tune(extracted)
    assert report(again).skipped == []
    assert len(report(again).fused) == 5
    assert_equivalent(extracted, again, IMAGES)


# --- Adapters -----------------------------------------------------------------------------------------------------


def with_lora(model):
    """The model with peft's adapters on its blocks' convolutions, in place, but for those of shortcuts."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=r"layer\d\.\d\.conv\d", init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model).eval()


@pytest.mark.slow
@pytest.mark.parametrize("adapters_first", [True, False])
def test_adapters_on_convolutions(adapters_first):
    plain = resnet()
    adapted = with_lora(copy.deepcopy(plain))
    tuned = tune(adapted) if adapters_first else with_lora(tune(plain))
    # What the adapter adds to comes before the batch norm: these are no pairs, and no longer counted as such.
    told = report(tuned)
    reason = "NOT_AFTER_CONVOLUTION" if adapters_first else "CHANGED_SINCE"
    assert len(told.fused) == 4
    assert {skip.reason.name for skip in told.skipped} == {reason}
    assert len(told.skipped) == 16
    assert_equivalent(adapted, tuned, IMAGES)
    assert saved_bytes(tuned, IMAGES) < saved_bytes(adapted, IMAGES)
