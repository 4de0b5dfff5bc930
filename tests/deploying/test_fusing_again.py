"""A deployed model and the libraries' own ways to fold batch norms, which look for what is no longer there."""

import pytest
import torch
from models import data, prepared
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from convbn_fx import deploy, report
from convbn_fx.testing import randomize_batchnorms


def test_pytorchs_own_function():
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1)))
    deployed = deploy(model)
    again = fuse_conv_bn_eval(deployed[0], deployed[1])
    torch.testing.assert_close(again(x := data(2, 3, 6, 6)), model(x))
    assert deployed.state_dict().keys() == {"0.weight", "0.bias"}
    assert fuse_conv_bn_eval(*deployed.to("meta")).weight.is_meta


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n"])
def test_ultralytics(name):
    ultralytics = pytest.importorskip("ultralytics")
    torch.manual_seed(0)
    model = ultralytics.YOLO(f"{name}.yaml").model.double().eval()
    randomize_batchnorms(model)
    deployed, x = deploy(model), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert all(pair.is_baked for pair in report(deployed).fused)
    with torch.no_grad():
        expected = model(x)[0]
        torch.testing.assert_close(deployed(x)[0], expected)
        torch.testing.assert_close(deployed.fuse(verbose=False)(x)[0], expected)


def test_a_formula_that_forgets_the_bias_raises():
    """As that of RepVGG: it would leave out what the convolution has got of the batch norm."""
    conv = pytest.importorskip("ultralytics.nn.modules.conv")
    model = prepared(conv.RepConv(3, 4))
    deployed = deploy(model)
    torch.testing.assert_close(deployed(x := data(2, 3, 6, 6)), model(x))
    with pytest.raises(TypeError, match="NoneType"):
        deployed.fuse_convs()
