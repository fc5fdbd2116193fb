"""to-orbax and to-hf: bytes, resumption, sharing, and every way a source can be wrong."""

import dataclasses
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_cases import tiny_config
from released import config_json, released_tensors, write_released, write_safetensors

from deepseek_v4 import RELEASED, RELEASED_BASE, Config, Storage
from deepseek_v4.checkpoint import (
    CheckpointError,
    HuggingFaceSource,
    Share,
    compare,
    inspect_checkpoint,
    open_huggingface,
    open_source,
    plan_conversion,
    to_hf,
    to_orbax,
)
from deepseek_v4.checkpoint.layout import items
from deepseek_v4.nn.variables import MASTER

SHORT = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 2, "n_routed_experts": 4}
ROOT = Path(__file__).resolve().parents[2]


def _same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    _, different, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (different, errors) == ([], [])


def _with_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        (directory / name).write_text(f"contents of {name}")


def _write_one_file(directory: Path, config: Config, tensors: dict, storage: Storage = RELEASED) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config_json(config, storage)))


@pytest.mark.parametrize(
    ("storage", "copies"),
    [
        (RELEASED, False),
        (Storage("fp8"), False),
        (RELEASED_BASE, True),
        (Storage("bfloat16", "bfloat16"), False),
        (MASTER, False),
        (Storage("fp4", "bfloat16", norms="float32"), False),
    ],
    ids=["fp4", "fp8", "base", "bf16", "f32", "mixed kinds"],
)
def test_round_trip_returns_every_byte(storage, copies, tmp_path):
    write_released(tmp_path / "a", tiny_config(), storage, base_draft_copies=copies)
    _with_tokenizer(tmp_path / "a")
    source = open_huggingface(tmp_path / "a")
    assert source.storage == storage
    assert to_orbax(source, tmp_path / "b")
    orbax = open_source(tmp_path / "b")
    assert (orbax.storage, orbax.config) == (storage, source.config)
    assert to_hf(orbax, tmp_path / "c")
    _same_files(tmp_path / "a", tmp_path / "c")


def test_items_are_plain_orbax_checkpoints(tmp_path):
    config = tiny_config(**SHORT)
    write_released(tmp_path / "a", config)
    to_orbax(open_huggingface(tmp_path / "a"), tmp_path / "b")
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "b/items/layers.00001")
    tensors = released_tensors(config)
    w1 = np.stack([tensors[f"layers.1.ffn.experts.{e}.w1.weight"] for e in range(4)]).view(np.uint8)
    scale = np.stack([tensors[f"layers.1.ffn.experts.{e}.w1.scale"] for e in range(4)])
    assert restored["ffn"]["experts"]["w1"]["weight"].tobytes() == w1.tobytes()
    assert restored["ffn"]["experts"]["w1"]["weight"].dtype == np.uint8
    assert restored["ffn"]["experts"]["w1"]["scale"].tobytes() == scale.tobytes()
    assert restored["ffn"]["experts"]["w1"]["scale"].dtype == ml_dtypes.float8_e8m0fnu
    assert np.array_equal(restored["ffn"]["gate"]["tid2eid"], tensors["layers.1.ffn.gate.tid2eid"])
    assert restored["ffn"]["gate"]["tid2eid"].dtype == np.int32
    assert restored["attn"]["attn_sink"].dtype == np.float32


@pytest.mark.parametrize("prefixed_layers", [True, False])
def test_model_prefix(prefixed_layers, tmp_path):
    config = tiny_config(**SHORT)
    tensors = released_tensors(config)
    renamed = {f"model.{n}" if prefixed_layers or not n.startswith("layers.") else n: a for n, a in tensors.items()}
    _write_one_file(tmp_path / "a", config, renamed)
    write_released(tmp_path / "expected", config)
    to_hf(open_source(tmp_path / "a"), tmp_path / "c")
    for shard in sorted((tmp_path / "expected").glob("*.safetensors")):
        assert filecmp.cmp(shard, tmp_path / "c" / shard.name, shallow=False)


