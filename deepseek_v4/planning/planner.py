"""Plans: what a setting costs, which mesh is best and why, and what to change where nothing fits."""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from deepseek_v4.config import Config
from deepseek_v4.nn.variables import Packed
from deepseek_v4.parameters import flatten
from deepseek_v4.planning.memory import GIB, Memory, memory
from deepseek_v4.planning.roofline import Stage, prompt_seconds, seconds_by_limit, stages, step_seconds
from deepseek_v4.planning.topology import Topology, slices
from deepseek_v4.planning.workload import Setting, Workload, WorkloadError
from deepseek_v4.sharding import MESH_AXES, MeshError
from pallas_kernels.grouped_matmul.tpu import unserved


@dataclasses.dataclass(frozen=True)
class Plan:
    """A setting with its memory per device and the least time of its step."""

    setting: Setting
    memory: Memory
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Least seconds of a step."""
        return step_seconds(self.stages)

    @property
    def by_limit(self) -> dict[str, float]:
        """Those seconds by what they are due to, longest first."""
        return seconds_by_limit((stage.count, stage) for stage in self.stages)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, at most; drafts are not counted as accepted."""
        work = self.setting.workload
        return work.batch * work.tokens / self.seconds

    @property
    def prompt_seconds(self) -> float | None:
        """Least seconds from an empty cache to the last token of a full context; None for other phases."""
        return prompt_seconds(self.setting) if self.setting.workload.phase == "prefill" else None


@dataclasses.dataclass(frozen=True)
class Search:
    """Every legal mesh of a slice, best first: those that fit by least time, then the others by how much they lack."""

    plans: tuple[Plan, ...]
    illegal: tuple[tuple[str, str], ...]
    """Meshes that cannot be, and why."""

    @property
    def best(self) -> Plan:
        """The first; it may not fit."""
        return self.plans[0]

    @property
    def fits(self) -> bool:
        """Whether any mesh fits."""
        return self.best.memory.fits


def plan(setting: Setting) -> Plan:
    """Plans one setting; raises ``MeshError`` or ``WorkloadError`` where it cannot run at all."""
    check(setting)
    return Plan(setting, memory(setting), stages(setting))


def check(setting: Setting) -> None:
    """Raises ``MeshError`` or ``WorkloadError`` with what is wrong about a setting."""
    product, devices = math.prod(setting.sizes.values()), setting.topology.devices
    if product != devices:
        raise MeshError(f"mesh {setting.mesh_text} has {product} devices, {setting.topology.name} has {devices}")
    work, limit = setting.workload, setting.config.max_position_embeddings
    if work.context > limit:
        raise WorkloadError(f"context {work.context:,} is beyond the model's {limit:,} tokens")
    parts = setting.placement.size("batch")
    if work.batch % parts:
        axes = "*".join(setting.placement.rules.batch)
        raise WorkloadError(f"batch {work.batch} does not divide over {axes} = {parts}")
    setting.model()
    if work.phase == "train" and (split := setting.placement.mesh_axes("entries")):
        raise WorkloadError(f"{'*'.join(split)} splits caches, which training has none of")
    reason = experts_unserved(setting)
    if reason is not None:
        raise WorkloadError(
            f"the expert kernel does not serve this mesh, and without it XLA copies the packed experts: {reason}"
        )


