"""Training data: documents, chat targets, packing, order, resume, shares of processes, and reports of bad lines."""

import gzip
import itertools
import json
import lzma
import re
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.chat import encode_messages
from deepseek_v4.chat.tokens import ASSISTANT, BOS, EOS, TASK_TOKENS, THINK_END, THINK_START, USER
from deepseek_v4.data import DataConfig, DataError, open_data
from deepseek_v4.data.documents import DocumentEncoder, DocumentError
from deepseek_v4.data.packing import best_fit, cut
from deepseek_v4.default_model import CONFIG_DIRECTORY
from deepseek_v4.tokenizer import Tokenizer

CHAT = Path(__file__).resolve().parents[1] / "data" / "chat"
TOKENIZER = Tokenizer.from_file(CONFIG_DIRECTORY)
VOCAB, BOS_ID, EOS_ID = 4096, 0, 1
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

properties = settings(max_examples=100, deadline=None)


def opened(paths, one_pass=False, tokenizer=TOKENIZER, **settings):
    paths = tuple(map(str, paths)) if isinstance(paths, list) else (str(paths),)
    config = DataConfig(paths, **{"sequence_length": 16, "batch_size": 4, **settings})
    return open_data(config, tokenizer, VOCAB, BOS_ID, EOS_ID, one_pass)


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def pieces(batch):
    """The documents, or pieces of one, in the rows of a batch: (tokens, targets) each, told apart by positions."""
    found = []
    columns = (batch[name] for name in ("tokens", "positions", "targets", "real"))
    for tokens, positions, targets, real in zip(*columns, strict=True):
        length = int(real.sum())
        assert real[:length].all()
        assert not targets[length:].any()
        starts = [*np.flatnonzero(positions[:length] == 0), length]
        for begin, end in itertools.pairwise(starts):
            np.testing.assert_array_equal(positions[begin:end], np.arange(end - begin))
            found.append((tuple(tokens[begin:end]), tuple(targets[begin:end])))
        np.testing.assert_array_equal(positions[length:], np.arange(len(tokens) - length))
    return found


def rows(dataset, first, count):
    """Rows ``first`` to ``first + count`` of the endless sequence of rows, as bytes."""
    size = dataset.config.batch_size
    steps = [dataset.batch(step) for step in range(first // size, -(-(first + count) // size))]
    tokens = np.concatenate([batch["tokens"] for batch in steps])
    return [row.tobytes() for row in tokens[first % size :][:count]]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def numbered(lengths):
    """Documents of these lengths that have no two tokens in common."""
    ends = np.cumsum(lengths)
    assert ends[-1] <= VOCAB
    return [list(range(end - length, end)) for end, length in zip(map(int, ends), lengths, strict=True)]


# --- packing ------------------------------------------------------------------------------------------------


@properties
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(2, 32))
def test_best_fit_wastes_no_room(lengths, size):
    document, start, length = cut(np.array(lengths), size)
    expected = [(d, s, min(size, n - s)) for d, n in enumerate(lengths) for s in range(0, n, size)]
    assert list(zip(document, start, length, strict=True)) == expected
    row = best_fit(length, size)
    used = np.bincount(row, weights=length)
    assert used.min() > 0
    assert used.max() <= size
    # No two rows would fit into one: the first piece of the later row had not fitted into the earlier.
    assert all(used[i] + used[j] > size for i in range(len(used)) for j in range(i))
    # Rows are numbered by their first pieces.
    assert list(dict.fromkeys(row)) == list(range(len(used)))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    size=st.integers(2, 24),
    batch_size=st.integers(1, 5),
    packing=st.sampled_from(["best_fit", "one_per_row"]),
    shuffle=st.booleans(),
)
def test_every_token_once_per_epoch(tmp_path_factory, lengths, size, batch_size, packing, shuffle):
    documents = numbered(lengths)
    targets = [[token % 3 == 0 for token in document] for document in documents]
    path = tmp_path_factory.mktemp("data") / "a.npz"
    offsets = np.cumsum([0, *lengths])
    np.savez(path, tokens=np.concatenate(documents), offsets=offsets, targets=np.concatenate(targets))
    options = {"sequence_length": size, "batch_size": batch_size, "packing": packing, "shuffle": shuffle}
    expected = sorted(
        (tuple(document[at : at + size]), tuple(wanted[at : at + size]))
        for document, wanted in zip(documents, targets, strict=True)
        for at in range(0, len(document), size)
    )
    once = opened(path, one_pass=True, **options)
    assert sorted(piece for step in range(len(once)) for piece in pieces(once.batch(step))) == expected
    with pytest.raises(IndexError):
        once.batch(len(once))

    endless = opened(path, **options)
    count = endless.statistics.rows
    every = sorted(row.tobytes() for step in range(len(once)) for row in once.batch(step)["tokens"])
    for epoch in range(3):
        padding = [bytes(4 * size)] * (len(once) * batch_size - count)
        assert sorted(rows(endless, epoch * count, count) + padding) == every

    statistics = endless.statistics
    assert statistics.tokens == sum(lengths)
    assert statistics.targets == sum(map(sum, targets))
    assert statistics.cut_documents == sum(length > size for length in lengths)
    assert statistics.padding_share == pytest.approx(1 - sum(lengths) / (count * size))
    if packing == "one_per_row":
        assert count == len(expected)