_KILLED = """
import os, signal, sys
from deepseek_v4.checkpoint import open_source, to_hf, to_orbax
source, target, direction, item, in_the_middle = sys.argv[1:]
seen = []
def on_item(name):
    seen.append(name)
    if len(seen) > int(item) and in_the_middle == "0":
        os.kill(os.getpid(), signal.SIGKILL)
def on_bytes(count):
    if len(seen) > int(item):
        os.kill(os.getpid(), signal.SIGKILL)
{"to-orbax": to_orbax, "to-hf": to_hf}[direction](open_source(source), target, on_item=on_item, on_bytes=on_bytes)
"""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def _spoil_unseen(path: Path, names: list[str]) -> None:
    """Overwrites the tensors of a shard without changing what tells that a file has changed."""
    status = path.stat()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length)
        file.write(b"\xff" * (status.st_size - 8 - length))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(("item", "in_the_middle"), [(1, 0), (3, 1)])
def test_killed_conversion_resumes_without_rereading(item, in_the_middle, tmp_path):
    config = tiny_config(**SHORT)
    write_released(tmp_path / "a", config)
    write_released(tmp_path / "expected", config)
    command = [sys.executable, "-c", _KILLED, tmp_path / "a", tmp_path / "b", "to-orbax", str(item), str(in_the_middle)]
    assert subprocess.run(command, env=_environment()).returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_source(tmp_path / "b")
    with pytest.raises(CheckpointError, match=f"unfinished conversion: {item} of 5 items"):
        inspect_checkpoint(tmp_path / "b")

    # Finished items are embed + head (shell), then a shard per layer; what they were read from is now garbage.
    shard_of_item = {0: ["00001", "00005"], 1: ["00002"], 2: ["00003"], 3: ["00004"], 4: ["00006"]}
    for finished in range(item):
        for number in shard_of_item[finished]:
            _spoil_unseen(tmp_path / "a" / f"model-{number}-of-00006.safetensors", [])
    converted = []
    assert to_orbax(open_source(tmp_path / "a"), tmp_path / "b", on_item=converted.append)
    assert converted == [found.name for found in items(config)][item:]
    result = compare(open_source(tmp_path / "expected"), open_source(tmp_path / "b"))
    assert result.equal
    assert result.compared == len(released_tensors(config))
    left = [path.name for path in (tmp_path / "b/items").iterdir()]
    assert sorted(left) == sorted(found.name for found in items(config))


class _Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("while_writing", [False, True])
def test_interrupted_at_every_item(while_writing, tmp_path):
    """Ctrl-C anywhere, again and again: each run gets one item further, and the end is the whole checkpoint."""
    write_released(tmp_path / "a", tiny_config(**SHORT))
    source = open_source(tmp_path / "a")
    names = [item.name for item in items(source.config)]
    seen = []
    for turn in range(len(names)):
        started = []

        def on_item(name, started=started):
            started.append(name)
            if not while_writing and len(started) == 2:
                raise _Interrupted

        def on_bytes(count, started=started):
            if while_writing and len(started) == 2:
                raise _Interrupted

        if turn < len(names) - 1:
            with pytest.raises(_Interrupted):
                to_orbax(source, tmp_path / "b", on_item=on_item, on_bytes=on_bytes)
            with pytest.raises(CheckpointError, match="unfinished"):
                open_source(tmp_path / "b")
        else:
            assert to_orbax(source, tmp_path / "b", on_item=on_item, on_bytes=on_bytes)
        seen.append(started[0])
    assert seen == names
    assert compare(source, open_source(tmp_path / "b")).equal


def test_killed_export_resumes(tmp_path):
    config = tiny_config(**SHORT)
    write_released(tmp_path / "a", config)
    command = [sys.executable, "-c", _KILLED, tmp_path / "a", tmp_path / "b", "to-hf", "3", "1"]
    assert subprocess.run(command, env=_environment()).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"config\.json|missing"):
        open_source(tmp_path / "b")
    written = []
    assert to_hf(open_source(tmp_path / "a"), tmp_path / "b", on_item=written.append)
    assert written[0] == "model-00004-of-00006.safetensors"
    _same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError, match="not empty"):
        to_hf(open_source(tmp_path / "a"), tmp_path / "b")


def test_changed_source_is_converted_again(tmp_path):
    config = tiny_config(**SHORT)
    write_released(tmp_path / "a", config)
    assert not to_orbax(open_source(tmp_path / "a"), tmp_path / "b", share=Share(0, 2))
    shutil.rmtree(tmp_path / "a")
    write_released(tmp_path / "a", config, seed=1)
    converted = []
    assert to_orbax(open_source(tmp_path / "a"), tmp_path / "b", on_item=converted.append)
    assert len(converted) == 5
    assert compare(open_source(tmp_path / "a"), open_source(tmp_path / "b")).equal


