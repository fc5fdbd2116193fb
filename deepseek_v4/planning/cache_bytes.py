"""Bytes of cache, from first principles: the published format, our own, and the models the paper compares with."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from deepseek_v4.config import Config
from deepseek_v4.layer_spec import LayerSpec, draft_specs, layer_specs
from deepseek_v4.planning.flops import V32


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """Bytes of a KV row of ``head_dim`` numbers, of which ``rope`` turn, and of an index key of ``index_dim``.

    ``published``: E4M3 with one scale byte per 64 dims, the RoPE dims in BF16, padded to 8 bytes; index keys in E2M1
    with one scale byte per 32 dims (architecture section 7). ``bfloat16``: two bytes per number, what this project's
    cache keeps.
    """

    name: str

    def row(self, head_dim: int, rope: int) -> int:
        """Bytes of one KV row."""
        if self.name == "bfloat16":
            return 2 * head_dim
        return -(-(head_dim - rope + 2 * rope + (head_dim - rope) // 64) // 8) * 8

    def index_key(self, dim: int) -> int:
        """Bytes of one index key."""
        return 2 * dim if self.name == "bfloat16" else dim // 2 + dim // 32


PUBLISHED = CacheFormat("published")
BFLOAT16 = CacheFormat("bfloat16")
FORMATS: Mapping[str, CacheFormat] = MappingProxyType({f.name: f for f in (PUBLISHED, BFLOAT16)})


def bytes_per_token(config: Config, form: CacheFormat = PUBLISHED) -> float:
    """Bytes that each further token of context adds: entries and index keys of the layers that compress."""
    return sum(_per_window(config, spec, form) / spec.compress_ratio for spec in layer_specs(config) if _kept(spec))


def cache_bytes(config: Config, context: int, form: CacheFormat = PUBLISHED) -> dict[str, int]:
    """Bytes of one sequence by part: ``window`` rows, ``entries``, ``index keys``, ``state`` of unfinished windows."""
    c = config
    row = form.row(c.head_dim, c.qk_rope_head_dim)
    parts = dict.fromkeys(("window", "entries", "index keys", "state"), 0)
    for spec in layer_specs(config):
        parts["window"] += c.sliding_window * row
        if not _kept(spec):
            continue
        windows = context // spec.compress_ratio
        parts["entries"] += windows * row
        widths = [c.head_dim]
        if spec.indexer:
            parts["index keys"] += windows * form.index_key(c.index_head_dim)
            widths.append(c.index_head_dim)
        # kv and score in float32, every row that the window in progress will pool.
        parts["state"] += sum(2 * 4 * spec.pool_rows * spec.lanes * width for width in widths)
    return parts


def _kept(spec: LayerSpec) -> bool:
    return spec.compress_ratio > 0


def _per_window(config: Config, spec: LayerSpec, form: CacheFormat) -> int:
    key = form.index_key(config.index_head_dim) if spec.indexer else 0
    return form.row(config.head_dim, config.qk_rope_head_dim) + key


def v32_bytes_per_token(model: V32) -> int:
    """V3.2 keeps every token in every layer: latent in E4M3, float32 scale per 128, BF16 RoPE key; E4M3 index key."""
    row = model.kv_lora_rank + 4 * model.kv_lora_rank // 128 + 2 * model.qk_rope_head_dim
    return model.num_hidden_layers * (row + model.index_head_dim + 4 * model.index_head_dim // 128)


def gqa_bytes_per_token(layers: int, kv_heads: int = 8, head_dim: int = 128) -> int:
    """Grouped-query attention in BF16: the baseline of the paper's "about 2 %"."""
    return layers * kv_heads * head_dim * 2 * 2


def model_cache_bytes(config: Config, batch: int, context: int, rollback: int = 0) -> int:
    """Bytes of this project's cache (``Model.abstract_cache``, bfloat16, layout "plain"), counted from the formulas.

    Rings keep one row fewer than they pool (the token at hand is not read back) and ``rollback`` more; the draft
    layers keep theirs, the last streams and a position per row come on top.
    """
    c, spare = config, max(rollback, 1)
    specs = (*layer_specs(c), *draft_specs(c))
    total = 4
    for spec in specs:
        total += (c.sliding_window - 1 + spare) * 2 * c.head_dim
        if spec.compress_ratio:
            widths = [c.head_dim, *([c.index_head_dim] if spec.indexer else [])]
            entries = max(1, context // spec.compress_ratio)
            rows = spec.pool_rows - 1 + spare
            total += sum(entries * 2 * width + 2 * 4 * rows * spec.lanes * width for width in widths)
    if draft_specs(c):
        total += (1 + rollback) * c.hc_mult * c.hidden_size * 2
    return batch * total
