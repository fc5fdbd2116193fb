"""How a model is executed: arithmetic, simulated quantisation, placement and kernel choice, as one static value."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from deepseek_v4.cache import ENTRY_LAYOUTS
from deepseek_v4.nn.variables import Storage

if TYPE_CHECKING:
    from deepseek_v4.sharding import Axis, Placement

SIMULATIONS = ("kv", "indexer", "activations")


@dataclasses.dataclass(frozen=True)
class Execution:
    """Static choices of one compiled program; hashable, never traced.

    ``dtype`` is the activation dtype ("float32" or "bfloat16"). ``simulate`` names the parts of the released
    deployment quantisation to reproduce: ``kv`` (E4M3 non-RoPE dims of every KV entry), ``indexer`` (Hadamard and
    E2M1 of index queries and keys), ``activations`` (E4M3 inputs of FP8/FP4 linears); architecture section 7.
    ``quantise`` is for training: weights are used as a checkpoint of that ``Storage`` would hold them, with straight-
    through gradients to the unquantised ones that the model must store (None: used as they are).
    ``placement`` says where arrays live (None: one device); ``implementation`` names the kernels (None: the default
    of the backend); ``entry_layout`` how the cache stores compressed entries: "plain", or "words", bfloat16 pairs in
    uint32, which TPU kernels read in place (None: words where the kernels of TPUs run in bfloat16, else plain), or
    "published", the bytes of the release, which hold what ``kv`` and ``indexer`` simulate, or "columns", the same bytes
    as TPU kernels read them, with windows in bfloat16 (``with_published_cache`` chooses).
    ``unroll`` is how many repetitions of a scan group one iteration of its loop runs: more compile longer, but what a
    backward pass needs of them is not stacked up by copies.
    Raises ``ValueError`` for an unknown dtype, simulation or layout, and for a layout that cannot hold what is run.
    """

    dtype: str = "bfloat16"
    simulate: frozenset[str] = frozenset()
    placement: "Placement | None" = None
    implementation: str | None = None
    entry_layout: str | None = None
    quantise: Storage | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "simulate", frozenset(self.simulate))
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', found {self.dtype!r}")
        if self.unroll < 1:
            raise ValueError(f"unroll: expected at least 1, found {self.unroll}")
        if self.entry_layout not in (None, *ENTRY_LAYOUTS):
            raise ValueError(f"entry_layout: expected one of {list(ENTRY_LAYOUTS)}, found {self.entry_layout!r}")
        if self.entry_layout not in (None, "plain") and self.dtype != "bfloat16":
            raise ValueError(f"entry_layout: {self.entry_layout} holds bfloat16, but dtype is {self.dtype!r}")
        if self.entry_layout in ("published", "columns") and not {"kv", "indexer"} <= self.simulate:
            raise ValueError(
                f"entry_layout: {self.entry_layout} rows hold what simulate kv,indexer gives, "
                f"found {sorted(self.simulate)}"
            )
        unknown = self.simulate - set(SIMULATIONS)
        if unknown:
            raise ValueError(f"simulate: unknown {sorted(unknown)}, expected any of {list(SIMULATIONS)}")

    @property
    def cache_layout(self) -> str:
        """The layout of compressed entries in a cache made now, with the default decided."""
        if self.entry_layout is not None:
            return self.entry_layout
        return "words" if self._tpu_kernels and self.dtype == "bfloat16" else "plain"

    def with_published_cache(self) -> "Execution":
        """The same with a cache of the released bytes, in the layout of the kernels that run, and what it simulates."""
        layout = "columns" if self._tpu_kernels else "published"
        return dataclasses.replace(self, simulate=self.simulate | {"kv", "indexer"}, entry_layout=layout)

    @property
    def _tpu_kernels(self) -> bool:
        platform = jax.default_backend() if self.placement is None else self.placement.platform
        return platform == "tpu" and self.implementation != "xla"

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of the residual streams and of matmul inputs."""
        return jnp.dtype(self.dtype)

    def constrain(self, x: jax.Array, axes: "Iterable[Axis]") -> jax.Array:
        """Asks the partitioner to lay out ``x`` by these axes; the identity on one device."""
        return x if self.placement is None else self.placement.constrain(x, tuple(axes))

    def tokens(self, length: int) -> tuple[str, tuple[str, ...]]:
        """The axes of tokens [B, S] between sublayers, of rows of ``length`` tokens."""
        return ("batch", ()) if self.placement is None else self.placement.tokens(length)

    def split_tokens(self, x: jax.Array, before: "Axis" = ()) -> jax.Array:
        """See ``Placement``; the identity on one device."""
        return x if self.placement is None else self.placement.split_tokens(x, before)

    def gather_tokens(self, x: jax.Array) -> jax.Array:
        """See ``Placement``; the identity on one device."""
        return x if self.placement is None else self.placement.gather_tokens(x)

    def mesh_axes(self, logical: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that a logical axis is split over; none on one device."""
        return () if self.placement is None else self.placement.mesh_axes(logical)

    def shift_tokens(self, x: jax.Array, before: jax.Array) -> jax.Array:
        """See ``Placement``: x [B, S, ...] with each token's place taken by the one before it, first ``before``."""
        if self.placement is None:
            return jnp.concatenate([before, x[:, :-1]], axis=1)
        return self.placement.shift_tokens(x, before)

    def per_shard(
        self, function: Callable, args: Sequence[Any], in_axes: "Sequence[Sequence[Axis]]", out_axes: "Sequence[Axis]"
    ) -> jax.Array:
        """``function(*args)`` on each device's own shards, laid out by these axes; a plain call on one device."""
        if self.placement is None:
            return function(*args)
        return self.placement.per_shard(function, args, in_axes, out_axes)


def dot_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32: accelerators otherwise multiply float32 in bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
