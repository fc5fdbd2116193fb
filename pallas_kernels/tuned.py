"""Block sizes that a device measured to be best: ``tuned.json``, which ``scripts/benchmark.py kernels --tune`` writes.

The table maps operation, chip and class of shapes to an entry: ``blocks``, the fields that differ from the kernel's
defaults or repeat them; ``device``, ``command`` and ``date``, where they were measured, how and when; ``microseconds``,
geometric means over the measured shapes with the defaults and with these blocks. What is not there runs with defaults.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, TypeVar

from pallas_kernels.targets import Chip

PATH = Path(__file__).with_name("tuned.json")

Blocks = TypeVar("Blocks")


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """The committed table: operation, chip and shape class to an entry."""
    return json.loads(PATH.read_text())


def tuned(operation: str, chip: Chip | None, shape_class: str, default: Blocks) -> Blocks:
    """``default`` with the fields that were tuned for this class of shapes on ``chip`` (None: an interpreter).

    A class may not depend on the batch or on a cache's capacity where the blocks decide the order of a sum: the bits
    of a row would. Raises ``TypeError`` for an entry with fields that the kernel does not have.
    """
    if chip is None:
        return default
    entry = table().get(operation, {}).get(chip.name, {}).get(shape_class)
    return default if entry is None else dataclasses.replace(default, **entry["blocks"])  # type: ignore[type-var]
