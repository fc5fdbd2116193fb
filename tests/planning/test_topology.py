"""Slices, their links and the tiled layout of arrays: closed forms, and what the TPU compiler reports."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from deepseek_v4.planning.layout import tiled_bytes
from deepseek_v4.planning.topology import HOP_SECONDS, TopologyError, _coordinates, parse_topology, slices
from deepseek_v4.sharding import MESH_AXES, parse_mesh
from pallas_kernels.targets import CHIPS

# Shapes that parameters and caches have on devices: stacked, narrow, odd, smaller than a tile.
ARRAYS = [
    ([1], "float32"),
    ([4], "float32"),
    ([24], "float32"),
    ([64], "float32"),
    ([384], "float32"),
    ([4096], "bfloat16"),
    ([2, 3], "float32"),
    ([20, 3], "float32"),
    ([20, 24], "float32"),
    ([43, 512], "bfloat16"),
    ([20, 24, 16384], "float32"),
    ([4, 128, 512], "float32"),
    ([21, 8, 1, 1024], "float32"),
    ([20, 8, 32, 4096], "float8_e4m3fn"),
    ([20, 8, 8, 32], "float8_e8m0fnu"),
    ([20, 12, 256, 2048], "uint8"),
    ([20, 12, 256, 128], "float8_e8m0fnu"),
    ([3, 1, 131, 512], "bfloat16"),
    ([3, 1, 144, 512], "bfloat16"),
    ([20, 1, 512, 256], "uint32"),
    ([20, 2, 11, 1280], "float32"),
    ([129280, 6], "int32"),
    ([8, 5, 4, 4096], "bfloat16"),
    ([20, 256, 7], "bfloat16"),
]
MESHES = [("v6e", (4, 4), "expert=8,tensor=2"), ("v5p", (2, 2, 4), "data=4,expert=4"), ("v7x", (2, 2, 1), "expert=8")]


@pytest.fixture(scope="module")
def compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra: tpu)")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    program = str(Path(__file__).parent / "ask_compiler.py")
    question = json.dumps({"arrays": ARRAYS, "meshes": MESHES})
    done = subprocess.run(
        [sys.executable, program, question], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_bytes_of_arrays_are_those_the_compiler_allocates(compiler):
    ours = [tiled_bytes(tuple(shape), jnp.dtype(dtype).itemsize) for shape, dtype in ARRAYS]
    wrong = [(a, mine, found) for a, mine, found in zip(ARRAYS, ours, compiler["bytes"], strict=True) if mine != found]
    assert not wrong


def test_devices_of_a_mesh_are_where_the_runtime_puts_them(compiler):
    for (chip, grid, text), places in zip(MESHES, compiler["places"], strict=True):
        topology = parse_topology(f"{chip}:{'x'.join(map(str, grid))}")
        sizes = parse_mesh(text)
        ours = _coordinates(topology, tuple(sizes[axis] for axis in MESH_AXES))
        assert ours.reshape(-1, 4).tolist() == places


def test_parses_the_names_users_type():
    assert parse_topology("tpu7x:4x4x4").devices == 128
    assert parse_topology("v7x:4x4x4").name == "v7x:4x4x4"
    assert parse_topology("v6e:8x8").devices == 64
    assert parse_topology("b200:8x4").devices == 32
    assert parse_topology("h200:8").name == "h200:8"
    for text, message in (("v9:2x2", "v6e"), ("v6e:3x3", "v6e:8x8"), ("v6e", "v6e:8x8")):
        with pytest.raises(TopologyError, match=message):
            parse_topology(text)


def test_every_slice_of_every_chip_parses_smallest_first():
    for chip in CHIPS.values():
        counts = [topology.devices for topology in slices(chip)]
        assert counts == sorted(counts)


def test_whole_nodes_exchange_over_nvlink_and_nodes_over_the_network():
    h200 = CHIPS["h200"]
    inside = parse_topology("h200:8").links(parse_mesh("expert=8"), ("expert",))
    assert (inside.size, inside.bandwidth, inside.medium) == (8, 450e9, "NVLink")
    across = parse_topology("h200:8x4").links(parse_mesh("data=4,expert=8"), ("data",))
    # One adapter of 400 Gb/s per GPU.
    assert (across.size, across.medium) == (4, "network")
    assert across.bandwidth == h200.network_bandwidth == 50e9
    both = parse_topology("h200:8x4").links(parse_mesh("expert=32"), ("expert",))
    assert 50e9 < both.bandwidth < 8 * 50e9


def test_a_whole_torus_uses_every_dim_and_wraps_where_the_slice_does():
    v5p = CHIPS["v5p"].link_bandwidth
    assert v5p == 100e9
    # 4x4x4 is a cube with wraparound: two directions of three dims; farthest devices are 2 + 2 + 2 hops apart.
    cube = parse_topology("v5p:4x4x4").links(parse_mesh("expert=64"), ("expert",))
    assert (cube.bandwidth, cube.hops) == (6 * v5p, 6)
    # 4x4 of v6e is a corner of a 16x16 torus and wraps nowhere: one direction of two dims.
    flat = parse_topology("v6e:4x4").links(parse_mesh("expert=16"), ("expert",))
    assert (flat.bandwidth, flat.hops) == (2 * 100e9, 6)


def test_collective_times_follow_the_bytes():
    links = parse_topology("h200:8").links(parse_mesh("expert=8"), ("expert",))
    assert links.all_gather(8e9) == pytest.approx(7e9 / 450e9 + HOP_SECONDS)
    assert links.all_reduce(8e9) == pytest.approx(2 * links.all_gather(8e9))
    assert links.all_to_all(8e9) == pytest.approx(7e9 / 450e9 + HOP_SECONDS)
    alone = parse_topology("h200:8").links(parse_mesh("data=8"), ("expert",))
    assert (alone.size, alone.all_reduce(1e9), alone.bandwidth) == (1, 0, math.inf)
