"""How long a step takes at least: for every part of every layer the slowest of memory, arithmetic and links.

What a device multiplies and reads is taken from its shards of the parameters that the model describes, so a change of
the sharding rules changes the plan. Times are limits from published peaks, not predictions: parts of a layer follow one
another, within a part memory and arithmetic overlap fully, collectives overlap with nothing. Arithmetic is what this
project's kernels do on every chip: packed weights are multiplied in bfloat16, residual mixing in float32, and so are
compressors and router where an operand or a gradient is float32 (float32 sums of bfloat16 operands are the same).
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from deepseek_v4.layer_spec import LayerSpec, draft_specs, layer_specs
from deepseek_v4.parameters import ParameterSpec, flatten
from deepseek_v4.planning.cache_bytes import BFLOAT16, PUBLISHED
from deepseek_v4.planning.memory import is_trained, trained_specs, travelling_bytes
from deepseek_v4.planning.topology import Links
from deepseek_v4.planning.workload import Setting, size_bytes
from pallas_kernels.compressed_attention.cost import attention_cost
from pallas_kernels.shares import FEW

MEMORY = "HBM"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective of one device over mesh axes.

    ``kind`` is "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "ragged-all-to-all", of ``bytes``.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a layer on one device: operations by operand type, bytes that cross HBM, or one collective."""

    name: str
    operations: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes: float = 0
    exchange: Exchange | None = None


@dataclasses.dataclass(frozen=True)
class Timed:
    """The least seconds of a part and what they are due to: "HBM", an operand type, or a collective over an axis."""

    name: str
    limit: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """The parts of one kind of layer (or of what surrounds the layers), which occurs ``count`` times in a step."""

    name: str
    count: int
    parts: tuple[Timed, ...]

    @property
    def seconds(self) -> float:
        """Of one such layer."""
        return sum(part.seconds for part in self.parts)

    @property
    def by_limit(self) -> dict[str, float]:
        """Seconds of one such layer by limit, longest first."""
        return seconds_by_limit([(1, self)])

    @property
    def limit(self) -> str:
        """What takes most of its time."""
        return next(iter(self.by_limit), MEMORY)


def seconds_by_limit(stages: Iterable[tuple[int, Stage]]) -> dict[str, float]:
    """Seconds by limit over (count, stage), longest first."""
    total: dict[str, float] = collections.defaultdict(float)
    for count, stage in stages:
        for part in stage.parts:
            total[part.limit] += count * part.seconds
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def stages(setting: Setting, context: int | None = None) -> tuple[Stage, ...]:
    """The least time of every kind of layer of a step whose last token sees ``context`` tokens (default: all).

    Training steps pass through every layer forwards twice (once to recompute) and backwards once, which multiplies
    twice as much.
    """
    described, config, work = setting.descriptions, setting.config, setting.workload
    context = work.context if context is None else context
    kinds = collections.Counter((spec.kind, spec) for spec in layer_specs(config))
    found = []
    for (kind, spec), count in kinds.items():
        name = f"{kind}, hash" if spec.hash_router else kind
        parts = _layer(setting, described.layers[spec], spec, context)
        found.append(_stage(setting, name, count, parts))
    found.append(_stage(setting, "embedding and head", 1, _shell(setting, described.shell)))
    if described.draft is not None and (work.draft or work.phase == "train"):
        spec = draft_specs(config)[0]
        draft = [*_layer(setting, described.draft, spec, context), *_head(setting, flatten(described.shell))]
        found.append(_stage(setting, "MTP", 1, draft))
    if work.phase == "train":
        found.append(_stage(setting, "optimizer", 1, _update(setting)))
    return tuple(found)


def step_seconds(found: Iterable[Stage]) -> float:
    """Least seconds of a whole step."""
    return sum(stage.count * stage.seconds for stage in found)


def _stage(setting: Setting, name: str, count: int, parts: Iterable[Part]) -> Stage:
    timed = [_timed(setting, part) for part in parts]
    return Stage(name, count, tuple(part for part in timed if part.seconds))


def _timed(setting: Setting, part: Part) -> Timed:
    chip = setting.topology.chip
    if part.exchange is not None:
        links = setting.topology.links(setting.sizes, part.exchange.axes)
        name = f"{part.exchange.kind} over {'*'.join(part.exchange.axes)} ({links.medium})"
        return Timed(part.name, name, _exchange_seconds(links, part.exchange))
    limits = {MEMORY: part.bytes / chip.hbm_bandwidth}
    for kind, operations in part.operations.items():
        limits[kind] = operations / chip.peak_for(kind)
    limit = max(limits, key=lambda name: limits[name])
    return Timed(part.name, limit, limits[limit])


