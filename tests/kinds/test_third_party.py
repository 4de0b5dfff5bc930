"""transformers' detectors: their frozen batch norms are in the table by a pattern of their names."""

import pytest
import torch
from models import prepared, tuned_with
from torch import nn

from convbn_fx import deploy, report
from convbn_fx.testing import assert_equivalent

transformers = pytest.importorskip("transformers")

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
TRANSFORMER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
}


def on_resnet(name, stages=("stage4",), **options):
    """A detector on transformers' own ResNet, built from a small configuration."""
    backbone = transformers.ResNetConfig(**RESNET, out_features=list(stages))
    return built(
        name, backbone_config=backbone, use_timm_backbone=False, backbone=None, **(TRANSFORMER | options)
    )


def built(name, **options):
    config = getattr(transformers, f"{name}Config")(use_pretrained_backbone=False, **options)
    return getattr(transformers, f"{name}Model")(config)


def rt_detr():
    backbone = transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    return built(
        "RTDetr",
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        num_denoising=0,
        decoder_in_channels=[16, 16, 16],
        **{
            key: value
            for key, value in TRANSFORMER.items()
            if key != "encoder_ffn_dim" and "encoder_a" not in key
        },
    )


STAGES = ("stage2", "stage3", "stage4")
DETECTORS = {
    "DETR": (lambda: on_resnet("Detr"), 12),
    "DETR on timm's ResNet": (
        lambda: built("Detr", use_timm_backbone=True, backbone="resnet18", **TRANSFORMER),
        20,
    ),
    "Table Transformer": (lambda: on_resnet("TableTransformer"), 12),
    "Conditional DETR": (lambda: on_resnet("ConditionalDetr"), 12),
    "Deformable DETR": (lambda: on_resnet("DeformableDetr", STAGES, num_feature_levels=3, d_model=32), 12),
    "RT-DETR": (rt_detr, 57),
}
#: Pairs that `deploy` cannot prove to be used in no other way: code for more feature levels indexes their list.
DOUBTFUL = {"RT-DETR": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_fused_whole(name):
    torch.manual_seed(0)
    make, pairs = DETECTORS[name]
    model = prepared(make())
    with (
        torch.no_grad()
    ):  # where they sample, and which queries they choose, is not to be decided by rounding
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    frozen = [module for module in model.modules() if type(module).__name__.endswith("FrozenBatchNorm2d")]
    assert frozen
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    tuned = tuned_with(model, pairs)
    assert not report(tuned).skipped
    assert_equivalent(model, tuned, x)
    deployed = deploy(model)
    linked = DOUBTFUL.get(name, 0)  # as `tune` makes them
    assert len(report(deployed).fused) == pairs - linked
    assert [skip.reason.name for skip in report(deployed).skipped] == ["MAY_BE_USED_ELSEWHERE"] * linked
    assert not any(type(module) in set(map(type, frozen)) for module in deployed.modules())
    with torch.no_grad():
        expected, actual = model(x), deployed(x)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9)


def test_they_are_frozen_in_train_mode_too():
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    model = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), DetrFrozenBatchNorm2d(8))).train()
    tuned = tuned_with(model, 1)
    assert_equivalent(model, tuned, torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_one_of_the_name_with_another_forward_is_not_known():
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-3).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1, 1)

    namesake = type(
        "OtherFrozenBatchNorm2d",
        (nn.Module,),
        {
            "__module__": "transformers.models.other.modeling_other",
            "__init__": DetrFrozenBatchNorm2d.__init__,
            "forward": forward,
        },
    )
    model = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), make_with_buffers(namesake)))
    (skip,) = report(tuned_with(model, 0)).skipped
    assert skip.reason.name == "UNKNOWN_BATCH_NORM"


def make_with_buffers(cls):
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name in ("weight", "bias", "running_mean", "running_var"):
        module.register_buffer(name, torch.ones(8))
    return module