def experts_unserved(setting: Setting) -> str | None:
    """Why the kernel for packed experts does not serve a device's shard of them, or None where that costs no copy.

    XLA's TPU compiler alone copies packed experts, and plain ones (of training) nobody does.
    """
    chip = setting.topology.chip
    layer = flatten(next(iter(setting.descriptions.layers.values())))
    specs = [layer[("ffn", "experts", name, "weight")] for name in ("w1", "w2")]
    if chip.platform != "tpu" or specs[0].kind is not Packed:
        return None
    w1, w2 = ((jax.ShapeDtypeStruct(setting.used_shard(spec), spec.dtype), spec) for spec in specs)
    rows = setting.rows * setting.workload.tokens
    x: Any = jax.ShapeDtypeStruct((rows, setting.config.hidden_size), setting.model().execution.activation_dtype)
    return unserved(chip, x, w1, w2)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices."""

    def factors(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
            return
        for size in (n for n in range(1, count + 1) if count % n == 0):
            for rest in factors(count // size, axes - 1):
                yield (size, *rest)

    for sizes in factors(devices, len(MESH_AXES)):
        yield dict(zip(MESH_AXES, sizes, strict=True))


def settings(config: Config, topology: Topology, workload: Workload) -> Iterator[Setting]:
    """The workload on every mesh of a slice; where experts are split, with the batch over their axis too or without."""
    for mesh in meshes(topology.devices):
        for travel in (False, True) if mesh["expert"] > 1 and mesh["context"] == 1 else (False,):
            yield Setting.of(config, topology, mesh, workload, travel)


def search(config: Config, topology: Topology, workload: Workload) -> Search:
    """Plans the workload on every mesh of the slice; raises ``WorkloadError`` if none is legal."""
    plans, illegal = [], []
    for setting in settings(config, topology, workload):
        try:
            plans.append(plan(setting))
        except (MeshError, WorkloadError) as error:
            illegal.append((setting.title, str(error).splitlines()[-1].strip()))
    if not plans:
        reasons = "\n".join(f"  {mesh}: {reason}" for mesh, reason in illegal)
        raise WorkloadError(f"no mesh of {topology.name} can run this:\n{reasons}")
    plans.sort(key=_rank)
    return Search(tuple(plans), tuple(illegal))


def _rank(plan: Plan) -> tuple:
    lacking = max(0, -plan.memory.spare)
    return (lacking, round(plan.seconds, 9), plan.memory.peak)


def explain(found: Search) -> list[str]:
    """Sentences: why the first mesh is first, and what kept the others back."""
    best = found.best
    fitting = [p for p in found.plans if p.memory.fits]
    lines = []
    if not fitting:
        lines.append(
            f"No mesh fits; {best.setting.title} is nearest and lacks {-best.memory.spare / GIB:.2f} GiB per device."
        )
    elif len(fitting) == 1:
        lines.append(f"{best.setting.title} is the only mesh that fits.")
    else:
        second = fitting[1]
        lines.append(
            f"{best.setting.title} is first of {len(fitting)} meshes that fit: {_ms(best.seconds)} per step, "
            f"{second.setting.title} takes {_ms(second.seconds)}. {_difference(best, second)}"
        )
        least = min(fitting, key=lambda p: p.memory.peak)
        if least is not best:
            lines.append(
                f"{least.setting.title} needs least memory, {least.memory.peak / GIB:.2f} GiB per device instead "
                f"of {best.memory.peak / GIB:.2f}, and takes {_ms(least.seconds)}."
            )
    too_large = len(found.plans) - len(fitting)
    if fitting and too_large:
        lines.append(f"{too_large} meshes do not fit.")
    if found.illegal:
        common = collections.Counter(reason for _, reason in found.illegal).most_common(3)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in common)
        lines.append(f"{len(found.illegal)} meshes are not legal, most often: {reasons}.")
    return lines


def _difference(best: Plan, second: Plan) -> str:
    mine, theirs = best.by_limit, second.by_limit
    gaps = {limit: theirs.get(limit, 0) - mine.get(limit, 0) for limit in {*mine, *theirs}}
    worst = max(gaps, key=lambda limit: gaps[limit])
    if gaps[worst] <= 0:
        return "They differ in nothing that takes time; less memory decides."
    saved = min(gaps, key=lambda limit: gaps[limit])
    text = f"The second spends {_ms(gaps[worst])} more on {worst}"
    return text + (f" and {_ms(-gaps[saved])} less on {saved}." if gaps[saved] < 0 else ".")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


# --- what to change --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Advice:
    """How a workload can be made to fit: ``batch`` at its context, ``context`` at its batch (None: not even the least),
    and the ``smallest`` slice of the same chip that takes it as it is, with a mesh (None: there is none that large).
    """

    batch: int | None
    context: int | None
    smallest: Setting | None


def largest_batch(config: Config, topology: Topology, workload: Workload) -> Setting | None:
    """The setting with the most sequences of this context that fits the slice; None if not one does."""
    best: Setting | None = None
    for least in settings(config, topology, workload):
        parts = least.placement.size("batch")

        def setting(rows: int, least=least, parts=parts) -> Setting:
            return dataclasses.replace(least, workload=dataclasses.replace(workload, batch=rows * parts))

        try:
            check(setting(1))
        except (MeshError, WorkloadError):
            continue
        rows = _most(lambda rows, setting=setting: memory(setting(rows)).fits)
        if rows and (best is None or rows * parts > best.workload.batch):
            best = setting(rows)
    return best


def _most(fits) -> int:
    """The largest number for which ``fits`` holds, 0 if none; it holds up to some number."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest_slice(config: Config, topology: Topology, workload: Workload) -> Setting | None:
    """The smallest slice of the chip that takes the workload, with the fastest mesh that fits; None if none does."""
    for candidate in slices(topology.chip):
        fitting = []
        for setting in settings(config, candidate, workload):
            try:
                check(setting)
            except (MeshError, WorkloadError):
                continue
            if memory(setting).fits:
                fitting.append(setting)
        if fitting:
            return min(fitting, key=lambda s: step_seconds(stages(s)))
    return None


def advise(config: Config, topology: Topology, workload: Workload) -> Advice:
    """What would fit instead."""
    batch = largest_batch(config, topology, workload)
    context, fitting = workload.context, None
    while fitting is None and context > 1024:
        context //= 2
        shorter = dataclasses.replace(workload, context=context)
        if any(map(_fits, settings(config, topology, shorter))):
            fitting = context
    return Advice(batch.workload.batch if batch else None, fitting, smallest_slice(config, topology, workload))


def _fits(setting: Setting) -> bool:
    try:
        check(setting)
    except (MeshError, WorkloadError):
        return False
    return memory(setting).fits


def advice_lines(found: Search, advice: Advice) -> list[str]:
    """Sentences: what takes the memory, by how much it is too much, and what would fit."""
    best = found.best
    work, topology = best.setting.workload, best.setting.topology
    parts = {**best.memory.arguments, **best.memory.working}
    largest = ", ".join(f"{name} {size / GIB:.2f}" for name, size in _largest(parts, 3))
    lines = [
        f"{topology.name} has {best.memory.usable / GIB:.2f} GiB per device; on {best.setting.title} this needs "
        f"{best.memory.peak / GIB:.2f}, {-best.memory.spare / GIB:.2f} too much (GiB: {largest})."
    ]
    if advice.batch:
        lines.append(f"Fits with batch {advice.batch} instead of {work.batch} at this context.")
    else:
        lines.append("Not one sequence of this context fits.")
    if advice.context:
        lines.append(f"Fits with context {advice.context:,} instead of {work.context:,} at this batch.")
    if advice.smallest:
        smallest = advice.smallest
        lines.append(f"Smallest {topology.chip.name} slice that takes it: {smallest.topology.name}, {smallest.title}.")
    else:
        lines.append(f"No slice of {topology.chip.name} up to {slices(topology.chip)[-1].name} takes it.")
    return lines


def _largest(parts: dict[str, int], count: int) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda part: -part[1])[:count]
