"""scripts/evaluate.py against the log-probabilities and logits of scripts/score.py's own path, the cached one."""

import json
import math

import numpy as np
import pytest

from deepseek_v4 import Execution, Model
from deepseek_v4.checkpoint import open_checkpoint
from deepseek_v4.scoring import score
from deepseek_v4.tokenizer import Tokenizer

TEXTS = ("It is a truth universally acknowledged.", "Emma Woodhouse, handsome, clever, and rich — " * 12, "No.\n")
LENGTH = 96


@pytest.fixture(scope="module")
def evaluate(script):
    return script("evaluate")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def pieces(hf_checkpoint):
    """The documents' token ids in the pieces that rows of LENGTH tokens cut them into."""
    tokenizer = Tokenizer.from_file(hf_checkpoint)
    whole = [[0, *tokenizer.encode(text), 1] for text in TEXTS]
    return [tokens[start : start + LENGTH] for tokens in whole for start in range(0, len(tokens), LENGTH)]


def test_the_figures_are_those_of_each_document_alone(
    evaluate, hf_checkpoint, orbax_checkpoint, documents, pieces, tmp_path, capsys
):
    assert max(map(len, pieces)) == LENGTH < sum(map(len, pieces))
    output = tmp_path / "result.json"
    flags = ["--checkpoint", str(orbax_checkpoint), "--input", str(documents), "--output", str(output)]
    flags += ["--sequence-length", str(LENGTH), "--batch-size", "2", "--dtype", "float32"]
    assert evaluate.main([*flags, "--mesh", "data=2,expert=2,tensor=2"]) == 0
    found = json.loads(output.read_text())
    assert (tmp_path / "result.png").read_bytes()[:4] == b"\x89PNG"
    assert "bits_per_byte" in capsys.readouterr().out

    checkpoint = open_checkpoint(hf_checkpoint)
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32"))
    scores = list(score(model, checkpoint.load(model), pieces, batch_size=8, prefill_chunk=LENGTH, mtp=True))
    loss = -sum(row.logprobs.sum(dtype=np.float64) for row in scores)
    targets = sum(len(row.logprobs) for row in scores)
    first = [row.logits.argmax(axis=-1) for row in scores]
    drafted = [row.mtp_logits.argmax(axis=-1) for row in scores]
    labels = [np.array(piece[1:]) for piece in pieces]
    # The MTP block's row t predicts token t + 2.
    mtp_loss = -sum(
        float(log_softmax(row.mtp_logits[:-1])[np.arange(len(label) - 1), label[1:]].sum())
        for row, label in zip(scores, labels, strict=True)
    )
    mtp_targets = sum(len(label) - 1 for label in labels)
    expected = {
        "targets": targets,
        "loss": loss / targets,
        "perplexity": math.exp(loss / targets),
        "accuracy": sum((a[:-1] == b).sum() for a, b in zip(first, labels, strict=True)) / targets,
        "mtp_loss": mtp_loss / mtp_targets,
        "mtp_accuracy": sum((a[:-1] == b[1:]).sum() for a, b in zip(drafted, labels, strict=True)) / mtp_targets,
        "mtp_acceptance": sum((a[:-1] == b[1:-1]).sum() for a, b in zip(drafted, first, strict=True)) / mtp_targets,
        # BOS is not predicted; EOS costs, but stands for no byte. No piece begins within a text but where it was cut.
        "bits_per_byte": loss
        / math.log(2)
        / (sum(len(text.encode()) for text in TEXTS) - cut_bytes(hf_checkpoint, pieces)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name  # float32 sums in another order
    load = np.array(list(found["load"].values()))
    assert list(found["load"]) == ["layer 0, SWA, hash", "layer 1, CSA", "layer 2, HCA", "MTP block 0"]
    # Every token of the main layers goes to two experts; the MTP block has no place for a document's first token.
    tokens = sum(map(len, pieces))
    np.testing.assert_array_equal(load[:3].sum(axis=1), 2 * tokens)
    assert 2 * (tokens - len(pieces)) <= load[3].sum() <= 2 * tokens


def cut_bytes(checkpoint, pieces):
    """Bytes of the tokens that begin a piece within a text: nothing predicts them."""
    tokenizer = Tokenizer.from_file(checkpoint)
    return sum(len(tokenizer.token_bytes(piece[:1])) for piece in pieces if piece[0] != 0)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))
        - logits.max(axis=-1, keepdims=True)
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--limit-batches", "0"], "--limit-batches: expected at least 1, found 0"),
        (["--mesh", "data=8", "--batch-size", "6"], "--batch-size: expected a multiple of data=8, found 6"),
        (["--checkpoint", "nowhere"], "nowhere: no such directory"),
        (["--format", "chat"], "texts.jsonl:1: expected messages"),
    ],
)
def test_what_cannot_be_evaluated_is_said(evaluate, hf_checkpoint, documents, capsys, arguments, said):
    flags = {"--checkpoint": str(hf_checkpoint), "--input": str(documents)}
    flags |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert evaluate.main([word for pair in flags.items() for word in pair]) == 1
    assert said in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_said(evaluate, documents, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert evaluate.main(["--checkpoint", str(tmp_path), "--input", str(documents)]) == 1
    assert "no complete checkpoint yet" in capsys.readouterr().err
