"""Kernels and their twins on this device, at the named V4 shapes, beside ceilings measured in the same run.

Bytes and operations are those of the operations' exact cost functions: what any implementation has to move and compute
at least, and not what one of them does. On a CPU there are no kernels, and the twins alone are measured.
"""

import dataclasses
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_v4.benchmarks.timing import arrays_like, copy_bandwidth, matmul_rate, seconds_per_call
from deepseek_v4.benchmarks.tune import tune
from pallas_kernels import tuned
from pallas_kernels.registry import Case, Operation, cases_matching, operations
from pallas_kernels.targets import Chip, chip_of_kind

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class KernelBenchmark:
    """Time, bytes and operations per second of every kernel and its XLA twin on this device, and their ceilings."""

    ops: tuple[str, ...] = ()
    """Operations; all of them by default."""
    shapes: tuple[str, ...] = ()
    """Cases whose name contains all words of one of these comma-separated lists; all of them by default."""
    representative: bool = False
    """Only the cases that CI compiles."""
    max_mib: int | None = None
    """Leave out cases whose arrays take more. Default: half of the device's memory, and 64 on a CPU."""
    cold_mib: int = 256
    """Calls go in turn through copies of their arrays that take so much, so that no cache holds them."""
    samples: int = 7
    """Timed samples, of which the median counts."""
    sample_seconds: float = 0.05
    """What a sample takes at least, by calling as often as that needs."""
    tune: bool = False
    """Sweep block sizes instead, and keep the best in the table that kernels consult."""
    table: Path = tuned.PATH
    """That table."""
    json: Path | None = None
    """Write the figures to this file too."""


def run(args: KernelBenchmark, console: Console) -> int:
    """Measures what was asked for and prints it; returns the exit code."""
    if not console.is_terminal:
        console.width = 170
    declared = operations()
    unknown = set(args.ops) - set(declared)
    if unknown:
        raise ValueError(f"--ops: unknown operations {sorted(unknown)}; known: {', '.join(declared)}")
    device = jax.devices()[0]
    chip = chip_of_kind(device.device_kind)
    chosen = [
        (operation, case.on(chip))
        for name, operation in declared.items()
        if not args.ops or name in args.ops
        for case in cases_matching(operation, list(args.shapes) or None)
        if case.representative or not args.representative
    ]
    limit = _memory_limit(args, device)
    fitting = [(operation, case) for operation, case in chosen if case.argument_bytes() <= limit]
    left_out = f"{len(chosen) - len(fitting)} cases of more than {limit // _MIB} MiB were left out"
    if not fitting:
        raise ValueError(f"no case is left to measure: {left_out}")
    if args.tune:
        return _tune(args, fitting, chip, device, console)
    ceilings = measure_ceilings(device)
    rows: list[dict[str, Any]] = []
    for operation, case in fitting:
        with console.status(f"{operation.name} {case.name}"):
            rows += measure(args, operation, case, chip, ceilings)
    console.print(_table(rows, device, ceilings))
    console.print(left_out, highlight=False)
    if args.json is not None:
        found = {"device": device.device_kind, "date": _today(), "ceilings": ceilings, "rows": rows}
        args.json.write_text(json.dumps({**dataclasses.asdict(args), "found": found}, indent=1, default=str) + "\n")
    return 0


def measure_ceilings(device: jax.Device) -> dict[str, float]:
    """Bytes per second of a large copy and operations per second of a large bfloat16 product, on this device."""
    cpu = device.platform == "cpu"
    return {
        "bytes_per_second": copy_bandwidth((1 << 24) if cpu else (1 << 28)),
        "operations_per_second": matmul_rate(1024 if cpu else 8192),
    }


