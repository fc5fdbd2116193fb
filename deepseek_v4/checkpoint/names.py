"""Tensor names of other writers, translated to those of the release (checkpoint reference 3.1 and 3.3)."""

import dataclasses
import re

RELEASED = "released"
PREFIXED = "released names behind 'model.'"
TRANSFORMERS = "transformers"
HYBRID = "transformers 5.23 hybrid"


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a source tensor goes: a released name, or (``stacked``) a whole leaf of stacked experts.

    ``part`` of ``parts`` equal row ranges of the source tensor is meant: transformers keeps w1 and w3 in one tensor.
    """

    name: str
    stacked: bool = False
    part: int = 0
    parts: int = 1


_MODULES = {
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.kv_norm": "attn.compressor.norm",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.norm",
    "mlp.gate": "ffn.gate",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LEAVES = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _MODULES.items()}
_LEAVES |= {f"{theirs}.weight_scale_inv": f"{ours}.scale" for theirs, ours in _MODULES.items()}
_LEAVES |= {f"{part}_hc.{leaf}": f"hc_{part}_{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")}
_LEAVES |= {
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
}
"""Layer leaves of transformers, all but the routed experts."""

_STACKED = {
    "mlp.experts.gate_up_proj": ("weight", ("w1", "w3")),
    "mlp.experts.gate_up_proj_scale_inv": ("scale", ("w1", "w3")),
    "mlp.experts.down_proj": ("weight", ("w2",)),
    "mlp.experts.down_proj_scale_inv": ("scale", ("w2",)),
}

# Written by save_pretrained's default, whose reverse renaming is wrong for this one leaf.
_HYBRID_LEAVES = {"attn.norm.weight": "attn.kv_norm.weight"}

_GLOBALS = {
    "embed_tokens.weight": "embed.weight",
    **{f"hc_head.hc_{leaf}": f"hc_head_{leaf}" for leaf in ("fn", "base", "scale")},
}

_LAYER = re.compile(r"(layers\.\d+\.)(.+)")


def translate(name: str) -> tuple[tuple[Target, ...], str]:
    """Where a source tensor goes, and in which naming it was written.

    A name that no table knows is returned as it is: whether the release has such a tensor is the caller's question.
    """
    if name == "lm_head.weight":
        return (Target("head.weight"),), TRANSFORMERS
    bare = name.removeprefix("model.")
    prefixed = bare != name
    if bare in _GLOBALS:
        return (Target(_GLOBALS[bare]),), TRANSFORMERS
    match = _LAYER.fullmatch(bare)
    if match:
        prefix, leaf = match.groups()
        if leaf in _LEAVES:
            return (Target(prefix + _LEAVES[leaf]),), TRANSFORMERS
        if leaf in _STACKED:
            kind, projections = _STACKED[leaf]
            return tuple(
                Target(f"{prefix}ffn.experts.{projection}.{kind}", True, part, len(projections))
                for part, projection in enumerate(projections)
            ), TRANSFORMERS
        if leaf in _HYBRID_LEAVES:
            return (Target(prefix + _HYBRID_LEAVES[leaf]),), HYBRID
    return (Target(bare),), PREFIXED if prefixed else RELEASED


def describe_naming(namings: set[str]) -> str:
    """One name for the namings found in a source."""
    if TRANSFORMERS in namings and (PREFIXED in namings and HYBRID in namings):
        return HYBRID
    # model.norm.weight is spelt alike with and without transformers.
    if TRANSFORMERS in namings and RELEASED not in namings:
        return TRANSFORMERS
    if len(namings) == 1:
        return next(iter(namings))
    return " + ".join(sorted(namings))