# --- order, shares and resume -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    lengths = np.random.default_rng(0).integers(1, 40, 150)
    path = tmp_path_factory.mktemp("tokens") / "a.npz"
    np.savez(path, tokens=np.concatenate(numbered(lengths)), offsets=np.cumsum([0, *lengths]))
    return path


def test_order_depends_on_seed_and_epoch_only(tokens_file):
    dataset, again, other = opened(tokens_file), opened(tokens_file), opened(tokens_file, seed=1)
    count = dataset.rows
    epochs = [rows(dataset, epoch * count, count) for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [rows(again, epoch * count, count) for epoch in (2, 0, 1)] == [epochs[i] for i in (2, 0, 1)]
    assert rows(other, 0, count) != epochs[0]
    still = opened(tokens_file, shuffle=False)
    assert rows(still, 0, count) == rows(still, count, count)
    assert rows(still, 0, 1)[0][:4] == bytes(4)  # begins with the first document, whose first token is 0


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_shares_of_processes_make_up_the_batch(tokens_file, count):
    dataset = opened(tokens_file, batch_size=12)
    for step in (0, len(dataset) - 1, len(dataset) + 3):
        shares = [dataset.batch(step, index, count) for index in range(count)]
        assert_same({name: np.concatenate([s[name] for s in shares]) for name in shares[0]}, dataset.batch(step))


def test_processes_must_share_evenly(tokens_file):
    with pytest.raises(DataError, match="4 rows cannot be shared evenly by 3"):
        opened(tokens_file).batch(0, 0, 3)


@pytest.mark.parametrize("step", [0, 1, 17, 100])
def test_resume_continues_the_batches(tokens_file, step):
    state = json.loads(json.dumps(opened(tokens_file).state(step)))
    assert len(json.dumps(state)) < 1000
    resumed, uninterrupted = opened(tokens_file), opened(tokens_file)
    with uninterrupted.prefetch(stop=step + 5) as all_batches:
        expected = [item for item in all_batches if item[0] >= step]
    with resumed.prefetch(start=resumed.restore(state)) as batches:
        for (n, batch), (m, other) in zip(expected, batches, strict=False):
            assert n == m
            assert_same(batch, other)


def test_resume_refuses_other_data_and_order(tokens_file, tmp_path):
    state = opened(tokens_file).state(5)
    assert state["epoch"] == 0
    for change in ({"batch_size": 8}, {"seed": 3}, {"sequence_length": 8}, {"packing": "one_per_row"}):
        name = next(iter(change))
        with pytest.raises(DataError, match=f"^{name} is .* in the saved run"):
            opened(tokens_file, **change).restore(state)
    with np.load(tokens_file) as file:
        arrays = dict(file)
    for name, index in (("tokens", 99), ("offsets", 1)):
        changed = {key: value.copy() for key, value in arrays.items()}
        changed[name][index] += 1
        np.savez(tmp_path / "b.npz", **changed)
        with pytest.raises(DataError, match="the training data changed"):
            opened(tmp_path / "b.npz").restore(state)
    np.savez(tmp_path / "b.npz", **arrays, targets=arrays["tokens"] != 7)
    with pytest.raises(DataError, match="the training data changed"):
        opened(tmp_path / "b.npz").restore(state)
    # Another file, and other integers, with the same documents are the same data.
    np.save(tmp_path / "c.npy", arrays["tokens"].astype(np.uint16))
    np.save(tmp_path / "c.offsets.npy", arrays["offsets"])
    assert opened(tmp_path / "c.npy").restore(state) == 5


def test_prefetch_ends_its_thread_and_passes_errors_on(tokens_file):
    dataset = opened(tokens_file, one_pass=True)
    before = threading.active_count()
    with dataset.prefetch(depth=3) as batches:
        steps = [step for step, _ in batches]
    assert steps == list(range(len(dataset)))
    with opened(tokens_file).prefetch(process_count=3) as batches, pytest.raises(DataError, match="shared evenly"):
        next(batches)
    with opened(tokens_file).prefetch() as batches:
        next(batches)
    assert list(batches) == []
    assert threading.active_count() == before


# --- evaluation ---------------------------------------------------------------------------------------------


def test_held_out_share(tokens_file):
    dataset = opened(tokens_file, holdout=0.1)
    held_out = dataset.evaluation
    assert held_out.statistics.documents == 15
    assert dataset.statistics.documents == 135
    tokens = {
        part: {t for step in range(len(data)) for piece, _ in pieces(data.batch(step)) for t in piece}
        for part, data in (("train", opened(tokens_file, holdout=0.1, one_pass=True)), ("evaluation", held_out))
    }
    assert not tokens["train"] & tokens["evaluation"]
    assert len(tokens["train"] | tokens["evaluation"]) == opened(tokens_file).statistics.tokens
    assert opened(tokens_file, holdout=0.1, seed=5).evaluation.fingerprint == held_out.fingerprint
    with pytest.raises(DataError, match="the training data changed"):
        dataset.restore(opened(tokens_file).state(1))


def test_evaluation_files_are_not_trained_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}")
    dataset = opened(tmp_path, evaluation_paths=(str(tmp_path / "b.txt"),))
    assert (dataset.statistics.files, dataset.evaluation.statistics.files) == (2, 1)
    assert TOKENIZER.decode(pieces(dataset.evaluation.batch(0))[0][0]) == f"{BOS}the text of b{EOS}"
    with pytest.raises(DataError, match="none is left"):
        opened(tmp_path / "b.txt", evaluation_paths=(str(tmp_path / "*.txt"),))
    with pytest.raises(DataError, match="leaves none to learn from"):
        opened(tmp_path / "b.txt", holdout=0.1)
    with pytest.raises(DataError, match="give one of them"):
        opened(tmp_path, holdout=0.1, evaluation_paths=("x",))