def measure(
    args: KernelBenchmark, operation: Operation, case: Case, chip: Chip | None, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for the kernel that serves ``case`` here, if any, one for the twin and one for torch, where it compares."""
    names = ["xla"]
    fallback = None if chip is None else operation.unserved(chip, case.arguments)
    if chip is not None and fallback is None:
        names.insert(0, {"tpu": "tpu", "cuda": "gpu"}[chip.platform])
    arguments = cold_arguments(case, args.cold_mib * _MIB)
    timing: dict[str, Any] = {"samples": args.samples, "sample_seconds": args.sample_seconds}
    rows = []
    for name in names:
        row: dict[str, Any] = {"operation": operation.name, "case": case.name, "implementation": name}

        def call(traced: Any, name: str = name) -> Any:
            return operation.function(**traced, **case.static(), implementation=name)

        try:
            seconds = seconds_per_call(jax.jit(call), arguments, **timing)
        except Exception as error:
            # A twin may need more memory than there is: the row says so, the others are measured.
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        else:
            moved, computed = case.cost.bytes_moved / seconds, case.cost.total_operations / seconds
            row |= {
                "seconds": seconds,
                "bytes_per_second": moved,
                "operations_per_second": computed,
                "memory_share": moved / ceilings["bytes_per_second"],
                "compute_share": computed / ceilings["operations_per_second"],
            }
        rows.append(row | ({} if fallback is None else {"fallback": fallback}))
    theirs = _torch_seconds(operation, case, chip, timing)
    if theirs is not None:
        rows.append(
            {"operation": operation.name, "case": case.name, "implementation": "torch, bfloat16", "seconds": theirs}
        )
    return rows


def cold_arguments(case: Case, cold_bytes: int) -> list[tuple[Any]]:
    """Sets of the case's arrays, so many that they are no smaller together than ``cold_bytes`` (64 at most)."""
    copies = max(1, min(64, -(-cold_bytes // case.argument_bytes())))
    return [(case_arrays(case, seed),) for seed in range(copies)]


def case_arrays(case: Case, seed: int) -> dict[str, Any]:
    """The arrays of a case: integers as it says, everything else any numbers."""
    known = case.values(np.random.default_rng(seed))
    return {
        name: jnp.asarray(known[name]) if name in known else arrays_like(abstract, seed)
        for name, abstract in case.traced().items()
    }


def _torch_seconds(operation: Operation, case: Case, chip: Chip | None, timing: dict[str, Any]) -> float | None:
    """Seconds of torch's own product of plain bfloat16 weights, for linears; None where there is nothing fair."""
    if operation.name != "block_scaled_matmul" or case.arguments["groups"] > 1:
        return None
    try:
        import torch
    except ImportError:
        return None
    cuda = chip is not None and chip.platform == "cuda"
    if chip is not None and not (cuda and torch.cuda.is_available()):
        return None
    where = "cuda" if cuda else "cpu"
    _, outputs, inputs = case.arguments["weight"].shape
    x = torch.ones(case.arguments["x"].shape, dtype=torch.bfloat16, device=where)
    weights = [(x, torch.ones((outputs, inputs), dtype=torch.bfloat16, device=where)) for _ in range(4)]

    def wait(_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()

    with torch.no_grad():
        return seconds_per_call(torch.nn.functional.linear, weights, wait=wait, **timing)


def _memory_limit(args: KernelBenchmark, device: jax.Device) -> int:
    if args.max_mib is not None:
        return args.max_mib * _MIB
    if device.platform == "cpu":
        return 64 * _MIB
    return int((device.memory_stats() or {}).get("bytes_limit", 8 << 30)) // 2


def _tune(
    args: KernelBenchmark,
    chosen: list[tuple[Operation, Case]],
    chip: Chip | None,
    device: jax.Device,
    console: Console,
) -> int:
    if chip is None:
        raise ValueError(f"--tune: {device.device_kind} runs no kernels, there is nothing to tune")

    def seconds(function: Any, case: Case) -> tuple[float, Any]:
        arguments = cold_arguments(case, args.cold_mib * _MIB)
        compiled = jax.jit(lambda traced: function(**traced, **case.static()))
        taken = seconds_per_call(compiled, arguments, samples=args.samples, sample_seconds=args.sample_seconds)
        return taken, compiled(*arguments[0])

    where = {
        "device": device.device_kind,
        "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
        "date": _today(),
    }
    found = tune(chosen, chip, seconds, args.table, where, lambda line: console.print(line, highlight=False))
    console.print(f"{found} entries written to {args.table}", highlight=False)
    return 0


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _table(rows: list[dict[str, Any]], device: jax.Device, ceilings: dict[str, float]) -> Table:
    table = Table(
        title=f"Measured on {device.device_kind}: a copy moves {ceilings['bytes_per_second'] / 1e9:,.1f} GB/s, a "
        f"bfloat16 product does {ceilings['operations_per_second'] / 1e12:,.2f} TFLOP/s; load {os.getloadavg()[0]:.1f}",
        row_styles=("", "dim"),
    )
    for name in ("operation", "shape", "runs as", "us", "GB/s", "of copy", "TFLOP/s", "of product", "twin / this"):
        table.add_column(name, justify="left" if name in ("operation", "shape", "runs as") else "right")
    twins = {(row["operation"], row["case"]): row.get("seconds") for row in rows if row["implementation"] == "xla"}
    for row in rows:
        name = row["implementation"] if "fallback" not in row else f"xla ({row['fallback']})"
        if "error" in row:
            table.add_row(row["operation"], row["case"], name, row["error"])
            continue
        twin = twins[row["operation"], row["case"]]
        figures = ["", "", "", ""]
        if "memory_share" in row:
            figures = [
                f"{row['bytes_per_second'] / 1e9:,.1f}",
                f"{row['memory_share']:.1%}",
                f"{row['operations_per_second'] / 1e12:,.3f}",
                f"{row['compute_share']:.1%}",
            ]
        ratio = "" if twin is None or row["implementation"] == "xla" else f"{twin / row['seconds']:.2f}x"
        table.add_row(row["operation"], row["case"], name, f"{1e6 * row['seconds']:,.1f}", *figures, ratio)
    return table
