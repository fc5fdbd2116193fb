"""Writes random checkpoints in the released layout, from the published tables and with numpy alone.

Shares no code with ``deepseek_v4.checkpoint``, so that tests of it (and of everything behind it) have an independent
source: tensor names, shapes, dtypes and shards follow sections 2 and 3 of the checkpoint reference.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from deepseek_v4.config import Config
from deepseek_v4.nn.variables import RELEASED, Storage

DTYPE_NAMES = {
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int8): "I8",
}
_ORDER = ["I64", "I32", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"]

Tensors = dict[str, np.ndarray]


def write_released(
    directory: str | Path,
    config: Config,
    storage: Storage = RELEASED,
    seed: int = 0,
    *,
    base_draft_copies: bool = False,
    scale: float = 1.0,
) -> None:
    """Writes shards, ``model.safetensors.index.json`` and ``config.json`` of a random model into ``directory``.

    Linear weights have a standard deviation near ``scale / sqrt(inputs)`` in every format, norms are in 0.5..1.5, and
    nothing is zero: sinks, position biases, hyper-connections and router biases are random too. With
    ``base_draft_copies`` the MTP block carries copies of embedding and head, as the Base releases do.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = released_shards(config, storage, seed, base_draft_copies=base_draft_copies, scale=scale)
    count = config.num_hidden_layers + 2 + (config.drafter is not None)
    weight_map: dict[str, str] = {}
    total = 0
    for index, tensors in enumerate(shards, start=1):
        filename = f"model-{index:05d}-of-{count:05d}.safetensors"
        write_safetensors(directory / filename, tensors)
        weight_map |= dict.fromkeys(tensors, filename)
        total += sum(array.nbytes for array in tensors.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config_json(config, storage), indent=2), encoding="utf-8")


