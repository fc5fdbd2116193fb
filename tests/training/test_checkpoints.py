"""Checkpoints of a run: what was there when it was saved comes back, or an error says why not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_v4 import make_mesh
from deepseek_v4.checkpoint import CheckpointError
from deepseek_v4.training.checkpoints import Checkpoints


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "trained": ({"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), "frozen": None},),
        "bytes": jnp.asarray(rng.integers(0, 256, (4, 4)), jnp.uint8),
    }


def described(state, sharding=None):
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=(sharding and sharding(a)) or one), state
    )


def test_what_was_saved_comes_back_with_its_meta_data(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest is None
        for step in (3, 5, 9):
            checkpoints.save(step, make_state(step), {"data": {"step": step}, "note": "ä"})
        checkpoints.wait()
        assert checkpoints.steps == [5, 9]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest == 9
        assert checkpoints.meta(5) == {"data": {"step": 5}, "note": "ä"}
        for step in (5, 9):
            found = checkpoints.restore(step, described(make_state()))
            jax.tree.map(np.testing.assert_array_equal, found, make_state(step))
            assert found["trained"][0]["frozen"] is None


def test_a_save_goes_on_while_its_arrays_are_donated(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda a: a * 2 + 1, state)

    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    expected = np.array(state["w"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(10):
            state = step(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(1, described(state))["w"], expected)


def test_any_mesh_reads_what_another_wrote(tmp_path):
    def on(mesh):
        def sharding(a):
            return NamedSharding(
                mesh, PartitionSpec(("data", "expert")) if a.ndim and a.shape[0] == 8 else PartitionSpec()
            )

        return sharding

    first, second = (on(make_mesh(mesh)) for mesh in ("data=8", "data=2,expert=2,tensor=2"))
    state = jax.tree.map(lambda a: jax.device_put(a, first(a)), make_state())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        wanted = described(state, second)
        found = checkpoints.restore(1, wanted)
    jax.tree.map(np.testing.assert_array_equal, found, make_state())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


class TestErrors:
    @pytest.fixture
    def saved(self, tmp_path):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(1), {})
            checkpoints.save(2, make_state(2), {})
        return tmp_path

    def test_another_structure_is_named(self, saved):
        wanted = described(make_state())
        wanted["trained"][0]["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
        wanted["more"] = wanted.pop("bytes")
        with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError) as error:
            checkpoints.restore(2, wanted)
        assert "2: not a checkpoint of this configuration" in str(error.value)
        assert error.value.problems == (
            "bytes: this run has None, the checkpoint ((4, 4), 'uint8')",
            "more: this run has ((4, 4), 'uint8'), the checkpoint None",
            "trained.0.w: this run has ((8, 4), 'float32'), the checkpoint ((8, 16), 'float32')",
        )

    def test_leftovers_of_a_killed_save_are_no_checkpoint(self, saved):
        left = saved / "3.orbax-checkpoint-tmp"
        left.mkdir()
        (left / "part").write_bytes(b"x")
        with Checkpoints(saved) as checkpoints:
            assert checkpoints.steps == [1, 2]
            checkpoints.save(3, make_state(3), {})
        assert not left.exists()
        assert (saved / "3").is_dir()

    def test_a_step_is_not_saved_twice(self, saved):
        with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match="expected a step above 2"):
            checkpoints.save(2, make_state(2), {})

    def test_what_cannot_be_read_says_which_can(self, saved):
        for file in (saved / "2").rglob("*"):
            if file.is_file() and file.name != "_CHECKPOINT_METADATA":
                file.write_bytes(b"")
        with Checkpoints(saved) as checkpoints:
            with pytest.raises(CheckpointError, match=r"2: cannot be read .*to go on from step 1, delete it"):
                checkpoints.meta(2)
            with pytest.raises(CheckpointError, match="2: cannot be read"):
                checkpoints.restore(2, described(make_state()))
