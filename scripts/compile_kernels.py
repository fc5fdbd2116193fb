"""Compiles every kernel at its named V4 shapes with the real TPU and GPU compilers and prints what came out.

    python scripts/compile_kernels.py --targets v5e v5p v6e v7x
    python scripts/compile_kernels.py --targets v6e --ops compressed_attention --shapes flash,csa,decode pro,prefill

No accelerator is needed. TPU targets need the extra [tpu] of this package, GPU targets [gpu], and one process can
compile for one kind of GPU. Exits with 1 when a row fails. Roofline times are from published peaks; rows
that do not fit one device are shared by several, and each has its part of the bytes and operations.
"""

import dataclasses
import functools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.compile_table import Report, compile_case
from pallas_kernels.registry import cases_matching, operations
from pallas_kernels.targets import TargetError, abstract_devices, chip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    targets: tuple[str, ...] = ("v5e", "v5p", "v6e", "v7x")
    """Chips, of: v5e v5p v6e v7x h200 b200."""
    ops: tuple[str, ...] = ()
    """Operations; all of them by default."""
    shapes: tuple[str, ...] = ()
    """Cases whose name contains all words of one of these comma-separated lists; all of them by default."""
    representative: bool = False
    """Only the cases that CI compiles."""
    fallbacks: bool = False
    """Also compile the XLA twin where no kernel serves a target."""
    full_errors: bool = False
    """Print failures whole, below the table."""


def main(options: Options) -> int:
    """Compiles, prints the table, returns the exit status."""
    for target in options.targets:
        chip(target)
    declared = operations()
    unknown = set(options.ops) - set(declared)
    if unknown:
        raise SystemExit(f"unknown operations {sorted(unknown)}; known: {', '.join(declared)}")
    console = Console(width=None if sys.stdout.isatty() else 190)
    rows: list[Report] = []
    devices = functools.cache(abstract_devices)
    for target in options.targets:
        for name, operation in declared.items():
            if options.ops and name not in options.ops:
                continue
            for case in cases_matching(operation, list(options.shapes) or None):
                if options.representative and not case.representative:
                    continue
                with console.status(f"{target} {name} {case.name}"):
                    rows.append(compile_case(operation, case, target, devices, fallbacks=options.fallbacks))
    console.print(table(rows))
    failed = [row for row in rows if row.failures]
    for row in failed:
        detail = row.failures if options.full_errors else [text[:400] for text in row.failures]
        console.print(f"{row.target.name} {row.operation} {row.case.name}: " + "; ".join(detail), markup=False)
    console.print(f"{len(rows)} rows, {len(failed)} failed")
    return 1 if failed else 0


def table(rows: list[Report]) -> Table:
    """The rows as a rich table, one line each."""
    names = (
        "chip,devices,operation,shape,runs as,compiles,seconds,VMEM MiB/registers,HBM temp MiB,bytes MB,GFLOP,"
        "roofline us,bound"
    )
    result = Table(*names.split(","), title="Kernels compiled ahead of time", row_styles=("", "dim"))
    for column in result.columns[6:12]:
        column.justify = "right"
    for row in rows:
        cost = row.case.cost
        status = "no" if row.error else ("over limit" if row.failures else ("-" if row.seconds == 0 else "yes"))
        memory_bound = cost.memory_seconds(row.target) >= cost.compute_seconds(row.target)
        result.add_row(
            row.target.name,
            str(row.devices),
            row.operation,
            row.case.name,
            row.implementation if row.fallback is None else f"xla ({row.fallback})",
            status,
            f"{row.seconds:.1f}" if row.seconds else "",
            _on_chip(row),
            "" if row.temporaries is None else f"{row.temporaries / 2**20:.2f}",
            f"{cost.bytes_moved / 1e6:,.2f}",
            f"{cost.total_operations / 1e9:,.2f}",
            f"{cost.roofline_seconds(row.target) / row.devices * 1e6:,.1f}",
            "memory" if memory_bound else "compute",
        )
    return result


def _on_chip(row: Report) -> str:
    """MiB of VMEM of a TPU kernel; registers of a GPU thread, and bytes of them that were spilled to memory."""
    if row.registers is not None:
        return f"{row.registers.most}" + (f" +{row.registers.spilled} B" if row.registers.spilled else "")
    return "" if row.fast_memory is None else f"{row.fast_memory / 2**20:.1f}"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except TargetError as error:
        sys.exit(str(error))
