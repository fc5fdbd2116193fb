"""Compiling an operation's cases with the real compilers, and what the compiled programs say about themselves."""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import ptx
from pallas_kernels.registry import Case, Operation
from pallas_kernels.targets import Chip, abstract_devices, chip

_KERNEL_OF_PLATFORM = {"tpu": "tpu", "cuda": "gpu"}

# Instructions that name a value without moving it.
_FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "custom-call", "constant"}


@dataclasses.dataclass(frozen=True)
class Report:
    """One row of the table. Sizes in bytes; ``fallback`` is why the kernel does not serve this target, if it does not.

    ``error`` is the compiler's first line when it refused; ``fast_memory`` the most VMEM any one kernel of the program
    takes; ``registers`` what the kernels of a GPU program take, where there is an assembler to ask; ``temporaries`` HBM
    scratch of one device; ``copies`` instructions whose result is as large as a protected argument; ``devices`` how
    many share the rows.
    """

    operation: str
    case: Case
    target: Chip
    implementation: str
    fallback: str | None = None
    devices: int = 1
    error: str | None = None
    seconds: float = 0.0
    fast_memory: int | None = None
    registers: ptx.Registers | None = None
    temporaries: int | None = None
    copies: tuple[str, ...] = ()

    @property
    def failures(self) -> list[str]:
        """What is wrong with this row, in words; empty for a good one and for a declared fallback."""
        found = []
        if self.error is not None:
            found.append(self.error)
        limit = self.case.limit_on(self.target)
        if limit is not None and self.temporaries is not None and self.temporaries > limit:
            found.append(f"temporaries of {self.temporaries:,} bytes exceed the limit of {limit:,}")
        if self.copies:
            found.append(f"copies of protected arguments: {', '.join(self.copies)}")
        return found


def compile_case(
    operation: Operation,
    case: Case,
    target: str,
    devices: Callable[[str], list] = abstract_devices,
    *,
    fallbacks: bool = False,
) -> Report:
    """Compiles ``case`` for ``target`` with the kernel that serves it there.

    Where the operation's rule says that no kernel does, the row says why, and the twin is compiled in its place only
    with ``fallbacks``. A compiler's refusal is a row with ``error``, not an exception. ``devices`` gives the devices of
    a target and is asked only if there is something to compile; it raises ``TargetError`` where it cannot.
    """
    where = chip(target)
    case = case.on(where)
    fallback = operation.unserved(where, case.arguments)
    implementation = _KERNEL_OF_PLATFORM[where.platform] if fallback is None else "xla"
    report = Report(operation.name, case, where, implementation, fallback)
    if fallback is not None and not fallbacks:
        return report
    count = devices_needed(case, where)
    report = dataclasses.replace(report, devices=count)
    mesh = Mesh(np.array(devices(target)[:count]), ("device",))
    start = time.perf_counter()
    try:
        lowered = lower(operation, case, implementation, mesh)
        compiled, registers = _compiled(lowered, None if where.platform == "tpu" else ptx.assembler())
    except Exception as error:
        # Whatever the compiler threw, the table goes on; the row carries the message.
        message = f"{type(error).__name__}: {_first_line(str(error))}"
        return dataclasses.replace(report, error=message, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    memory = compiled.memory_analysis()
    return dataclasses.replace(
        report,
        seconds=seconds,
        fast_memory=used_fast_memory(text),
        temporaries=None if memory is None else int(memory.temp_size_in_bytes),
        registers=registers,
        copies=copies_of(text, [a for name in case.protected for a in _per_device(case, name, count)]),
    )


def _compiled(lowered: jax.stages.Lowered, ptxas: str | None) -> tuple[jax.stages.Compiled, ptx.Registers | None]:
    """The program, and what ``ptxas`` says of its kernels, if there is one."""
    if ptxas is None:
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as directory:
        compiled = lowered.compile(compiler_options={"xla_dump_to": directory})
        return compiled, ptx.registers(Path(directory), ptxas)


def devices_needed(case: Case, target: Chip) -> int:
    """How many devices must share the rows of a case for its arrays to fit; 1 where they cannot be shared."""
    count = 1
    if case.split:
        # A fifth of the memory is left to the program and to what a model keeps beside one operation.
        while case.argument_bytes() / count > 0.8 * target.hbm_bytes:
            count *= 2
    return count


def lower(operation: Operation, case: Case, implementation: str, mesh: Mesh) -> jax.stages.Lowered:
    """The operation traced for the devices of ``mesh``, which share the rows; abstract arguments are its parameters."""

    def spec(name: str) -> PartitionSpec:
        if mesh.size == 1 or name not in case.split:
            return PartitionSpec()
        return PartitionSpec(*[None] * case.split[name], "device")

    specs = {name: jax.tree.map(lambda _, name=name: spec(name), value) for name, value in case.traced().items()}
    traced = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), case.traced(), specs
    )

    def call(traced):
        return operation.function(**traced, **case.static(), implementation=implementation)

    if mesh.size > 1:
        call = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec("device"), check_vma=False)
    with jax.set_mesh(mesh):
        return jax.jit(call).lower(traced)


def used_fast_memory(text: str) -> int | None:
    """The most VMEM that one custom call of a compiled TPU program takes, or None if it has none."""
    sizes = re.findall(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', text)
    return max((int(size) for size in sizes), default=None)


def copies_of(text: str, protected: list[jax.ShapeDtypeStruct]) -> tuple[str, ...]:
    """Instructions of a compiled program that produce a protected array anew, or one of the layers stacked in it.

    Such an instruction is a copy, a change of layout, or a slice of a whole layer; a kernel that reads its arguments
    where they lie needs none of them. What changes the type as well shows among the temporaries. Arrays that XLA moves
    to fast memory before the kernel, as it may those of a few hundred KiB, are read once all the same.
    """
    sizes = {(_hlo_type(a.dtype), math.prod(a.shape) // n) for a in protected for n in (1, a.shape[0])}
    found = []
    for name, kind, dims, layout, opcode in re.findall(
        r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[([\d,]*)\]([^ ]*) ([\w\-]+)\(", text, flags=re.M
    ):
        size = math.prod(int(d) for d in dims.split(",") if d)
        if opcode not in _FREE and (kind, size) in sizes and "S(" not in layout:
            found.append(f"{name} = {kind}[{dims}] {opcode}")
    return tuple(found)


def _hlo_type(dtype: np.dtype) -> str:
    name = np.dtype(dtype).name
    for prefix, short in (("uint", "u"), ("int", "s"), ("bfloat", "bf"), ("float8_", "f8"), ("float4_", "f4")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name.replace("float", "f")


def _per_device(case: Case, name: str, count: int) -> list[jax.ShapeDtypeStruct]:
    """One device's part of an argument: its arrays, of which rows in parts (``deepseek_v4.stored_rows``) have some."""

    def part(whole: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = list(whole.shape)
        if count > 1 and name in case.split:
            shape[case.split[name]] //= count
        return jax.ShapeDtypeStruct(tuple(shape), whole.dtype)

    return [part(whole) for whole in jax.tree.leaves(case.arguments[name])]


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]
