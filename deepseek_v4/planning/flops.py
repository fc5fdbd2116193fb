"""Every matrix product of one token, as a list of terms: the published efficiency and the planner's compute time.

A *term* is one product of one layer (or of what surrounds the layers): how many operations it costs for one token at a
given context (a multiply-add is two), and the formats of its two operands in the released deployment. Only products are
listed. Elementwise work (norms, RoPE, softmax, pooling, Sinkhorn and stream mixing, the relu-weighted sum of index
heads, top-k) has no published weight and is well below one percent of the operations of any layer.

"Equivalent FP8" operations weigh a product by its wider operand: FP4 0.5, FP8 1, BF16 2, FP32 4. FP8 activations times
FP4 expert weights therefore count like FP8: current hardware multiplies them at the FP8 rate. The
indexer multiplies FP4 by FP4.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from deepseek_v4.config import Config
from deepseek_v4.layer_spec import LayerSpec, draft_specs, layer_specs

WEIGHTS: Mapping[str, float] = MappingProxyType({"fp4": 0.5, "fp8": 1.0, "bf16": 2.0, "fp32": 4.0})
"""Equivalent FP8 operations of one operation, by the wider operand's format."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One matrix product of one token: ``operations`` over all of its ``layers``; ``formula`` is per layer."""

    name: str
    layers: int
    operations: int
    activation: str
    weight: str
    formula: str

    def equivalent(self, weights: Mapping[str, float] = WEIGHTS) -> float:
        """Equivalent FP8 operations. A key "fp8*fp4" of ``weights`` overrides the rule of the wider operand."""
        pair = f"{self.activation}*{self.weight}"
        return self.operations * weights.get(pair, max(weights[self.activation], weights[self.weight]))


def layer_terms(config: Config, spec: LayerSpec, context: int) -> tuple[Term, ...]:
    """The products of one layer for a token that sees ``context`` tokens, itself included."""
    c = config
    d, heads, width = c.hidden_size, c.num_attention_heads, c.head_dim
    attended = min(c.sliding_window, context)
    terms = [
        _linear("attn.wq_a", d * c.q_lora_rank, "d * q_lora"),
        _linear("attn.wq_b", c.q_lora_rank * heads * width, "q_lora * H * c"),
        _linear("attn.wkv", d * width, "d * c"),
        _linear("attn.wo_a", c.o_lora_rank * heads * width, "g * o_lora * (H * c / g)"),
        _linear("attn.wo_b", c.o_groups * c.o_lora_rank * d, "g * o_lora * d"),
        _term("attn window", 2 * heads * width * attended, "bf16", "bf16", "2 * H * c * min(window, t)"),
    ]
    if spec.compress_ratio:
        entries = context // spec.compress_ratio
        lanes = "2 * " if spec.lanes == 2 else ""
        terms.append(
            _term(
                f"{spec.kind} compressor",
                2 * d * spec.lanes * width,
                "fp32",
                "bf16",
                f"(wkv + wgate) 2 * d * {lanes}c",
            )
        )
        selected = min(entries, c.index_topk) if spec.indexer else entries
        rows = f"min(topk, t/{spec.compress_ratio})" if spec.indexer else f"t/{spec.compress_ratio}"
        terms.append(_term(f"{spec.kind} entries", 2 * heads * width * selected, "bf16", "bf16", f"2 * H * c * {rows}"))
        if spec.indexer:
            index = c.index_n_heads * c.index_head_dim
            terms += [
                _linear("indexer.wq_b", c.q_lora_rank * index, "q_lora * Hi * ci"),
                _term("indexer.weights_proj", d * c.index_n_heads, "bf16", "bf16", "d * Hi"),
                _term(
                    "indexer compressor",
                    2 * d * spec.lanes * c.index_head_dim,
                    "fp32",
                    "bf16",
                    f"(wkv + wgate) 2 * d * {lanes}ci",
                ),
                _term("indexer scores", index * entries, "fp4", "fp4", f"Hi * ci * t/{spec.compress_ratio}"),
            ]
    expert = 3 * d * c.moe_intermediate_size
    mixes = (2 + c.hc_mult) * c.hc_mult * c.hc_mult * d
    terms += [
        _term("router", d * c.n_routed_experts, "fp32", "bf16", "d * E"),
        _term("routed experts", c.num_experts_per_tok * expert, "fp8", "fp4", "k * 3 * d * m"),
        _linear("shared experts", c.n_shared_experts * expert, "shared * 3 * d * m"),
        _term("hyper-connections", 2 * mixes, "fp32", "fp32", "2 sublayers * (2 + n) * n * n * d"),
    ]
    return tuple(terms)


