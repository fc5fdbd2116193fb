"""The released models at full size, compiled by the real TPU compiler: no chip is needed, nothing is timed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_CONFIGS = _TESTS.parent / "configs"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)"
)

CASES = [
    # model, chips, mesh, rows, context, tokens per call, GiB of temporaries allowed
    pytest.param("flash", "v6e", "expert=8,tensor=2", 1, 65536, 1, 0.5, id="flash-decode"),
    pytest.param("flash", "v6e", "expert=8,tensor=2", 1, 65536, 2048, 1.0, id="flash-prefill", marks=pytest.mark.slow),
    pytest.param("flash", "v6e", "expert=4,tensor=4", 1, 1 << 20, 1, 1.0, id="flash-1M", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "target", "mesh", "rows", "context", "length", "limit"), CASES)
def test_full_size_model_compiles_and_fits(name, target, mesh, rows, context, length, limit):
    arguments = [str(_CONFIGS / name / "config.json"), target, mesh, str(rows), str(context), str(length)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, str(_TESTS / "compile_full_size.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # The compiler's arguments are our parameters, our cache and the token ids; it pads small arrays to whole tiles.
    counted = report["parameter_bytes"] + report["cache_bytes"]
    assert counted <= report["argument_bytes"] <= counted * 1.02
    # The cache is updated in place.
    assert report["alias_bytes"] >= report["cache_bytes"]
    assert report["temporary_bytes"] < limit * 2**30, report
