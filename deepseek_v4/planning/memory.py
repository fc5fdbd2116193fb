"""What a step keeps in each device's memory: exact arguments, and an estimate of what it needs while it runs."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_v4.nn.variables import Weight
from deepseek_v4.parameters import ParameterSpec, is_spec
from deepseek_v4.planning.layout import tiled_bytes
from deepseek_v4.planning.workload import BATCH, Setting, leaves_per_device, size_bytes
from pallas_kernels.compressed_attention.merge import PART_NUMBERS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device by part; ``arguments`` are exact, ``working`` is an estimate.

    ``arguments`` holds "experts", "other weights", "cache", "tokens", and for training "masters", "optimizer". The peak
    is their sum with ``working``: activations, gradients, results.
    """

    arguments: Mapping[str, int]
    working: Mapping[str, int]
    usable: int

    @property
    def argument_bytes(self) -> int:
        """What the compiled step takes."""
        return sum(self.arguments.values())

    @property
    def peak(self) -> int:
        """What the device holds at most."""
        return self.argument_bytes + sum(self.working.values())

    @property
    def spare(self) -> int:
        """Bytes left; negative by how much it does not fit."""
        return self.usable - self.peak

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.spare >= 0


def memory(setting: Setting) -> Memory:
    """The memory of one device of a setting; raises ``MeshError`` where the mesh does not fit the model."""
    train = setting.workload.phase == "train"
    arguments = _training_arguments(setting) if train else _inference_arguments(setting)
    working = _training_working(setting) if train else _inference_working(setting)
    return Memory(arguments, working, setting.topology.chip.usable_bytes)


def array_bytes(setting: Setting, arrays: Iterable[tuple[tuple[int, ...], Any]]) -> int:
    """Bytes of arrays on a device: on TPUs in whole tiles."""
    tiled = setting.topology.chip.platform == "tpu"
    return sum(
        tiled_bytes(shape, dtype.itemsize) if tiled else math.prod(shape) * dtype.itemsize for shape, dtype in arrays
    )


def _inference_arguments(setting: Setting) -> dict[str, int]:
    work = setting.workload
    parts = dict(_weights(_whatever_batch(setting)))
    cache = setting.model().abstract_cache(work.batch, work.context, work.rollback)
    parts["cache"] = array_bytes(setting, leaves_per_device(cache))
    integers = jnp.dtype(jnp.int32)
    parts["tokens"] = array_bytes(setting, [((setting.rows, work.tokens), integers), ((setting.rows,), integers)])
    return parts


def _whatever_batch(setting: Setting) -> Setting:
    """The setting with the smallest workload: what does not depend on its size is computed once for all of them."""
    least = dataclasses.replace(setting.workload, batch=setting.placement.size("batch"), context=1)
    return dataclasses.replace(setting, workload=least)


@functools.lru_cache(maxsize=1024)
def _weights(setting: Setting) -> tuple[tuple[str, int], ...]:
    parts = {"experts": 0, "other weights": 0}
    for path, spec in _described(setting.descriptions.params):
        parts["experts" if "experts" in path else "other weights"] += _stored(setting, [spec])
    return tuple(parts.items())


def _described(specs: Any) -> list[tuple[tuple[str, ...], ParameterSpec]]:
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return [(tuple(str(getattr(key, "key", key)) for key in path), spec) for path, spec in leaves]


