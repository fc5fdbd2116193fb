"""scripts/train.py before anything is trained: configs, and what it says about those that cannot run."""

import dataclasses
import json
from pathlib import Path

import pytest
from training_runs import CONFIG_FILE, write_documents, write_model

from deepseek_v4.data import DataConfig
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.run_config import (
    ConfigurationError,
    TrainConfig,
    differences,
    from_json,
    load_config,
    to_json,
)
from deepseek_v4.training.throughput import training_operations

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture(scope="module")
def train(script):
    return script("train")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    write_model(directory / "model")
    write_documents(directory / "documents.jsonl")
    write_documents(directory / "held_out.jsonl", 12, seed=1)
    (directory / "config.py").write_text(CONFIG_FILE)
    return directory


def complaint(train, capsys, place, *arguments):
    code = train.main(["--config", str(place / "config.py"), *arguments])
    assert code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "nowhere"),
        (
            ["--weights", "checkpoint"],
            "no safetensors files; expected a Hugging Face directory; to begin without a checkpoint",
        ),
        (["--data.paths", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--mesh", "data=3"], "needs 3 devices, found 8"),
        (["--mesh", "data=8", "--data.batch-size", "6"], "data.batch_size 6 does not divide over data = 8"),
        (["--mesh", "data=4,tensor=2", "--accumulate", "4"], "expected a multiple of 16"),
        (["--expert-precision", "fp8"], "expert_precision: 'fp8' is for rows that travel"),
        (["--mesh", "expert=2,tensor=4", "--data.batch-size", "8"], "o_groups"),
        (["--freeze", "attn.nothing"], "pattern 'attn.nothing' names no parameter"),
        (["--mode", "lora"], "mode 'lora' trains beside the weights of a checkpoint"),
        (["--mode", "qat", "--quantise-from", "10"], "expected a step below 10"),
        (["--quantise-from", "5"], "only mode 'qat' quantises"),
        (["--mode", "qat", "--export", "x", "--export-storage.experts", "fp8"], "export_storage: the run is trained"),
        (["--accumulate", "3"], "expected a divisor of data.batch_size 8, found 3"),
        (["--checkpoint-every", "0"], "checkpoint_every: expected at least 1, found 0"),
        (["--data.evaluation-paths"], "there is nothing to evaluate"),
        (["--simulate-devices", "0"], "expected at least 1, found 0"),
    ],
)
def test_what_cannot_run_is_said(train, capsys, place, arguments, said):
    assert said in complaint(train, capsys, place, *arguments)
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizer.warmup-steps", "9"], "expected 0 <= warmup_steps"),
        (["--objective.z-weight", "-1"], "objective.z_weight: expected a number"),
        (["--dtype", "float64"], "float64"),
    ],
)
def test_a_bad_command_line_ends_with_2(train, capsys, place, arguments, said):
    with pytest.raises(SystemExit) as end:
        train.main(["--config", str(place / "config.py"), *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_an_export_is_not_written_over(train, capsys, place, tmp_path):
    assert f"export: {tmp_path} exists already" in complaint(train, capsys, place, "--export", str(tmp_path))


def test_config_files_that_are_none(train, capsys, tmp_path):
    assert train.main([]) == 1
    assert "--config: missing" in capsys.readouterr().err
    for text, said in (
        ("config = 3", "expected config = TrainConfig(...), found int"),
        ("", "expected config = TrainConfig(...), found NoneType"),
        ("import nothing_of_the_kind", "ModuleNotFoundError"),
    ):
        (tmp_path / "bad.py").write_text(text)
        assert train.main(["--config", str(tmp_path / "bad.py")]) == 1
        assert said in capsys.readouterr().err
    assert train.main(["--config", str(tmp_path / "none.py")]) == 1
    assert "none.py: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_complete_and_survive_json(path):
    config = load_config(path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert len(path.read_text().splitlines()) < 70
    assert differences(to_json(config), config) == ([], [])


def test_every_field_can_be_given_on_the_command_line(train, place):
    words = ["--config", str(place / "config.py"), "--seed", "7", "--optimizer.betas", "0.8", "0.9", "--fsdp"]
    words += ["--lora.patterns", "a", "b", "--data.shuffle", "--mesh", "data=2", "--export-storage.experts", "fp8"]
    run = train._parse(words).run
    assert (run.seed, run.optimizer.betas, run.fsdp, run.lora.patterns) == (7, (0.8, 0.9), True, ("a", "b"))
    assert (run.mesh, run.export_storage.experts) == ("data=2", "fp8")
    assert run.optimizer.learning_rate == 5e-3  # of the file


class TestDifferences:
    base = TrainConfig(
        output=Path("a"),
        model=Path("m"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=1, decay_start=2, total_steps=9
        ),
        data=DataConfig(paths=("x",), sequence_length=8, batch_size=8),
    )

    def changed(self, **changes):
        return differences(to_json(self.base), dataclasses.replace(self.base, **changes))

    def test_what_alters_a_run(self):
        assert self.changed(seed=1, freeze=("embed",)) == (
            ["freeze: [] so far, ['embed'] now", "seed: 0 so far, 1 now"],
            [],
        )
        optimizer = dataclasses.replace(self.base.optimizer, clip_norm=1.0)
        assert self.changed(optimizer=optimizer)[0] == ["optimizer.clip_norm: None so far, 1.0 now"]

    def test_what_rounds_differently(self):
        assert self.changed(mesh="data=8", fsdp=True, accumulate=2)[1] == [
            "accumulate: 1 so far, 2 now",
            "fsdp: False so far, True now",
            "mesh: None so far, 'data=8' now",
        ]

    def test_what_may_change(self):
        assert self.changed(output=Path("b"), steps=5, keep=1, log_every=3, export=Path("e")) == ([], [])

    def test_fields_that_an_earlier_version_had_not_are_their_defaults(self):
        saved = to_json(self.base)
        del saved["expert_precision"]
        assert differences(saved, self.base) == ([], [])

    def test_fields_of_another_version_are_named(self):
        with pytest.raises(ConfigurationError, match=r"unknown fields \['speed'\]"):
            from_json({**to_json(self.base), "speed": 9})


def test_out_of_memory_says_what_to_change(train):
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\nmore")
    said = train._device_error(TestDifferences.base, error)
    for word in ("12345 bytes", "data.batch_size 8 / accumulate 1", "--accumulate", "--remat full", "--fsdp"):
        assert word in said


def test_operations_of_training_are_three_times_those_of_the_forward_pass():
    from training_runs import CONFIG

    forward = training_operations(CONFIG, 64) / 3
    assert training_operations(CONFIG, 64, weights=False) == pytest.approx(2 * forward)
    # At least two operations for each weight that every token meets: attention, head, chosen experts.
    expert = 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size
    assert forward > 2 * (2 * CONFIG.vocab_size * CONFIG.hidden_size + 2 * 4 * expert)
