"""The command line, on small checkpoints and on full-size sparse ones."""

import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import tiny_config
from released import released_tensors, write_released, write_safetensors
from rich.console import Console

from deepseek_v4 import RELEASED, RELEASED_BASE
from deepseek_v4.checkpoint import inspect_checkpoint

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts/convert_checkpoint.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments) -> tuple[int, str]:
        output = io.StringIO()
        code = module.main([str(argument) for argument in arguments], Console(file=output, width=200))
        return code, output.getvalue()

    return call


def test_whole_path(run, tmp_path):
    write_released(tmp_path / "a", tiny_config(), RELEASED_BASE, base_draft_copies=True)
    assert run("to-orbax", tmp_path / "a", tmp_path / "b", "--dry-run")[0] == 0
    assert not (tmp_path / "b").exists()
    assert run("to-orbax", tmp_path / "a", tmp_path / "b")[0] == 0
    code, text = run("to-hf", tmp_path / "b", tmp_path / "c", "--dry-run")
    assert code == 0
    assert "model-00010-of-00010.safetensors" in text
    assert run("to-hf", tmp_path / "b", tmp_path / "c")[0] == 0
    for other in ("b", "c"):
        code, text = run("verify", tmp_path / "a", tmp_path / other)
        assert code == 0
        assert "equal" in text
    for name in "abc":
        assert run("inspect", tmp_path / name)[0] == 0


def test_verify_names_what_differs(run, tmp_path):
    config = tiny_config()
    write_released(tmp_path / "a", config)
    run("to-orbax", tmp_path / "a", tmp_path / "b")
    path = tmp_path / "a/model-00003-of-00010.safetensors"
    tensors = {n: a.copy() for n, a in released_tensors(config).items() if n.startswith("layers.1.")}
    tensors["layers.1.ffn.experts.7.w2.weight"][3, 5] ^= 1
    tensors["layers.1.attn_norm.weight"][:2] += 1
    write_safetensors(path, tensors)
    code, text = run("verify", tmp_path / "a", tmp_path / "b")
    assert code == 1
    lines = [line.strip() for line in text.splitlines() if "values differ" in line]
    assert lines == [
        "layers.1.attn_norm.weight: 2 values differ",
        "layers.1.ffn.experts.7.w2.weight: 1 values differ",
    ]


def test_errors_are_told_without_a_traceback(run, tmp_path, capsys):
    write_released(tmp_path / "a", tiny_config())
    (tmp_path / "a/model-00002-of-00010.safetensors").unlink()
    assert run("to-orbax", tmp_path / "a", tmp_path / "b")[0] == 1
    assert "model-00002-of-00010.safetensors: file missing" in capsys.readouterr().err
    assert run("verify", tmp_path / "a", tmp_path / "b")[0] == 1
    assert run("inspect", tmp_path / "b")[0] == 1
    assert run("to-orbax", tmp_path / "a", tmp_path / "b", "--process-index", "2", "--process-count", "2")[0] == 1
    code, text = run("inspect", tmp_path / "a")
    assert code == 1
    assert "NOT complete" in text


@pytest.mark.parametrize(
    ("name", "tensors", "total", "whole", "main", "kinds"),
    [
        ("flash", 69187, 159609485896, 290.94, 284.33, {"SWA": 2, "CSA": 21, "HCA": 20}),
        ("pro", 145116, 864704792696, 1598.84, 1573.00, {"HCA": 31, "CSA": 30}),
    ],
)
def test_inspect_full_size(name, tensors, total, whole, main, kinds, run, sparse_release):
    found = inspect_checkpoint(sparse_release(name))
    assert found.complete
    assert (found.tensors, found.total_bytes) == (tensors, total)
    assert (round(found.parameters / 1e9, 2), round(found.parameters_without_draft / 1e9, 2)) == (whole, main)
    assert found.layer_kinds == kinds
    assert found.storage == RELEASED
    # The command prints what was found; the larger release is inspected once only.
    if name == "pro":
        return
    code, text = run("inspect", sparse_release(name))
    assert code == 0
    for shown in (f"{tensors:,}", f"{total:,}", f"{whole:,.2f} B", f"{main:,.2f} B"):
        assert shown in text


def test_plan_full_size(run, sparse_release, tmp_path, monkeypatch):
    # The plan is refused where the disk is too small; the one this runs on usually is.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**13))
    code, text = run("to-orbax", sparse_release("pro"), tmp_path / "b", "--dry-run")
    assert code == 0
    assert sum(line.endswith("to do") for line in text.splitlines()) == 63
    code, text = run("to-hf", sparse_release("flash"), tmp_path / "c", "--dry-run")
    assert code == 0
    assert sum(line.endswith("to do") for line in text.splitlines()) == 46
    assert not list(tmp_path.iterdir())


def test_too_little_disk(run, sparse_release, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    assert run("to-orbax", sparse_release("flash"), tmp_path / "b")[0] == 1
    assert "only 1.00 GB free" in capsys.readouterr().err


def test_what_is_missing_full_size(run, sparse_release, tmp_path):
    directory = tmp_path / "partial"
    directory.mkdir()
    for path in sparse_release("flash").iterdir():
        if path.name not in ("model-00007-of-00046.safetensors", "model-00046-of-00046.safetensors"):
            (directory / path.name).symlink_to(path)
    found = inspect_checkpoint(directory)
    assert not found.complete
    missing = [problem for problem in found.problems if problem.startswith("layers.5.ffn.experts.{0-255}.w")]
    assert len(missing) == 6
    assert "model-00046-of-00046.safetensors: file missing (1575 tensors)" in found.problems
    assert run("inspect", directory)[0] == 1
    assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 43
    assert np.isclose(found.total_bytes, 159609485896 * (1 - 1.0 / 23), rtol=0.02)
