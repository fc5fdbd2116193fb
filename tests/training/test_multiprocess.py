"""Two processes of four devices train as one process of eight, save together, and stop together."""

import re
import signal
import socket

import numpy as np
import pytest
from training_runs import losses, metrics, wait_for_steps, workplace

from deepseek_v4 import Placement, make_mesh
from deepseek_v4.distributed import Processes, batch_share, start

MESH = ("--mesh", "data=4,expert=2", "--fsdp")
TRAVEL = ("--mesh", "data=2,expert=2,tensor=2", "--fsdp", "--expert-parallel")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    # The same arithmetic in a third of the compile time: of several processes only the first one's is kept for others.
    return workplace(tmp_path_factory.mktemp("processes"), "--xla_backend_optimization_level=0")


def start_two(place, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ("--coordinator", f"localhost:{port}", "--num-processes", "2", "--simulate-devices", "4", *arguments)
    return [place.start(*common, "--process-id", str(index)) for index in range(2)]


def finish(processes, code=0):
    """What each of them says; all must end with ``code``."""
    said = [process.communicate(timeout=1800) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return [out + err for out, err in said]


@pytest.mark.parametrize("mesh", [MESH, pytest.param(TRAVEL, marks=pytest.mark.slow)], ids=["FSDP", "and experts"])
def test_two_processes_train_as_one(place, mesh):
    name = f"{len(mesh)}-"
    one, two = place.directory / f"{name}one", place.directory / f"{name}two"
    exports = [place.directory / f"{name}{which}-export" for which in ("one", "two")]
    place.run("--output", str(one), "--export", str(exports[0]), *mesh, "--simulate-devices", "8")
    first, second = finish(start_two(place, "--output", str(two), "--export", str(exports[1]), *mesh))
    assert "2 processes" in first
    assert "step 10 of 10, complete" in first
    assert "training data" not in second  # only one of them speaks
    assert "held out" not in second
    assert [line["step"] for line in metrics(two)] == [line["step"] for line in metrics(one)]
    # Sums over devices are taken by another library, in another order: float32 roundings.
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-5)
    np.testing.assert_allclose(losses(two, "eval_loss"), losses(one, "eval_loss"), rtol=2e-5)
    assert [p.name for p in sorted(exports[1].iterdir())] == [p.name for p in sorted(exports[0].iterdir())]


def test_sigterm_to_one_stops_both_after_the_same_step(place):
    output = place.directory / "stopped"
    processes = start_two(place, "--output", str(output), *MESH, "--steps", "1000")
    wait_for_steps(processes[0], output, 3)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes, code=143)
    step = int(re.search(r"SIGTERM: stopped after step (\d+) of 1000", first)[1])
    assert (output / "checkpoints" / str(step)).is_dir()
    one_process = ("--simulate-devices", "8", "--steps", str(step + 2))
    said = place.run("--output", str(output), *MESH, *one_process)
    assert f"going on from step {step} of {step + 2}" in said


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        (Processes(num_processes=2), "coordinator, num_processes and process_id go together, found None, 2, None"),
        (Processes(coordinator="here", num_processes=2, process_id=0), "expected HOST:PORT, found 'here'"),
        (Processes(coordinator="here:1", num_processes=2, process_id=2), "process_id: expected 0 to 1"),
    ],
)
def test_settings_that_do_not_go_together(processes, said):
    with pytest.raises(ValueError, match=said):
        start(processes)


def test_one_process_has_every_row():
    assert batch_share(None) == (0, 1)
    assert batch_share(Placement(make_mesh("data=4,expert=2"))) == (0, 1)
