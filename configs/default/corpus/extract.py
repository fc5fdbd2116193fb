"""Recreates the texts of this folder from Debian's package r-cran-janeaustenr (see PROVENANCE.md).

python extract.py path/to/janeaustenr/data/Rdata.rdb
"""

import lzma
import re
import struct
import sys
import zlib
from pathlib import Path

TITLES = {
    "EMMA": "emma",
    "MANSFIELD PARK": "mansfield-park",
    "NORTHANGER ABBEY": "northanger-abbey",
    "Persuasion": "persuasion",
    "PRIDE AND PREJUDICE": "pride-and-prejudice",
    "SENSE AND SENSIBILITY": "sense-and-sensibility",
}


def character_vectors(data: bytes):
    """The character vectors of an R lazy-load database, in file order: lists of lines.

    A record is a big-endian length and a zlib stream; inside, R's XDR serialisation: a header, then flags, a count and
    per string its flags, its length and its bytes.
    """
    position = 0
    while position < len(data):
        (size,) = struct.unpack_from(">I", data, position)
        stream = zlib.decompressobj()
        raw = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        if len(raw) != size or raw[:2] != b"X\n":
            raise ValueError("not an R lazy-load database of serialised vectors")
        (version,) = struct.unpack_from(">i", raw, 2)
        at = 14
        if version == 3:
            (length,) = struct.unpack_from(">i", raw, at)
            at += 4 + length
        flags, count = struct.unpack_from(">ii", raw, at)
        if flags & 0xFF != 16:
            raise ValueError(f"expected a character vector, found R type {flags & 0xFF}")
        at += 8
        lines = []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", raw, at)
            lines.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        yield lines


def clean(lines: list[str]) -> str:
    """One line per paragraph, a blank line between; no editors' notes, no underscores for emphasis."""
    text = "\n".join(lines).split("A NOTE ON THE TEXT")[0]
    text = re.sub(r"\[(End volume|At this point)[^\]]*\]?[^\n]*", "", text)
    text = re.sub(r"_([^_]+)_", r"\1", text)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        indented = any(line.startswith("    ") for line in paragraph.split("\n"))
        parts = [" ".join(line.split()) for line in paragraph.split("\n")]
        joined = ("\n" if indented else " ").join(part for part in parts if part)
        if joined:
            paragraphs.append(joined)
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Writes one compressed text per novel beside this file."""
    folder = Path(__file__).parent
    for lines in character_vectors(Path(sys.argv[1]).read_bytes()):
        text = clean(lines)
        path = folder / f"{TITLES[lines[0]]}.txt.xz"
        path.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
        print(path.name, len(text), "characters", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