# --- files --------------------------------------------------------------------------------------------------


def texts(dataset):
    return [TOKENIZER.decode(tokens) for step in range(len(dataset)) for tokens, _ in pieces(dataset.batch(step))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, BOS + "Ünïcode 1" + EOS), ({"bos": False}, "Ünïcode 1" + EOS), ({"eos": False}, BOS + "Ünïcode 1")],
)
def test_text_has_bos_and_eos(tmp_path, options, expected):
    write_lines(tmp_path / "a.jsonl", "\ufeff" + json.dumps({"text": "Ünïcode 1", "source": "s"}), "", "  ")
    (tmp_path / "b.txt").write_text("\ufeffÜnïcode 1")
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress("Ünïcode 1".encode()))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "Ünïcode 1"}).encode()))
    (tmp_path / "README.md").write_text("no data")
    once = opened(tmp_path, one_pass=True, **options)
    assert texts(once) == [expected] * 4
    assert once.statistics.targets == once.statistics.tokens
    assert texts(opened(tmp_path / "*.txt*", one_pass=True, **options)) == [expected] * 2


def test_bos_is_as_the_tokenizer_says(tmp_path):
    released = Tokenizer(TOKENIZER._backend, bos_token_id=0, add_bos=False)
    (tmp_path / "a.txt").write_text("text")
    assert texts(opened(tmp_path, one_pass=True, tokenizer=released)) == ["text" + EOS]
    assert texts(opened(tmp_path, one_pass=True, tokenizer=released, bos=True)) == [BOS + "text" + EOS]


