"""Tokenises training documents once, so that a large corpus is memory-mapped instead of encoded at every start.

    python scripts/tokenize_data.py --checkpoint DIR --input 'corpus/*.jsonl.xz' --output corpus.npy --on-bad skip

Writes corpus.npy (int32 tokens of all documents), corpus.offsets.npy (int64, where each begins, and the end) and, if
some tokens are not to be learnt, as in chats, corpus.targets.npy (bool). Give corpus.npy to a training config.
deepseek_v4/data/sources.py and documents.py say which files are read and what becomes of them. Documents that cannot be
used stop the run at the first, or with --on-bad skip are left out, counted and listed.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from deepseek_v4.config import Config
from deepseek_v4.data.documents import DocumentEncoder
from deepseek_v4.data.sources import BadDocuments, DataError, find_files, read_documents
from deepseek_v4.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tokenise training documents."""

    checkpoint: Path
    """Directory with config.json and tokenizer.json, such as configs/default."""
    input: tuple[str, ...]
    """JSONL and text files, directories or patterns."""
    output: Path
    """File (.npy) to write; two more are written beside it."""
    format: Literal["auto", "text", "chat"] = "auto"
    """What the files hold."""
    separator: str | None = None
    """Splits .txt files into documents. Default: a file is a document."""
    bos: bool | None = None
    """Whether texts begin with a BOS token. Default: if the tokenizer's config says add_bos_token."""
    eos: bool = True
    """Whether texts end with an EOS token."""
    thinking_mode: Literal["chat", "thinking"] = "chat"
    """Of messages whose line does not say."""
    on_bad: Literal["fail", "skip"] = "fail"
    """Whether a document that cannot be used stops everything or is counted and left out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments)
    console = Console(stderr=True, soft_wrap=True)
    try:
        _run(args, console)
        return 0
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]; nothing was written")
        return 130
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
    return 1


def _run(args: Arguments, console: Console) -> None:
    if args.output.suffix != ".npy":
        raise DataError(f"--output: expected a name ending in .npy, found {args.output}")
    config = Config.from_file(args.checkpoint / "config.json")
    encoder = DocumentEncoder(
        Tokenizer.from_file(args.checkpoint),
        config.vocab_size,
        config.bos_token_id,
        config.eos_token_id,
        args.bos,
        args.eos,
        args.thinking_mode,
    )
    files = find_files(args.input, args.format)
    arrays = [file for file in files if file.suffix in (".npy", ".npz")]
    if arrays:
        raise DataError(f"{arrays[0]}: is tokenised already; name JSONL and text files only")
    bad = BadDocuments(args.on_bad)
    names = [args.output.with_name(args.output.stem + ending) for ending in (".npy", ".targets.npy", ".offsets.npy")]
    temporary = [name.with_name(f".{name.name}.{os.getpid()}.tmp") for name in names]
    offsets = [0]
    try:
        columns = (TextColumn("{task.description}"), TextColumn("{task.fields[found]}"), TimeElapsedColumn())
        with (
            open(temporary[0], "wb") as tokens,
            open(temporary[1], "wb") as targets,
            Progress(*columns, console=console) as progress,
        ):
            _header(tokens, np.int32, 0)
            _header(targets, np.bool_, 0)
            learnt = 0
            for number, file in enumerate(files, start=1):
                task = progress.add_task(f"{number}/{len(files)} {file}", found="")
                for document in read_documents(file, encoder, bad, args.format, args.separator):
                    tokens.write(document.tokens.tobytes())
                    targets.write(document.targets.tobytes())
                    learnt += int(document.targets.sum())
                    offsets.append(offsets[-1] + len(document.tokens))
                    progress.update(task, found=_found(offsets, bad))
            _header(tokens, np.int32, offsets[-1])
            _header(targets, np.bool_, offsets[-1])
        if len(offsets) == 1:
            raise DataError(f"{' '.join(args.input)}: no documents to write ({bad.count} bad ones left out)")
        with open(temporary[2], "wb") as bounds:
            np.save(bounds, np.array(offsets, np.int64))
        # The tokens last: without their own offsets and targets beside them they would be taken for something else.
        names[0].unlink(missing_ok=True)
        names[1].unlink(missing_ok=True)
        for source, name in reversed(list(zip(temporary, names, strict=True))):
            if name != names[1] or learnt < offsets[-1]:
                os.replace(source, name)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    for report in bad.reports:
        console.print(f"left out {report}", style="yellow", markup=False, highlight=False)
    console.print(f"wrote {args.output}: {_found(offsets, bad)}, {learnt} of them targets", highlight=False)


def _header(file: IO[bytes], dtype: type[np.generic], length: int) -> None:
    """Writes the header of a .npy file at its start; NumPy makes it as long for any length of a first axis."""
    file.seek(0)
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (length,)})


def _found(offsets: list[int], bad: BadDocuments) -> str:
    return f"{len(offsets) - 1} documents, {bad.count} bad, {offsets[-1]} tokens"


if __name__ == "__main__":
    sys.exit(main())
