"""Eight devices of two and of four processes compute what one device does: logits, tokens, losses, gradients."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import process_cases
import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def expected():
    return process_cases.numbers(None)


def run(processes: int, cases, directory: Path) -> dict[str, np.ndarray]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if "device_count" not in v} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "JAX_COMPILATION_CACHE_DIR": str(directory / "programs"),
    }
    # In order on each device: see deepseek_v4.loading.simulate_devices.
    environment["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    output = directory / "found.npz"
    program, rest = str(TESTS / "process_cases.py"), (str(8 // processes), str(output), *cases)
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([sys.executable, program, where, str(processes), str(index), *rest], env=environment, **piped)
        for index in range(processes)
    ]
    said = [process.communicate(timeout=1800)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return dict(np.load(output))


def check(found, expected, cases):
    for case in cases:
        mine = {name.partition("/")[2]: a for name, a in found.items() if name.startswith(f"{case}/")}
        assert set(mine) == (set(expected) if not case.startswith("context") else {"logits", "tokens"})
        np.testing.assert_array_equal(mine["tokens"], expected["tokens"], err_msg=case)
        for name, array in mine.items():
            # float32 sums of another order: logits of order one, gradients relative to a tensor's largest.
            atol = 3e-5 if name in ("logits", "loss") else 2e-4 * float(np.abs(expected[name]).max())
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=atol, err_msg=f"{case} {name}")


RUNS = [
    (2, ["context", "dispatch"]),
    pytest.param(2, ["context of processes", "gather"], marks=pytest.mark.slow),
    pytest.param(4, ["context of processes", "dispatch"], marks=pytest.mark.slow),
    pytest.param(4, ["context", "gather"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("processes", "cases"), RUNS)
def test_processes_are_one_device(expected, tmp_path, processes, cases):
    check(run(processes, cases, tmp_path), expected, cases)
