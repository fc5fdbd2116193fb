"""A small model of every layer kind, and full-size files without their bytes, for the checkpoint tests."""

import json
import struct
from pathlib import Path

from released import _ORDER

from deepseek_v4 import Config

_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1, "I8": 1}


def tiny_config(**changes) -> Config:
    """Every layer kind, hash and score routing, repeated scan groups, and an MTP block, in 128 channels."""
    data = {
        "vocab_size": 64,
        "hidden_size": 128,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 128,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": 8,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "num_hash_layers": 3,
        "moe_intermediate_size": 64,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1048576,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "scoring_func": "sqrtsoftplus",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
    }
    return Config.from_dict(data | changes)


def inventory_shards(inventory: dict, experts: int):
    """(filename, {name: (dtype, shape)}, bytes) of every shard of a released inventory."""
    for shard in inventory["shards"]:
        tensors = {}
        for name, (dtype, shape) in inventory["templates"][shard["template"]].items():
            for expert in range(experts) if "{expert}" in name else (None,):
                tensors[shard["prefix"] + name.replace("{expert}", str(expert))] = (dtype, tuple(shape))
        yield shard["filename"], tensors, shard["bytes"]


def write_sparse(path: Path, tensors: dict) -> None:
    """A safetensors file with a real header and a body that takes no disk."""
    header, offset = {}, 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        size = _BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