def shell_terms(config: Config) -> tuple[Term, ...]:
    """The products between the last layer and the logits; the embedding is a lookup."""
    c = config
    return (
        _term("hyper-connection head", c.hc_mult * c.hc_mult * c.hidden_size, "fp32", "fp32", "n * n * d"),
        _term("head", c.vocab_size * c.hidden_size, "bf16", "bf16", "vocab * d"),
    )


def draft_terms(config: Config, context: int) -> tuple[Term, ...]:
    """The products of the MTP block of one token, its output head included; empty for a model without one."""
    terms: list[Term] = []
    for spec in draft_specs(config):
        square = config.hidden_size**2
        terms += layer_terms(config, spec, context)
        terms += [_linear("mtp.e_proj", square, "d * d"), _linear("mtp.h_proj", config.hc_mult * square, "n * d * d")]
        terms += shell_terms(config)
    return tuple(terms)


def token_terms(config: Config, context: int, *, draft: bool = False) -> tuple[Term, ...]:
    """Every product of decoding one token at ``context``, equal terms of several layers added up."""
    terms = [term for spec in layer_specs(config) for term in layer_terms(config, spec, context)]
    terms += shell_terms(config)
    if draft:
        terms += draft_terms(config, context)
    return _merged(terms)


def equivalent_operations(terms: Iterable[Term], weights: Mapping[str, float] = WEIGHTS) -> float:
    """The sum of the terms' equivalent FP8 operations."""
    return sum(term.equivalent(weights) for term in terms)


def _term(name: str, products: int, activation: str, weight: str, formula: str) -> Term:
    return Term(name, 1, 2 * products, activation, weight, formula)


def _linear(name: str, products: int, formula: str) -> Term:
    return _term(name, products, "fp8", "fp8", formula)


def _merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    merged: dict[tuple[str, str], Term] = {}
    for term in terms:
        key = (term.name, term.formula)
        known = merged.get(key)
        merged[key] = (
            term
            if known is None
            else dataclasses.replace(
                known, layers=known.layers + term.layers, operations=known.operations + term.operations
            )
        )
    return tuple(merged.values())


@dataclasses.dataclass(frozen=True)
class V32:
    """DeepSeek-V3.2, the model that the paper compares with; sizes from its released ``config.json``."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    dense_layers: int = 3
    intermediate_size: int = 18432
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048

    def token_terms(self, context: int) -> tuple[Term, ...]:
        """Every product of decoding one token: MLA in its absorbed form over the indexer's selection (V3.2 report)."""
        d, heads, rank = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        layers, sparse = self.num_hidden_layers, self.num_hidden_layers - self.dense_layers
        index = self.index_n_heads * self.index_head_dim
        keys = min(self.index_topk, context)
        expert = 3 * d * self.moe_intermediate_size
        query = self.qk_nope_head_dim + self.qk_rope_head_dim

        def every(name, products, activation, weight, formula, count=layers):
            return Term(name, count, 2 * count * products, activation, weight, formula)

        return (
            every("attn.wq_a", d * self.q_lora_rank, "fp8", "fp8", "d * q_lora"),
            every("attn.wq_b", self.q_lora_rank * heads * query, "fp8", "fp8", "q_lora * H * (nope + rope)"),
            every("attn.wkv_a", d * (rank + self.qk_rope_head_dim), "fp8", "fp8", "d * (kv_lora + rope)"),
            every("attn.wkv_b, keys", heads * self.qk_nope_head_dim * rank, "bf16", "fp8", "H * nope * kv_lora"),
            every("attn.wkv_b, values", heads * self.v_head_dim * rank, "bf16", "fp8", "H * v * kv_lora"),
            every("attn.wo", heads * self.v_head_dim * d, "fp8", "fp8", "H * v * d"),
            every(
                "attn selected keys",
                heads * (2 * rank + self.qk_rope_head_dim) * keys,
                "bf16",
                "bf16",
                "H * (2 * kv_lora + rope) * min(topk, t)",
            ),
            every("indexer.wq_b", self.q_lora_rank * index, "fp8", "fp8", "q_lora * Hi * ci"),
            every("indexer.wk", d * self.index_head_dim, "fp8", "fp8", "d * ci"),
            every("indexer.weights_proj", d * self.index_n_heads, "bf16", "bf16", "d * Hi"),
            every("indexer scores", index * context, "fp8", "fp8", "Hi * ci * t"),
            every("dense MLP", 3 * d * self.intermediate_size, "fp8", "fp8", "3 * d * width", self.dense_layers),
            every("router", d * self.n_routed_experts, "fp32", "bf16", "d * E", sparse),
            every("routed experts", self.num_experts_per_tok * expert, "fp8", "fp8", "k * 3 * d * m", sparse),
            every("shared expert", expert, "fp8", "fp8", "3 * d * m", sparse),
            every("head", self.vocab_size * d, "bf16", "bf16", "vocab * d", 1),
        )
