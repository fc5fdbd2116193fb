"""What a run makes of a model: quantised at the end, adapted, fine-tuned, exported; and when it must stop."""

import json
import shutil

import numpy as np
import pytest
from training_runs import losses, metrics, workplace, write_documents

from deepseek_v4 import RELEASED
from deepseek_v4.checkpoint import open_checkpoint

ADAPTERS = ("--mode", "lora", "--lora.rank", "4", "--lora.alpha", "8", "--lora.patterns", "attn.w*", "ffn")
ADAPTERS += ("--optimizer.name", "adamw", "--optimizer.weight-decay", "0", "--objective.bias-rate", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("trainer"), "--xla_backend_optimization_level=0")


@pytest.fixture(scope="module")
def quantised(place):
    """A run whose last four steps quantise, and its export."""
    output, export = place.directory / "qat", place.directory / "released"
    quantisation = ("--mode", "qat", "--quantise-from", "6", "--simulate", "kv")
    said = place.run("--output", str(output), *quantisation, "--export", str(export))
    assert f"wrote {export}: experts in fp4, linears in fp8" in said
    return output, export


def evaluation(place, checkpoint, *arguments):
    """The figures of scripts/evaluate.py on the held-out documents."""
    result = place.directory / "evaluation.json"
    documents = ("--input", str(place.directory / "held_out.jsonl"), "--sequence-length", "128", "--dtype", "float32")
    place.run("--checkpoint", str(checkpoint), *documents, *arguments, "--output", str(result), script="evaluate")
    return json.loads(result.read_text())


def test_quantisation_begins_on_the_way(place, quantised):
    output = place.directory / "full"
    place.run("--output", str(output), "--steps", "7", "--eval-every", "0")
    plain, found = losses(output), losses(quantised[0])
    assert found[:6] == plain[:6]
    assert 0 < abs(found[6] - plain[6]) < 0.1
    assert found[-1] < found[0] - 0.5


def test_an_export_is_what_was_evaluated(place, quantised):
    output, export = quantised
    assert open_checkpoint(export).storage == RELEASED
    last = metrics(output)[-1]
    assert last["step"] == 10
    found = evaluation(place, export, "--simulate", "kv")
    # The same weights, decoded elsewhere; float32 sums in another order.
    for name in ("loss", "mtp_loss"):
        np.testing.assert_allclose(found[name], last[f"eval_{name}"], rtol=1e-5)
    assert found["accuracy"] == pytest.approx(last["eval_accuracy"], abs=2 / found["targets"])
    # A run's own directory can be evaluated too.
    own = evaluation(place, output)
    np.testing.assert_allclose(own["loss"], last["eval_loss"], rtol=1e-5)
    assert np.array_equal(list(own["load"].values()), list(found["load"].values()))


def test_adapters_are_trained_saved_and_merged(place, quantised):
    _, base = quantised
    other = write_documents(place.directory / "other.jsonl", shift=11)
    write_documents(place.directory / "other_held_out.jsonl", 12, seed=1, shift=11)
    output, adapters, merged = (place.directory / name for name in ("lora", "adapters", "merged"))
    arguments = (
        *("--output", str(output), "--model", str(base), "--weights", "checkpoint", *ADAPTERS),
        *("--data.paths", str(other), "--data.evaluation-paths", str(place.directory / "other_held_out.jsonl")),
        *("--optimizer.learning-rate", "0.02", "--export", str(adapters)),
    )
    place.run(*arguments, "--steps", "5")
    shutil.rmtree(adapters)
    assert f"convert_checkpoint.py merge {base} {adapters}" in place.run(*arguments)
    before, *_, after = losses(output, "eval_loss")
    assert after < before - 0.5
    assert sorted(path.name for path in adapters.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (output / "checkpoints" / "10").is_dir()

    place.run("merge", str(base), str(adapters), str(merged), script="convert_checkpoint")
    result = place.directory / "merged.json"
    documents = ("--input", str(place.directory / "other_held_out.jsonl"), "--sequence-length", "128")
    place.run(
        *("--checkpoint", str(merged), *documents, "--dtype", "float32", "--output", str(result)), script="evaluate"
    )
    # Requantised once: closer to the adapted model than to the base.
    assert abs(json.loads(result.read_text())["loss"] - after) < 0.2 * (before - after)

    # Beside other weights the run does not go on.
    tampered = place.directory / "tampered"
    shutil.copytree(base, tampered)
    shard = sorted(tampered.glob("model-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    said = place.run(*arguments, "--model", str(tampered), "--steps", "11", "--export", "None", code=1)
    assert "the weights that are not trained are others" in said


def test_all_parameters_of_a_checkpoint_begin_where_it_is(place, quantised):
    _, base = quantised
    output = place.directory / "tuned"
    place.run("--output", str(output), "--model", str(base), "--weights", "checkpoint", "--steps", "1")
    # Masters decode every released weight exactly.
    np.testing.assert_allclose(losses(output, "eval_loss")[0], evaluation(place, base)["loss"], rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_and_nothing_is_saved_after_it(place):
    output = place.directory / "diverged"
    rates = ("--optimizer.learning-rate", "1e30", "--optimizer.final-learning-rate", "1e30")
    said = place.run("--output", str(output), *rates, "--eval-every", "0", "--checkpoint-every", "1", code=1)
    assert "training diverged: step 1: loss nan" in said
    assert f"the last good checkpoint is {output}/checkpoints/1, whose own next loss this is" in said
    assert "--accept-changes" in said
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["1"]
    assert [line["loss"] is None for line in metrics(output)] == [False, True]


def test_parts_of_a_batch_and_anticipation_run(place):
    output = place.directory / "parts"
    options = ("--accumulate", "2", "--anticipate", "2", "--remat", "experts", "--data.packing", "one_per_row")
    place.run("--output", str(output), *options, "--steps", "2", "--eval-every", "0")
    place.run("--output", str(output), *options, "--steps", "4", "--eval-every", "0")
    whole = place.directory / "parts-whole"
    place.run("--output", str(whole), *options, "--steps", "4", "--eval-every", "0")
    assert metrics(output) == metrics(whole)
