"""The whole model once more, naively, in float64 NumPy: the independent side of the correctness tests.

Written from the architecture reference alone and sharing no code with ``deepseek_v4``: one full sequence at a time, one
query after the other, tensors under their released names (already decoded to float64). Rotary angles are the
one place that is float32, because the model defines them so. ``margins`` collects how close each discrete choice
(router, indexer) was, for tests to show that rounding cannot flip one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; the code after 448 would be NaN.
E4M3 = np.array([(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])[
    :-1
]


# --- number formats ---------------------------------------------------------------------------------------------------


def round_to(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x to the nearest of the non-negative ``values`` (sign kept), ties to the even index, saturating."""
    magnitude = np.minimum(np.abs(x), values[-1])
    high = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low = high - 1
    up, down = values[high] - magnitude, magnitude - values[low]
    index = np.where(up < down, high, np.where(down < up, low, np.where(high % 2 == 0, high, low)))
    return np.sign(x) * values[index]


def round_blocks(x: np.ndarray, block: int, values: np.ndarray, floor: float) -> np.ndarray:
    """The last axis in blocks that share one power-of-two scale, rounded up from amax / largest value."""
    out = np.empty_like(x)
    for first in range(0, x.shape[-1], block):
        part = x[..., first : first + block]
        amax = np.maximum(np.abs(part).max(axis=-1, keepdims=True), floor)
        scale = 2.0 ** np.ceil(np.log2(amax / values[-1]))
        out[..., first : first + block] = round_to(values, part / scale) * scale
    return out


def round_activation(x: np.ndarray) -> np.ndarray:
    return round_blocks(x, 128, E4M3, 1e-4)


def hadamard(size: int) -> np.ndarray:
    """The normalised Walsh-Hadamard matrix in natural order: sign is the parity of i & j."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / math.sqrt(size)


# --- small pieces -----------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, weight, eps):
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return normed if weight is None else normed * weight


def frequencies(config: Mapping[str, Any], compressed: bool) -> np.ndarray:
    """Radians per token of each pair, by the closed form, every step rounded to float32 as released."""
    dims = config["qk_rope_head_dim"]
    base = config["compress_rope_theta"] if compressed else config["rope_theta"]
    result = np.array([np.float32(1) / np.float32(base ** (2 * i / dims)) for i in range(dims // 2)], np.float32)
    if not compressed:
        return result
    yarn = config["rope_scaling"]

    def dimension(rotations):
        turns = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(dimension(yarn["beta_fast"])), 0)
    high = min(math.ceil(dimension(yarn["beta_slow"])), dims - 1)
    for i in range(dims // 2):
        ramp = np.float32(min(max((i - low) / ((high - low) or 0.001), 0), 1))
        smooth = np.float32(1) - ramp
        slowed = result[i] / np.float32(yarn["factor"])
        result[i] = slowed * (np.float32(1) - smooth) + result[i] * smooth
    return result


def rope(x, positions, freqs, sign=1):
    """x [..., c] with positions broadcastable to x.shape[:-1]: the last dims as complex pairs (2i, 2i+1)."""
    angle = (np.asarray(positions, np.float32)[..., None] * freqs).astype(np.float64)
    dims = 2 * len(freqs)
    z = (x[..., -dims::2] + 1j * x[..., -dims + 1 :: 2]) * np.exp(1j * sign * angle)
    out = x.copy()
    out[..., -dims::2], out[..., -dims + 1 :: 2] = z.real, z.imag
    return out


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, in descending order, ties to the lowest index."""
    return np.argsort(-scores, kind="stable")[:k]


# --- the model --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """logits [S, V]; draft_logits [S - 1, V], row t made from main position t and token t + 1; streams [S, n, d]."""

    logits: np.ndarray
    draft_logits: np.ndarray | None
    streams: np.ndarray
    margins: list[float]


@dataclasses.dataclass
class History:
    """What came before position ``start``, for one layer: rows [count, width] whose last one is the latest.

    ``window`` are rotated KV rows; ``entries`` and ``index_entries`` all entries so far; ``kv`` and ``score`` (and
    ``index_*``) the compressor projections of at least the last pool_rows - 1 tokens, position bias included.
    """

    window: np.ndarray
    entries: np.ndarray | None = None
    kv: np.ndarray | None = None
    score: np.ndarray | None = None
    index_entries: np.ndarray | None = None
    index_kv: np.ndarray | None = None
    index_score: np.ndarray | None = None


