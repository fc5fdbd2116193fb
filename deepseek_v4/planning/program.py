"""The real compiler on the real program: what a plan predicted, as the compiler of the chip sees it.

Nothing is run and nothing is timed but the compiler itself. Use a process of its own (``abstract_devices``).
"""

import collections
import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from deepseek_v4.planning.workload import BATCH, Setting
from deepseek_v4.sharding import Placement, make_mesh
from pallas_kernels.targets import abstract_devices

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "reduce-scatter",
)


Level = Literal["O0", "O1", "O2", "O3"]
"""How much a compiler optimises for execution time: JAX's ``jax_optimization_level``."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind that one step runs: how often, and the bytes of their results on a device, added up."""

    kind: str
    times: int
    bytes: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one device's program, in bytes; ``seconds`` are the compiler's own running time.

    ``level`` is what it was asked to optimise (None: its default).
    """

    arguments: int
    aliased: int
    outputs: int
    temporaries: int
    peak: int
    seconds: float
    level: Level | None
    collectives: tuple[Collective, ...]

    @property
    def results(self) -> int:
        """Bytes of outputs that do not take an argument's place."""
        return self.outputs - self.aliased


def default_level(setting: Setting) -> Level | None:
    """O1 for training steps on TPUs: libtpu 0.0.42 otherwise spends most of its time on the code of their products.

    Buffers and collectives are chosen before there is code (``docs/pods.md`` compares both).
    """
    return "O1" if setting.workload.phase == "train" and setting.topology.chip.platform == "tpu" else None


def compile_setting(setting: Setting, level: Level | None = None) -> Compiled:
    """Compiles the step of a setting for its slice, with the model's own functions and kernels.

    ``level`` is ``default_level`` by default. Raises what the compiler raises: a TPU program that does not fit is an
    error that says by how much.
    """
    level = level or default_level(setting)
    devices = abstract_devices(setting.topology.chip_name, setting.topology.grid)
    placement = setting.place(make_mesh(setting.sizes, devices))
    begin = time.perf_counter()
    with jax.set_mesh(placement.mesh), _optimising(level):
        compiled = lower_step(setting, placement).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    arguments, outputs = int(memory.argument_size_in_bytes), int(memory.output_size_in_bytes)
    aliased, temporaries = int(memory.alias_size_in_bytes), int(memory.temp_size_in_bytes)
    return Compiled(
        arguments=arguments,
        aliased=aliased,
        outputs=outputs,
        temporaries=temporaries,
        # The compiler for GPUs may report no peak.
        peak=int(memory.peak_memory_in_bytes) or arguments + outputs - aliased + temporaries,
        seconds=round(seconds, 1),
        level=level,
        collectives=collectives(compiled.as_text()),
    )


@contextlib.contextmanager
def _optimising(level: Level | None) -> Iterator[None]:
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", level or before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def step_arguments(setting: Setting, placement: Placement) -> tuple[Any, ...]:
    """The arguments of a step as abstract arrays, with the layouts they have on the mesh of ``placement``.

    Inference: parameters, token ids, cache, real tokens of each row. Training: state, frozen parameters, batch.
    """
    work, model = setting.workload, setting.model(placement)
    tokens = functools.partial(
        jax.ShapeDtypeStruct, (work.batch, work.tokens), sharding=placement.sharding(("batch", None))
    )
    if work.phase == "train":
        program = setting.program(placement)
        batch = {name: tokens(kind) for name, kind in BATCH.items()}
        frozen = program.split(model.abstract_params())[2]
        return program.abstract_state((work.batch, work.context)), frozen, batch
    lengths = jax.ShapeDtypeStruct((work.batch,), jnp.int32, sharding=placement.sharding(("batch",)))
    cache = model.abstract_cache(work.batch, work.context, work.rollback)
    return model.abstract_params(), tokens(jnp.int32), cache, lengths


def lower_step(setting: Setting, placement: Placement) -> Any:
    """The traced step: one call of ``Model.forward`` that updates its cache in place, or of ``Program.train_step``."""
    arguments = step_arguments(setting, placement)
    if setting.workload.phase == "train":
        program = setting.program(placement)
        return type(program).train_step.lower(program, *arguments)
    model = setting.model(placement)
    draft = setting.workload.draft and bool(model.drafts)
    step = functools.partial(model.forward, last_only=True, draft=draft)
    return jax.jit(step, donate_argnums=2).lower(*arguments)


# --- collectives of a compiled program --------------------------------------------------------------------------------

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([%\w.\-, ]+)\}?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= s32\[\][^ ]* constant\((\d+)\)")
_ARRAY = re.compile(r"(\w+?)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "f8e8m0fnu": 8}


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives that an optimised HLO program runs, those in loops as often as the loops do.

    Loops are those of ``lax.scan``: they count from 0 to a constant.
    """
    inside: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    calls: dict[str, list[tuple[str, int | str]]] = collections.defaultdict(list)
    bounds: dict[str, int] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
            entry = name if line.startswith("ENTRY") else entry
        if constant := _CONSTANT.search(line):
            bounds[name] = max(bounds.get(name, 1), int(constant[1]))
        elif found := _COLLECTIVE.search(line):
            # An asynchronous start returns its operand beside its result: the last array is the result.
            arrays = _ARRAY.findall(found[1])
            inside[name].append((found[2], _bytes(*arrays[-1]) if "-start(" in line else _total(arrays)))
        elif called := _CALLED.search(line):
            times: int | str = 1
            if " while(" in line:
                # TPU programs do not say how often a loop runs: its condition compares with the number.
                trips, condition = _TRIPS.search(line), _CONDITION.search(line)
                times = int(trips[1]) if trips else condition[1] if condition else 1
            calls[name] += [(callee.strip(" %"), times) for callee in called[1].split(",")]

    totals: dict[str, list[int]] = {}

    def visit(computation: str, times: int) -> None:
        for kind, size in inside[computation]:
            total = totals.setdefault(kind, [0, 0, 0])
            total[0] += times
            total[1] += times * size
            total[2] = max(total[2], size)
        for callee, more in calls[computation]:
            visit(callee, times * (bounds.get(more, 1) if isinstance(more, str) else more))

    visit(entry, 1)
    return tuple(Collective(kind, *totals[kind]) for kind in sorted(totals))


def _total(arrays: list[tuple[str, str]]) -> int:
    return sum(_bytes(*array) for array in arrays)


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