def _inference_working(setting: Setting) -> dict[str, int]:
    """Logits, copied rings, and what one layer needs at once: its activations, or its linears while they are unpacked.

    Follows what the compiled programs of ``docs/pods.md`` keep. A layer's activations are queries and attention
    outputs of a device's heads, rows sent to experts or index scores of a block of queries with the copies that top-k
    makes, and four copies of the residual streams. FP8 linears outside of kernels become float32 products of codes and
    scales, then bfloat16: 14 bytes per number, of two linears at a time. Rings (window, and the float32 rows of windows
    in progress) change their layout on the way into the scan over layers, and on some chips the weights that stay
    bfloat16: a copy of those of the largest scan group.
    """
    config, work, placement = setting.config, setting.workload, setting.placement
    tokens = setting.rows * work.tokens
    d, n = config.hidden_size, config.hc_mult
    logits = 4 * setting.rows * config.vocab_size // placement.size("vocab")
    drafts = 1 if work.draft and config.drafter == "mtp" else 0
    streams = tokens * n * d * 2 // placement.token_shards(work.tokens)
    heads = config.num_attention_heads // placement.size("heads")
    attention = 3 * tokens * heads * config.head_dim * 2
    if placement.mesh_axes("entries"):
        # Float32 parts of a softmax, of a block of queries: made, joined to rows, sent, received.
        attention += 4 * min(tokens * heads * (config.head_dim + 2), PART_NUMBERS) * 4
    experts = tokens * config.num_experts_per_tok * (d * 2 + config.moe_intermediate_size * 2) + 2 * tokens * d * 4
    activations = 4 * streams + max(attention, experts, _index_scores(setting))
    linears = sorted(
        math.prod(setting.used_shard(spec))
        for described in setting.descriptions.layers.values()
        for _, spec in _described(described)
        if spec.role == "linear"
    )
    cache = setting.model().abstract_cache(work.batch, work.context, work.rollback)
    rings = [_rings(setting, group) for group in cache["groups"]]
    return {
        "results": (1 + drafts) * logits,
        "copied rings": max(rings),
        "copied weights": max(map(functools.partial(_copied_weights, setting), setting.descriptions.params["groups"])),
        "activations": max(activations, UNPACKED * sum(linears[-2:])),
    }


def _copied_weights(setting: Setting, group: Any) -> int:
    """Bytes of a group's stacks of bfloat16 matrices, where the chip's compiler keeps them twice."""
    if not setting.topology.chip.copies_stacks:
        return 0
    matrices = [spec for _, spec in _described(group) if spec.role == "matrix" and spec.dtype == jnp.bfloat16]
    return array_bytes(setting, [(setting.used_shard(spec), spec.dtype) for spec in matrices])


