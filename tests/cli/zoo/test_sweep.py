"""`convbn-fx sweep` as its users run it: in a process of its own, with models that crash, hang and eat memory."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from zoo_models import SLOW

from convbn_fx.cli.zoo import isolation, results, running
from convbn_fx.cli.zoo.measuring import Settings, measure
from convbn_fx.cli.zoo.results import Level, Row, Status

TESTS = Path(__file__).parents[2]


def command(*arguments):
    return [sys.executable, "-m", "convbn_fx", "sweep", *map(str, arguments)]


def environment():
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(*arguments, status=0, cwd=None):
    """Runs a sweep to its end."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        timeout=240,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


_STARTED = []


def started(*arguments):
    """A sweep that is under way."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    _STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _no_sweep_outlives_its_test():
    yield
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.communicate()  # closes its pipes, which the next test would be blamed for


def suite_of(folder, names):
    suite = folder / "suite.txt"
    suite.write_text("# models of the tests\n\n" + "".join(f"{name}\n" for name in names))
    return suite


def until(condition, seconds=120):
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def finished_lines(path):
    return path.read_text().split("\n")[1:-1] if path.exists() else []


def family_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def called(processes, word):
    """Those of some processes whose command has a word in it, and that have not ended."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [process] if word in " ".join(process.cmdline()) else []
    return found


def alive(processes):
    """Those of some processes that have not ended."""
    found = []
    for process in processes:
        try:
            found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.NoSuchProcess:
            continue
    return found


# --- One sweep over models of every kind ------------------------------------------------------------------------------

