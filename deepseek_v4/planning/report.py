"""A plan as tables, as a picture and as data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from deepseek_v4.planning.memory import GIB
from deepseek_v4.planning.planner import Plan, Search
from deepseek_v4.planning.program import Compiled


def memory_table(plan: Plan, compiled: Compiled | None = None) -> Table:
    """Bytes per device by part; beside what the compiler reported, if it was asked."""
    memory = plan.memory
    table = Table(title=f"Memory of one device of {plan.setting.topology.name}, {plan.setting.title}")
    for column in ("part", "bytes", "GiB"):
        table.add_column(column, justify="left" if column == "part" else "right")
    if compiled:
        table.add_column("compiler, bytes", justify="right")
        table.add_column("plan / compiler", justify="right")

    def row(name: str, size: int, found: int | None = None) -> None:
        cells = [name, f"{size:,}", f"{size / GIB:.3f}"]
        if compiled:
            cells += [
                "" if found is None else f"{found:,}",
                "" if not found else "equal" if found == size else f"{size / found:.3f}",
            ]
        table.add_row(*cells)

    for name, size in memory.arguments.items():
        row(name, size)
    row("arguments", memory.argument_bytes, compiled.arguments if compiled else None)
    table.add_section()
    for name, size in memory.working.items():
        row(f"{name} (estimate)", size)
    row("peak (estimate)", memory.peak, compiled.peak if compiled else None)
    table.add_section()
    row("usable", memory.usable)
    row("left" if memory.fits else "MISSING", abs(memory.spare))
    return table


def time_table(plan: Plan) -> Table:
    """Least time of every kind of layer and what limits it."""
    table = Table(title=f"Least time of one step: {plan.seconds * 1e3:,.3f} ms, from published peaks")
    table.add_column("layers")
    for column in ("count", "us each", "ms in all"):
        table.add_column(column, justify="right")
    table.add_column("limited by")
    table.add_column("longest parts")
    for stage in plan.stages:
        limits = ", ".join(f"{name} {share:.0%}" for name, share in _shares(stage.by_limit) if share >= 0.05)
        parts = sorted(stage.parts, key=lambda part: -part.seconds)[:3]
        table.add_row(
            stage.name,
            str(stage.count),
            f"{stage.seconds * 1e6:,.1f}",
            f"{stage.count * stage.seconds * 1e3:,.3f}",
            limits,
            ", ".join(f"{part.name} {part.seconds * 1e6:,.1f}" for part in parts),
        )
    table.add_section()
    limits = ", ".join(f"{name} {share:.0%}" for name, share in _shares(plan.by_limit) if share >= 0.05)
    table.add_row("step", "", "", f"{plan.seconds * 1e3:,.3f}", limits, "")
    work = plan.setting.workload
    devices = plan.setting.topology.devices
    rate = plan.tokens_per_second
    table.caption = (
        f"At most {rate:,.0f} tokens/s, {rate / devices:,.1f} per device, {rate / work.batch:,.1f} per sequence"
    )
    if plan.prompt_seconds is not None:
        table.caption += f"; a prompt of {work.context:,} tokens takes at least {plan.prompt_seconds:,.2f} s"
    table.caption += ". Nothing here was measured."
    return table


def search_table(found: Search, count: int = 12) -> Table:
    """The meshes, best first."""
    table = Table(title=f"Meshes of {found.best.setting.topology.name}")
    table.add_column("mesh")
    for column in ("arguments GiB", "peak GiB", "left GiB", "ms per step"):
        table.add_column(column, justify="right")
    table.add_column("limited by")
    for plan in found.plans[:count]:
        limits = ", ".join(f"{name} {share:.0%}" for name, share in _shares(plan.by_limit)[:3] if share >= 0.05)
        table.add_row(
            plan.setting.title,
            f"{plan.memory.argument_bytes / GIB:.2f}",
            f"{plan.memory.peak / GIB:.2f}",
            f"{plan.memory.spare / GIB:.2f}",
            f"{plan.seconds * 1e3:,.3f}",
            limits,
            style=None if plan.memory.fits else "red",
        )
    return table


def compiled_table(compiled: Compiled, layers: int) -> Table:
    """Collectives that the compiled step runs."""
    level = f" at level {compiled.level}" if compiled.level else ""
    table = Table(title=f"Compiled in {compiled.seconds:,.0f} s{level}; collectives of one step on one device")
    table.add_column("kind")
    for column in ("times", "per layer", "MiB in all", "largest MiB"):
        table.add_column(column, justify="right")
    for found in compiled.collectives:
        table.add_row(
            found.kind,
            f"{found.times:,}",
            f"{found.times / layers:.2f}",
            f"{found.bytes / 2**20:,.2f}",
            f"{found.largest / 2**20:,.2f}",
        )
    table.caption = f"temporaries {compiled.temporaries / GIB:.3f} GiB, results {compiled.results / GIB:.3f} GiB"
    return table


def _shares(by_limit: dict[str, float]) -> list[tuple[str, float]]:
    total = sum(by_limit.values()) or 1.0
    return [(name, seconds / total) for name, seconds in by_limit.items()]


def as_json(plans: Sequence[Plan], compiled: Compiled | None = None) -> dict[str, Any]:
    """Plans, best first, as data."""
    return {
        "plans": [_plan_json(plan) for plan in plans],
        "compiled": dataclasses.asdict(compiled) if compiled else None,
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "topology": plan.setting.topology.name,
        "devices": plan.setting.topology.devices,
        "mesh": plan.setting.sizes,
        "workload": dataclasses.asdict(plan.setting.workload),
        "arguments": dict(plan.memory.arguments),
        "working": dict(plan.memory.working),
        "argument_bytes": plan.memory.argument_bytes,
        "peak_bytes": plan.memory.peak,
        "usable_bytes": plan.memory.usable,
        "fits": plan.memory.fits,
        "seconds": plan.seconds,
        "seconds_by_limit": plan.by_limit,
        "tokens_per_second": plan.tokens_per_second,
        "stages": [
            {
                "name": stage.name,
                "count": stage.count,
                "seconds": stage.seconds,
                "limit": stage.limit,
                "parts": [dataclasses.asdict(part) for part in stage.parts],
            }
            for stage in plan.stages
        ],
    }


def picture(plans: Sequence[Plan], path: str) -> None:
    """Draws memory per device of several meshes, stacked by part, and the first one's time by layer and limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    first = plans[0]
    names = [plan.setting.title.replace(",", "\n") for plan in plans]
    parts = list({name: None for plan in plans for name in (*plan.memory.arguments, *plan.memory.working)})
    bottoms = [0.0] * len(plans)
    for part in parts:
        sizes = [{**plan.memory.arguments, **plan.memory.working}.get(part, 0) / GIB for plan in plans]
        left.bar(names, sizes, bottom=bottoms, label=part, width=0.7)
        bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
    left.axhline(first.memory.usable / GIB, color="black", ls="--", lw=1, label="usable")
    left.set_title(f"GiB per device, {first.setting.topology.name}")
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    left.tick_params(axis="x", labelsize=8)

    stages = [f"{stage.count} x {stage.name}" for stage in first.stages]
    lefts = [0.0] * len(stages)
    for limit in first.by_limit:
        times = [stage.count * stage.by_limit.get(limit, 0.0) * 1e3 for stage in first.stages]
        right.barh(stages, times, left=lefts, label=limit)
        lefts = [a + b for a, b in zip(lefts, times, strict=True)]
    right.invert_yaxis()
    right.set_title(f"Least ms per step by limit, {first.setting.title}")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
