"""The files of one item: any Orbax reads them, and parts read back are what was written, however it is cut."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_v4.checkpoint import CheckpointError, orbax_items
from deepseek_v4.checkpoint.orbax_items import crc32c, open_item, read_record, write_item


@dataclasses.dataclass
class _Array:
    array: np.ndarray

    def __post_init__(self):
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, index):
        return self.array[index].copy()


def test_checksum():
    # The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
    assert crc32c(b"123456789") == 0xE3069283


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_of_arrays_in_many_files(data, tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("item") / "a"
    # Small enough for several chunks per file and several files per array.
    monkeypatch.setattr(orbax_items, "_CHUNK_BYTES", data.draw(st.integers(8, 200)))
    monkeypatch.setattr(orbax_items, "PIECE_BYTES", data.draw(st.integers(8, 1000)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    leaves = {}
    for path, dims in ((("ffn", "experts", "w1", "weight"), 3), (("a",), 2), (("b",), 1)):
        shape = data.draw(st.tuples(*[st.integers(1, 9)] * dims))
        dtype = data.draw(st.sampled_from([np.uint8, np.float32, "bfloat16", "float8_e8m0fnu"]))
        leaves[path] = rng.integers(0, 99, shape).astype(jax.numpy.dtype(dtype))
    write_item(directory, {path: _Array(array) for path, array in leaves.items()}, {"who": "me"})
    stored = open_item(directory)
    assert read_record(directory) == {"who": "me"}
    assert set(stored) == set(leaves)
    for path, array in leaves.items():
        found = stored[path]
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        for _ in range(3):
            bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in array.shape]
            index = tuple(slice(*bound) for bound in bounds)
            rows = (index[0], *(slice(0, n) for n in array.shape[1:]))
            assert found.read(index).tobytes() == array[index].tobytes()
            assert found.read(rows).tobytes() == array[rows].tobytes()
    restored = ocp.PyTreeCheckpointer().restore(directory)
    assert restored["ffn"]["experts"]["w1"]["weight"].tobytes() == leaves["ffn", "experts", "w1", "weight"].tobytes()
    assert restored["a"].tobytes() == leaves["a",].tobytes()


def test_items_that_orbax_wrote(tmp_path):
    """Layouts of other writers (here OCDBT with compression) are read through Orbax."""
    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    ocp.PyTreeCheckpointer().save(tmp_path / "a", {"x": array, "y": {"z": np.ones(7)}})
    stored = open_item(tmp_path / "a")
    assert np.array_equal(stored["x",].read((slice(1, 3), slice(0, 4), slice(0, 3))), array[1:3])
    assert np.array_equal(stored["y", "z"].read((slice(0, 7),)), np.ones(7))


def test_failed_read_leaves_no_item(tmp_path):
    class Failing(_Array):
        def read(self, index):
            raise OSError("source gone")

    with pytest.raises(OSError, match="source gone"):
        write_item(tmp_path / "a", {("x",): Failing(np.ones(3))}, {})
    assert not (tmp_path / "a").exists()
    assert read_record(tmp_path / "a") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_files_are_noticed(damage, tmp_path):
    write_item(tmp_path / "a", {("x",): _Array(np.arange(8, dtype=np.float32))}, {})
    path = tmp_path / "a/x/c/0"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-7] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        open_item(tmp_path / "a")["x",].read((slice(0, 8),))