def test_separator(tmp_path):
    (tmp_path / "a.txt").write_text("\n***\none\ntwo\n***\n\n***\nthree\n***\n")
    dataset = opened(tmp_path, one_pass=True, separator="\n***\n", sequence_length=32)
    assert texts(dataset) == [f"{BOS}one\ntwo{EOS}", f"{BOS}three{EOS}"]


def test_long_text_is_cut_into_samples_without_bos(tmp_path):
    text = "It is a truth universally acknowledged. " * 20
    (tmp_path / "a.txt").write_text(text)
    dataset = opened(tmp_path, one_pass=True, shuffle=False)
    assert dataset.statistics.cut_documents == 1
    assert "".join(texts(dataset)) == BOS + text + EOS


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0, 5, 6, 1, 0, 7, 1, 8, 1], [[0, 5, 6, 1], [0, 7, 1, 8, 1]]),  # BOS tokens tell, a chat has many EOS tokens
        ([3, 0, 5, 0, 6], [[3], [0, 5], [0, 6]]),
        ([5, 6, 1, 7, 1, 8], [[5, 6, 1], [7, 1], [8]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6, 1], [7, 1, 8]], [[5, 6, 1], [7, 1, 8]]),
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_documents_in_an_array(tmp_path, tokens, expected, dtype):
    np.save(tmp_path / "a.npy", np.array(tokens, dtype))
    np.savez(tmp_path / "a.npz", tokens=np.array(tokens, dtype))
    for name in ("a.npy", "a.npz"):
        dataset = opened(tmp_path / name, one_pass=True, tokenizer=None, format="tokens")
        assert sorted(list(tokens) for tokens, _ in pieces(dataset.batch(0))) == sorted(expected)


def test_arrays_beside_an_array(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10))
    np.save(tmp_path / "a.offsets.npy", np.array([0, 4, 10]))
    np.save(tmp_path / "a.targets.npy", np.arange(10) > 2)
    found = pieces(opened(tmp_path, one_pass=True).batch(0))
    assert found == [((0, 1, 2, 3), (False, False, False, True)), ((4, 5, 6, 7, 8, 9), (True,) * 6)]


def test_an_array_stays_on_disk(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(1 << 26, np.uint16))  # 128 MiB
    np.save(tmp_path / "a.offsets.npy", np.arange(0, (1 << 26) + 1, 1 << 16))
    tracemalloc.start()
    dataset = opened(tmp_path, sequence_length=4096)
    dataset.batch(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Checks and hashes run over pieces of 2^24 tokens: a copy in int32, or a few masks, of one piece at a time.
    assert peak < 110 << 20


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.zeros(4)}, "expected integers"),
        ({"tokens": np.zeros((2, 2, 2), int)}, "expected integers"),
        ({"ids": np.zeros(4, int)}, "expected an array 'tokens'"),
        ({"tokens": np.zeros(4, int), "offsets": np.array([0, 3])}, "rise from 0 to the number of tokens, 4"),
        ({"tokens": np.zeros(4, int), "offsets": np.array([0, 3, 2, 4])}, "not rising"),
        ({"tokens": np.zeros(4, int), "offsets": np.array([0.0, 4.0])}, "offsets: expected integers"),
        ({"tokens": np.zeros((2, 2), int), "offsets": np.array([0, 4])}, "whose rows are documents"),
        ({"tokens": np.zeros(4, int), "targets": np.ones(4, int)}, "targets: expected bool"),
        ({"tokens": np.zeros(4, int), "targets": np.ones(3, bool)}, "targets: expected bool"),
        ({"tokens": np.array(["a", None], object)}, "not a readable array"),
    ],
)
def test_unusable_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, on_bad="skip")
    assert "a.npz" in str(caught.value)