def config_json(config: Config, storage: Storage = RELEASED) -> dict:
    """``config.json`` as the release words it, stored formats included."""
    data = config.to_dict() | {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
    }
    if storage.linears == "fp8":
        data["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
        data["expert_dtype"] = storage.experts
    return data


def released_tensors(config: Config, storage: Storage = RELEASED, seed: int = 0, **options) -> Tensors:
    """All tensors of ``write_released`` by name, in memory."""
    tensors: Tensors = {}
    for shard in released_shards(config, storage, seed, **options):
        tensors |= shard
    return tensors


def released_shards(
    config: Config, storage: Storage = RELEASED, seed: int = 0, *, base_draft_copies: bool = False, scale: float = 1.0
) -> Iterator[Tensors]:
    """The tensors of one shard after the other: embedding, every layer, head, draft layers."""
    rng = np.random.default_rng(seed)
    make = _Maker(rng, storage, scale)
    c = config
    embed = make.matrix((c.vocab_size, c.hidden_size), deviation=1.0)
    yield {"embed.weight": embed}
    for index, ratio in enumerate(c.layer_ratios):
        yield _prefixed(f"layers.{index}.", _block(c, ratio, index < c.num_hash_layers, make))
    head = make.matrix((c.vocab_size, c.hidden_size))
    yield {"head.weight": head, "norm.weight": make.norm(c.hidden_size), **_hyper_head(c, make)}
    if c.drafter == "mtp":
        block = _block(c, c.draft_ratios[0], False, make)
        for name in ("e_proj", "h_proj"):
            block |= make.linear(name, c.hidden_size, c.hidden_size)
        for name in ("enorm", "hnorm", "norm"):
            block[f"{name}.weight"] = make.norm(c.hidden_size)
        block |= _hyper_head(c, make)
        if base_draft_copies:
            block |= {"emb.tok_emb.weight": embed, "head.weight": head}
        yield _prefixed("mtp.0.", block)
    elif c.drafter == "dspark":
        tensors: Tensors = {}
        for index, ratio in enumerate(c.draft_ratios):
            tensors |= _prefixed(f"mtp.{index}.", _block(c, ratio, False, make))
            tensors[f"mtp.{index}.markov.weight"] = make.matrix((16, c.hidden_size))
        yield tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, tensors ordered by dtype and then name, the header padded to 8 bytes."""
    ordered = sorted(tensors, key=lambda name: (_ORDER.index(DTYPE_NAMES[tensors[name].dtype]), name))
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name in ordered:
        array = tensors[name]
        end = offset + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


class _Maker:
    """Random tensors in the formats of a ``Storage``."""

    def __init__(self, rng: np.random.Generator, storage: Storage, scale: float):
        self.rng = rng
        self.storage = storage
        self.scale = scale

    def _deviation(self, inputs: int) -> float:
        return self.scale / math.sqrt(inputs)

    def norm(self, size: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, size).astype(self.storage.norms)

    def float32(self, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        return self.rng.normal(scale=deviation, size=shape).astype(np.float32)

    def matrix(self, shape: tuple[int, int], deviation: float | None = None) -> np.ndarray:
        deviation = self._deviation(shape[-1]) if deviation is None else deviation
        return self.rng.normal(scale=deviation, size=shape).astype(self.storage.matrices)

    def linear(self, name: str, out: int, inputs: int) -> Tensors:
        return self._stored(name, out, inputs, self.storage.linears)

    def expert(self, name: str, out: int, inputs: int) -> Tensors:
        return self._stored(name, out, inputs, self.storage.experts)

    def _stored(self, name: str, out: int, inputs: int, kind: str) -> Tensors:
        rng, deviation = self.rng, self._deviation(inputs)
        if kind == "fp4":
            # Uniform nibbles have a root mean square of 2.9; block scales spread over three octaves around the mean.
            weight = rng.integers(0, 256, (out, inputs // 2), dtype=np.uint8).view(np.int8)
            exponent = round(math.log2(deviation / 2.9)) + rng.integers(-1, 2, (out, inputs // 32))
            scale = (exponent + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
        elif kind == "fp8":
            weight = rng.normal(scale=32.0, size=(out, inputs)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            blocks = (math.ceil(out / 128), math.ceil(inputs / 128))
            if self.storage.scales == "float32":
                scale = (rng.uniform(0.7, 1.4, blocks) * deviation / 32).astype(np.float32)
            else:
                exponent = round(math.log2(deviation / 32)) + rng.integers(-1, 2, blocks)
                scale = (exponent + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
        else:
            return {f"{name}.weight": rng.normal(scale=deviation, size=(out, inputs)).astype(kind)}
        return {f"{name}.weight": weight, f"{name}.scale": scale}


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: array for name, array in tensors.items()}


def _hyper(c: Config, make: _Maker, name: str, mixes: int, gates: int) -> Tensors:
    width = c.hc_mult * c.hidden_size
    return {
        f"{name}_fn": make.float32((mixes, width), 1 / math.sqrt(width)),
        f"{name}_base": make.float32((mixes,), 0.5),
        f"{name}_scale": make.rng.uniform(0.5, 1.5, gates).astype(np.float32),
    }


def _hyper_head(c: Config, make: _Maker) -> Tensors:
    return _hyper(c, make, "hc_head", c.hc_mult, 1)


def _compressor(c: Config, make: _Maker, prefix: str, ratio: int, width: int) -> Tensors:
    lanes = width * (2 if ratio == 4 else 1)
    return {
        f"{prefix}.ape": make.float32((ratio, lanes), 0.5),
        f"{prefix}.wkv.weight": make.matrix((lanes, c.hidden_size)),
        f"{prefix}.wgate.weight": make.matrix((lanes, c.hidden_size)),
        f"{prefix}.norm.weight": make.norm(width),
    }


def _block(c: Config, ratio: int, hashed: bool, make: _Maker) -> Tensors:
    d, heads, experts, m = c.hidden_size, c.num_attention_heads, c.n_routed_experts, c.moe_intermediate_size
    t: Tensors = {
        "attn.attn_sink": make.float32((heads,), 1.0),
        "attn.q_norm.weight": make.norm(c.q_lora_rank),
        "attn.kv_norm.weight": make.norm(c.head_dim),
        "attn_norm.weight": make.norm(d),
        "ffn_norm.weight": make.norm(d),
    }
    t |= make.linear("attn.wq_a", c.q_lora_rank, d)
    t |= make.linear("attn.wq_b", heads * c.head_dim, c.q_lora_rank)
    t |= make.linear("attn.wkv", c.head_dim, d)
    t |= make.linear("attn.wo_a", c.o_groups * c.o_lora_rank, heads * c.head_dim // c.o_groups)
    t |= make.linear("attn.wo_b", d, c.o_groups * c.o_lora_rank)
    if ratio:
        t |= _compressor(c, make, "attn.compressor", ratio, c.head_dim)
    if ratio == 4:
        t |= make.linear("attn.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        t["attn.indexer.weights_proj.weight"] = make.matrix((c.index_n_heads, d))
        t |= _compressor(c, make, "attn.indexer.compressor", ratio, c.index_head_dim)
    t["ffn.gate.weight"] = make.matrix((experts, d))
    if hashed:
        rows = make.rng.permuted(np.tile(np.arange(experts), (c.vocab_size, 1)), axis=1)
        t["ffn.gate.tid2eid"] = np.ascontiguousarray(rows[:, : c.num_experts_per_tok]).astype(np.int64)
    else:
        t["ffn.gate.bias"] = make.float32((experts,), 0.1)
    for expert in range(experts):
        t |= make.expert(f"ffn.experts.{expert}.w1", m, d)
        t |= make.expert(f"ffn.experts.{expert}.w2", d, m)
        t |= make.expert(f"ffn.experts.{expert}.w3", m, d)
    t |= make.linear("ffn.shared_experts.w1", m * c.n_shared_experts, d)
    t |= make.linear("ffn.shared_experts.w2", d, m * c.n_shared_experts)
    t |= make.linear("ffn.shared_experts.w3", m * c.n_shared_experts, d)
    for name in ("hc_attn", "hc_ffn"):
        t |= _hyper(c, make, name, (2 + c.hc_mult) * c.hc_mult, 3)
    return t
