"""A run that is killed, stopped or moved goes on as if nothing had happened."""

import re
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest
from training_runs import files, losses, metrics, wait_for_steps, workplace

# Every weight as it is, so that an export shows the masters.
MASTERS = ("--export-storage.experts", "float32", "--export-storage.linears", "float32")
MASTERS += ("--export-storage.matrices", "float32", "--export-storage.norms", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing interrupts."""
    output = place.directory / "whole"
    place.run("--output", str(output), "--export", str(place.directory / "whole-export"), *MASTERS)
    return output


def state(output, step):
    """Everything in a checkpoint, by name."""
    found = ocp.StandardCheckpointer().restore(output / "checkpoints" / str(step) / "state")
    return {name: np.asarray(array) for name, array in found.items()}


def same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


def test_it_learns(whole):
    found = losses(whole)
    assert len(found) == 10
    assert found[-1] < found[0] - 0.5
    assert [line["step"] for line in metrics(whole) if "eval_loss" in line] == [0, 4, 8, 10]
    assert losses(whole, "eval_loss")[-1] < losses(whole, "eval_loss")[0] - 0.3
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["10", "6", "9"]
    assert (whole / "loss.png").stat().st_size > 1000


def test_killed_at_any_moment_it_goes_on_bit_for_bit(place, whole):
    output, export = place.directory / "killed", place.directory / "killed-export"
    arguments = ("--output", str(output), "--export", str(export), *MASTERS)
    for step in (2, 4, 7):  # before the first checkpoint, right after it, after another
        process = place.start(*arguments)
        wait_for_steps(process, output, step)
        process.kill()
        process.communicate()
    said = place.run(*arguments)
    assert re.search(r"going on from step [36] of 10", said)  # whichever was complete at the last kill
    assert metrics(output) == metrics(whole)
    same_state(state(output, 10), state(whole, 10))
    assert files(export) == files(place.directory / "whole-export")


def test_signals_save_and_stop(place, whole):
    output, done = place.directory / "stopped", 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = place.start("--output", str(output))
        wait_for_steps(process, output, done + 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=1800)
        assert process.returncode == code, err
        assert f"{number.name}: stopped after step" in err
        done = metrics(output)[-1]["step"] + 1
        assert (output / "checkpoints" / str(done)).is_dir()
    assert f"going on from step {done} of 10" in place.run("--output", str(output))
    assert metrics(output) == metrics(whole)
    same_state(state(output, 10), state(whole, 10))


def test_on_another_mesh_it_goes_on_to_rounding(place, whole):
    output = place.directory / "moved"
    place.run("--output", str(output), "--steps", "4")
    mesh = ("--mesh", "data=2,expert=2,tensor=2", "--fsdp", "--simulate-devices", "8")
    said = place.run("--output", str(output), *mesh)
    assert "mesh: None so far, 'data=2,expert=2,tensor=2' now (rounds differently)" in said
    # float32 sums in another order, through six updates that normalise directions of small gradients.
    np.testing.assert_allclose(losses(output), losses(whole), rtol=2e-3)
    assert losses(output)[:4] == losses(whole)[:4]
    np.testing.assert_allclose(losses(output)[4], losses(whole)[4], rtol=1e-5)


def test_another_configuration_is_refused(place, whole):
    output = place.directory / "changed"
    place.run("--output", str(output), "--steps", "3")
    before = metrics(output)
    said = place.run("--output", str(output), "--optimizer.learning-rate", "1e-3", "--seed", "5", code=1)
    assert "optimizer.learning_rate: 0.005 so far, 0.001 now" in said
    assert "seed: 0 so far, 5 now" in said
    assert "--accept-changes" in said
    assert metrics(output) == before
    said = place.run("--output", str(output), "--data.batch-size", "4", code=1)
    assert "batch_size is 4 now, 8 in the saved run" in said
    said = place.run("--output", str(output), "--optimizer.learning-rate", "1e-3", "--accept-changes", "--steps", "5")
    assert "changed: optimizer.learning_rate: 0.005 so far, 0.001 now" in said
    assert metrics(output)[: len(before) - 1] == before[:-1]
    assert losses(output, "learning_rate")[3] == np.float32(1e-3)