#: The one that takes as long as it may comes first, beside all others.
ODD = [
    *("hanging", "small", "with_inputs", "functions", "without_batch_norm", "chatty", "broken", "no_model"),
    *("refusing", "killed", "aborting", "exiting", "hungry", "not_there"),
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The output and the rows, by the short name, of a numeric sweep over all odd models."""
    folder = tmp_path_factory.mktemp("odd")
    suite = suite_of(
        folder, [f"zoo_models:{name}" for name in ODD] + ["timm:not_there", "nowhere:model", "nonsense"]
    )
    out = folder / "results.csv"
    limits = ["--timeout", 40, "--memory-limit", "1500MB"]
    done = run("--suite", suite, "--level", "numeric", "--jobs", 2, "--out", out, *limits)
    return done, {row.name.removeprefix("zoo_models:"): row for row in results.read(out)}


def test_every_model_has_a_row(odd):
    _, rows = odd
    assert rows.keys() == {*ODD, "timm:not_there", "nowhere:model", "nonsense"}


def test_the_file_is_sorted_in_the_end(odd):
    _, rows = odd
    names = [row.name for row in rows.values()]
    assert names == sorted(names)


def test_a_model_that_is_well(odd):
    row = odd[1]["small"]
    assert (row.status, row.level, row.detail) == (Status.PASS, Level.NUMERIC, "")
    assert (row.family, row.batch_norms, row.fused) == ("zoo_models", 3, 2)
    assert row.refused == {"NOT_AFTER_CONVOLUTION": 1}
    assert row.parameters == 3 * 8 * 9 + 8 + 8 * 4 * 9 + 4 + 2 * (3 + 8 + 4)
    assert row.input == "2x3x224x224"
    assert row.bytes_deploy <= row.bytes_tune < row.bytes_eval
    assert 0 < row.output_error < 1e-12
    assert 0 < row.gradient_error < 1e-12
    assert 0 < row.float32_error_tune < 1e-4
    assert 0 < row.float32_error_eval < 1e-4
    assert row.seconds > 0


def test_inputs_of_the_users_own(odd):
    row = odd[1]["with_inputs"]
    assert (row.status, row.fused, row.input) == (Status.PASS, 1, "5x4")
    # The float32 input and output of the layer; tuned, the output is not kept.
    assert row.bytes_eval - row.bytes_tune >= 5 * 6 * 4


def test_functions_are_fused_too(odd):
    row = odd[1]["functions"]
    assert (row.status, row.batch_norms, row.fused) == (Status.PASS, 0, 1)
    assert row.gradient_error < 1e-12


def test_without_batch_norms_there_is_nothing_to_measure(odd):
    row = odd[1]["without_batch_norm"]
    assert (row.status, row.batch_norms, row.fused, row.refused) == (Status.PASS, 0, 0, {})
    assert row.bytes_eval is None
    assert row.gradient_error is None


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("broken", Status.UNBUILDABLE, "RuntimeError: no such"),
        ("no_model", Status.UNBUILDABLE, "made a int"),
        ("not_there", Status.UNBUILDABLE, "zoo_models has no 'not_there'"),
        ("nowhere:model", Status.UNBUILDABLE, "no module 'nowhere'"),
        ("nonsense", Status.UNBUILDABLE, "'nonsense' is no model's name"),
        ("timm:not_there", Status.UNBUILDABLE, "no model timm:not_there"),
        ("refusing", Status.ERROR, "ValueError: never, on any input"),
        ("killed", Status.CRASH, "killed by SIGKILL"),
        ("aborting", Status.CRASH, "killed by SIGABRT"),
        ("exiting", Status.CRASH, "exit status 3"),
        ("hanging", Status.TIMEOUT, "longer than 40 s"),
        ("hungry", Status.MEMORY, "above 1.50 GB"),
    ],
)
def test_what_goes_wrong_is_a_row(odd, name, status, detail):
    done, rows = odd
    assert (rows[name].status, rows[name].level) == (status, Level.NUMERIC)
    assert detail in rows[name].detail
    assert rows[name].name in done.stderr  # it is named while the sweep runs, too


def test_what_models_print_is_kept_to_themselves(odd):
    done, rows = odd
    assert rows["chatty"].status is Status.PASS
    assert "a line on" not in done.stdout + done.stderr


def test_what_a_process_sends_as_it_ends_is_read(monkeypatch):
    """It may send, and end, after its pipe is looked at and before its exit status is."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    class Process:
        sentinel = ours

        @property
        def exitcode(self):
            theirs.send(isolation.Ending(value="sent"))
            return 0

    monkeypatch.setattr(isolation, "wait", lambda *_: [])
    with ours, theirs:
        assert isolation._watch(Process(), ours, timeout=None, memory_limit=None, stop=None).value == "sent"


def test_the_summary(odd):
    done, _ = odd
    for words in ("crash", "unbuildable", "timeout", "memory", "NOT_AFTER_CONVOLUTION", "zoo_models"):
        assert words in done.stdout
    assert re.search(
        r"pairs fused\s+6", done.stdout
    )  # 2 of small, 2 of chatty, 1 of functions, 1 of with_inputs


# --- Interrupted, and gone on with ------------------------------------------------------------------------------


def assert_complete(out, names):
    assert [row.name for row in results.read(out)] == sorted(names)
    assert {row.status for row in results.read(out)} == {Status.PASS}


@pytest.fixture
def slow(tmp_path):
    """Arguments of a sweep that takes some seconds, and its results file."""
    out = tmp_path / "results.csv"
    return ["--suite", suite_of(tmp_path, SLOW), "--jobs", 2, "--out", out], out


@pytest.mark.slow
def test_a_killed_sweep_loses_no_row_and_is_gone_on_with(slow):
    arguments, out = slow
    process = started(*arguments)
    until(lambda: len(finished_lines(out)) >= 2)
    family = family_of(process)
    process.kill()
    process.communicate()
    kept = finished_lines(out)
    assert 2 <= len(kept) < len(SLOW)
    until(lambda: not alive(family))
    with out.open("a") as file:
        file.write("zoo_models:slow_0,half a li")  # as a power cut leaves it
    run(*arguments, "--resume")
    assert_complete(out, SLOW)
    assert set(kept) <= set(finished_lines(out))


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_measured(slow):
    arguments, out = slow
    process = started(*arguments)
    until(lambda: len(finished_lines(out)) >= 1)
    family = family_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, errors = process.communicate(timeout=60)
    until(lambda: not alive(family), seconds=30)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    kept = finished_lines(out)
    assert 1 <= len(kept) < len(SLOW)
    run(*arguments, "--resume")
    assert_complete(out, SLOW)
    assert set(kept) <= set(finished_lines(out))


def test_nothing_is_overwritten(slow):
    arguments, out = slow
    out.write_text("precious\n")
    assert "--resume" in run(*arguments, status=2).stderr
    assert "unknown column 'precious'" in run(*arguments, "--resume", status=2).stderr
    assert out.read_text() == "precious\n"


def test_a_finished_sweep_has_nothing_left_to_do(tmp_path):
    out = tmp_path / "results.csv"
    arguments = ["--suite", suite_of(tmp_path, SLOW[:1]), "--jobs", 1, "--out", out]
    run(*arguments)
    before = out.read_bytes()
    run(*arguments, "--resume")
    assert out.read_bytes() == before
    for option, value in (("--level", "numeric"), ("--seed", 1)):
        errors = run(*arguments, "--resume", option, value, status=2).stderr
        assert f"{out} was begun with" in errors
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"level": Level.NUMERIC}, {"seed": 1}, {"batch": 3}, {"side": 64}, {"max_parameters": 9}]
)
def test_what_is_resumed_is_measured_as_before(tmp_path, change):
    out = tmp_path / "results.csv"
    running.begin(out, Settings())
    results.append(out, Row(name="timm:a", status=Status.PASS, level=Level.STRUCTURE))
    assert running.begin(out, Settings(), resume=True) == {"timm:a"}
    (key,) = change
    with pytest.raises(running.Unusable, match=f"was begun with {key} "):
        running.begin(out, Settings(**change), resume=True)


def test_what_was_stopped_is_measured_again_if_asked_for(tmp_path):
    out = tmp_path / "results.csv"
    running.begin(out, Settings())
    for status in Status:
        results.append(out, Row(name=f"timm:{status}", status=status, level=Level.STRUCTURE))
    everything = {f"timm:{status}" for status in Status}
    assert running.begin(out, Settings(), resume=True) == everything
    stopped = {"timm:crash", "timm:timeout", "timm:memory"}
    assert running.begin(out, Settings(), resume=True, retry=True) == everything - stopped
    assert {row.name for row in results.read(out)} == everything - stopped


