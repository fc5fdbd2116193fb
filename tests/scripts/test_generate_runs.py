"""Runs of scripts/generate.py as processes: killed and started again, and on several processes at once.

A mixed workload must give exactly what it gives one request at a time. The slow variant is the full size: 200 requests
of up to 8K tokens on the built-in model, on one process and on four.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_v4.default_model import write_default

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from workload import mixed_workload

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow  # many processes: minutes on a quiet machine


class Runs:
    """Starts the script on one workload; compiled programs are shared between the runs."""

    def __init__(self, directory, checkpoint, lines, *options):
        self.directory, self.lines = directory, lines
        self.source = directory / "in.jsonl"
        self.source.write_text("".join(line + "\n" for line in lines))
        options = ("--max-new-tokens", "8", "--dtype", "float32", *options)
        self.options = ["--checkpoint", str(checkpoint), "--input", str(self.source), *options]
        self.environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")} | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(directory / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, output, *options, devices=1):
        command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *self.options, *options]
        command += ["--output", str(output), "--simulate-devices", str(devices)]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)

    def start_all(self, output, count, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        together = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), *options)
        return [self.start(output, *together, "--process-id", str(index)) for index in range(count)]

    def finish(self, *processes):
        told = [process.communicate(timeout=3000)[1] for process in processes]
        for process, text in zip(processes, told, strict=True):
            assert process.returncode == 1, text  # some lines are wrong
        return told

    def kill_after(self, output, lines, *processes, number=signal.SIGKILL):
        """Sends a signal once the token log has so many more lines, to every process at once."""
        log = output.with_name(output.name + ".tokens")
        before, deadline = None, time.monotonic() + 3000
        while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            size = log.read_bytes().count(b"\n") if log.exists() else 0
            before = size if before is None and size else before
            if before is not None and size >= before + lines:
                break
            time.sleep(0.02)
        for process in processes:
            process.send_signal(number)
        return [process.communicate(timeout=300)[1] for process in processes]


def check_kept(output, expected):
    """Whatever is in the output of a killed run is what the whole run gives, to the byte."""
    whole = {json.loads(row)["index"]: row for row in expected.splitlines()}
    rows = output.read_bytes()
    rows = rows[: rows.rfind(b"\n") + 1].splitlines()
    assert all(whole[json.loads(row)["index"]] == row for row in rows)
    return len(rows)


def check_all(runs, kills, processes, mesh, alone_options, options):
    directory = runs.directory
    alone = directory / "alone.jsonl"
    runs.finish(runs.start(alone, *alone_options))
    expected = alone.read_bytes()
    results = [json.loads(row) for row in expected.splitlines()]
    assert [row["index"] for row in results] == list(range(len(runs.lines)))
    wrong = {row["index"] for row in results if row["finish_reason"] == "error"}
    assert wrong == {index for index in range(len(runs.lines)) if index % 17 == 16}

    killed = directory / "killed.jsonl"
    kept = 0
    for lines in kills:
        runs.kill_after(killed, lines, runs.start(killed, *options))
        now = check_kept(killed, expected)
        assert now >= kept
        kept = now
    (told,) = runs.finish(runs.start(killed, *options))
    assert "requests were finished earlier" in told
    assert killed.read_bytes() == expected

    together = directory / "together.jsonl"
    runs.kill_after(together, kills[0], *runs.start_all(together, processes, "--mesh", mesh, *options))
    check_kept(together, expected)
    told = runs.finish(*runs.start_all(together, processes, "--mesh", mesh, *options))
    assert "tokens/s per chip" in told[0]
    assert not any("tokens/s" in text for text in told[1:])
    assert together.read_bytes() == expected
    left = {path.name for path in directory.iterdir()} - {"programs", "prefixes"}
    assert left == {"in.jsonl"} | {
        n + e for n in ("alone.jsonl", "killed.jsonl", "together.jsonl") for e in ("", ".run.json")
    }


def test_a_mixed_workload_through_kills_and_on_two_processes(hf_checkpoint, tmp_path):
    runs = Runs(tmp_path, hf_checkpoint, mixed_workload(40, 300, 24), "--prefill-chunk", "64")
    check_all(runs, [3, 5], 2, "expert=2", ("--batch-size", "1"), ("--batch-size", "4"))


def test_an_interrupted_run_ends_cleanly(hf_checkpoint, tmp_path):
    """SIGINT to one of two processes stops both at the same step; the same command finishes the work."""
    runs = Runs(tmp_path, hf_checkpoint, mixed_workload(60, 30, 100), "--prefill-chunk", "64")
    output = tmp_path / "out.jsonl"
    first, second = runs.start_all(output, 2, "--mesh", "expert=2")
    log = output.with_name("out.jsonl.tokens")
    while first.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3):
        time.sleep(0.05)
    second.send_signal(signal.SIGINT)
    told = [process.communicate(timeout=600)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [130, 130], told
    assert "stopped; the same command goes on from here" in told[0]
    assert log.exists()


@pytest.mark.slow
def test_two_hundred_requests_through_kills_and_on_four_processes(tmp_path):
    checkpoint = write_default(tmp_path.parent / "built-in")
    runs = Runs(tmp_path, checkpoint, mixed_workload(200, 8192, 48), "--prefill-chunk", "512")
    together = ("--pools", "6x2048,2x8448", "--prefix-gib", "1")
    check_all(runs, [20, 60, 5], 4, "expert=4", ("--pools", "1x8448"), together)
