"""The model configuration: one frozen value read strictly from a Hugging Face ``config.json``."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A ``config.json`` that is incomplete, contradictory or describes something this project does not run."""


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN frequency interpolation of the compressed layers (architecture section 2; no attention factor)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


# Keys whose value never changes what is computed here.
_IRRELEVANT_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "dtype",
        "initializer_range",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Keys that have one legal value: another would ask for arithmetic that no DeepSeek-V4 has.
_FIXED_KEYS: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

# Keys of the 0731/0813 checkpoints, whose draft layers are DSpark drafters instead of an MTP block.
_DSPARK_KEYS = frozenset(
    {"dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank"}
)

_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

# What transformers adds when it writes a config of its own; none of it is read by its V4 model code
# in evaluation, and each has the one value that keeps it that way.
_TRANSFORMERS_INERT: dict[str, Any] = {
    "chunk_size_feed_forward": 0,
    "id2label": None,
    "is_encoder_decoder": False,
    "label2id": None,
    "mlp_bias": False,
    "output_router_logits": None,
    "problem_type": None,
    "router_aux_loss_coef": None,
    "router_jitter_noise": None,
    "partial_rotary_factor": None,
    "attn_implementation": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a DeepSeek-V4 model that is not a weight, under the names of ``config.json``.

    ``compress_ratios`` has one entry per main layer followed by one per draft layer; ``drafter`` says what the
    draft layers are: ``"mtp"`` (one multi-token-prediction block), ``"dspark"`` (recognised, not runnable) or
    ``None``. Sizes are in elements, positions in tokens. Source: the released configs (checkpoint reference 1.1).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: YarnScaling
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    rms_norm_eps: float
    max_position_embeddings: int
    num_nextn_predict_layers: int
    drafter: str | None
    bos_token_id: int
    eos_token_id: int

    def __post_init__(self) -> None:
        problems = list(_contradictions(self))
        if problems:
            raise ConfigError("config.json contradicts itself:\n" + "\n".join(f"  {p}" for p in problems))

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each main layer: [num_hidden_layers]."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def draft_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each draft layer."""
        return self.compress_ratios[self.num_hidden_layers :]

    @classmethod
    def from_file(cls, path: str | Path) -> "Config":
        """Reads ``config.json`` (a file, or a directory that holds one); raises ``ConfigError`` naming each bad key."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint directory needs its config.json") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from None
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Config":
        """Builds a config from the keys of a released (or transformers-written) ``config.json``.

        Every key must be known: unknown, missing, mistyped and contradictory keys are all reported in one
        ``ConfigError``.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a JSON object, found {type(data).__name__}")
        data = dict(data)
        problems: list[str] = []
        if "layer_types" in data:
            data = _from_transformers(data, problems)

        for key, expected in _FIXED_KEYS.items():
            if key not in data:
                problems.append(f"{key}: missing (expected {expected!r})")
            elif data[key] != expected:
                problems.append(f"{key}: expected {expected!r}, found {data[key]!r}")
        if data.get("attention_dropout", 0) != 0:
            problems.append(f"attention_dropout: expected 0.0, found {data['attention_dropout']!r}")
        _check_quantization(data, problems)

        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in ("rope_scaling", "drafter", "compress_ratios"):
                continue
            if field.name not in data:
                problems.append(f"{field.name}: missing")
                continue
            values[field.name] = _number(field.name, data[field.name], field.type, problems)
        values["compress_ratios"] = _ratios(data, problems)
        values["rope_scaling"] = _yarn(data.get("rope_scaling"), problems)
        values["drafter"] = _drafter(data)

        known = (
            {field.name for field in dataclasses.fields(cls)}
            | _IRRELEVANT_KEYS
            | set(_FIXED_KEYS)
            | _DSPARK_KEYS
            | {"quantization_config", "expert_dtype", "pad_token_id"}
        ) - {"drafter"}
        for key in sorted(set(data) - known):
            problems.append(
                f"{key}: unknown key (value {data[key]!r}); remove it, or add it to the config if it changes the model"
            )
        if problems:
            raise ConfigError("bad config:\n" + "\n".join(f"  {p}" for p in problems))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The config under the key names of the release, without the keys that describe stored dtypes."""
        data = dataclasses.asdict(self)
        drafter = data.pop("drafter")
        data["compress_ratios"] = list(self.compress_ratios)
        data["rope_scaling"] = {"type": "yarn", **data["rope_scaling"]}
        data |= _FIXED_KEYS
        if drafter == "dspark":
            data["dspark_block_size"] = 5
        return data


def _number(name: str, value: Any, annotation: Any, problems: list[str]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.append(f"{name}: expected a number, found {value!r}")
        return 1
    if annotation is int and value != int(value):
        problems.append(f"{name}: expected an integer, found {value!r}")
        return 1
    if not math.isfinite(value):
        problems.append(f"{name}: expected a finite number, found {value!r}")
        return 1
    return int(value) if annotation is int else float(value)


def _ratios(data: Mapping[str, Any], problems: list[str]) -> tuple[int, ...]:
    ratios = data.get("compress_ratios")
    if not isinstance(ratios, list | tuple) or not all(type(r) is int and r >= 0 for r in ratios):
        problems.append(f"compress_ratios: expected a list of integers >= 0, found {ratios!r}")
        return ()
    return tuple(ratios)


def _yarn(value: Any, problems: list[str]) -> YarnScaling:
    fields = {f.name for f in dataclasses.fields(YarnScaling)}
    if not isinstance(value, Mapping):
        problems.append(f"rope_scaling: expected an object with {sorted(fields | {'type'})}, found {value!r}")
        return YarnScaling(1, 1, 1, 1)
    value = dict(value)
    kind = value.pop("type", value.pop("rope_type", None))
    if kind != "yarn":
        problems.append(f"rope_scaling.type: expected 'yarn', found {kind!r}")
    for key in sorted(fields - set(value)):
        problems.append(f"rope_scaling.{key}: missing")
    for key in sorted(set(value) - fields):
        problems.append(f"rope_scaling.{key}: unknown key (value {value[key]!r})")
    numbers = {key: _number(f"rope_scaling.{key}", value.get(key, 1), float, problems) for key in fields}
    numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
    return YarnScaling(**numbers)


def _drafter(data: Mapping[str, Any]) -> str | None:
    if _DSPARK_KEYS & set(data):
        return "dspark"
    return "mtp" if data.get("num_nextn_predict_layers") else None


def _check_quantization(data: Mapping[str, Any], problems: list[str]) -> None:
    """The config's word on stored dtypes is checked for sanity only: the tensors' own dtypes decide (1.1, traps)."""
    quantization = data.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, Mapping):
            problems.append(f"quantization_config: expected an object, found {quantization!r}")
        else:
            for key, value in quantization.items():
                if key in _QUANTIZATION and value != _QUANTIZATION[key]:
                    problems.append(f"quantization_config.{key}: expected {_QUANTIZATION[key]!r}, found {value!r}")
                elif key not in _QUANTIZATION and key not in (
                    "expert_dtype",
                    "modules_to_not_convert",
                    "dequantize",
                ):
                    problems.append(f"quantization_config.{key}: unknown key (value {value!r})")
    if data.get("expert_dtype") not in (None, "fp4", "fp8"):
        problems.append(f"expert_dtype: expected 'fp4' or 'fp8', found {data['expert_dtype']!r}")


_TRANSFORMERS_RATES = {
    "sliding_attention": None,
    "compressed_sparse_attention": "compressed_sparse_attention",
    "heavily_compressed_attention": "heavily_compressed_attention",
}


def _from_transformers(data: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Translates the keys that transformers 5.23 writes back into those of the release (checkpoint reference 3.3)."""
    layer_types = data.pop("layer_types")
    rates = data.pop("compress_rates", {})
    ratios = []
    for index, kind in enumerate(layer_types):
        if kind not in _TRANSFORMERS_RATES:
            problems.append(
                f"layer_types[{index}]: unknown kind {kind!r}, expected one of {sorted(_TRANSFORMERS_RATES)}"
            )
            continue
        rate = _TRANSFORMERS_RATES[kind]
        if rate is not None and rate not in rates:
            problems.append(f"compress_rates.{rate}: missing")
            continue
        ratios.append(0 if rate is None else rates[rate])
    drafts = int(data.get("num_nextn_predict_layers", 0) or 0)
    data.setdefault("compress_ratios", ratios + [0] * drafts)

    mlp_types = data.pop("mlp_layer_types", None)
    if mlp_types is not None:
        hashed = sum(kind == "hash_moe" for kind in mlp_types)
        if list(mlp_types) != ["hash_moe"] * hashed + ["moe"] * (len(mlp_types) - hashed):
            problems.append(f"mlp_layer_types: expected 'hash_moe' layers first, then 'moe', found {mlp_types!r}")
        data.setdefault("num_hash_layers", hashed)
    data.setdefault("topk_method", "noaux_tc")

    rope = data.pop("rope_parameters", None)
    head_dim = data.get("head_dim", 0)
    if isinstance(rope, Mapping) and {"main", "compress"} <= set(rope):
        main, compress = dict(rope["main"]), dict(rope["compress"])
        for key, name, part in (("rope_theta", "main", main), ("compress_rope_theta", "compress", compress)):
            if "rope_theta" in part:
                data[key] = part["rope_theta"]
            else:
                problems.append(f"rope_parameters.{name}.rope_theta: missing")
        if "partial_rotary_factor" in main and isinstance(head_dim, int):
            data.setdefault("qk_rope_head_dim", int(head_dim * main["partial_rotary_factor"]))
        if compress.get("attention_factor", 1.0) != 1.0:
            problems.append(
                f"rope_parameters.compress.attention_factor: expected 1.0, found {compress['attention_factor']}"
            )
        for key in ("rope_theta", "partial_rotary_factor", "attention_factor", "type"):
            compress.pop(key, None)
        data.setdefault("rope_scaling", {"type": compress.pop("rope_type", None), **compress})
    else:
        problems.append(f"rope_parameters: expected an object with 'main' and 'compress', found {rope!r}")

    for key, only in _TRANSFORMERS_INERT.items():
        if key in data:
            value = data.pop(key)
            if only is not None and value != only:
                problems.append(f"{key}: expected {only!r}, found {value!r}")
    return data


def _contradictions(config: Config):
    """Yields one line per pair of keys that cannot both be true."""
    c = config
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "q_lora_rank",
        "o_groups",
        "o_lora_rank",
        "sliding_window",
        "hc_mult",
        "hc_sinkhorn_iters",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "max_position_embeddings",
    ):
        if getattr(c, name) < 1:
            yield f"{name}: expected at least 1, found {getattr(c, name)}"
            return
    drafts = len(c.draft_ratios)
    if len(c.compress_ratios) < c.num_hidden_layers:
        yield (
            f"compress_ratios: {len(c.compress_ratios)} entries for num_hidden_layers {c.num_hidden_layers}; "
            "expected one per layer followed by one per draft layer"
        )
    elif c.drafter == "mtp" and drafts != c.num_nextn_predict_layers:
        yield (
            f"compress_ratios: {drafts} entries after the {c.num_hidden_layers} main layers, but "
            f"num_nextn_predict_layers is {c.num_nextn_predict_layers}"
        )
    if c.drafter == "mtp" and c.num_nextn_predict_layers != 1:
        yield f"num_nextn_predict_layers: expected 0 or 1, found {c.num_nextn_predict_layers}"
    if c.qk_rope_head_dim % 2 or not 0 < c.qk_rope_head_dim <= c.head_dim:
        yield f"qk_rope_head_dim: expected an even number in (0, head_dim {c.head_dim}], found {c.qk_rope_head_dim}"
    if c.num_attention_heads % c.o_groups:
        yield f"o_groups {c.o_groups} does not divide num_attention_heads {c.num_attention_heads}"
    if c.num_experts_per_tok > c.n_routed_experts:
        yield f"num_experts_per_tok {c.num_experts_per_tok} exceeds n_routed_experts {c.n_routed_experts}"
    if c.n_shared_experts != 1:
        yield f"n_shared_experts: expected 1, found {c.n_shared_experts}"
    if not 0 <= c.num_hash_layers <= c.num_hidden_layers:
        yield f"num_hash_layers: expected 0..{c.num_hidden_layers}, found {c.num_hash_layers}"
    for name in ("bos_token_id", "eos_token_id"):
        if not 0 <= getattr(c, name) < c.vocab_size:
            yield f"{name} {getattr(c, name)} is outside vocab_size {c.vocab_size}"
    for name in ("rope_theta", "compress_rope_theta", "rms_norm_eps", "hc_eps", "swiglu_limit"):
        if not getattr(c, name) > 0:
            yield f"{name}: expected a positive number, found {getattr(c, name)}"
    if any(ratio > 0 for ratio in c.layer_ratios):
        if c.index_head_dim & (c.index_head_dim - 1) or c.index_head_dim < c.qk_rope_head_dim:
            yield (
                f"index_head_dim: expected a power of two (Hadamard) of at least qk_rope_head_dim "
                f"{c.qk_rope_head_dim}, found {c.index_head_dim}"
            )
        if c.index_topk < 1 or c.index_n_heads < 1:
            yield f"index_topk {c.index_topk} and index_n_heads {c.index_n_heads} must be at least 1"
