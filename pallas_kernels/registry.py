"""What every operation declares about itself, so that one compiler, one table and one benchmark serve them all.

The convention: an operation is a folder ``pallas_kernels/<name>/`` with

- ``__init__.py``: the public function, which ends in ``implementation: str | None = None`` and calls
  ``pallas_kernels.implementation.choose``;
- ``xla.py``: the twin; ``tpu.py``, ``gpu.py``: kernels, as far as there are any;
- ``cost.py``: exact bytes and operations from shapes (``Cost``), no JAX tracing;
- ``operation.py``: one constant ``OPERATION = Operation(...)``; nothing is registered by importing, ``operations()``
  finds the folders that have this file.

An ``Operation`` is a name, the public function (called with keyword arguments only), a function that returns the
named ``Case``s, and ``unserved``, the fallback rule in words: given a chip and a case's arguments it says why the
kernel does not serve them, or None. A ``Case`` is a shape that the project must serve:

    Case(
        name="flash/csa/decode/64x128K",           # model/kind/phase/rows x context; what --shapes matches
        arguments={"q": jax.ShapeDtypeStruct(...), ..., "scale": 512**-0.5},
        cost=Cost(bytes_read=..., bytes_written=..., operations={"bfloat16": ...}),
        protected=("entries",),                     # arguments that must not be copied or relaid out
        temporaries_limit=16 * MIB,                 # HBM temporaries allowed, or None
        gpu_temporaries_limit=None,                 # the same on GPUs, where it differs
        representative=True,                        # compiled in CI; the others by hand and in slow tests
        split={"q": 0, "entries": 1},               # rows may be dealt to several chips along these axes
        values=lambda rng: {"counts": ...},         # what integer arguments hold when the case is measured (else 0)
        on_gpus=None,                               # the same shape in the forms in which GPUs keep it, if others
    )

A cache of 256 rows of a million tokens is larger than some chips' memory. Where a case's arguments do not fit one
device, the compiler is asked for the program of one of several devices that share the rows: ``split`` names the
arguments that have a rows axis, and which; results are split along axis 0. Without ``split`` it must fit one device.

Arguments that are ``jax.ShapeDtypeStruct`` (or pytrees of them) are traced, everything else is static. Operations with
several public functions (pre- and post-mix, gate-up and down) declare ``OPERATIONS = (Operation(...), ...)`` instead.
A kernel whose block sizes are free says in ``tuning``, by platform, what a tuner may try (``pallas_kernels.tuned``).
"""

import dataclasses
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import pallas_kernels
from pallas_kernels.targets import Chip

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call must do at least: bytes that cross HBM once, and arithmetic by operand type (a multiply-add is 2).

    ``operations`` counts matrix products by the type of their operands ("bfloat16", "float8_e4m3fn", "float32") and,
    where someone counted it, other arithmetic as "vector". Both are exact for the stated shapes with every selectable
    row selected and every visible entry present.
    """

    bytes_read: int
    bytes_written: int
    operations: Mapping[str, int] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def total_operations(self) -> int:
        """Operations of matrix products, of whatever type."""
        return sum(count for kind, count in self.operations.items() if kind != "vector")

    def memory_seconds(self, chip: Chip) -> float:
        """Time to move the bytes at the chip's published bandwidth."""
        return self.bytes_moved / chip.hbm_bandwidth

    def compute_seconds(self, chip: Chip) -> float:
        """Time for the products at the chip's published peaks."""
        return sum(count / chip.peak_for(kind) for kind, count in self.operations.items())

    def roofline_seconds(self, chip: Chip) -> float:
        """No implementation can be faster than this on ``chip``."""
        return max(self.memory_seconds(chip), self.compute_seconds(chip))


@dataclasses.dataclass(frozen=True)
class Case:
    """A named shape of an operation (module docstring)."""

    name: str
    arguments: Mapping[str, Any]
    cost: Cost
    protected: tuple[str, ...] = ()
    temporaries_limit: int | None = None
    gpu_temporaries_limit: int | None = None
    representative: bool = False
    split: Mapping[str, int] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    values: Callable[[np.random.Generator], Mapping[str, np.ndarray]] = lambda rng: {}
    on_gpus: "Case | None" = None

    def on(self, chip: Chip | None) -> "Case":
        """The case as ``chip`` keeps its arrays; None (a CPU) keeps them as TPUs do."""
        return self.on_gpus if self.on_gpus is not None and chip is not None and chip.platform == "cuda" else self

    def limit_on(self, chip: Chip) -> int | None:
        """Bytes of HBM temporaries allowed on ``chip``: GPU kernels may need more, having less fast memory."""
        if chip.platform == "cuda" and self.gpu_temporaries_limit is not None:
            return self.gpu_temporaries_limit
        return self.temporaries_limit

    def traced(self) -> dict[str, Any]:
        """The arguments that are arrays."""
        return {name: value for name, value in self.arguments.items() if _is_abstract(value)}

    def static(self) -> dict[str, Any]:
        """The arguments that are not."""
        return {name: value for name, value in self.arguments.items() if not _is_abstract(value)}

    def argument_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self.traced()))


def _is_abstract(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _served(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The free block sizes of one kernel: dataclasses that ``candidates`` lists, the first of them the default.

    ``shape_class`` names the class of shapes, by a case's arguments, that share a choice; ``run`` gives the kernel with
    the blocks it is given, a function of a case's arguments. All candidates compute the same to rounding; some may be
    refused by a chip's compiler for their size.
    """

    shape_class: Callable[[Mapping[str, Any]], str]
    candidates: Callable[[Chip, Mapping[str, Any]], Sequence[Any]]
    run: Callable[[Any], Callable]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation's declaration (module docstring)."""

    name: str
    function: Callable
    cases: Callable[[], tuple[Case, ...]]
    unserved: Callable[[Chip, Mapping[str, Any]], str | None] = _served
    tuning: Mapping[str, Tuning] = dataclasses.field(default_factory=lambda: MappingProxyType({}))


def operations() -> dict[str, Operation]:
    """Every declared operation by name, in alphabetical order of their folders; raises ``ValueError`` on a clash."""
    found: dict[str, Operation] = {}
    for folder in sorted(m.name for m in pkgutil.iter_modules(pallas_kernels.__path__) if m.ispkg):
        module_name = f"pallas_kernels.{folder}.operation"
        if importlib.util.find_spec(module_name) is None:
            continue
        module = importlib.import_module(module_name)
        declared = getattr(module, "OPERATIONS", None) or (module.OPERATION,)
        for operation in declared:
            if operation.name in found:
                raise ValueError(f"{module_name}: an operation called {operation.name!r} is declared already")
            found[operation.name] = operation
    return found


def cases_matching(operation: Operation, patterns: list[str] | None) -> list[Case]:
    """The cases whose name contains every word of one of ``patterns`` (words separated by commas); None takes all."""
    cases = operation.cases()
    if not patterns:
        return list(cases)
    return [c for c in cases if any(all(word in c.name for word in p.split(",")) for p in patterns)]