def _exchange_seconds(links: Links, exchange: Exchange) -> float:
    if exchange.kind == "all-reduce":
        return links.all_reduce(exchange.bytes)
    if exchange.kind in ("all-to-all", "ragged-all-to-all"):
        return links.all_to_all(exchange.bytes)
    return links.all_gather(exchange.bytes)


# --- what a layer does -----------------------------------------------------------------------------------------------


def _passes(setting: Setting) -> tuple[float, float]:
    """How often weights are multiplied with, and how often they and the activations cross memory, per step."""
    if setting.workload.phase != "train":
        return 1, 1
    # Forwards, recomputed, and backwards: to the input always, to the weight where it is trained.
    return (4 if setting.workload.lora is None else 3), 3


def _float32_passes(setting: Setting, spec: ParameterSpec) -> float:
    """How many of the products of a weight that makes float32 have an operand that is float32.

    None of bfloat16 rows and weights; all with a float32 master; beside adapters that of the gradient alone.
    """
    if setting.workload.phase != "train":
        return 0
    return _passes(setting)[0] if spec.dtype == jnp.float32 else 1


def _layer(setting: Setting, described: Mapping[str, Any], spec: LayerSpec, context: int) -> Iterator[Part]:
    config, placement, work = setting.config, setting.placement, setting.workload
    flat = flatten(described)
    tokens = setting.rows * work.tokens
    d = config.hidden_size
    # Where rows are split between sublayers, a sublayer gathers what it needs of them and scatters its sums.
    shards = placement.token_shards(work.tokens)
    summed = "all-reduce" if shards == 1 else "reduce-scatter"

    def sums(name: str, logical: str, bytes_per_number: int) -> Part:
        numbers = tokens * d // (shards // placement.size(logical)) if shards > 1 else tokens * d
        return Part(name, exchange=_exchange(setting, summed, logical, bytes_per_number * numbers))

    yield _mixing(setting, flat, tokens // shards)
    if shards > 1:
        size = _latents(setting, flat, tokens)
        yield Part("attention inputs", exchange=_exchange(setting, "all-gather", "sequence", size))
    yield _linears(setting, "projections", flat, ("attn",), tokens, without=("compressor", "indexer"))
    if spec.compress_ratio:
        yield _linears(setting, "compressor", flat, ("attn", "compressor"), tokens)
    if spec.indexer:
        yield _linears(setting, "indexer projections", flat, ("attn", "indexer"), tokens)
        yield from _index(setting, spec, context)
    yield _attention(setting, spec, context)
    if spec.compress_ratio:
        # Float32 parts of a softmax.
        heads = config.num_attention_heads // placement.size("heads")
        size = tokens * heads * config.head_dim
        yield from _joined(setting, "attention parts", size + 2 * tokens * heads, size * _activation_bytes())
    yield sums("attention output", "o_groups", 2)
    yield _linears(setting, "router", flat, ("ffn", "gate"), tokens)
    if shards > 1:
        yield Part("expert inputs", exchange=_exchange(setting, "all-gather", "sequence", 2 * tokens * d))
    yield _experts(setting, flat, tokens)
    yield _linears(setting, "shared expert", flat, ("ffn", "shared_experts"), tokens)
    yield sums("shared expert output", "expert_width", 2)
    yield from _travel(setting, tokens)
    draft = {path: leaf for path, leaf in flat.items() if path[0] in ("e_proj", "h_proj")}
    if draft:
        yield _linears(setting, "draft inputs", draft, ("e_proj",), tokens)
        yield _linears(setting, "draft streams", draft, ("h_proj",), tokens * config.hc_mult)
    if placement.rules.fsdp and work.phase == "train":
        yield from _gathered(setting, flat)


def _mixing(setting: Setting, flat: Mapping[tuple[str, ...], ParameterSpec], tokens: int) -> Part:
    """mHC: between two sublayers, one reading and one writing of the streams, of what ended and of what begins.

    Training mixes at the end of every layer, for the sake of what it keeps: that is one reading more.
    """
    config = setting.config
    multiplied, moved = _passes(setting)
    weights = [spec for path, spec in flat.items() if spec.role == "hyper" and path[0].startswith("hc_")]
    products = sum(math.prod(setting.used_shard(spec)) for spec in weights)
    row = tokens * config.hidden_size * _activation_bytes()
    streams = config.hc_mult * row
    readings = 2 + (setting.workload.phase == "train")
    size = (readings + 2) * streams + 4 * row + sum(_bytes(setting, spec) for spec in weights)
    return Part("residual streams", {"float32": multiplied * 2 * tokens * products}, moved * size)


def _linears(
    setting: Setting,
    name: str,
    flat: Mapping[tuple[str, ...], ParameterSpec],
    prefix: tuple[str, ...],
    tokens: int,
    without: tuple[str, ...] = (),
) -> Part:
    """The products with the weights under a path: weights once, inputs and outputs of every token.

    Of tokens that are split between sublayers a weight meets those that ``Linear`` gives it.
    """
    multiplied, moved = _passes(setting)
    operations: dict[str, float] = collections.defaultdict(float)
    size = 0.0
    for path, spec in flat.items():
        if path[: len(prefix)] != prefix or set(path) & set(without):
            continue
        size += _bytes(setting, spec) if spec.role != "token_table" else 0
        if spec.role not in ("linear", "matrix", "adapter"):
            continue
        out, inputs = setting.used_shard(spec)
        wide = _float32_passes(setting, spec) if {"compressor", "gate"} & set(path) else 0
        whole = "wq_b" in path
        own = tokens // (1 if whole else setting.placement.token_shards(setting.workload.tokens, spec.axes))
        operations["float32"] += wide * 2 * own * out * inputs
        operations["bfloat16"] += (multiplied - wide) * 2 * own * out * inputs
        size += own * (out + inputs) * _activation_bytes()
    return Part(name, operations, moved * size)


def _experts(setting: Setting, flat: Mapping[tuple[str, ...], ParameterSpec], tokens: int) -> Part:
    """Routed experts, tokens spread evenly: those of a device that any of its tokens chooses are read once.

    Beside what ``_passes`` counts, their backward pass computes gate and up again, two of three products.
    """
    config, placement = setting.config, setting.placement
    multiplied, moved = _passes(setting)
    if setting.workload.phase == "train":
        multiplied += 2 / 3
    weights = {path: spec for path, spec in flat.items() if path[:2] == ("ffn", "experts")}
    tokens *= setting.exchange[1]  # of the whole group: their choices come to this device
    share = config.num_experts_per_tok / config.n_routed_experts
    touched = 1 - (1 - share) ** tokens
    products = sum(math.prod(_elements(setting, path, spec)) for path, spec in weights.items() if spec.role == "expert")
    size = touched * sum(_bytes(setting, spec) for spec in weights.values())
    # A choice is a row of input, three of the hidden width and a float32 row that is added up.
    choices = tokens * config.num_experts_per_tok / placement.size("experts")
    width = config.moe_intermediate_size // placement.size("expert_width")
    size += choices * (config.hidden_size * (2 + 4) + 3 * 2 * width)
    return Part("routed experts", {"bfloat16": multiplied * 2 * tokens * share * products}, moved * size)


def _travel(setting: Setting, tokens: int) -> Iterator[Part]:
    """Tokens to their experts, where they are elsewhere, and what these say back; sums over the shards of an expert.

    Dispatched rows have the bytes of the ``dispatch.Exchange``, and a routing weight each; in training their gradients
    travel too, as they are.
    """
    d, choices = setting.config.hidden_size, setting.config.num_experts_per_tok
    form, group = setting.exchange
    if form == "gather":
        yield Part("tokens to experts", exchange=_exchange(setting, "all-gather", "experts", 2 * group * tokens * d))
        sums = _exchange(setting, "reduce-scatter", "experts", 4 * group * tokens * d)
        yield Part("expert outputs", exchange=sums)
    elif form == "dispatch":
        moved, kind, rows = setting.placement.exchange, "ragged-all-to-all", tokens * choices
        there = _travelling(setting, moved.sent_bytes(d)) + _travelling(setting, 4)
        back = _travelling(setting, moved.returned_bytes(d))
        for name, size in (("tokens to experts", there), ("expert outputs", back)):
            yield Part(name, exchange=_exchange(setting, kind, "experts", rows * size))
        if setting.workload.phase == "train":
            size = _travelling(setting, d * _activation_bytes()) + _travelling(setting, 4)
            yield Part("expert gradients", exchange=Exchange(kind, setting.placement.mesh_axes("experts"), rows * size))
    name, over = ("expert outputs", ("experts", "expert_width")) if form is None else ("expert sums", "expert_width")
    kind = "all-reduce" if setting.placement.token_shards(setting.workload.tokens) == 1 else "reduce-scatter"
    yield Part(name, exchange=_exchange(setting, kind, over, 4 * tokens * d))


def _travelling(setting: Setting, row: int) -> int:
    """What a row of so many bytes takes in a ragged exchange: libtpu 0.0.42 fills up 128 words of four bytes."""
    return -(-row // 512) * 512 if setting.topology.chip.platform == "tpu" else row


def _latents(setting: Setting, flat: Mapping[tuple[str, ...], ParameterSpec], tokens: int) -> int:
    """Bytes that attention gathers: latents of queries and keys, float32 ones of compressors, index weights."""
    size = 0
    for path, spec in flat.items():
        if path[0] != "attn" or path[-1] != "weight":
            continue
        if path[-2] in ("wq_a", "wkv", "wgate", "weights_proj"):
            wide = "compressor" in path or "weights_proj" in path
            size += spec.shape[-2] * (4 if wide else _activation_bytes())
    return tokens * size


def _elements(setting: Setting, path: tuple[str, ...], spec: ParameterSpec) -> tuple[int, ...]:
    """The numbers of a weight's shard: two to the byte in FP4."""
    shape = setting.used_shard(spec)
    packed = spec.dtype == jnp.uint8
    return (*shape[:-1], shape[-1] * (2 if packed else 1))


def _attention(setting: Setting, spec: LayerSpec, context: int) -> Part:
    """Attention to a device's part of the entries: of those selected, an even share."""
    config, work = setting.config, setting.workload
    multiplied, moved = _passes(setting)
    ratio = spec.compress_ratio
    selected = min(config.index_topk, context // ratio) if spec.indexer else (context // ratio if ratio else 0)
    selected = -(-selected // setting.placement.size("entries"))
    # Kernels read them in the bytes of the release, those of GPUs the window too; where a mesh splits entries, which no
    # GPU kernel serves, they are decoded first. On TPUs those that are selected cross in two rows of words, which are
    # as many bytes as bfloat16 takes.
    published = PUBLISHED.row(config.head_dim, config.qk_rope_head_dim) if work.cache == "fp8" else None
    by_rows = setting.topology.chip.platform == "cuda"
    in_place = setting.placement.size("entries") == 1 if by_rows else not spec.indexer
    cost = attention_cost(
        batch=setting.rows,
        length=work.tokens,
        heads=config.num_attention_heads // setting.placement.size("heads"),
        width=config.head_dim,
        window=min(config.sliding_window, context),
        entries=selected,
        indices=spec.indexer,
        causal_ratio=ratio,
        context=context,
        entry_bytes=published if in_place else None,
        ring_bytes=published if by_rows else None,
    )
    operations = {kind: multiplied * count for kind, count in cost.operations.items()}
    return Part("attention", operations, moved * cost.bytes_moved)


def _joined(setting: Setting, name: str, numbers: int, result: int) -> Iterator[Part]:
    """What ``pallas_kernels.shares.joined`` exchanges of a device's 32-bit ``numbers``, joined to ``result`` bytes."""
    shards = setting.placement.size("entries")
    if numbers * shards <= FEW:
        yield Part(name, exchange=_exchange(setting, "all-gather", "entries", 4 * numbers * shards))
    else:
        yield Part(name, exchange=_exchange(setting, "all-to-all", "entries", 4 * numbers))
        yield Part(f"joined {name}", exchange=_exchange(setting, "all-gather", "entries", result))


def _index(setting: Setting, spec: LayerSpec, context: int) -> Iterator[Part]:
    """Index scores of every entry that the cache has room for, and the top-k over them: written and read once.

    Where a kernel selects, only the keys are read, and those that are visible. Devices that have a part of the heads
    each share out queries, or rows; where neither divides, a kernel scores all on each, and the twin adds up scores, as
    in training. Devices that have a part of the entries each exchange the best of them, a score and an index each.
    """
    config, work, placement = setting.config, setting.workload, setting.placement
    multiplied, moved = _passes(setting)
    shards = placement.size("entries")
    entries = max(1, work.context // spec.compress_ratio // shards)
    tokens, best = setting.rows * work.tokens, min(config.index_topk, entries * shards)
    split, width = placement.size("index_heads"), config.index_head_dim
    # Where no kernel reads FP4 keys, they are read, and written, as numbers.
    form = PUBLISHED if work.cache == "fp8" and setting.scores_stay else BFLOAT16
    keys: float = setting.rows * entries * form.index_key(width)
    operations: float = multiplied * 2 * tokens * entries * config.index_n_heads * width
    queries = tokens * config.index_n_heads * (width * _activation_bytes() + 4)
    share = setting.index_share
    operations /= split if share or not setting.scores_stay else 1
    keys /= split if share == "rows" else 1
    if setting.scores_stay:
        visible = min(1.0, max(1, context // spec.compress_ratio // shards) / entries)
        yield Part("index scores", {"bfloat16": operations * visible}, keys * visible)
    else:
        scores = 4 * tokens * entries / (split if share else 1)
        yield Part("index scores", {"bfloat16": operations}, moved * (keys + 2 * scores))
        if not share:
            yield Part("index score sums", exchange=_exchange(setting, "all-reduce", "index_heads", scores))
    if share:
        yield Part("index queries", exchange=_exchange(setting, "all-to-all", "index_heads", queries / split))
        yield Part("selected entries", exchange=_exchange(setting, "all-gather", "index_heads", 4 * tokens * best))
        tokens //= split
    elif setting.scores_stay:
        yield Part("index queries", exchange=_exchange(setting, "all-gather", "index_heads", queries))
    candidates = 2 * tokens * min(config.index_topk, entries)
    yield from _joined(setting, "index candidates", candidates, 4 * tokens * best)


def _shell(setting: Setting, shell: Mapping[str, Any]) -> Iterator[Part]:
    config = setting.config
    _, moved = _passes(setting)
    tokens = setting.rows * setting.workload.tokens
    size = tokens * config.hidden_size * _activation_bytes()
    yield Part("embedding", bytes=moved * (1 + config.hc_mult) * size)
    yield Part("embedding rows", exchange=_exchange(setting, "all-reduce", "vocab", size))
    yield from _head(setting, flatten(shell))


def _head(setting: Setting, shell: Mapping[tuple[str, ...], ParameterSpec]) -> Iterator[Part]:
    """The vocabulary projection: of the last token of every row, or of every token of a training step."""
    multiplied, moved = _passes(setting)
    tokens = setting.rows * (setting.workload.tokens if setting.workload.phase == "train" else 1)
    weight = shell[("head", "weight")]
    out, inputs = setting.used_shard(weight)
    size = _bytes(setting, weight) + tokens * (2 * inputs + 4 * out)
    # Float32 logits: this product is not rounded to bfloat16.
    yield Part("head", {"float32": multiplied * 2 * tokens * out * inputs}, moved * size)


# --- training --------------------------------------------------------------------------------------------------------


def _gathered(setting: Setting, flat: Mapping[tuple[str, ...], ParameterSpec]) -> Iterator[Part]:
    """FSDP: a layer's weights are gathered forwards and for the recomputation, its gradients scattered once."""
    cut = [spec for spec in flat.values() if setting.shard(spec) != setting.used_shard(spec)]
    weights = sum(travelling_bytes(setting, spec) for spec in cut)
    gradients = sum(_bytes(setting, spec) for spec in cut if is_trained(setting, spec))
    if weights:
        yield Part("weights", exchange=_exchange(setting, "all-gather", "fsdp", 2 * weights))
    if gradients:
        yield Part("gradients", exchange=_exchange(setting, "reduce-scatter", "fsdp", gradients))


def _update(setting: Setting) -> Iterator[Part]:
    """The optimizer: parameter, gradient and momentum are read, parameter and momentum written; Newton-Schulz."""
    from deepseek_v4.training.optimizer import MUON_ROLES

    size, products = 0.0, 0.0
    for spec in trained_specs(setting):
        shard = setting.shard(spec)
        size += 5 * 4 * math.prod(shard)
        if spec.role in MUON_ROLES and len(spec.shape) >= 2:
            rows = spec.matrices[0] if spec.matrices else spec.shape[-2]
            short, long = sorted((rows, spec.shape[-1]))
            count = math.prod(spec.shape) // (rows * spec.shape[-1])
            # Ten iterations of X X^T, its square, and a product with X; the devices share the matrices.
            products += 10 * 2 * count * (2 * short * short * long + short**3) / setting.topology.devices
    yield Part("update", {"float32": products}, size)


def _exchange(setting: Setting, kind: str, logical: str | tuple[str, ...], size: float) -> Exchange:
    """Over the mesh axes of logical axes; what activations exchange, a training step exchanges in every pass."""
    names = (logical,) if isinstance(logical, str) else logical
    axes = tuple(axis for name in names for axis in setting.placement.mesh_axes(name))
    times = 3 if setting.workload.phase == "train" and names != ("fsdp",) else 1
    return Exchange(kind, axes, times * size)


def _activation_bytes() -> int:
    return 2


def _bytes(setting: Setting, spec: ParameterSpec) -> int:
    return size_bytes(setting.used_shard(spec), spec.dtype)


def prompt_seconds(setting: Setting) -> float:
    """Least seconds of a whole prompt of ``context`` tokens in chunks: attention grows linearly, so its mean counts."""
    calls = math.ceil(setting.workload.context / setting.workload.tokens)
    middle = max(setting.workload.tokens, setting.workload.context // 2)
    return calls * step_seconds(stages(setting, middle))
