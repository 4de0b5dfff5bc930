"""What distributes a model over processes works on the result of `tune`.

The cases are in `distributed_worker.py`. torchrun runs all that were asked for at once, on two processes; here each
shows what became of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from distributed_worker import CASES

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")
RANKS = 2
SECONDS = 240


def launched(folder, names):
    """Runs the cases named with torchrun; returns what it printed."""
    asked = folder / "names.json"
    asked.write_text(json.dumps(names), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    process = subprocess.Popen(
        [sys.executable, *launch, str(WORKER), str(folder), str(asked)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        return f"not done after {SECONDS} seconds\n{process.communicate(timeout=30)[0]}"


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    """What each rank says of each case that this session asks for, and what torchrun printed."""
    folder = tmp_path_factory.mktemp("distributed")
    asked = [item for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    names = [f"{item.originalname.removeprefix('test_')}: {item.callspec.params['case']}" for item in asked]
    output = launched(folder, names)
    files = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for file in files], output


def check(outcomes, name):
    """Fails with the traceback of the first rank that has one."""
    of_ranks, output = outcomes
    for rank, of_rank in enumerate(of_ranks):
        if name in of_rank and of_rank[name]["error"] is not None:
            pytest.fail(f"rank {rank}: {of_rank[name]['error']}", pytrace=False)
    for rank, of_rank in enumerate(of_ranks):
        if name not in of_rank:
            pytest.fail(f"rank {rank} did not come to the end of this case\n{output}", pytrace=False)


@pytest.mark.parametrize("case", CASES["ddp"])
def test_ddp(outcomes, case):
    check(outcomes, f"ddp: {case}")


@pytest.mark.parametrize("case", CASES["fsdp2"])
def test_fsdp2(outcomes, case):
    check(outcomes, f"fsdp2: {case}")


@pytest.mark.parametrize("case", CASES["sync_batch_norm"])
def test_sync_batch_norm(outcomes, case):
    check(outcomes, f"sync_batch_norm: {case}")


@pytest.mark.parametrize("case", CASES["checkpointing"])
def test_checkpointing(outcomes, case):
    check(outcomes, f"checkpointing: {case}")


@pytest.mark.parametrize("case", CASES["checkpoints"])
def test_checkpoints(outcomes, case):
    check(outcomes, f"checkpoints: {case}")


@pytest.mark.parametrize("case", CASES["effect"])
def test_effect(outcomes, case):
    check(outcomes, f"effect: {case}")
