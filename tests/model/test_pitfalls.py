"""Defects that other implementations shipped, put into this one: each must be noticed.

Every mutation plants one bug with ``monkeypatch`` and names a probe, a small comparison with the float64 oracle. The
probe must pass without the bug and fail with it, which shows that the comparison can see what it is there for. Numbers
are those of the list of known defects; defects of conversion (3, 4, 44, 45, 58, 59), sharding (26, 27) and text
(54 to 57) have their tests beside those modules.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import compiled
from flax import nnx
from oracle import History, Oracle, frequencies
from oracle import rope as oracle_rope
from released import released_tensors
from small_models import SmallModel, decoded, parameters, small_config, small_model

import deepseek_v4
import pallas_kernels
from deepseek_v4 import Config, Execution, Model, formats, positions, rollback, rope
from deepseek_v4 import config as config_module
from deepseek_v4 import layer_spec as layer_spec_module
from deepseek_v4 import model as model_module
from deepseek_v4.layer_spec import RopeSpec, layer_spec, layer_specs
from deepseek_v4.nn import attention, block, compressor, indexer, mixing, moe
from deepseek_v4.nn.variables import MASTER, RELEASED, Storage
from deepseek_v4.parameters import block_module
from deepseek_v4.positions import Tokens
from pallas_kernels.compress import xla as compress_xla
from pallas_kernels.grouped_matmul import xla as grouped_xla
from pallas_kernels.hyper_connection import xla as hyper_xla

# float32 against float64 in one layer whose outputs are of size one.
ATOL = 1e-5
Patch = Callable[[pytest.MonkeyPatch], None]


# --- one layer, run eagerly -------------------------------------------------------------------------------------------


class Layer:
    """One layer of a model with one layer, from both sides; built anew by every probe, so that bugs take effect."""

    def __init__(self, ratio: int, *, hashed: bool = False, storage: Storage = MASTER, simulate=(), **changes: Any):
        sizes = {
            "hidden_size": 32, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_lora_rank": 8,
            "index_head_dim": 8, "index_topk": 3, "sliding_window": 8, "moe_intermediate_size": 32, "vocab_size": 64,
        }  # fmt: skip
        self.config = small_config((ratio,), mtp=False, num_hash_layers=int(hashed), **(sizes | changes))
        self.tensors = released_tensors(self.config, storage, seed=ratio)
        self.storage, self.simulate = storage, frozenset(simulate)
        self.execution = Execution("float32", self.simulate)
        self.spec = layer_spec(self.config, ratio, hashed)

    @functools.cached_property
    def model(self) -> Model:
        return Model(self.config, self.storage, self.execution)

    @functools.cached_property
    def block(self) -> Any:
        params = parameters(self.model, self.tensors)["groups"][0][0]
        graph = nnx.graphdef(block_module(self.config, self.spec, self.storage))
        return nnx.merge(graph, jax.tree.map(lambda a: a[0], params))

    @functools.cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.config.to_dict(), decoded(self.tensors), self.simulate)

    def x(self, length: int, rows: int = 1, seed: int = 0) -> np.ndarray:
        shape = (rows, length, self.config.hidden_size)
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

    def cache(self, rows: int, length: int, rollback: int = 0) -> dict[str, jax.Array]:
        return self.model.init_cache(rows, length, rollback)["groups"][0][0]

    def attend(self, x, cache=None, start=None, lengths=None):
        rows, length = x.shape[:2]
        start = jnp.zeros(rows, jnp.int32) if start is None else jnp.asarray(start, jnp.int32)
        lengths = jnp.full(rows, length, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
        tokens = Tokens(jnp.zeros((rows, length), jnp.int32), start, lengths)
        out, cache, _ = self.block.attn(jnp.asarray(x), tokens, cache, 0, self.execution)
        return np.asarray(out), cache

    def expected(self, x, start: int = 0, history: History | None = None) -> np.ndarray:
        return self.oracle.attention("layers.0.attn.", 0, x.astype(np.float64), start, history)


def row_of(tokens: np.ndarray) -> Tokens:
    return Tokens(jnp.asarray(tokens)[None], jnp.zeros(1, jnp.int32), jnp.full(1, len(tokens), jnp.int32))


def close(found, expected, atol: float = ATOL) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def full_pass(ratio: int, length: int = 26, storage: Storage = MASTER, simulate=(), **changes: Any) -> None:
    """A whole sequence of one layer without a cache."""
    layer = Layer(ratio, storage=storage, simulate=simulate, **changes)
    x = layer.x(length)
    # Simulated values round to another neighbour now and then; at this size and seed none does.
    close(layer.attend(x)[0][0], layer.expected(x[0]))


def csa() -> None:
    full_pass(4)


def hca() -> None:
    full_pass(128, 260, hidden_size=16, num_attention_heads=2)


def swa() -> None:
    full_pass(0)


def every_kind() -> None:
    swa()
    csa()


def simulated_index() -> None:
    full_pass(4, simulate=("indexer",))


def simulated_kv() -> None:
    full_pass(4, simulate=("kv",))


def simulated_activations() -> None:
    full_pass(0, storage=RELEASED, simulate=("activations",), hidden_size=192)


# Every probe with a cache runs chunks of SIZE over ROWS rows, so that all of them share their few compiled shapes.
ROWS, SIZE, LONGEST = 5, 7, 27


class Session:
    """A layer with a cache, its sequences and what the oracle says about them."""

    def __init__(self, ratio: int = 4, rollback: int = 6, garbage: bool = False):
        self.layer = Layer(ratio)
        self.x = self.layer.x(LONGEST, ROWS)
        self.expected = [self.layer.expected(row) for row in self.x]
        self.cache = self.layer.cache(ROWS, LONGEST + 1, rollback)
        if garbage:
            self.cache = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), self.cache)
        self.position = np.zeros(ROWS, int)

    def feed(self, rows: list[np.ndarray], check: bool = True) -> None:
        lengths = np.array([len(row) for row in rows])
        chunk = np.ones((ROWS, SIZE, self.x.shape[2]), np.float32)
        for b, row in enumerate(rows):
            chunk[b, : len(row)] = row
        out, self.cache = self.layer.attend(chunk, self.cache, self.position, lengths)
        for b, n in enumerate(lengths if check else []):
            close(out[b, :n], self.expected[b][self.position[b] : self.position[b] + n])
        self.position = self.position + lengths

    def advance(self, *lengths: int) -> None:
        self.feed([self.x[b, p : p + n] for b, (p, n) in enumerate(zip(self.position, lengths, strict=True))])


def chunks() -> None:
    """Five rows, each split in its own way, at different positions mod ratio, some waiting."""
    session = Session()
    for lengths in (
        [1, 4, 7, 3, 5],
        [1, 4, 7, 0, 1],
        [1, 4, 7, 5, 1],
        [1, 4, 1, 4, 1],
        [1, 4, 1, 7, 1],
        [1, 7, 1, 1, 7],
    ):
        session.advance(*lengths)


def roll_back() -> None:
    """Wrong drafts are undone, whatever prefix of them is kept, over the ends of windows."""
    session = Session()
    for _ in range(2):
        session.advance(*[SIZE] * ROWS)
    wrong = session.layer.x(LONGEST, ROWS, seed=1)
    start, kept = session.position, np.arange(ROWS)
    rows = [
        np.concatenate([session.x[b, p : p + k], wrong[b, : 6 - k]])
        for b, (p, k) in enumerate(zip(start, kept, strict=True))
    ]
    session.feed(rows, check=False)
    session.position = start + kept
    session.advance(6, 5, 4, 3, 2)
    session.advance(*[6] * ROWS)


def garbage() -> None:
    """Cache memory that was never written holds NaN."""
    for ratio in (0, 4):
        session = Session(ratio, garbage=True)
        session.advance(6, 2, 7, 0, 3)
        session.advance(1, 1, 7, 2, 0)


def far_history(layer: Layer, start: int, seed: int = 3):
    """A cache at position ``start`` with random contents, and the oracle's view of it."""
    rng = np.random.default_rng(seed)
    cache = {k: rng.normal(size=a.shape).astype(np.float32) for k, a in layer.cache(1, start + 16).items()}

    def ring(name: str, count: int) -> np.ndarray:
        array = cache[name][0, 0]
        return array[np.arange(start - count, start) % len(array)].astype(np.float64)

    past = {"window": ring("window", layer.config.sliding_window - 1)}
    past |= {k: ring(k, layer.spec.pool_rows - 1) for k in cache if k.endswith(("kv", "score"))}
    past |= {k: cache[k][0, 0, : start // 4].astype(np.float64) for k in cache if k.endswith("entries")}
    return jax.tree.map(jnp.asarray, cache), History(**past)


def retrieval_past_5k() -> None:
    layer = Layer(4)
    x = layer.x(6)
    cache, history = far_history(layer, 6001)
    close(layer.attend(x, cache, [6001])[0][0], layer.expected(x[0], 6001, history))


def rotation() -> None:
    """Rotations of main and compressed layers at late positions."""
    released = {
        "qk_rope_head_dim": 64, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
        "rope_scaling": {"factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536},
    }  # fmt: skip
    config = small_config(head_dim=64, qk_rope_head_dim=64, index_head_dim=64)
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    positions = np.array([3, 4_096, 65_537, 1_048_575])
    for ratio in (0, 4, 128):
        found = rope.apply_rope(jnp.asarray(x), jnp.asarray(positions), layer_spec(config, ratio, False).rope)
        close(found, oracle_rope(x.astype(np.float64), positions, frequencies(released, ratio > 0)))


# --- other probes -----------------------------------------------------------------------------------------------------


def hyper_connections() -> None:
    """Around a sublayer, with an eps large enough to be seen."""
    layer = Layer(0, hc_eps=1e-2, hc_sinkhorn_iters=3)
    rng = np.random.default_rng(0)
    streams = rng.normal(size=(1, 5, 4, 32)).astype(np.float32) * np.array([1, 2, 3, 4], np.float32)[:, None]
    y = rng.normal(size=(1, 5, 32)).astype(np.float32)
    x, post, comb = layer.block._mix(block.pre_mix, "attn", {"streams": jnp.asarray(streams)}, layer.execution)
    wanted, wanted_post, wanted_comb = layer.oracle.mix("layers.0.hc_attn", streams[0].astype(np.float64))
    close(x[0], wanted)
    found = mixing.post_mix(jnp.asarray(y), jnp.asarray(streams), post, comb)
    mixed = wanted_post[..., None] * y[0][:, None] + np.einsum("sjk,sjd->skd", wanted_comb, streams[0].astype(float))
    close(found[0], mixed)


def experts(hashed: bool = False, storage: Storage = MASTER, x_scale: float = 1.0, **changes: Any) -> None:
    layer = Layer(0, hashed=hashed, storage=storage, **changes)
    x = layer.x(12) * np.float32(x_scale)
    tokens = np.arange(12) * 5 % 64
    found, _ = layer.block.ffn(jnp.asarray(x), row_of(tokens), 0, layer.execution)
    close(found[0], layer.oracle.moe("layers.0.ffn.", x[0].astype(np.float64), tokens))


def hash_experts() -> None:
    experts(hashed=True)


def fp4_experts() -> None:
    experts(storage=RELEASED)


def fp4_experts_of_several_blocks() -> None:
    experts(storage=RELEASED, hidden_size=128)


def fp8_experts() -> None:
    experts(storage=Storage(experts="fp8"), hidden_size=160, moe_intermediate_size=160)


def crowded_expert() -> None:
    """Every token wants the same experts."""
    layer = Layer(0, hashed=True)
    layer.tensors["layers.0.ffn.gate.tid2eid"][:] = [2, 5, 6]
    x = layer.x(40)
    tokens = np.zeros(40, int)
    found, _ = layer.block.ffn(jnp.asarray(x), row_of(tokens), 0, layer.execution)
    close(found[0], layer.oracle.moe("layers.0.ffn.", x[0].astype(np.float64), tokens))


def underflowing_scores() -> None:
    layer = Layer(0, hashed=True)
    layer.tensors["layers.0.ffn.gate.weight"][:] = -10
    x = np.full((1, 2, 32), 1, np.float32)
    _, weights, _ = layer.block.ffn.gate(jnp.asarray(x[0]), jnp.zeros(2, jnp.int32), layer.execution)
    close(weights, np.full((2, 3), 0.5))


def large_expert_ids() -> None:
    layer = Layer(0, hashed=True, n_routed_experts=384)
    layer.tensors["layers.0.ffn.gate.tid2eid"][:] = [383, 257, 301]
    ids, _, _ = layer.block.ffn.gate(jnp.asarray(layer.x(4)[0]), jnp.arange(4), layer.execution)
    np.testing.assert_array_equal(ids, np.tile([383, 257, 301], (4, 1)))


def tied_index_scores() -> None:
    layer = Layer(4)
    layer.tensors["layers.0.attn.indexer.weights_proj.weight"][:] = 0
    x = layer.x(26)
    close(layer.attend(x)[0][0], layer.expected(x[0]))


def index_weights() -> None:
    """The scale of index weights changes no selection, but what the indexer is trained on."""
    layer, seen = Layer(4), {}
    original = indexer.index_topk

    def spy(q, weights, *args, **kwargs):
        seen["weights"] = weights
        return original(q, weights, *args, **kwargs)

    x = layer.x(26)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "index_topk", spy)
        layer.attend(x)
    projected = x[0].astype(float) @ layer.oracle.tensors["layers.0.attn.indexer.weights_proj.weight"].T
    close(seen["weights"][0], projected * 16**-0.5 * 8**-0.5)


@functools.cache
def draft_model() -> SmallModel:
    config = small_config((0,), num_hash_layers=0, hc_sinkhorn_iters=2, hidden_size=64, sliding_window=5)
    return small_model(config, seed=5)


def drafts() -> None:
    """The MTP block in two chunks and then from one token to the next."""
    small, tokens = draft_model(), np.random.default_rng(5).integers(0, 256, 12)
    expected = Oracle(small.config.to_dict(), small.decoded).forward(tokens, draft=True).draft_logits
    model = dataclasses.replace(small.model)
    step = compiled(lambda p, t, cache, n: model.forward(p, t, cache, n, draft=True)[1:])
    cache, first = model.init_cache(1, 12), 0
    for length in (5, 1, 4, 1, 1):
        chunk = np.zeros((1, 5), int)
        chunk[0, :length] = tokens[first : first + length]
        logits, cache = step(small.params, jnp.asarray(chunk), cache, jnp.asarray([length]))
        skipped = max(1 - first, 0)
        close(logits[0, skipped:length], expected[first - 1 + skipped : first - 1 + length], 2e-5)
        first += length


def layer_count() -> None:
    config = small_config((0, 4, 128), num_hash_layers=0)
    assert [spec.compress_ratio for spec in layer_specs(config)] == [0, 4, 128]


def unknown_keys() -> None:
    with pytest.raises(config_module.ConfigError, match="surprise"):
        Config.from_dict(small_config().to_dict() | {"surprise": 1})


# --- bugs -------------------------------------------------------------------------------------------------------------


def swap(target: Any, name: str, bug: Callable) -> Patch:
    """Replaces ``target.name`` by ``bug(original)``."""
    return lambda patch: patch.setattr(target, name, bug(getattr(target, name)))


def every(*patches: Patch) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        for one in patches:
            one(patch)

    return apply


def with_arguments(**edits: Callable) -> Callable:
    """A wrapper that edits some arguments of the attention or selection it wraps, by name."""
    names = ("q", "window", "sink", "start")

    def bug(original):
        def run(*args, **kwargs):
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            for name, edit in edits.items():
                if kwargs.get(name) is not None:
                    kwargs[name] = edit(kwargs[name], kwargs)
                first = [kwargs.pop(name) for name in names]
            return original(*first, **kwargs)

        return run

    return bug


def half_split(original):
    def run(x, positions, spec, *, inverse=False):
        even_odd = np.r_[0 : spec.dims // 2], np.r_[spec.dims // 2 : spec.dims]
        order = np.stack(even_odd, axis=-1).reshape(-1)
        rotated = x[..., -spec.dims :][..., order]
        turned = original(jnp.concatenate([x[..., : -spec.dims], rotated], axis=-1), positions, spec, inverse=inverse)
        return jnp.concatenate([turned[..., : -spec.dims], turned[..., -spec.dims :][..., np.argsort(order)]], axis=-1)

    return run


def low_precision_angles(original):
    def run(x, positions, spec, *, inverse=False):
        angles = positions[..., None].astype(jnp.float32) * rope.rope_frequencies(spec)
        cos, sin = (f(angles).astype(jnp.bfloat16).astype(jnp.float32) for f in (jnp.cos, jnp.sin))
        pairs = x[..., -spec.dims :].reshape(*x.shape[:-1], spec.dims // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(*x.shape[:-1], spec.dims)
        return jnp.concatenate([x[..., : -spec.dims], turned], axis=-1)

    return run


def stale_lane_zeroed(original):
    def run(ring, layer, start, count):
        rows = original(ring, layer, start, count)
        positions = start[:, None] - count + jnp.arange(count)
        return jnp.where((positions >= (start - start % 4)[:, None])[..., None], rows, 0)

    return run


def bias_after_storing(original):
    """The compressor's second ring holds scores: stored without the position bias."""
    calls = []

    def run(ring, layer, start, lengths, rows):
        calls.append(None)
        if len(calls) % 2 == 0 and rows.shape[-1] == 32:
            ape = Layer(4).oracle.tensors["layers.0.attn.compressor.ape"]
            rows = rows - jnp.asarray(ape, jnp.float32)[(start[:, None] + jnp.arange(rows.shape[1])) % 4]
        return original(ring, layer, start, lengths, rows)

    return run


def state_kept_for(rollback: int | None = None, dtype: Any = None) -> Patch:
    """Cache arrays without the rows that rollback needs, or with downcast state."""

    def bug(original):
        def run(config, spec, max_length, bound, *rest):
            shapes = original(config, spec, max_length, bound if rollback is None else rollback, *rest)
            if dtype is not None:
                shapes = {k: (s, dtype if k.endswith(("kv", "score")) else t) for k, (s, t) in shapes.items()}
            return shapes

        return run

    return swap(model_module, "layer_cache_shapes", bug)


def row_zero_decides(original):
    def run(self, x, tokens, *rest):
        return original(self, x, tokens._replace(start=jnp.full_like(tokens.start, tokens.start[0])), *rest)

    return run


def union_of_selections(indices, arguments):
    counts, out = np.asarray(arguments["counts"]), []
    for row, chosen in enumerate(np.asarray(indices)):
        union = np.unique(chosen[chosen >= 0])
        out.append([np.where(union < count, union, -1) for count in counts[row]])
    return jnp.asarray(out, jnp.int32).reshape(*counts.shape, -1)


def one_sided(original):
    calls = []

    def run(self, vectors, execution):
        calls.append(None)
        return vectors if len(calls) % 2 else original(self, vectors, execution)

    return run


def late_index_keys(original):
    def run(entries, layer, first, complete, rows):
        if rows.shape[-1] == 8:
            complete = complete & (first[:, None] + jnp.arange(rows.shape[1]) >= 3)
        return original(entries, layer, first, complete, rows)

    return run


def selection(scores: Callable | None = None, last_of_ties: bool = False, only_first: int | None = None) -> Callable:
    """A rewritten index selection with one defect."""

    def bug(original):
        def run(q, weights, keys, counts, *, layer=0, k, **_):
            keys = keys[layer]
            products = jnp.einsum("bqhd,bkd->bqhk", q, keys, precision="highest")
            if scores is None:
                total = jnp.sum(weights[..., None] * jnp.maximum(products, 0), axis=2)
            else:
                total = scores(weights, products)
            visible = jnp.arange(keys.shape[1]) < counts[..., None]
            if only_first is not None:
                visible &= jnp.arange(keys.shape[1]) < only_first
            total = np.where(visible, total, -np.inf)
            order = np.argsort(-total[..., ::-1] if last_of_ties else -total, axis=-1, kind="stable")
            order = (keys.shape[1] - 1 - order if last_of_ties else order)[..., :k]
            return jnp.where(np.take_along_axis(total, order, -1) > -np.inf, order, -1)

        return run

    return bug


def scores_masked_but_not_values(original):
    def run(q, window, sink, start, *, entries, layer, indices, window_size, scale, **_):
        keys = jnp.arange(window.shape[1])[None]
        queries = jnp.arange(q.shape[1])[:, None]
        seen = (keys >= queries) & (keys < queries + window_size)
        seen = seen & (start[:, None, None] - window_size + 1 + keys >= 0)
        rows = window
        if entries is not None:
            rows = jnp.concatenate([window, entries[layer]], axis=1)
            chosen = (jnp.arange(entries.shape[2]) == indices[..., None]).any(axis=2)
            seen = jnp.concatenate([seen, chosen], axis=-1)
        score = jnp.where(seen[:, None], jnp.einsum("bqhc,bkc->bhqk", q, rows, precision="highest") * scale, -jnp.inf)
        score = jnp.concatenate([score, jnp.broadcast_to(sink[:, None, None], (*score.shape[:3], 1))], axis=-1)
        weights = jax.nn.softmax(score, axis=-1)[..., :-1]
        return jnp.einsum("bhqk,bkc->bqhc", weights, rows, precision="highest")

    return run


def per_stream_mixes(streams, fn, norm_eps):
    z = streams * jax.lax.rsqrt(jnp.mean(jnp.square(streams), axis=-1, keepdims=True) + norm_eps)
    return jnp.einsum("...z,mz->...m", z.reshape(*z.shape[:-2], -1), fn, precision="highest")


def rows_last(logits, iterations, eps):
    comb = jax.nn.softmax(logits, axis=-1) + eps
    comb = comb / (jnp.sum(comb, axis=-1, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (jnp.sum(comb, axis=-2, keepdims=True) + eps)
        comb = comb / (jnp.sum(comb, axis=-1, keepdims=True) + eps)
    return comb


def routed(change: Callable) -> Patch:
    """``change(router, x, ids, weights)`` gives other ids and weights."""

    def bug(original):
        def run(self, x, *rest):
            ids, weights, scores = original(self, x, *rest)
            return *change(self, x, ids, weights), scores

        return run

    return swap(moe.Router, "__call__", bug)


def biased_weights(router, x, ids, weights):
    scores = jnp.sqrt(jax.nn.softplus(x @ router.weight[...].T)) + router.bias[...]
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    return ids, chosen / chosen.sum(-1, keepdims=True) * router.config.routed_scaling_factor


def limited_capacity(original):
    def run(x, ids, weights, *stored, **kwargs):
        seen = jnp.cumsum(jax.nn.one_hot(ids.reshape(-1), stored[0][0].shape[0]), axis=0)
        rank = jnp.take_along_axis(seen, ids.reshape(-1, 1), axis=1).reshape(ids.shape)
        capacity = 2 * ids.size // stored[0][0].shape[0]
        return original(x, ids, jnp.where(rank <= capacity, weights, 0), *stored, **kwargs)

    return run


def unclamped(original):
    return lambda gate, up, limit: jax.nn.silu(gate) * up


def coarser_blocks(original):
    """All groups of 32 of a row share the largest scale, codes rounded again."""

    def run(packed, scale, dtype=jnp.float32):
        exact = original(packed, scale, jnp.float32)
        largest = jnp.max(formats.decode_e8m0(scale), axis=-1, keepdims=True)
        return (formats.e2m1_to_float(formats.float_to_e2m1(exact / largest)) * largest).astype(dtype)

    return run


def integer_codes(original):
    def run(weight, scale, dtype=jnp.float32):
        codes = jax.lax.bitcast_convert_type(weight, jnp.uint8).astype(jnp.float32)
        blocks = jnp.repeat(jnp.repeat(formats.decode_scale(scale), 128, axis=-2), 128, axis=-1)
        return (codes * blocks[..., : weight.shape[-2], : weight.shape[-1]]).astype(dtype)

    return run


def after_head(original):
    def run(self, embedded, streams, execution):
        return original(self, embedded, jnp.broadcast_to(streams.mean(2, keepdims=True), streams.shape), execution)

    return run


def forgetful_draft(original):
    def run(self, params, embedded, streams, tokens, cache):
        out, module, updates, seen = original(self, params, embedded, streams, tokens, cache)
        return out, module, {**updates, "drafts": cache["drafts"]}, seen

    return run


def starved_draft(original):
    def run(self, params, embedded, streams, tokens, cache):
        return original(self, params, embedded, streams, tokens, {**cache, "streams": jnp.zeros_like(cache["streams"])})

    return run


@dataclasses.dataclass(frozen=True)
class Bug:
    """One defect: its number, what it is, how to plant it, which probe notices."""

    number: int
    what: str
    plant: Patch
    probe: Callable[[], None]


def default_yarn(theta, dims, yarn):
    return RopeSpec(40000.0 if yarn else theta, dims, dataclasses.replace(yarn, factor=40.0) if yarn else None)


def yarn_everywhere(theta, dims, yarn):
    return RopeSpec(theta, dims, yarn or small_config().rope_scaling)


BUGS = [
    Bug(1, "rope defaults of code", lambda p: p.setattr(layer_spec_module, "RopeSpec", default_yarn), rotation),
    Bug(
        1,
        "index_topk of code",
        swap(attention, "Indexer", lambda o: lambda c, *a: o(dataclasses.replace(c, index_topk=5), *a)),
        csa,
    ),
    Bug(
        2,
        "draft ratio as a layer",
        lambda p: p.setattr(Config, "layer_ratios", property(lambda c: c.compress_ratios)),
        layer_count,
    ),
    Bug(
        4,
        "unknown keys ignored",
        lambda p: p.setattr(config_module, "_IRRELEVANT_KEYS", config_module._IRRELEVANT_KEYS | {"surprise"}),
        unknown_keys,
    ),
    Bug(
        5, "no YaRN", swap(rope, "rope_frequencies", lambda o: lambda s: o(dataclasses.replace(s, yarn=None))), rotation
    ),
    Bug(6, "YaRN on window layers", lambda p: p.setattr(layer_spec_module, "RopeSpec", yarn_everywhere), rotation),
    Bug(
        7, "mscale on logits", swap(attention, "compressed_attention", with_arguments(scale=lambda s, _: s * 1.63)), csa
    ),
    Bug(8, "half-split pairs", swap(rope, "apply_rope", half_split), rotation),
    Bug(
        8,
        "half-split pairs",
        every(*(swap(m, "apply_rope", half_split) for m in (attention, compress_xla, indexer))),
        csa,
    ),
    Bug(9, "entry rotated at s", swap(compress_xla, "apply_rope", lambda o: lambda x, p, s: o(x, p // 4, s)), csa),
    Bug(
        10,
        "no de-rotation",
        swap(attention, "apply_rope", lambda o: lambda x, p, s, inverse=False: x if inverse else o(x, p, s)),
        every_kind,
    ),
    Bug(11, "bfloat16 angles", swap(rope, "apply_rope", low_precision_angles), rotation),
    Bug(12, "previous lane zeroed in decode", swap(compress_xla, "ring_read", stale_lane_zeroed), chunks),
    Bug(
        13,
        "state lost between chunks",
        swap(compress_xla, "ring_read", lambda o: lambda *a: jnp.zeros_like(o(*a))),
        chunks,
    ),
    Bug(13, "state lost in rollback", state_kept_for(rollback=0), roll_back),
    Bug(14, "ape added after storing", swap(compressor, "ring_write", bias_after_storing), chunks),
    Bug(15, "row 0 decides", swap(compressor.Compressor, "__call__", row_zero_decides), chunks),
    Bug(16, "bfloat16 state", state_kept_for(dtype=jnp.dtype(jnp.bfloat16)), chunks),
    Bug(
        17,
        "mask by floor(t / ratio) inclusive",
        swap(positions, "visible_entries", lambda o: lambda t, r: t // r + 1),
        csa,
    ),
    Bug(
        17,
        "mask by floor(t / ratio) inclusive",
        swap(positions, "visible_entries", lambda o: lambda t, r: t // r + 1),
        hca,
    ),
    Bug(17, "window completed too late", swap(positions, "visible_entries", lambda o: lambda t, r: t // r), csa),
    Bug(
        18,
        "selection unioned over queries",
        swap(attention, "compressed_attention", with_arguments(indices=union_of_selections)),
        csa,
    ),
    Bug(
        19,
        "padding on entry 0",
        swap(attention, "compressed_attention", with_arguments(indices=lambda i, _: jnp.maximum(i, 0))),
        csa,
    ),
    Bug(
        20,
        "relu after the head sum",
        swap(indexer, "index_topk", selection(lambda w, p: jnp.maximum(jnp.sum(w[..., None] * p, axis=2), 0))),
        csa,
    ),
    Bug(
        20,
        "no scale of index weights",
        swap(indexer, "plain_matmul", lambda o: lambda *a: o(*a) * 128**0.5),
        index_weights,
    ),
    Bug(21, "Hadamard and FP4 on one side", swap(indexer.Indexer, "_quantised", one_sided), simulated_index),
    Bug(22, "no index keys below top-k", swap(compressor, "entries_write", late_index_keys), chunks),
    Bug(23, "ties to the highest index", swap(indexer, "index_topk", selection(last_of_ties=True)), tied_index_scores),
    Bug(
        24, "retrieval ends at 1024 entries", swap(indexer, "index_topk", selection(only_first=1024)), retrieval_past_5k
    ),
    Bug(
        25,
        "sink counted twice",
        swap(attention, "compressed_attention", with_arguments(sink=lambda s, _: s + np.log(2))),
        every_kind,
    ),
    Bug(
        25,
        "bfloat16 sink",
        swap(
            attention,
            "compressed_attention",
            with_arguments(sink=lambda s, _: s.astype(jnp.bfloat16).astype(jnp.float32)),
        ),
        every_kind,
    ),
    Bug(
        26,
        "first half of the sinks twice",
        swap(attention, "compressed_attention", with_arguments(sink=lambda s, _: jnp.tile(s[: len(s) // 2], 2))),
        every_kind,
    ),
    Bug(
        28, "scores masked, values not", swap(attention, "compressed_attention", scores_masked_but_not_values), garbage
    ),
    Bug(
        28,
        "padding sees unwritten entries",
        swap(positions, "visible_entries", lambda o: lambda t, r: o(t[:, :1] + jnp.arange(t.shape[1]), r)),
        garbage,
    ),
    Bug(
        29,
        "comb not transposed",
        swap(mixing, "post_mix", lambda o: lambda y, s, post, comb, **k: o(y, s, post, comb.swapaxes(-1, -2), **k)),
        hyper_connections,
    ),
    Bug(30, "rows and columns exchanged", swap(hyper_xla, "sinkhorn", lambda o: rows_last), hyper_connections),
    Bug(
        30, "no eps", swap(hyper_xla, "sinkhorn", lambda o: lambda logits, n, eps: o(logits, n, 0.0)), hyper_connections
    ),
    Bug(31, "root mean square per stream", swap(hyper_xla, "_mixes", lambda o: per_stream_mixes), hyper_connections),
    Bug(
        32,
        "bfloat16 Sinkhorn",
        swap(hyper_xla, "sinkhorn", lambda o: lambda x, n, eps: o(x.astype(jnp.bfloat16), n, eps).astype(jnp.float32)),
        hyper_connections,
    ),
    Bug(
        33,
        "softplus underflow",
        swap(moe, "log_sqrt_softplus", lambda o: lambda x: jnp.log(jnp.sqrt(jnp.log(1 + jnp.exp(x))))),
        underflowing_scores,
    ),
    Bug(34, "bias in the weights", routed(biased_weights), experts),
    Bug(35, "hash layers weighted 1/K", routed(lambda r, x, ids, w: (ids, jnp.full_like(w, 0.5))), hash_experts),
    Bug(
        36,
        "tid2eid through bfloat16",
        routed(lambda r, x, ids, w: (ids.astype(jnp.bfloat16).astype(jnp.int32), w)),
        large_expert_ids,
    ),
    Bug(36, "tid2eid zero", routed(lambda r, x, ids, w: (ids * 0, w)), hash_experts),
    Bug(37, "no clamp on the shared expert", swap(moe, "clamped_swiglu", unclamped), experts),
    Bug(37, "no clamp on routed experts", swap(grouped_xla, "clamped_swiglu", unclamped), experts),
    Bug(38, "capacity", swap(moe, "expert_mlp", limited_capacity), crowded_expert),
    Bug(
        39,
        "experts summed in bfloat16",
        swap(moe, "expert_mlp", lambda o: lambda *a, **k: o(*a, **k).astype(jnp.bfloat16)),
        experts,
    ),
    Bug(
        40,
        "scale byte as a number",
        swap(
            formats, "decode_e8m0", lambda o: lambda s: jax.lax.bitcast_convert_type(s, jnp.uint8).astype(jnp.float32)
        ),
        fp4_experts,
    ),
    Bug(41, "high nibble first", swap(formats, "e2m1_planes", lambda o: lambda p: o((p << 4) | (p >> 4))), fp4_experts),
    Bug(42, "FP8 bytes as integers", swap(formats, "dequantize_fp8", integer_codes), fp8_experts),
    Bug(
        43,
        "FP4 requantised in larger blocks",
        swap(grouped_xla, "dequantize_fp4_planes", coarser_blocks),
        fp4_experts_of_several_blocks,
    ),
    Bug(46, "draft from collapsed streams", swap(block.DraftBlock, "combine", after_head), drafts),
    Bug(47, "draft without its own cache", swap(Model, "_run_draft", forgetful_draft), drafts),
    Bug(47, "last main streams of a chunk not kept", swap(Model, "_run_draft", starved_draft), drafts),
    Bug(48, "state of earlier prefixes overwritten", state_kept_for(rollback=2), roll_back),
]


@pytest.mark.parametrize(
    "probe", sorted({bug.probe for bug in BUGS}, key=lambda p: p.__name__), ids=lambda p: p.__name__
)
def test_the_probe_passes_without_the_bug(probe: Callable[[], None]) -> None:
    probe()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.number}-{bug.what}".replace(" ", "-"))
def test_the_bug_is_noticed(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    # A comparison that fails, or pytest.raises whose error did not come.
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        bug.probe()


@pytest.mark.parametrize("probe", [simulated_kv, simulated_activations, hca], ids=lambda p: p.__name__)
def test_probes_without_a_bug_of_their_own(probe: Callable[[], None]) -> None:
    probe()


# --- what is a property of the source ---------------------------------------------------------------------------------


def sources() -> list[Path]:
    roots = [Path(package.__file__).parent for package in (deepseek_v4, pallas_kernels)]
    return [path for root in roots for path in sorted(root.rglob("*.py"))]


def test_no_environment_variable_switches() -> None:
    """61."""
    for path in sources():
        text = path.read_text(encoding="utf-8")
        # Setting a variable for another library's sake is no switch; reading one is.
        assert not re.search(r"\bgetenv\b|\benviron\.get\b|\benviron\[|\bin os\.environ\b", text), path


def test_the_jit_boundary_sees_plain_pytrees() -> None:
    """60: no framework objects to flatten at every decoded token."""
    small = draft_model()

    def check(node: Any) -> None:
        if type(node) is dict:
            for value in node.values():
                check(value)
        elif type(node) is tuple:
            for value in node:
                check(value)
        else:
            assert isinstance(node, jax.Array)

    check(small.params)
    check(small.model.init_cache(1, 8, 2))
    assert (
        rollback(small.model.init_cache(1, 8, 2), jnp.zeros(1, jnp.int32)).keys() == small.model.init_cache(1, 8).keys()
    )
