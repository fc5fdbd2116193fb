"""The built-in small model: a V4 in the released layout with every kind of layer, trained here, and its own tokenizer.

python -m deepseek_v4.default_model --output DIR           writes the model as a Hugging Face directory
python -m deepseek_v4.default_model --output DIR --seed 0  ... with random weights instead of the trained ones
python -m deepseek_v4.default_model --chats FILE           writes conversations about its novels, to fine-tune on
python -m deepseek_v4.default_model --train-tokenizer      recreates configs/default/tokenizer.json from the corpus
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
import tyro
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek_v4.checkpoint.export import to_hf
from deepseek_v4.checkpoint.huggingface import INDEX_FILE, open_huggingface
from deepseek_v4.checkpoint.layout import Item, item_specs, items
from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.checkpoint.source import Leaf
from deepseek_v4.config import Config
from deepseek_v4.initialise import initialise
from deepseek_v4.nn.variables import RELEASED, Storage
from deepseek_v4.parameters import Path as LeafPath
from deepseek_v4.parameters import flatten, nest

CONFIG_DIRECTORY = Path(__file__).resolve().parents[1] / "configs" / "default"

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""What the directory of the built-in model holds beside its weights."""

_SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")  # ids 0, 1, 2

# The named tokens that the release keeps at ids 128800 and up, in its order; here they close the vocabulary.
_ADDED = (
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
    "<｜begin▁of▁repo▁name｜>",
    "<｜end▁of▁repo▁name｜>",
    "<｜begin▁of▁file▁name｜>",
    "<｜end▁of▁file▁name｜>",
    "<｜begin▁of▁file｜>",
    "<｜end▁of▁file｜>",
    "<think>",
    "</think>",
    "<｜place▁holder▁for▁copy｜>",
    "<｜place▁holder▁for▁pointer▁replace｜>",
    "｜DSML｜",
    "<｜begin▁sys｜>",
    "<｜end▁sys｜>",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜task｜>",
    "<｜political｜>",
    "<｜entity｜>",
    "<｜title｜>",
    "<｜safety｜>",
    "<｜answer｜>",
    "<｜search｜>",
    "<dsml:",
    "</dsml:",
    "<｜search▁begin｜>",
    "<｜search▁end｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
_ADDED_SPECIAL = ("<｜end_of_query｜>",)

# How the release cuts text before BPE (checkpoint reference, section 5): digits by three, runs of CJK and kana, then
# punctuation with letters, words, punctuation with line ends, and white space.
_DIGITS = r"\p{N}{1,3}"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
).replace(r"\r\n", "\r\n")


def default_config() -> Config:
    """The configuration of the built-in model."""
    return Config.from_file(CONFIG_DIRECTORY)


def corpus() -> Iterator[tuple[str, str]]:
    """(name, text) of each document the built-in model knows, in a fixed order; provenance beside the files."""
    for path in sorted((CONFIG_DIRECTORY / "corpus").glob("*.txt.xz")):
        yield path.name.removesuffix(".txt.xz"), lzma.decompress(path.read_bytes()).decode("utf-8")


def train_tokenizer() -> str:
    """The built-in tokenizer as the JSON text of ``tokenizer.json``: byte-level BPE, built as the release's is.

    The vocabulary is that of ``config.json``: BOS, EOS and padding, byte-pair tokens of the corpus, and the named
    tokens of the prompt format. A function of the corpus and the configuration alone.
    """
    size = default_config().vocab_size
    added = len(_ADDED) + len(_ADDED_SPECIAL)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (_DIGITS, _CJK, _WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - added,
        special_tokens=[tokenizers.AddedToken(token, normalized=False, special=True) for token in _SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in corpus()), trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=True, special=False) for token in _ADDED])
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in _ADDED_SPECIAL]
    )
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, config.json says {size}")
    return tokenizer.to_str(pretty=True) + "\n"