def test_two_sweeps_do_not_write_one_file(tmp_path):
    out = tmp_path / "results.csv"
    with running.alone_with(out):
        errors = run("--suite", suite_of(tmp_path, SLOW[:1]), "--out", out, status=2).stderr
        assert f"another sweep is writing {out}" in errors
    assert not out.exists()


def test_large_models_are_measured_in_structure_alone():
    large = measure("zoo_models:small", Settings(level=Level.NUMERIC, max_parameters=100))
    assert (large.status, large.level, large.gradient_error) == (Status.PASS, Level.STRUCTURE, None)
    assert large.fused == 2
    small = measure("zoo_models:with_inputs", Settings(level=Level.NUMERIC, max_parameters=100))
    assert small.level is Level.NUMERIC


def test_numbers_are_those_of_fused_pairs_however_small_the_images(real_costs):
    row = measure("timm:resnetv2_18", Settings(level=Level.NUMERIC))
    assert row.gradient_error > 0  # apart, all would be the same to the bit


def test_bytes_are_those_of_accelerators_whatever_a_constructor_needs(real_costs):
    """A CPU's cost rule would keep the outputs of this one's small layers; its constructor reads values of tensors."""
    row = measure("torchvision:regnet_x_400mf", Settings())
    assert (row.status, row.bytes_tune) == (Status.PASS, row.bytes_deploy)


def test_a_seed_is_a_sweep():
    """The same numbers from the same seed, others from another."""
    once, again, other = (
        measure("zoo_models:small", Settings(level=Level.NUMERIC, seed=seed)) for seed in (0, 0, 1)
    )
    assert once == again
    assert once.gradient_error != other.gradient_error


# --- On a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path):
    """The address of a Dask scheduler with two workers, each a process of its own on this machine."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-dashboard"]
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": environment(),
        "cwd": tmp_path,
    }
    processes = [
        subprocess.Popen([*dask, "--port", "0", "--no-dashboard", "--scheduler-file", str(file)], **quiet),
        *(
            subprocess.Popen([*worker, "--name", name, "--scheduler-file", str(file)], **quiet)
            for name in ("one", "two")
        ),
    ]
    try:
        until(lambda: file.exists() and '"address"' in file.read_text())
        yield re.search(r'"address": "([^"]+)"', file.read_text())[1], processes
    finally:
        family = [child for each in processes if each.poll() is None for child in family_of(each)]
        for process in [*family, *processes]:
            process.kill()
        for process in processes:
            process.wait()


def has_forked(worker):
    """Whether a worker has models measured: they are forked from a server of its own."""
    return bool(called(family_of(worker), "forkserver"))


@pytest.mark.slow
def test_a_cluster_of_two_workers(cluster, tmp_path):
    address, (_, *workers) = cluster
    out = tmp_path / "results.csv"
    names = [*SLOW, "zoo_models:small", "zoo_models:killed"]
    arguments = [
        "--suite",
        suite_of(tmp_path, names),
        "--backend",
        "dask",
        "--address",
        address,
        "--out",
        out,
    ]
    process = started(*arguments, "--level", "numeric")
    busy = set()
    while process.poll() is None:
        busy |= {worker.pid for worker in workers if has_forked(worker)}
        time.sleep(0.2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert busy == {worker.pid for worker in workers}
    rows = {row.name: row for row in results.read(out)}
    assert rows.keys() == set(names)
    assert rows.pop("zoo_models:killed").status is Status.CRASH
    assert {name: row.detail for name, row in rows.items() if row.status is not Status.PASS} == {}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
def test_a_cluster_of_rays_own(tmp_path):
    out = tmp_path / "results.csv"
    names = ["zoo_models:small", "zoo_models:killed", *SLOW[:4]]
    run("--suite", suite_of(tmp_path, names), "--backend", "ray", "--jobs", 2, "--out", out)
    found = {row.name: row.status for row in results.read(out)}
    assert found == dict.fromkeys(names, Status.PASS) | {"zoo_models:killed": Status.CRASH}


def test_no_cluster_at_an_address(tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "2s")
    suite, out = suite_of(tmp_path, SLOW[:1]), tmp_path / "results.csv"
    arguments = ["--suite", suite, "--out", out, "--backend", "dask", "--address", "tcp://127.0.0.1:9"]
    errors = run(*arguments, status=2).stderr
    assert "no Dask scheduler at tcp://127.0.0.1:9" in errors


def test_without_the_engine(tmp_path):
    hidden = "import sys; sys.modules['ray'] = None; from convbn_fx.__main__ import main; main()"
    suite, out = suite_of(tmp_path, SLOW[:1]), tmp_path / "results.csv"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "sweep", "--suite", suite, "--out", out, "--backend", "ray"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'convbn-fx[ray]'" in done.stderr
    assert "Traceback" not in done.stderr