# --- bad documents ------------------------------------------------------------------------------------------

BAD = {
    '{"text": ': "not valid JSON: .* at column",
    "[1]": r"expected a JSON object, found \[1\]",
    '{"txt": "a"}': r"exactly one of text, messages, token_ids; found the keys \['txt'\]",
    '{"text": "a", "token_ids": [1]}': "found text and token_ids",
    '{"text": ""}': "text: empty",
    '{"text": " \\n"}': "text: empty",
    '{"text": 3}': "text: expected a string, found 3",
    '{"text": "\\ud800"}': "not valid Unicode",
    '{"token_ids": []}': r"expected a non-empty list, found \[\]",
    '{"token_ids": [3, true]}': r"token_ids\[1\]: expected an integer, found True",
    '{"token_ids": [3, 4096]}': "token 1: 4096 is outside the vocabulary 0 .. 4095",
    '{"token_ids": [-1]}': "token 0: -1 is outside",
    '{"token_ids": [99999999999999999999]}': "is outside the vocabulary",
    '{"messages": []}': "messages: expected a non-empty list",
    '{"messages": [3]}': r"messages\[0\] must be a mapping",
    '{"messages": [{"role": "king", "content": "a"}]}': "Unknown role: king",
    '{"messages": [{"role": "user", "content": "a"}]}': "no assistant turn",
    '{"messages": [{"role": "assistant", "content": 1}]}': "content must be a string",
    '{"messages": [{"role": "user", "content": "a"}], "thinking_mode": "deep"}': "Invalid thinking_mode",
    '{"messages": [{"role": "system", "tools": [1]}], "tools": [1]}': "give them once",
    "[" * 100_000: "not valid JSON",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "a.jsonl", {"text": "good"}, "", line, {"text": "good"})
    with pytest.raises(DataError, match=message) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_bad_lines_are_counted_and_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"})
    path.write_bytes("\n".join([good, *BAD, good]).encode() + b'\n{"text": "\xff"}\n')
    dataset = opened(path, on_bad="skip", one_pass=True)
    assert texts(dataset) == [f"{BOS}good{EOS}"] * 2
    assert dataset.statistics.bad_documents == len(BAD) + 1
    reports = dataset.statistics.bad_reports
    assert [report.split(": ")[0] for report in reports] == [f"{path}:{n}" for n in [*range(2, len(BAD) + 2), 24]]
    assert f"{len(BAD) + 1} bad documents left out" in str(dataset.statistics)
    assert "byte 0xff" in reports[-1]
    write_lines(path, "x")
    with pytest.raises(DataError, match=r"no documents to learn from \(1 bad ones left out\)"):
        opened(path, on_bad="skip")


