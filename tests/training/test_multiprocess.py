"""Two processes of four devices train as one process of eight, save together, and stop together."""

import re
import signal
import socket

import numpy as np
import pytest
from training_runs import losses, metrics, wait_for_steps, workplace

MESH = ("--mesh", "data=4,expert=2", "--fsdp")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("processes"))


def start_two(place, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ("--coordinator", f"localhost:{port}", "--num-processes", "2", "--simulate-devices", "4", *arguments)
    return [place.start(*common, "--process-id", str(index)) for index in range(2)]


def finish(processes, code=0):
    """What each of them says; all must end with ``code``."""
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return [out + err for out, err in said]


def test_two_processes_train_as_one(place):
    one, two = place.directory / "one", place.directory / "two"
    exports = [place.directory / f"{name}-export" for name in ("one", "two")]
    place.run("--output", str(one), "--export", str(exports[0]), *MESH, "--simulate-devices", "8")
    first, second = finish(start_two(place, "--output", str(two), "--export", str(exports[1]), *MESH))
    assert "2 processes" in first
    assert "step 10 of 10, complete" in first
    assert second.strip() == ""  # only one of them speaks
    assert [line["step"] for line in metrics(two)] == [line["step"] for line in metrics(one)]
    # Sums over devices are taken by another library, in another order: float32 roundings, which Muon's normalisation
    # of small gradients enlarges from step to step.
    np.testing.assert_allclose(losses(two)[:3], losses(one)[:3], rtol=1e-5)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-3)
    np.testing.assert_allclose(losses(two, "eval_loss"), losses(one, "eval_loss"), rtol=2e-3)
    assert [p.name for p in sorted(exports[1].iterdir())] == [p.name for p in sorted(exports[0].iterdir())]

    # One process goes on from what two have saved.
    said = place.run("--output", str(two), *MESH, "--simulate-devices", "8", "--steps", "11")
    assert "going on from step 10 of 11" in said


def test_sigterm_to_one_stops_both_after_the_same_step(place):
    output = place.directory / "stopped"
    processes = start_two(place, "--output", str(output), *MESH, "--steps", "1000")
    wait_for_steps(processes[0], output, 3)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes, code=143)
    step = int(re.search(r"SIGTERM: stopped after step (\d+) of 1000", first)[1])
    assert (output / "checkpoints" / str(step)).is_dir()
    first, _ = finish(start_two(place, "--output", str(output), *MESH, "--steps", str(step + 2)))
    assert f"going on from step {step} of {step + 2}" in first


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-processes", "2"), "coordinator, num_processes and process_id go together"),
        (("--coordinator", "here", "--num-processes", "2", "--process-id", "0"), "expected HOST:PORT, found 'here'"),
        (("--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"), "process_id: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together(place, flags, said):
    assert said in place.run(*flags, code=1)