def _index_scores(setting: Setting) -> int:
    """Bytes of the scores of a block of queries for a device's keys, thrice, in the layers with an indexer.

    None where a kernel selects.
    """
    config, work = setting.config, setting.workload
    ratios = [spec.compress_ratio for spec in setting.descriptions.layers if spec.indexer]
    if not ratios or setting.scores_stay:
        return 0
    entries = max(1, work.context // min(ratios) // setting.placement.size("entries"))
    split, share = setting.placement.size("index_heads"), setting.index_share
    heads = config.index_n_heads // (1 if share else split)
    tokens = work.tokens // (split if share == "queries" else 1)
    rows = setting.rows // (split if share == "rows" else 1)
    block = max(1, min(tokens, INDEX_BLOCK // (rows * heads * entries)))
    return 3 * 4 * rows * block * entries


def _rings(setting: Setting, group: Any) -> int:
    """Bytes of the arrays of a group's cache that are rings."""
    rings = [{name: a for name, a in member.items() if "entries" not in name} for member in group]
    return array_bytes(setting, leaves_per_device(rings))


UNPACKED = 14
"""Bytes per number of an FP8 linear that is unpacked outside of a kernel."""

INDEX_BLOCK = 1 << 25
"""Products of index queries and keys that the XLA twin of ``index_topk`` makes at once."""


# --- training --------------------------------------------------------------------------------------------------------


def is_trained(setting: Setting, spec: ParameterSpec) -> bool:
    """Whether a training step changes a parameter: every weight, or the adapters alone."""
    return spec.kind is Weight and (setting.workload.lora is None or spec.role == "adapter")


def trained_specs(setting: Setting) -> list[ParameterSpec]:
    """What a training step changes."""
    leaves = jax.tree.leaves(setting.descriptions.params, is_leaf=is_spec)
    return [spec for spec in leaves if is_trained(setting, spec)]


def travelling_bytes(setting: Setting, spec: ParameterSpec) -> int:
    """Bytes of a parameter gathered from where it is cut: what is only multiplied travels in bfloat16 at most."""
    size = min(spec.dtype.itemsize, 2) if spec.role in ("linear", "expert") else spec.dtype.itemsize
    return math.prod(setting.used_shard(spec)) * size


def _stored(setting: Setting, specs: Iterable[ParameterSpec]) -> int:
    return array_bytes(setting, [(setting.shard(spec), spec.dtype) for spec in specs])


def _training_arguments(setting: Setting) -> dict[str, int]:
    """What ``Program.train_step`` takes: its state, what it leaves as it is, and a batch."""
    batch = [((setting.rows, setting.workload.context), jnp.dtype(kind)) for kind in BATCH.values()]
    return dict(_state(_whatever_batch(setting))) | {"tokens": array_bytes(setting, batch)}


@functools.lru_cache(maxsize=1024)
def _state(setting: Setting) -> tuple[tuple[str, int], ...]:
    program, work = setting.program(), setting.workload
    state = program.abstract_state((work.batch, work.context))
    frozen = program.split(setting.model().abstract_params())[2]
    weights = array_bytes(setting, leaves_per_device(state["trained"]))
    return (
        ("trained weights", weights),
        ("optimizer", array_bytes(setting, leaves_per_device(state)) - weights),
        ("frozen weights", array_bytes(setting, leaves_per_device(frozen))),
    )


def _training_working(setting: Setting) -> dict[str, int]:
    """Gradients, the streams kept between layers, and what one layer needs while its experts are differentiated.

    Follows the buffers that libtpu's compiler keeps at the peak of Flash's step (``docs/pods.md``): every layer is
    computed again in the backward pass, one at a time (``remat.in_turn``), and of the layers before it only the input
    streams are there. Float32 gradients of a layer's experts are whole until they are scattered. Of attention there are
    queries in float32, in which they are normed, and in bfloat16 as rotated queries, in blocks, and outputs. Rows that
    travel and their gradients are there as they were sorted and as the exchange takes them (in bfloat16 8 bytes per
    number), beside results that come back; a round has both as they arrived, in two layouts, and their gradients twice
    in float32. Embedding, head and the optimizer take turns with this, and less.
    """
    config, work, placement = setting.config, setting.workload, setting.placement
    tokens = setting.rows * work.tokens
    d, n, heads = config.hidden_size, config.hc_mult, config.num_attention_heads // placement.size("heads")
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    streams = tokens * n * d * 2 // placement.token_shards(work.tokens)
    gathered = whole = 0
    for described in setting.descriptions.layers.values():
        specs = [spec for _, spec in _described(described)]
        cut = [spec for spec in specs if setting.shard(spec) != setting.used_shard(spec)]
        gathered = max(gathered, sum(travelling_bytes(setting, spec) for spec in cut))
        experts = [spec for spec in specs if "experts" in spec.axes and is_trained(setting, spec)]
        whole = max(whole, sum(size_bytes(setting.used_shard(spec), spec.dtype) for spec in experts))
    attention = tokens * heads * config.head_dim * (4 + 3 * 2)
    choices, width = config.num_experts_per_tok, config.moe_intermediate_size
    form, group = setting.exchange
    if form == "dispatch":
        rows = min(placement.exchange.rows, group * tokens * choices)
        sent, returned = placement.exchange.sent_bytes(d), placement.exchange.returned_bytes(d)
        moved = tokens * choices * (2 * (sent + 2 * d) + returned) + rows * d * (2 * 2 * 2 + 2 * 4)
    else:
        moved = 2 * group * tokens * choices * (d * 6 + 3 * width * 4)
    return {
        "gradients": _stored(setting, trained_specs(setting)),
        "kept streams": layers * streams,
        "gathered weights": gathered,
        "whole gradients": whole,
        "activations": 8 * streams + attention + moved,
    }