def test_bad_texts_and_arrays_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n--\nthree\nf\xc3\n--\ngood")
    np.save(tmp_path / "b.npy", np.array([7, 8, 4096, 9, -1, -2, 9]))
    np.save(tmp_path / "b.offsets.npy", np.array([0, 2, 2, 4, 7]))
    dataset = opened(tmp_path, on_bad="skip", separator="--\n")
    assert dataset.statistics.documents == 3
    assert list(dataset.statistics.bad_reports) == [
        f"{tmp_path}/a.txt:5: not UTF-8: byte 0xc3",
        f"{tmp_path}/b.npy: document 2: token 0: 4096 is outside the vocabulary 0 .. 4095",
        f"{tmp_path}/b.npy: document 3: token 0: -1 is outside the vocabulary 0 .. 4095",
        f"{tmp_path}/b.npy: document 1: empty",
    ]
    with pytest.raises(DataError, match=r"b.npy: document 2: .* correct it, or"):
        opened(tmp_path / "b.npy")
    (tmp_path / "c.txt.xz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"c.txt.xz: cannot be read"):
        opened(tmp_path / "c.txt.xz")


def test_paths_that_name_nothing(tmp_path):
    for path, message in (("none.jsonl", "no such file"), ("*.txt", "no such file"), (".", "no .* files in it")):
        with pytest.raises(DataError, match=message):
            opened(tmp_path / path)
    for name in ("a.csv", "a.txt"):
        (tmp_path / name).write_text("a")
    with pytest.raises(DataError, match="expected a name ending in"):
        opened(tmp_path / "a.csv")
    with pytest.raises(DataError, match="for data of format 'chat'"):
        opened(tmp_path / "a.txt", format="chat")
    with pytest.raises(DataError, match="named twice"):
        opened([tmp_path, tmp_path / "a.txt"])
    with pytest.raises(DataError, match="expected a tuple"):
        DataConfig("a.txt", 16, 4)
    write_lines(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="expected messages; found the keys"):
        opened(tmp_path / "a.jsonl", format="chat")
    with pytest.raises(DataError, match=r"needs? the checkpoint's tokenizer"):
        opened(tmp_path / "a.jsonl", tokenizer=None)


# --- chat targets -------------------------------------------------------------------------------------------


def chat(messages, **line):
    encoder = DocumentEncoder(TOKENIZER, VOCAB, BOS_ID, EOS_ID)
    return encoder.chat({"messages": messages, **line})


def learnt(document):
    """The texts of the runs of targets."""
    edges = np.flatnonzero(np.diff([0, *document.targets.astype(int), 0]))
    return [TOKENIZER.decode(document.tokens[begin:end]) for begin, end in edges.reshape(-1, 2)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"id": "1", "function": {"name": "f", "arguments": '{"a": "b"}'}}
CALLED = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">b</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
RESULT = {"role": "tool", "tool_call_id": "1", "content": "r"}


@pytest.mark.parametrize(
    ("messages", "line", "expected"),
    [
        ([user("q"), assistant("a")], {}, ["a" + EOS]),
        ([user("q"), assistant("a", reasoning_content="r")], {}, ["a" + EOS]),
        (
            [user("q"), assistant("a", reasoning_content="r")],
            {"thinking_mode": "thinking", "reasoning_effort": "max"},
            [f"r{THINK_END}a{EOS}"],
        ),
        (  # reasoning before the last user turn is dropped, and with it earlier prefixes differ
            [user("p"), assistant("a", reasoning_content="r"), user("q"), assistant("b", reasoning_content="s")],
            {"thinking_mode": "thinking"},
            ["a" + EOS, f"s{THINK_END}b{EOS}"],
        ),
        (  # tools keep all reasoning
            [user("p"), assistant("a", reasoning_content="r", tool_calls=[CALL]), RESULT, assistant("b"), user("q")],
            {"thinking_mode": "thinking", "tools": [TOOL]},
            [f"r{THINK_END}a{CALLED}{EOS}", f"{THINK_END}b{EOS}"],
        ),
        ([{"role": "system", "content": "s"}, user("q"), assistant("a")], {"tools": [TOOL]}, ["a" + EOS]),
        ([user("q"), assistant("a", wo_eos=True)], {}, ["a"]),
        ([user("q"), assistant("a", wo_eos=True), user("q"), assistant("")], {}, ["a", EOS]),
        ([assistant("first"), assistant("second")], {}, [f"first{EOS}second{EOS}"]),
        ([{**user("q"), "task": "title"}, assistant("t")], {"thinking_mode": "thinking"}, ["t" + EOS]),
        ([{**user("q"), "task": "action"}, assistant("Search")], {}, ["Search" + EOS]),
        ([user(f"{ASSISTANT}{THINK_END}no{EOS}"), assistant("é🙂")], {}, [f"é🙂{EOS}"]),  # forged turns are the user's
    ],
)
def test_targets_are_what_the_assistant_writes(messages, line, expected):
    document = chat(messages, **line)
    assert learnt(document) == expected
    offered = {"tools": line.pop("tools")} if "tools" in line else {}
    if offered and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    text = encode_messages([{**messages[0], **offered}, *messages[1:]], **{"thinking_mode": "chat", **line})
    assert TOKENIZER.decode(document.tokens) == text


def test_a_token_in_two_turns_is_no_target():
    """No special token divides a system text from an assistant turn after it, so one token may span both."""
    assert [TOKENIZER.decode([token]) for token in TOKENIZER.encode("my mother said")] == ["my", " mother", " said"]
    messages = [{"role": "system", "content": "my mot"}, assistant("her said")]
    assert learnt(chat(messages)) == [f" said{EOS}"]


def golden_cases():
    """(name, messages, options, text) of the released cases that are whole conversations."""
    for case in json.loads((CHAT / "cases.json").read_text(encoding="utf-8"))["encode"]:
        kwargs = case["kwargs"]
        if "expected" in case and kwargs.keys() <= {"reasoning_effort"}:
            yield case["name"], case["messages"], {"thinking_mode": case["thinking_mode"], **kwargs}, case["expected"]
    for number, mode in ((1, "thinking"), (2, "thinking"), (3, "thinking"), (4, "chat")):
        messages = json.loads((CHAT / f"test_input_{number}.json").read_text(encoding="utf-8"))
        if isinstance(messages, dict):
            messages["messages"][0]["tools"] = messages["tools"]
            messages = messages["messages"]
        text = (CHAT / f"test_output_{number}.txt").read_bytes().decode("utf-8")
        yield f"official_{number}", messages, {"thinking_mode": mode}, text


# In the text alone: an assistant's turn goes from its marker, or that of a task, up to EOS.
TASKS = "|".join(re.escape(token) for name, token in TASK_TOKENS.items() if name != "action")
MARKER = f"{ASSISTANT}(?:{THINK_START}|{THINK_END})(?:{re.escape(TASK_TOKENS['action'])})?"
TURN = re.compile(f"(?:{MARKER}|{TASKS})((?:(?!{EOS}|{USER}).)*{EOS})", re.DOTALL)

# Turns that have no marker (the turn before was dropped, or there is none) or no EOS.
UNMARKED = {"developer_dropped_thinking": ["a" + EOS], "assistant_first": ["a" + EOS], "wo_eos": ["partial"]}


@pytest.mark.parametrize(
    ("name", "messages", "options", "text"), list(golden_cases()), ids=lambda value: str(value)[:30]
)
def test_targets_of_the_released_cases(name, messages, options, text):
    expected = UNMARKED.get(name, TURN.findall(text))
    if not expected:
        with pytest.raises(DocumentError, match=r"no assistant turn|expected a non-empty list"):
            chat(messages, **options)
        return
    document = chat(messages, **options)
    assert learnt(document) == expected
    assert TOKENIZER.decode(document.tokens) == text


contents = st.text(max_size=20) | st.sampled_from(["", "a", "a\n\n", " x", "é", EOS, THINK_END, f"{ASSISTANT}x"])


@properties
@given(st.lists(st.tuples(contents, contents, contents), min_size=1, max_size=4), st.sampled_from(["chat", "thinking"]))
def test_targets_are_what_each_turn_adds_to_the_tokens(exchanges, mode):
    """The tokens up to a user turn are the prompt of the answer, and the answer is what its turn adds to them."""
    # Tools keep earlier reasoning, so that the text of a conversation begins with that of its beginnings.
    messages = [{"role": "system", "content": "s", "tools": [TOOL]}]
    for question, reasoning, answer in exchanges:
        messages += [user(question), assistant(answer, reasoning_content=reasoning)]
    document = chat(messages, thinking_mode=mode)
    expected, known = [], 0
    for count in range(2, len(messages) + 1):
        tokens = TOKENIZER.encode(encode_messages(messages[:count], thinking_mode=mode))
        assert list(document.tokens[: len(tokens)]) == tokens
        expected += [messages[count - 1]["role"] == "assistant"] * (len(tokens) - known)
        known = len(tokens)
    assert list(document.targets) == expected
