"""The built-in small model: a V4 in the released layout with every kind of layer, and its own tokenizer.

    python -m deepseek_v4.default_model --output DIR         writes the Hugging Face directory (seeded random weights)
    python -m deepseek_v4.default_model --train-tokenizer    recreates configs/default/tokenizer.json from the corpus
"""

import dataclasses
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import tokenizers
import tyro
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek_v4.config import Config
from deepseek_v4.model import Model, Params

CONFIG_DIRECTORY = Path(__file__).resolve().parents[1] / "configs" / "default"

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""What a model directory holds beside its weights."""

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
