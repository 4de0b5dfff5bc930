"""Models that several of these files tune."""

import pytest
import torch
from blocks import CROSSING
from models import prepared


@pytest.fixture(params=CROSSING)
def crossing(request):
    torch.manual_seed(0)
    return prepared(CROSSING[request.param]())
