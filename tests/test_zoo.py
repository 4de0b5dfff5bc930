"""One architecture of each of timm's families with batch norms: every pair fused, every number the same."""

import pytest
import timm
import torch
from models import prepared, with_slow
from torch import nn

from bench.tools.structure import count_fused, count_pairs, main, on_meta
from convbn_fx import tune

#: Each module of timm's: its smallest architecture with a pair, and the smallest images that it takes (of 64, 96, ...).
FAMILIES = {
    "byoanet": ("eca_botnext26ts_256", 256),
    "byobnet": ("test_byobnet", 64),
    "cpubone": ("cpubone_nano", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m1", 64),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_a", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 64),
    "maxxvit": ("test_coatnet", 160),
    "mobilenetv3": ("lcnet_035", 64),
    "mobilevit": ("mobilevitv2_050", 64),
    "nasnet": ("nasnetalarge", 64),
    "nextvit": ("nextvit_small", 64),
    "pnasnet": ("pnasnet5large", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m0_9", 64),
    "res2net": ("res2net50_48w_2s", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 64),
    "tiny_vit": ("tiny_vit_11m_224", 64),
    "tresnet": ("tresnet_m", 64),
    "vgg": ("vgg11_bn", 64),
    "visformer": ("visformer_tiny", 224),
    "vision_transformer_hybrid": ("vit_small_resnet50d_s16_224", 224),
    "volo": ("volo_d1_224", 224),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_medium_24_p8_224", 64),
}

#: Those whose graphs take seconds to build.
SLOW = {
    *("cpubone", "densenet", "efficientformer_v2", "efficientvit_mit", "efficientvit_msra"),
    *("fastvit", "ghostnet", "hrnet", "iformer", "inception_resnet_v2", "inception_v3"),
    *("inception_v4", "levit", "lowformer", "mobilevit", "nasnet", "nextvit", "pnasnet"),
    *("repghost", "repvit", "shvit", "tiny_vit", "tresnet", "vision_transformer_hybrid", "volo"),
    *("xception", "xcit"),
}


@pytest.mark.parametrize("family", with_slow(FAMILIES, SLOW))
def test_every_pair_is_tuned(family):
    model, images = on_meta(FAMILIES[family][0])
    pairs = count_pairs(model, images)
    assert pairs > 0
    assert count_fused(model, images, compiled=False) == pairs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_is_fused_in_compiled_graphs(family):
    model, images = on_meta(FAMILIES[family][0])
    assert count_fused(model, images, compiled=True) == count_pairs(model, images)


def test_no_family_is_left_out():
    """A family is a module of timm's that has an architecture with a batch norm."""
    modules = {timm.models._registry._model_to_module[name] for name, _ in FAMILIES.values()}
    assert modules == set(FAMILIES)
    assert set(FAMILIES) > SLOW


def test_the_whole_zoo_has_a_command(capsys):
    assert main(["test_resnet"]) == 0
    assert "15 pairs in 1 models; not all or too many in 0: none" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family):
    name, size = FAMILIES[family]
    torch.manual_seed(0)
    model = prepared(timm.create_model(name))
    # Larger ones drive some attention into saturation, where even Eval mode's own rounding errors grow beyond 1e-9.
    images = 0.1 * torch.randn(2, model.default_cfg["input_size"][0], size, size, dtype=torch.float64)
    tuned = tune(model)  # before a call in which some models cache tensors that have a history
    expected, actual = observed(model, images), observed(tuned, images)
    assert expected.keys() == actual.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, value in expected.items():
        # A gradient that is zero but for rounding has the network's gradients for its scale.
        allowed = 1e-9 * value.abs().max() + 1e-13 * largest
        assert (actual[key] - value).abs().max() <= allowed, key


def observed(model: nn.Module, images):
    """The output and every gradient of one call."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    output = model(images)
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), "input": images.grad} | {
        name: gradient.clone() for name, gradient in gradients.items() if gradient is not None
    }
