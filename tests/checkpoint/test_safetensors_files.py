"""Headers, partial reads and written bytes of single safetensors files."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released import write_safetensors as write_independently

from deepseek_v4.checkpoint import CheckpointError
from deepseek_v4.checkpoint.safetensors import DTYPES, SafetensorsFile, write_safetensors


def _random(rng, dtype, shape):
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, count, dtype=np.uint8).view(dtype).reshape(shape)


TYPES = [np.int64, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, np.int8]


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    found = {f"t{i}.{shape}": _random(rng, dtype, shape) for i, dtype in enumerate(TYPES) for shape in [(3, 5), (7,)]}
    return found | {"scalar": _random(rng, np.float32, ()), "cube": _random(rng, ml_dtypes.bfloat16, (4, 5, 6))}


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    write_independently(path, tensors, metadata={"format": "pt"})
    return path


def test_whole_tensors(path, tensors):
    file = SafetensorsFile(path)
    assert set(file.entries) == set(tensors)
    for name, expected in tensors.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        assert found.flags.writeable


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_parts(path, tensors, data):
    name = data.draw(st.sampled_from(sorted(tensors)))
    array = tensors[name]
    index = []
    for size in array.shape[: data.draw(st.integers(0, array.ndim))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    file = SafetensorsFile(path)
    found, expected = file.read(name, tuple(index)), array[tuple(index)]
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()
    file.close()


def _write(path, tensors):
    layout = {n: (next(k for k, v in DTYPES.items() if v == a.dtype), a.shape) for n, a in tensors.items()}
    write_safetensors(path, layout, lambda entries: (tensors[entry.name] for entry in entries))


def test_writer_agrees_with_the_library(tensors, tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    _write(tmp_path / "ours.safetensors", tensors)
    library.save_file(tensors, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_failed_write_leaves_nothing(tensors, tmp_path):
    def pieces(entries):
        yield tensors[entries[0].name]
        raise RuntimeError("source gone")

    layout = {n: (next(k for k, v in DTYPES.items() if v == a.dtype), a.shape) for n, a in tensors.items()}
    with pytest.raises(RuntimeError):
        write_safetensors(tmp_path / "a.safetensors", layout, pieces)
    with pytest.raises(CheckpointError, match="header announces"):
        write_safetensors(tmp_path / "a.safetensors", layout, lambda entries: iter([tensors[entries[0].name]]))
    assert not list(tmp_path.iterdir())


def _file(header, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _tensor(start, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"\x05\0\0", "too few"),
        (struct.pack("<Q", 1 << 40) + b"x" * 99, "not a safetensors file"),
        (struct.pack("<Q", 500) + b"{}", "truncated"),
        (_file(b"not json"), "not JSON"),
        (_file([1]), "not a JSON object"),
        (_file({"a": _tensor(0, 8)}, b"\0" * 7), "truncated"),
        (_file({"a": _tensor(0, 8)}, b"\0" * 9), "no tensor owns"),
        (_file({"a": _tensor(0, 8), "b": _tensor(4, 12)}, b"\0" * 12), "b: overlaps a"),
        (_file({"a": _tensor(0, 8), "b": _tensor(12, 16)}, b"\0" * 16), "b: leaves a gap of 4 bytes after a"),
        (_file({"a": _tensor(0, 8, shape=[3])}, b"\0" * 8), "takes 12 bytes"),
        (_file({"a": _tensor(0, 8, dtype="F4")}, b"\0" * 8), "unknown dtype 'F4'"),
        (_file({"a": _tensor(0, 8, shape=[-2])}, b"\0" * 8), "bad shape"),
        (_file({"a": {"dtype": "F32"}}), "expected dtype, shape and data_offsets"),
        (_file(b'{"a":' + json.dumps(_tensor(0, 8)).encode() + b',"a":{}}', b"\0" * 8), "a: appears twice"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_all_problems_of_a_header_are_listed(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(_file({"a": _tensor(0, 8, dtype="X"), "b": _tensor(0, 4, shape=[9]), "c": {}}, b"\0" * 12))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    assert [problem.split(":")[0] for problem in error.value.problems[:3]] == ["a", "b", "c"]
