"""Where the profiler says that a step's time goes."""

import pytest
import torch
from models import Pair, data, prepared
from torch import nn

from bench.harness.steps import training_step
from bench.tools import profiles
from convbn_fx import tune


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("_FusedConvolution", "Python of fused pairs"),
        ("_FusedConvolutionBackward", "Python of fused pairs"),
        ("convbn_fx::conv_batch_norm", "Python of fused pairs"),
        ("torch::autograd::CppNode<convbn_fx::ConvBatchNorm>", "Python of fused pairs"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_slow_conv2d_forward", "convolutions"),
        ("aten::conv2d", "convolutions"),
        ("aten::native_batch_norm_backward", "batch norms"),
        ("aten::sum", "sums and products"),
        ("aten::mul_", "sums and products"),
        ("aten::relu_", "other operators"),
        ("autograd::engine::evaluate_function: _FusedConvolutionBackward", "other operators"),
    ],
)
def test_part_of(operator, part):
    assert profiles.part_of(operator) == part


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # PyTorch 2.11
def test_tune_has_no_batch_norms_and_eval_no_fused_pairs():
    model = prepared(Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.float32)
    batch = data(2, 3, 8, 8).float()
    of_eval = profiles.where_time_goes(training_step(model, batch))
    of_tune = profiles.where_time_goes(training_step(tune(model), batch))
    assert of_eval.keys() == of_tune.keys() == {*dict(profiles.PARTS), profiles.BETWEEN}
    assert of_eval["batch norms"] > 0 == of_tune["batch norms"]
    assert of_tune["Python of fused pairs"] > 0 == of_eval["Python of fused pairs"]
    assert of_eval["convolutions"] > 0 < of_tune["convolutions"]