def test_finished_target(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    write_released(tmp_path / "other", tiny_config(**SHORT), seed=1)
    assert to_orbax(open_source(tmp_path / "a"), tmp_path / "b")
    untouched = []
    assert to_orbax(open_source(tmp_path / "a"), tmp_path / "b", on_item=untouched.append)
    assert untouched == []
    with pytest.raises(CheckpointError, match="finished conversion of another source"):
        to_orbax(open_source(tmp_path / "other"), tmp_path / "b")
    assert compare(open_source(tmp_path / "a"), open_source(tmp_path / "b")).equal


def test_bad_targets(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    source = open_source(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        to_orbax(source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="not empty"):
        to_hf(source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="not a directory"):
        to_orbax(source, tmp_path / "file")
    with pytest.raises(CheckpointError, match="same directory"):
        to_orbax(source, tmp_path / "a")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_processes_share_a_conversion(tmp_path):
    write_released(tmp_path / "a", tiny_config())
    script = ROOT / "scripts/convert_checkpoint.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, "to-orbax", tmp_path / "a", tmp_path / "b", *share],
            env=_environment(),
            stdout=subprocess.DEVNULL,
        )
        for share in (
            ["--process-index", "0", "--process-count", "2"],
            ["--process-index", "1", "--process-count", "2"],
        )
    ]
    assert [process.wait() for process in processes] == [0, 0]
    source = open_source(tmp_path / "b")
    assert not to_hf(source, tmp_path / "c", share=Share(1, 2))
    assert to_hf(source, tmp_path / "c", share=Share(0, 2))
    _same_files(tmp_path / "a", tmp_path / "c")


def test_shares_are_disjoint_and_the_last_one_finishes(tmp_path):
    write_released(tmp_path / "a", tiny_config())
    source = open_source(tmp_path / "a")
    seen = []
    for index in (2, 0, 1):
        with pytest.raises(CheckpointError):
            open_source(tmp_path / "b")
        finished = to_orbax(source, tmp_path / "b", share=Share(index, 3), on_item=seen.append)
        assert finished == (index == 1)
    assert sorted(seen) == sorted(item.name for item in items(source.config))
    assert compare(source, open_source(tmp_path / "b")).equal


def test_two_processes_with_the_same_index_are_told_apart(tmp_path):
    import fcntl

    write_released(tmp_path / "a", tiny_config(**SHORT))
    (tmp_path / "b/.locks").mkdir(parents=True)
    (tmp_path / "b/items").mkdir()
    with (tmp_path / "b/.locks/layers.00001").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"another process is writing layers\.00001"):
            to_orbax(open_source(tmp_path / "a"), tmp_path / "b")
    assert to_orbax(open_source(tmp_path / "a"), tmp_path / "b")


# --- what a source can be wrong about ---------------------------------------------------------------------------------


def _broken(directory: Path, change, storage=RELEASED, **options) -> HuggingFaceSource:
    config = tiny_config(**SHORT)
    tensors = released_tensors(config, storage, **options)
    change(tensors)
    _write_one_file(directory, config, tensors, storage)
    return HuggingFaceSource(directory)


def test_every_problem_is_listed_before_anything_is_written(tmp_path):
    def change(t):
        del t["norm.weight"], t["layers.1.attn.wkv.scale"]
        for expert in (0, 1, 3):
            del t[f"layers.2.ffn.experts.{expert}.w2.weight"]
        t["layers.0.attn.bias"] = np.zeros(3, np.float32)
        t["layers.9.attn_norm.weight"] = t["layers.0.attn_norm.weight"]
        t["model.layers.0.attn_norm.weight"] = t["layers.0.attn_norm.weight"]
        t["layers.0.attn.wq_a.weight"] = t["layers.0.attn.wq_a.weight"][:-1]
        t["layers.1.attn.attn_sink"] = t["layers.1.attn.attn_sink"].astype(ml_dtypes.bfloat16)
        t["layers.0.ffn.gate.tid2eid"] = t["layers.0.ffn.gate.tid2eid"].astype(np.int32)

    source = _broken(tmp_path / "a", change)
    expected = {
        "norm.weight: missing",
        "layers.1.attn.wkv.scale: missing",
        "layers.2.ffn.experts.{0-1,3}.w2.weight: missing",
        "layers.0.attn.bias: unknown tensor (F32 [3])",
        "layers.9.attn_norm.weight: unknown tensor (BF16 [128])",
        "layers.0.attn_norm.weight: given 2 times: layers.0.attn_norm.weight, model.layers.0.attn_norm.weight",
        "layers.0.attn.wq_a.weight: expected shape [64, 128], found [63, 128]",
        "layers.1.attn.attn_sink: expected dtype F32, found BF16",
        "layers.0.ffn.gate.tid2eid: expected dtype I64, found I32",
    }
    assert set(source.problems) == expected
    with pytest.raises(CheckpointError) as error:
        open_huggingface(tmp_path / "a")
    assert set(error.value.problems) == expected


