"""Which block sizes are best on a device: every candidate of every class of shapes is timed and checked."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.registry import Case, Operation, Tuning
from pallas_kernels.targets import Chip

Measure = Callable[[Callable, Case], tuple[float, Any]]
"""Seconds of a function of a case's arguments, and its result."""


def tune(
    chosen: Sequence[tuple[Operation, Case]],
    chip: Chip,
    measure: Measure,
    path: Path,
    where: Mapping[str, str],
    report: Callable[[str], None],
) -> int:
    """Writes the best blocks of each class of shapes into the table at ``path``; returns how many entries those are.

    ``where`` is what an entry says about its origin. Only cases that the kernel serves and classes of which there are
    some are touched; the rest of the table stays as it is.
    """
    table = json.loads(path.read_text()) if path.is_file() else {}
    classes: dict[tuple[str, str], tuple[Tuning, list[Case]]] = {}
    for operation, case in chosen:
        tuning = operation.tuning.get(chip.platform)
        if tuning is not None and operation.unserved(chip, case.arguments) is None:
            key = (operation.name, tuning.shape_class(case.arguments))
            classes.setdefault(key, (tuning, []))[1].append(case)
    for (name, shape_class), (tuning, cases) in classes.items():
        best, seconds = best_blocks(tuning, chip, cases, measure, report)
        default = next(iter(seconds))
        microseconds = {"default": round(1e6 * seconds[default], 2), "best": round(1e6 * seconds[best], 2)}
        entry = {"blocks": dataclasses.asdict(best), **where, "microseconds": microseconds}
        table.setdefault(name, {}).setdefault(chip.name, {})[shape_class] = entry
        report(f"{name}, {shape_class}: {best}, {microseconds}")
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return len(classes)


def best_blocks(
    tuning: Tuning, chip: Chip, cases: Sequence[Case], measure: Measure, report: Callable[[str], None]
) -> tuple[Any, dict[Any, float]]:
    """The candidate of the least geometric mean of seconds over ``cases``, and those of all that are legal.

    The first candidate, which runs where nothing is tuned, comes first and must be legal. Others are left out if a
    compiler refuses them, or if a result differs from the default's by more than rounding.
    """
    results: list[Any] = []
    found: dict[Any, float] = {}
    for blocks in tuning.candidates(chip, cases[0].arguments):
        logs = 0.0
        try:
            for index, case in enumerate(cases):
                seconds, result = measure(tuning.run(blocks), case)
                if not found:
                    results.append(jax.device_get(result))
                elif not _same(results[index], result):
                    raise ValueError(f"{case.name}: another result than with {next(iter(found))}")
                logs += math.log(seconds)
        except Exception as error:
            if not found:
                raise
            report(
                f"{blocks}: left out, {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
            continue
        found[blocks] = math.exp(logs / len(cases))
    return min(found, key=lambda blocks: found[blocks]), found


def _same(expected: Any, found: Any) -> bool:
    """Whether results agree but for sums in another order: two bfloat16 roundings (2^-7) of the largest value."""
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(jax.device_get(found)), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        if not np.all(np.abs(one - other) <= 2.0**-7 * np.max(np.abs(one), initial=0)):
            return False
    return True
