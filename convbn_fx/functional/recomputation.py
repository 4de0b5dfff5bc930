"""What a compiler is told about the fused parameters: to compute them again in the backward pass, not to save them.

Left to itself PyTorch's partitioner saves them, because the backward pass reads them as they lie in memory; that is a
weight more for every pair. The tag is that of `torch.utils.checkpoint`'s selective checkpointing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.fx.traceback
from torch.utils.checkpoint import CheckpointPolicy


@contextmanager
def recomputed_in_backward() -> Iterator[None]:
    """A context in which the operations that AOT Autograd captures are tagged."""
    tags: dict[str, Any] = torch.fx.traceback.current_meta  # of the node that is being run
    if "recompute" in tags:  # in a region that is recomputed as a whole
        yield
        return
    tags |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}
    try:
        yield
    finally:
        del tags["recompute"], tags["ac_graph_id"]