def test_every_tensor_is_classified_exactly_once(tmp_path):
    def change(t):
        t["extra"] = np.zeros(2, np.float32)

    source = _broken(tmp_path / "a", change, RELEASED_BASE, base_draft_copies=True)
    used = sum(
        len(leaf.tensors) if hasattr(leaf, "tensors") else 1
        for item in items(source.config)
        for leaf in source.leaves(item).values()
    )
    unknown = [problem for problem in source.problems if "unknown tensor" in problem]
    assert set(source.dropped) == {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"}
    assert len(source.tensors) == used + len(source.dropped) + len(unknown)


def test_mixed_formats(tmp_path):
    plain = released_tensors(tiny_config(**SHORT), Storage("bfloat16", "bfloat16"))

    def change(t):
        for name in ("layers.1.attn.wq_a.weight", "layers.1.ffn.experts.2.w1.weight"):
            t[name] = plain[name]
        t["layers.0.attn_norm.weight"] = t["layers.0.attn_norm.weight"].astype(np.float32)
        t["layers.0.attn.wkv.scale"] = np.ones((1, 1), np.float32)

    problems = _broken(tmp_path / "a", change).problems
    for line in (
        "routed experts: mixed formats (I8 x 47, BF16 x 1)",
        "linears: mixed formats",
        "norms: mixed formats",
        "FP8 scales: mixed formats",
        "layers.1.ffn.experts.2.w1.weight: expected dtype I8, found BF16",
        "layers.1.ffn.experts.2.w1.weight: expected shape [64, 64], found [64, 128]",
        "layers.1.attn.wq_a.weight: expected dtype F8_E4M3, found BF16",
        "layers.0.attn_norm.weight: expected dtype BF16, found F32",
        "layers.0.attn.wkv.scale: expected dtype F8_E8M0, found F32",
    ):
        assert any(problem.startswith(line) for problem in problems), line


def test_scales_without_a_quantised_weight(tmp_path):
    def change(t):
        t["layers.0.attn.wkv.scale"] = np.ones((1, 1), np.float32)

    problems = _broken(tmp_path / "a", change, Storage("bfloat16", "bfloat16")).problems
    assert problems == ["layers.0.attn.wkv.scale: unexpected: linears are stored as bfloat16, which has no scales"]


@pytest.mark.parametrize("storage", [RELEASED, RELEASED_BASE])
def test_values_that_no_checkpoint_can_have(storage, tmp_path):
    def change(t):
        for name in ("layers.0.attn.wkv.scale", "layers.2.ffn.experts.3.w2.scale"):
            spoilt = t[name].copy()
            spoilt.reshape(-1)[0] = np.nan
            t[name] = spoilt
        table = t["layers.1.ffn.gate.tid2eid"].copy()
        table[5, 1], table[6, 0] = 4, -1
        t["layers.1.ffn.gate.tid2eid"] = table

    source = _broken(tmp_path / "a", change, storage)
    source.require_complete()
    with pytest.raises(CheckpointError) as error:
        to_orbax(source, tmp_path / "b")
    assert [problem.rsplit(" (")[0] for problem in error.value.problems] == [
        "layers.0.attn.wkv.scale: 1 non-finite scales",
        "layers.1.ffn.gate.tid2eid: 2 entries outside 0..3",
        "layers.2.ffn.experts.3.w2.scale: 1 non-finite scales",
    ]
    assert not (tmp_path / "b").exists()


def test_files_and_index_disagree(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    (tmp_path / "a/model-00003-of-00006.safetensors").unlink()
    shutil.copy(tmp_path / "a/model-00001-of-00006.safetensors", tmp_path / "a/copy.safetensors")
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    moved = "layers.0.attn_norm.weight"
    index["weight_map"][moved] = "model-00001-of-00006.safetensors"
    del index["weight_map"]["norm.weight"]
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        open_huggingface(tmp_path / "a")
    problems = error.value.problems
    assert "copy.safetensors: file not named by model.safetensors.index.json" in problems
    assert any(problem.startswith("model-00003-of-00006.safetensors: file missing (") for problem in problems)
    assert any(problem.startswith(f"{moved}: model.safetensors.index.json places it in") for problem in problems)
    assert "norm.weight: in model-00005-of-00006.safetensors but not in model.safetensors.index.json" in problems


def test_missing_shard_without_an_index(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    (tmp_path / "a/model.safetensors.index.json").unlink()
    open_huggingface(tmp_path / "a")
    (tmp_path / "a/model-00006-of-00006.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00006-of-00006\.safetensors: file missing"):
        open_huggingface(tmp_path / "a")


def test_tensor_in_two_files(tmp_path):
    config = tiny_config(**SHORT)
    _write_one_file(tmp_path / "a", config, released_tensors(config))
    write_safetensors(tmp_path / "a/more.safetensors", {"norm.weight": released_tensors(config)["norm.weight"]})
    with pytest.raises(CheckpointError, match=r"norm\.weight: stored twice, in model\.safetensors and more"):
        open_huggingface(tmp_path / "a")


def test_truncated_shard(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    path = tmp_path / "a/model-00002-of-00006.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="truncated"):
        open_huggingface(tmp_path / "a")


def test_directories_that_hold_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no safetensors files"):
        open_source(tmp_path)


# --- draft layers -----------------------------------------------------------------------------------------------------


def test_dspark_drafter_is_dropped(tmp_path):
    config = dataclasses.replace(tiny_config(**SHORT), drafter="dspark", compress_ratios=(0, 4, 128, 0, 0, 0))
    write_released(tmp_path / "a", config)
    source = open_huggingface(tmp_path / "a")
    assert source.config.drafter is None
    assert set(source.dropped.values()) == {"DSpark drafter, structure undocumented"}
    assert all(name.startswith("mtp.") for name in source.dropped)
    assert to_orbax(source, tmp_path / "b")
    assert to_hf(open_source(tmp_path / "b"), tmp_path / "c")
    written = json.loads((tmp_path / "c/config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0
    assert written["compress_ratios"] == [0, 4, 128]
    assert not any(key.startswith("dspark") for key in written)
    assert compare(source, open_source(tmp_path / "c")).equal
    assert inspect_checkpoint(tmp_path / "b").dropped == source.dropped


def test_announced_but_absent_draft_layer(tmp_path):
    def change(t):
        for name in [name for name in t if name.startswith("mtp.")]:
            del t[name]

    source = _broken(tmp_path / "a", change)
    source.require_complete()
    assert source.config.drafter is None
    assert "announces a draft layer" in source.notes[0]


def test_incomplete_draft_layer_is_missing_not_dropped(tmp_path):
    def change(t):
        del t["mtp.0.e_proj.weight"], t["mtp.0.e_proj.scale"]

    assert _broken(tmp_path / "a", change).problems == ["mtp.0.e_proj.scale: missing", "mtp.0.e_proj.weight: missing"]


def test_differing_draft_copy_is_not_restored(tmp_path):
    def change(t):
        t["mtp.0.head.weight"] = -t["mtp.0.head.weight"]

    source = _broken(tmp_path / "a", change, RELEASED_BASE, base_draft_copies=True)
    assert to_orbax(source, tmp_path / "b")
    assert open_source(tmp_path / "b").draft_copies == ("mtp.0.emb.tok_emb.weight",)
    assert "not equal" in inspect_checkpoint(tmp_path / "b").dropped["mtp.0.head.weight"]


def test_config_that_does_not_fit_an_orbax_directory(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    to_orbax(open_source(tmp_path / "a"), tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["q_lora_rank"] = 32
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.00000: attn\.q_norm\.weight"):
        open_source(tmp_path / "b")


def test_plan_says_what_happens(tmp_path):
    write_released(tmp_path / "a", tiny_config(**SHORT))
    source = open_source(tmp_path / "a")
    plan = plan_conversion(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    written = []
    to_orbax(source, tmp_path / "b", on_bytes=written.append)
    assert sum(written) == plan.pending_bytes
    assert plan_conversion(source, tmp_path / "b").pending_bytes == 0
