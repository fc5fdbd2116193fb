"""What NVIDIA's assembler says about the kernels of a compiled program: registers and spills."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Registers:
    """The most 32-bit registers that one thread of any kernel takes, and bytes per thread that did not fit in them."""

    most: int
    spilled: int


def assembler() -> str | None:
    """The path of ``ptxas``: on the search path, or what came with the extra [gpu]; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [str(path) for place in places for path in sorted(Path(place).glob("*/bin/ptxas"))]
    return found[0] if found else shutil.which("ptxas")


def registers(directory: Path, ptxas: str) -> Registers | None:
    """Of all kernels whose PTX XLA wrote to ``directory``, its own among them; None if there are none."""
    most, spilled = [], []
    for path in sorted(directory.glob("*.ptx")):
        text = path.read_text()
        target = re.search(r"^\.target (\w+)", text, flags=re.M)
        if target is None:
            continue
        command = [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        most += [int(number) for number in re.findall(r"Used (\d+) registers", said)]
        spilled += [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    return Registers(max(most), max(spilled, default=0)) if most else None
