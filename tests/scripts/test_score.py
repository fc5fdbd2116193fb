"""scripts/score.py from files to archives."""

import json

import numpy as np
import pytest

from deepseek_v4 import Execution, Model
from deepseek_v4.checkpoint import open_checkpoint
from deepseek_v4.scoring import score

SEQUENCES = [[0, *(11 * i % 4000 + 3 for i in range(n))] for n in (0, 1, 70, 199)]


@pytest.fixture(scope="module")
def score_script(script):
    return script("score")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "tokens.jsonl"
    path.write_text("".join(json.dumps({"token_ids": s}) + "\n" for s in SEQUENCES))
    return path


def flags(checkpoint, source, output, *more):
    return [
        *("--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)),
        *("--prefill-chunk", "64", "--batch-size", "4", "--mesh", "data=2,expert=2,tensor=2"),
        *more,
    ]


def test_the_archive_holds_the_scores(score_script, orbax_checkpoint, hf_checkpoint, source, tmp_path):
    output = tmp_path / "out.npz"
    assert score_script.main(flags(orbax_checkpoint, source, output, "--mtp")) == 0
    checkpoint = open_checkpoint(hf_checkpoint)
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32"))
    expected = list(score(model, checkpoint.load(model), SEQUENCES, batch_size=4, prefill_chunk=64, mtp=True))
    with np.load(output) as archive:
        assert len(archive.files) == 3 * len(SEQUENCES)
        for i, (sequence, row) in enumerate(zip(SEQUENCES, expected, strict=True)):
            size = len(sequence)
            assert archive[f"logits_{i}"].shape == (size, 4096)
            assert archive[f"logprobs_{i}"].shape == (size - 1,)
            assert archive[f"mtp_logits_{i}"].shape == (size - 1, 4096)
            for name in row._fields:
                array = archive[f"{name}_{i}"]
                assert array.dtype == np.float32
                # Another mesh sums in another order: float32 roundings of logits of size about 1.
                np.testing.assert_allclose(array, getattr(row, name), rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"token_ids": [0, 4096]}', "4096 is outside the vocabulary"),
        ('{"token_ids": []}', "token_ids: empty"),
        ("[", "not valid JSON"),
        (json.dumps({"token_ids": [0] * 4097}), "the limit is 4096"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(score_script, orbax_checkpoint, tmp_path, capsys, row, said):
    source = tmp_path / "in.jsonl"
    source.write_text('{"token_ids": [0]}\n\n' + row + "\n")
    output = tmp_path / "out.npz"
    output.write_bytes(b"earlier")
    assert score_script.main(flags(orbax_checkpoint, source, output)) == 1
    errors = capsys.readouterr().err
    assert "in.jsonl:3: " in errors
    assert said in errors
    assert output.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 2