class Oracle:
    """The model of ``config`` (released keys) with ``tensors`` (released names, float64 values, integer tid2eid)."""

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, simulate: frozenset[str] = frozenset()):
        self.config = config
        self.tensors = tensors
        self.simulate = simulate
        self.margins: list[float] = []

    def forward(self, token_ids, draft: bool = False, start: int = 0, history: list[History] | None = None) -> Result:
        """The tokens of positions start, start + 1, ..., after ``history`` (one per layer) when start > 0."""
        c, t = self.config, self.tensors
        self.margins = []
        embedded = t["embed.weight"][np.asarray(token_ids)]
        streams = np.repeat(embedded[:, None, :], c["hc_mult"], axis=1)
        for layer in range(c["num_hidden_layers"]):
            streams = self.block(
                f"layers.{layer}.", layer, streams, token_ids, start, None if history is None else history[layer]
            )
        logits = self.head("", streams)
        draft_logits = None
        if draft:
            m = "mtp.0."
            token = self.linear(m + "e_proj", rms_norm(embedded[1:], t[m + "enorm.weight"], c["rms_norm_eps"]))
            before = self.linear(m + "h_proj", rms_norm(streams[:-1], t[m + "hnorm.weight"], c["rms_norm_eps"]))
            x = self.block(m, c["num_hidden_layers"], token[:, None, :] + before, token_ids[1:], 0, None)
            draft_logits = self.head(m, x)
        return Result(logits, draft_logits, streams, self.margins)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """A linear that the release stores in FP8 or FP4."""
        if "activations" in self.simulate:
            x = round_activation(x)
        return x @ self.tensors[name + ".weight"].T

    def plain(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[name + ".weight"].T

    def block(self, prefix, layer, streams, token_ids, start, history):
        eps = self.config["rms_norm_eps"]
        for name, run in (
            ("attn", lambda x: self.attention(prefix + "attn.", layer, x, start, history)),
            ("ffn", lambda x: self.moe(prefix + "ffn.", x, token_ids)),
        ):
            x, post, comb = self.mix(f"{prefix}hc_{name}", streams)
            y = run(rms_norm(x, self.tensors[f"{prefix}{name}_norm.weight"], eps))
            mixed = np.empty_like(streams)
            for k in range(streams.shape[1]):
                mixed[:, k] = post[:, k, None] * y
                for j in range(streams.shape[1]):
                    mixed[:, k] += comb[:, j, k, None] * streams[:, j]
            streams = mixed
        return streams

    # --- hyper-connections

    def projected(self, prefix, streams):
        z = streams.reshape(len(streams), -1)
        scale = 1 / np.sqrt(np.mean(z**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return (z @ self.tensors[prefix + "_fn"].T) * scale

    def mix(self, prefix, streams):
        n, eps = self.config["hc_mult"], self.config["hc_eps"]
        scale, base = self.tensors[prefix + "_scale"], self.tensors[prefix + "_base"]
        mixes = self.projected(prefix, streams)
        pre = sigmoid(mixes[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        combs = []
        for row in mixes[:, 2 * n :] * scale[2] + base[2 * n :]:
            comb = np.exp(row.reshape(n, n))
            comb = comb / comb.sum(axis=1, keepdims=True) + eps
            comb = comb / (comb.sum(axis=0, keepdims=True) + eps)
            for _ in range(self.config["hc_sinkhorn_iters"] - 1):
                comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
                comb = comb / (comb.sum(axis=0, keepdims=True) + eps)
            combs.append(comb)
        return (pre[..., None] * streams).sum(axis=1), post, np.array(combs)

    def head(self, prefix, streams):
        """``prefix`` names whose hc_head and norm; the vocabulary projection is the main model's."""
        t = self.tensors
        mixes = self.projected(prefix + "hc_head", streams)
        weights = sigmoid(mixes * t[prefix + "hc_head_scale"][0] + t[prefix + "hc_head_base"]) + self.config["hc_eps"]
        x = (weights[..., None] * streams).sum(axis=1)
        return rms_norm(x, t[prefix + "norm.weight"], self.config["rms_norm_eps"]) @ t["head.weight"].T

    # --- attention

    def attention(self, prefix, layer, x, start, history):
        c, t = self.config, self.tensors
        ratio = c["compress_ratios"][layer]
        heads, width, window = c["num_attention_heads"], c["head_dim"], c["sliding_window"]
        eps, length = c["rms_norm_eps"], len(x)
        freqs = frequencies(c, ratio > 0)
        positions = start + np.arange(length)

        qr = rms_norm(self.linear(prefix + "wq_a", x), t[prefix + "q_norm.weight"], eps)
        q = rms_norm(self.linear(prefix + "wq_b", qr).reshape(length, heads, width), None, eps)
        q = rope(q, positions[:, None], freqs)
        kv = rms_norm(self.linear(prefix + "wkv", x), t[prefix + "kv_norm.weight"], eps)
        kv = self.stored(rope(kv, positions, freqs))
        first_row = start
        if history is not None:
            kv, first_row = np.concatenate([history.window, kv]), start - len(history.window)

        entries = selected = None
        if ratio:
            past = None if history is None else (history.entries, history.kv, history.score)
            entries = self.compress(prefix + "compressor.", ratio, width, x, start, past, self.stored)
        if ratio == 4:
            selected = self.select(prefix + "indexer.", ratio, x, qr, start, history, freqs)

        out = np.empty((length, heads, width))
        for i, position in enumerate(positions):
            rows = kv[max(position - window + 1, 0) - first_row : position + 1 - first_row]
            if entries is not None:
                chosen = selected[i] if selected is not None else np.arange((position + 1) // ratio)
                rows = np.concatenate([rows, entries[chosen]])
            for head in range(heads):
                scores = rows @ q[i, head] * width**-0.5
                sink = t[prefix + "attn_sink"][head]
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out[i, head] = weights @ rows / (weights.sum() + np.exp(sink - top))
        out = rope(out, positions[:, None], freqs, sign=-1)

        groups, rank = c["o_groups"], c["o_lora_rank"]
        per_group = out.reshape(length, groups, heads * width // groups)
        wo_a = t[prefix + "wo_a.weight"]
        latent = [per_group[:, g] @ wo_a[g * rank : (g + 1) * rank].T for g in range(groups)]
        return self.linear(prefix + "wo_b", np.concatenate(latent, axis=-1))

    def stored(self, rows):
        """KV entries as the cache keeps them."""
        if "kv" not in self.simulate:
            return rows
        content = rows.shape[-1] - self.config["qk_rope_head_dim"]
        return np.concatenate([round_blocks(rows[..., :content], 64, E4M3, 1e-4), rows[..., content:]], axis=-1)

    def compress(self, prefix, ratio, width, x, start, past, finish):
        """All entries of complete windows up to the last token: [T, width]."""
        t, c = self.tensors, self.config
        positions = start + np.arange(len(x))
        kv = self.plain(prefix + "wkv", x)
        score = self.plain(prefix + "wgate", x) + t[prefix + "ape"][positions % ratio]
        first, entries = start, []
        if past is not None:
            entries = list(past[0])
            first = start - len(past[1])
            kv, score = np.concatenate([past[1], kv]), np.concatenate([past[2], score])
        freqs = frequencies(c, True)
        for window in range(len(entries), (start + len(x)) // ratio):
            own = slice(window * ratio - first, (window + 1) * ratio - first)
            if ratio == 4:
                rows, scores = kv[own, width:], score[own, width:]
                if window > 0:
                    previous = slice(own.start - ratio, own.start)
                    rows = np.concatenate([kv[previous, :width], rows])
                    scores = np.concatenate([score[previous, :width], scores])
            else:
                rows, scores = kv[own], score[own]
            weights = np.exp(scores - scores.max(axis=0))
            pooled = (weights * rows).sum(axis=0) / weights.sum(axis=0)
            entry = rms_norm(pooled, t[prefix + "norm.weight"], c["rms_norm_eps"])
            entries.append(finish(rope(entry, window * ratio, freqs)))
        return np.array(entries).reshape(len(entries), width)

    def select(self, prefix, ratio, x, qr, start, history, freqs):
        """For every query the entries it attends to, best first."""
        c = self.config
        heads, width, k = c["index_n_heads"], c["index_head_dim"], c["index_topk"]
        positions = start + np.arange(len(x))

        def quantised(vectors):
            if "indexer" not in self.simulate:
                return vectors
            return round_blocks(vectors @ hadamard(width), 32, E2M1, 6 * 2.0**-126)

        past = None if history is None else (history.index_entries, history.index_kv, history.index_score)
        keys = self.compress(prefix + "compressor.", ratio, width, x, start, past, quantised)
        q = self.linear(prefix + "wq_b", qr).reshape(len(x), heads, width)
        q = quantised(rope(q, positions[:, None], freqs))
        weights = self.plain(prefix + "weights_proj", x) * heads**-0.5 * width**-0.5
        selected = []
        for i, position in enumerate(positions):
            visible = keys[: (position + 1) // ratio]
            scores = (weights[i][:, None] * np.maximum(q[i] @ visible.T, 0)).sum(axis=0)
            order = top_k(scores, k)
            if len(scores) > k:
                ranked = np.sort(scores)[::-1]
                self.margins.append(float((ranked[k - 1] - ranked[k]) / max(np.abs(ranked).max(), 1e-300)))
            selected.append(order)
        return selected

    # --- experts

    def moe(self, prefix, x, token_ids):
        c, t = self.config, self.tensors
        k = c["num_experts_per_tok"]
        scores = np.sqrt(np.logaddexp(0, self.plain(prefix + "gate", x)))
        out = self.expert(prefix + "shared_experts.", x, 1.0)
        for i, token in enumerate(np.asarray(token_ids)):
            if prefix + "gate.tid2eid" in t:
                ids = t[prefix + "gate.tid2eid"][token]
            else:
                biased = scores[i] + t[prefix + "gate.bias"]
                ids = top_k(biased, k)
                ranked = np.sort(biased)[::-1]
                if len(ranked) > k:
                    self.margins.append(float(ranked[k - 1] - ranked[k]))
            weights = scores[i, ids] / scores[i, ids].sum() * c["routed_scaling_factor"]
            for expert, weight in zip(ids, weights, strict=True):
                out[i] += self.expert(f"{prefix}experts.{expert}.", x[i : i + 1], weight)[0]
        return out

    def expert(self, prefix, x, weight):
        limit = self.config["swiglu_limit"]
        gate = np.minimum(self.linear(prefix + "w1", x), limit)
        up = np.clip(self.linear(prefix + "w3", x), -limit, limit)
        return self.linear(prefix + "w2", gate * sigmoid(gate) * up * weight)
