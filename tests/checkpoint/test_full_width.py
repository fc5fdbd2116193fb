"""Conversion of layers at the width of the releases: bounded memory, equal bytes. Needs up to 60 GB of disk."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from released import config_json

from deepseek_v4 import RELEASED, RELEASED_BASE, Config
from deepseek_v4.checkpoint import compare, open_source
from deepseek_v4.checkpoint.layout import shards
from deepseek_v4.checkpoint.safetensors import build_header

_ROOT = Path(__file__).resolve().parents[2]

_MEASURED = """
import resource, sys, time
from deepseek_v4.checkpoint import open_source, to_hf, to_orbax
direction, source, target = sys.argv[1:]
start, count = time.perf_counter(), [0]
def on_bytes(size):
    count[0] += size
{"to-orbax": to_orbax, "to-hf": to_hf}[direction](open_source(source), target, on_bytes=on_bytes)
rate = count[0] / (time.perf_counter() - start)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, f"{rate / 1e6:.0f} MB/s")
"""


def _write_wide(directory: Path, config: Config, storage) -> None:
    """A release of random bytes; no scale is NaN (code 0xFF, or an exponent of ones), no table entry but 0."""
    directory.mkdir(parents=True)
    block = np.random.default_rng(0).integers(0, 0x7F, 64 << 20, dtype=np.uint8)
    weight_map = {}
    for shard in shards(config, storage):
        header, entries, _ = build_header({name: (t.dtype, t.shape) for name, t in shard.tensors.items()})
        with (directory / shard.filename).open("wb") as file:
            file.write(header)
            for number, entry in enumerate(entries):
                left = entry.size_bytes
                offset = number * 7919 % (len(block) // 2)
                while left:
                    part = np.zeros(left, np.uint8) if entry.dtype == "I64" else block[offset : offset + left]
                    file.write(part.data)
                    left -= len(part)
        weight_map |= dict.fromkeys(shard.tensors, shard.filename)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config_json(config, storage)))


def _measure(direction: str, source: Path, target: Path) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _MEASURED, direction, source, target]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak, rate = output.split(maxsplit=1)
    return int(peak), rate.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "storage", "limit"),
    [("flash", 2, RELEASED, 4 << 30), ("pro", 1, RELEASED, 8 << 30), ("pro-base", 1, RELEASED_BASE, 8 << 30)],
)
def test_memory_is_bounded(name, layers, storage, limit, shared_dir, tmp_path):
    whole = Config.from_file(shared_dir / "fixtures/configs" / f"{name}.json")
    config = dataclasses.replace(
        whole,
        num_hidden_layers=layers,
        # From the first layer with an indexer on; one hash layer.
        compress_ratios=whole.compress_ratios[2 : 2 + layers],
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        drafter=None,
    )
    needed = 2 * sum(
        build_header({n: (t.dtype, t.shape) for n, t in s.tensors.items()})[2] for s in shards(config, storage)
    )
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk")
    _write_wide(tmp_path / "a", config, storage)
    peaks = {}
    for direction, source, target in (("to-orbax", "a", "b"), ("to-hf", "b", "c")):
        peaks[direction], rate = _measure(direction, tmp_path / source, tmp_path / target)
        print(f"{name} {direction}: peak {peaks[direction] / 2**30:.2f} GiB, {rate}")
        assert compare(open_source(tmp_path / source), open_source(tmp_path / target)).equal
        shutil.rmtree(tmp_path / source)
    shutil.rmtree(tmp_path / "c")
    assert max(peaks.values()) < limit
