"""Converts, inspects and compares DeepSeek-V4 checkpoints.

    convert_checkpoint.py to-orbax SRC DST     Hugging Face directory to Orbax directory
    convert_checkpoint.py to-hf SRC DST        any checkpoint to released names and shards, byte for byte
    convert_checkpoint.py merge BASE ADAPTERS DST    a checkpoint with trained adapters merged into its weights
    convert_checkpoint.py inspect SRC          what is in a directory, from headers alone
    convert_checkpoint.py verify A B           tensor-by-tensor equality, across formats

Interrupted conversions continue when the same command is run again. Several processes (also on several machines that
share a file system) divide one conversion with --process-index I --process-count N, or with --distributed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from deepseek_v4 import ConfigError
from deepseek_v4.checkpoint import (
    CheckpointError,
    HuggingFaceSource,
    Inspection,
    OrbaxSource,
    Share,
    compare,
    inspect_checkpoint,
    open_huggingface,
    open_source,
    plan_conversion,
    plan_export,
    to_hf,
    to_orbax,
)
from deepseek_v4.checkpoint.layout import items
from deepseek_v4.distributed import Processes, start
from deepseek_v4.names import unnumbered
from deepseek_v4.training.merging import Merged, add_to_report, open_merged


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Runs one subcommand; 0 when all is well, 1 when something is wrong with a checkpoint, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    console = console or Console()
    errors = Console(stderr=True, soft_wrap=True)
    # Conversion never computes on a device: leave accelerators to others.
    jax.config.update("jax_platforms", "cpu")
    try:
        return options.run(options, console)
    except (CheckpointError, ConfigError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted; run the same command again to continue", markup=False)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("to-orbax", _to_orbax, "convert a Hugging Face directory into an Orbax one"),
        ("to-hf", _to_hf, "write any checkpoint as a Hugging Face directory in the released layout"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", metavar="SRC")
        command.add_argument("target", metavar="DST")
        command.add_argument("--process-index", type=int, default=None, metavar="I", help="which share is this one's")
        command.add_argument("--process-count", type=int, default=None, metavar="N", help="how many share the work")
        command.add_argument("--distributed", action="store_true", help="take both from jax.distributed")
        command.add_argument("--dry-run", action="store_true", help="check headers, show the plan, write nothing")
        command.set_defaults(run=run)
    command = commands.add_parser("merge", help="merge adapters into a checkpoint", description=_merge.__doc__)
    command.add_argument("source", metavar="BASE", help="the checkpoint that the adapters were trained on")
    command.add_argument("adapters", metavar="ADAPTERS", help="directory of the adapters that training saved")
    command.add_argument("target", metavar="DST")
    command.add_argument("--format", choices=("hf", "orbax"), default="hf", help="of DST; default: %(default)s")
    command.set_defaults(run=_merge)
    command = commands.add_parser("inspect", help="describe a directory from its headers")
    command.add_argument("source", metavar="SRC")
    command.set_defaults(run=_inspect)
    command = commands.add_parser("verify", help="compare two checkpoints tensor by tensor")
    command.add_argument("first", metavar="A")
    command.add_argument("second", metavar="B")
    command.set_defaults(run=_verify)
    return parser


def _share(options: argparse.Namespace) -> Share:
    if options.distributed:
        start(Processes(distributed=True))
        return Share.of_this_process()
    if (options.process_index is None) != (options.process_count is None):
        raise CheckpointError("--process-index and --process-count go together")
    if options.process_count is None:
        return Share()
    try:
        return Share(options.process_index, options.process_count)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


@contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda count: progress.advance(task, count),
            lambda name: progress.update(task, description=name),
        )


def _to_orbax(options: argparse.Namespace, console: Console) -> int:
    source, share = open_huggingface(options.source), _share(options)
    plan = plan_conversion(source, options.target, share)
    _print_source(source, console)
    done = sum(planned.finished for planned in plan.items)
    console.print(
        f"items       {len(plan.items)}, {done} already converted, {len(plan.pending)} to do here "
        f"({_gigabytes(plan.pending_bytes)} to write, {_gigabytes(plan.free_bytes)} free)"
    )
    console.print(f"files       {', '.join(plan.files)}")
    if plan.pending_bytes > plan.free_bytes:
        raise CheckpointError(
            f"{options.target}: {_gigabytes(plan.pending_bytes)} to write but only {_gigabytes(plan.free_bytes)} free"
        )
    if options.dry_run:
        for planned in plan.items:
            state = "done" if planned.finished else "to do" if planned.mine else "another process"
            console.print(f"  {planned.item.name:<14} {_gigabytes(planned.size_bytes):>12}  {state}", highlight=False)
        return 0
    with _progress(console, plan.pending_bytes) as (on_bytes, on_item):
        complete = to_orbax(source, options.target, share=share, on_bytes=on_bytes, on_item=on_item)
    return _finish(console, options, complete)


def _to_hf(options: argparse.Namespace, console: Console) -> int:
    source, share = open_source(options.source), _share(options)
    plan = plan_export(source, options.target)
    size = plan.pending_bytes(share)
    console.print(
        f"shards      {len(plan.shards)}, {sum(plan.finished)} already written, {_gigabytes(size)} to write here"
    )
    if options.dry_run:
        for shard, shard_size, done in zip(plan.shards, plan.sizes, plan.finished, strict=True):
            console.print(
                f"  {shard.filename}  {len(shard.tensors):>6} tensors  {_gigabytes(shard_size):>12}"
                f"  {'done' if done else 'to do'}",
                highlight=False,
            )
        return 0
    with _progress(console, size) as (on_bytes, on_item):
        complete = to_hf(source, options.target, share=share, on_bytes=on_bytes, on_item=on_item)
    return _finish(console, options, complete)


def _merge(options: argparse.Namespace, console: Console) -> int:
    """Weights are decoded, added to their adapters' products and quantised once, a layer at a time, in the formats of
    BASE. What that changed is shown by linear, and by layer in DST/merge_report.json: how many stored weights are
    others now, how far they are from the exact sum, and how much of the change rounding has swallowed. Adapters of
    another checkpoint are refused."""
    base = open_source(options.source)
    merged = open_merged(base, options.adapters)
    for item in items(base.config)[:2]:
        merged.check(item)  # before anything is written; the others when it is their turn
    target = FilePath(options.target)
    hf = options.format == "hf"
    size = plan_export(merged, target).pending_bytes(Share()) if hf else plan_conversion(merged, target).pending_bytes
    with _progress(console, size) as (on_bytes, on_item):

        def on_next(name: str) -> None:
            add_to_report(target, merged.report)  # so that a run that continues this one has it
            on_item(name)

        if hf:
            to_hf(merged, target, share=Share(), on_bytes=on_bytes, on_item=on_next)
        else:
            to_orbax(merged, target, share=Share(), on_bytes=on_bytes, on_item=on_next, checked=base)
    _print_report(add_to_report(target, merged.report), console)
    return _finish(console, options, True)


def _print_report(report: Sequence[Merged], console: Console) -> None:
    table = Table("linear", "layers", "weights changed", "error", "lost", title="what merging changed")
    for column in table.columns[1:]:
        column.justify = "right"
    by_linear: dict[str, list[Merged]] = {}
    for row in report:
        by_linear.setdefault(unnumbered(row.name), []).append(row)
    for name, rows in by_linear.items():
        changed, error, lost = ([getattr(row, field) for row in rows] for field in ("changed", "error", "lost"))
        table.add_row(name, str(len(rows)), _span(changed, "{:.1%}"), _span(error, "{:.3f}"), _span(lost, "{:.1%}"))
    console.print(table)
    console.print(
        "changed: stored weights with another value; error: distance from the exact sum, by the size of the change;\n"
        "lost: the part of the change that rounding swallowed (from the least to the most of the layers)"
    )


def _span(values: Sequence[float], form: str) -> str:
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} .. {most}"


def _finish(console: Console, options: argparse.Namespace, complete: bool) -> int:
    if complete:
        console.print(f"{options.target} is complete", highlight=False)
    else:
        console.print(f"this process's share of {options.target} is done; others are still at work", highlight=False)
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    found = inspect_checkpoint(options.source)
    _print_inspection(found, console)
    return 0 if found.complete else 1


def _verify(options: argparse.Namespace, console: Console) -> int:
    first, second = open_source(options.first), open_source(options.second)
    total = sum(planned.size_bytes for planned in plan_conversion(first, "/nonexistent", Share()).items)
    with _progress(console, total) as (on_bytes, on_item):
        result = compare(first, second, on_bytes, on_item)
    for line in result.differences:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if result.widened:
        console.print(f"{result.widened} tensors are equal in value, BF16 in one and F32 in the other")
    verdict = "equal" if result.equal else "NOT equal"
    console.print(f"{result.compared} tensors compared: {verdict}", highlight=False)
    return 0 if result.equal else 1


def _print_source(source: HuggingFaceSource | OrbaxSource, console: Console) -> None:
    if isinstance(source, HuggingFaceSource):
        console.print(f"source      {source.directory} ({source.naming} names)", highlight=False)
        for note in source.notes:
            console.print(f"note        {note}", highlight=False)
        _print_dropped(source.dropped, console)
    console.print(f"formats     {_formats(source)}", highlight=False)


def _print_dropped(dropped: dict[str, str], console: Console) -> None:
    for reason, count in Counter(dropped.values()).items():
        names = [name for name, why in dropped.items() if why == reason]
        shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
        console.print(f"dropped     {count}: {shown}: {reason}", markup=False, highlight=False)


def _formats(source) -> str:
    storage = source.storage
    scales = f", FP8 scales {storage.scales}" if "fp8" in (storage.experts, storage.linears) else ""
    return (
        f"experts {storage.experts}, linears {storage.linears}{scales}, "
        f"matrices {storage.matrices}, norms {storage.norms}"
    )


def _print_inspection(found: Inspection, console: Console) -> None:
    table = Table(title=str(found.directory), show_header=False)
    draft = found.parameters - found.parameters_without_draft
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.layer_kinds.items())
    rows = {
        "format": f"{found.format}, {found.files} {'items' if found.format == 'Orbax' else 'files'}",
        "names": found.naming,
        "tensors": f"{found.tensors:,} ({found.draft_tensors:,} of draft layers)",
        "parameters": f"{_billions(found.parameters)}, {_billions(found.parameters_without_draft)} without draft layer",
        "layers": f"{kinds}; {found.config.num_hash_layers} with hash routing",
        "draft layer": f"{found.config.drafter} ({_billions(draft)})" if found.config.drafter else "none",
        "stored in": _formats(found),
        "bytes": f"{found.total_bytes:,} in {found.elements:,} stored elements",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    dtypes = Table("dtype", "tensors", "elements", "bytes")
    for column in dtypes.columns[1:]:
        column.justify = "right"
    for dtype, (count, elements, size) in found.dtypes.items():
        dtypes.add_row(dtype, f"{count:,}", f"{elements:,}", f"{size:,}")
    console.print(dtypes)
    for note in found.notes:
        console.print(f"note        {note}", highlight=False)
    _print_dropped(found.dropped, console)
    if found.complete:
        console.print("complete")
    else:
        console.print(f"NOT complete, {len(found.problems)} problems:", style="bold")
        for problem in found.problems:
            console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)


def _billions(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e9:.6f} B"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