class _ArrayLeaf:
    """A parameter in memory, as ``checkpoint.source.Leaf`` wants it."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return np.array(self.array[index])


class RandomSource:
    """A checkpoint that is nowhere yet: seeded random weights for the model that ``directory``'s config.json describes.

    A ``checkpoint.source.Source``; ``directory`` also gives the tokenizer and the other small files. The weights are a
    function of the configuration, ``storage`` and ``seed``.
    """

    def __init__(self, directory: Path = CONFIG_DIRECTORY, seed: int = 0, storage: Storage = RELEASED):
        self.directory = directory
        self.seed = seed
        self.config = Config.from_file(directory)
        self.storage = storage
        self.draft_copies: tuple[str, ...] = ()

    def leaves(self, item: Item) -> Mapping[LeafPath, Leaf]:
        """Random values of one item's parameters by path; every item draws from its own stream."""
        number = [known.name for known in items(self.config)].index(item.name)
        specs = tuple(item_specs(item, self.config, self.storage).items())
        values = jax.device_get(_random_item(self.config, specs, np.uint32(self.seed), np.uint32(number)))
        return {path: _ArrayLeaf(np.asarray(value)) for path, value in flatten(values).items()}

    def fingerprint(self, item: Item) -> Any:
        """What decides one item's values."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes()).hexdigest()
        return {"seed": self.seed, "config": digest, "storage": dataclasses.asdict(self.storage)}

    def config_json(self) -> dict[str, Any]:
        """The configuration as JSON data."""
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))

    def travelling_files(self) -> Mapping[str, bytes]:
        """The files that belong to the model, by name."""
        return {name: (self.directory / name).read_bytes() for name in FILES if (self.directory / name).is_file()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_item(config: Config, specs: tuple, seed: jax.Array, number: jax.Array) -> dict[str, Any]:
    # Compiled once per kind of layer; one seed per item, since equal paths draw equal values.
    stream: Any = jax.random.bits(jax.random.fold_in(jax.random.key(seed), number))
    return initialise(config, nest(dict(specs)), stream)


def write_default(directory: str | Path, seed: int | None = None) -> Path:
    """Writes the built-in model to ``directory`` as a release is laid out: trained weights, or random ones of ``seed``.

    Config, tokenizer, safetensors shards and their index; a directory that an earlier run left unfinished is completed.
    Raises ``CheckpointError`` if the directory holds something else, and ``FileNotFoundError`` outside a checkout,
    where the files of ``configs/default`` are missing.
    """
    needed = FILES if seed is not None else (*FILES, INDEX_FILE)
    missing = [name for name in needed if not (CONFIG_DIRECTORY / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{CONFIG_DIRECTORY}: {', '.join(missing)} missing; the built-in model needs a checkout of the repository "
            "(pip install -e .)"
        )
    to_hf(open_huggingface(CONFIG_DIRECTORY) if seed is None else RandomSource(seed=seed), directory)
    return Path(directory)


_SENTENCE = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+")
_CHARACTERS = range(40, 200)  # of a sentence that makes a turn


def chats(every: int = 20) -> Iterator[dict[str, Any]]:
    """Conversations for fine-tuning, {"messages": [...]}: a sentence of a novel, and the one that follows it.

    One of every ``every`` pairs of sentences of middle length, novel by novel; a function of the corpus alone.
    """
    pairs = (
        pair
        for _, text in corpus()
        for paragraph in text.splitlines()
        for pair in itertools.pairwise(_SENTENCE.split(paragraph))
        if all(len(sentence) in _CHARACTERS for sentence in pair)
    )
    for said, following in itertools.islice(pairs, 0, None, every):
        messages = [
            {"role": "user", "content": f"What comes next? {said}"},
            {"role": "assistant", "content": following},
        ]
        yield {"messages": messages}


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """Writes the built-in small model, conversations to fine-tune it on, or its tokenizer."""

    output: Path | None = None
    """Directory to write the model to, in the released Hugging Face layout."""
    seed: int | None = None
    """Seed of random weights. Default: the trained ones."""
    chats: Path | None = None
    """JSONL file to write conversations to."""
    train_tokenizer: bool = False
    """Recreate configs/default/tokenizer.json from the corpus."""


def main() -> None:
    """The command line."""
    arguments = tyro.cli(_Arguments)
    if not (arguments.train_tokenizer or arguments.output or arguments.chats):
        raise SystemExit("nothing to do: give --output DIR, --chats FILE or --train-tokenizer")
    jax.config.update("jax_platforms", "cpu")  # the same bytes on every machine, and small
    if arguments.train_tokenizer:
        path = CONFIG_DIRECTORY / "tokenizer.json"
        write_atomically(path, train_tokenizer().encode("utf-8"))
        print(f"wrote {path}")
    if arguments.chats is not None:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in chats()]
        write_atomically(arguments.chats, "".join(lines).encode("utf-8"))
        print(f"wrote {arguments.chats}: {len(lines)} conversations")
    if arguments.output is not None:
        print(f"wrote {write_default(arguments.output, arguments.seed)}")


if __name__ == "__main__":
    main()
