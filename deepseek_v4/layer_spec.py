"""What distinguishes one layer from another, as values, and the groups of layers that one scan can run."""

import dataclasses

from deepseek_v4.config import Config, ConfigError, YarnScaling


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer: base, rotated dims, optional YaRN (architecture section 2)."""

    theta: float
    dims: int
    yarn: YarnScaling | None


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer, derived from config.json (architecture section 1).

    ``compress_ratio`` is 0 without a compressed branch. ``overlap`` pools 2*ratio tokens at stride ratio (CSA),
    ``indexer`` selects top-k entries per query, ``hash_router`` routes by token id instead of score.
    """

    compress_ratio: int
    overlap: bool
    indexer: bool
    rope: RopeSpec
    hash_router: bool

    @property
    def kind(self) -> str:
        """The paper's name of the attention: SWA, CSA or HCA."""
        if not self.compress_ratio:
            return "SWA"
        return "CSA" if self.indexer else "HCA"

    @property
    def pool_rows(self) -> int:
        """Tokens pooled into one compressed entry."""
        return self.compress_ratio * (2 if self.overlap else 1)

    @property
    def lanes(self) -> int:
        """Width of the compressor projections in units of the entry width."""
        return 2 if self.overlap else 1


@dataclasses.dataclass(frozen=True)
class ScanGroup:
    """``repeats`` consecutive repetitions of ``pattern``, starting at layer ``start``."""

    start: int
    pattern: tuple[LayerSpec, ...]
    repeats: int

    def layer_index(self, repeat: int, member: int) -> int:
        """Index in the model of pattern member ``member`` in repetition ``repeat``."""
        return self.start + repeat * len(self.pattern) + member


# ratio -> (overlap, indexer). The one place that knows what the published ratios mean.
_ATTENTION_OF_RATIO = {0: (False, False), 4: (True, True), 128: (False, False)}


def layer_spec(config: Config, compress_ratio: int, hash_router: bool) -> LayerSpec:
    """The layer that ``compress_ratio`` denotes; raises ``ConfigError`` for a ratio nobody has documented."""
    if compress_ratio not in _ATTENTION_OF_RATIO:
        raise ConfigError(
            f"compress_ratios: ratio {compress_ratio} is not a documented DeepSeek-V4 layer kind "
            f"(known: {sorted(_ATTENTION_OF_RATIO)})"
        )
    overlap, indexer = _ATTENTION_OF_RATIO[compress_ratio]
    if compress_ratio:
        rope = RopeSpec(config.compress_rope_theta, config.qk_rope_head_dim, config.rope_scaling)
    else:
        rope = RopeSpec(config.rope_theta, config.qk_rope_head_dim, None)
    return LayerSpec(compress_ratio, overlap, indexer, rope, hash_router)


def layer_specs(config: Config) -> tuple[LayerSpec, ...]:
    """One spec per main layer: [num_hidden_layers]."""
    return tuple(
        layer_spec(config, ratio, index < config.num_hash_layers) for index, ratio in enumerate(config.layer_ratios)
    )


def draft_specs(config: Config) -> tuple[LayerSpec, ...]:
    """One spec per MTP block; empty for models without one (or with a DSpark drafter)."""
    if config.drafter != "mtp":
        return ()
    return tuple(layer_spec(config, ratio, False) for ratio in config.draft_ratios)


def scan_groups(specs: tuple[LayerSpec, ...]) -> tuple[ScanGroup, ...]:
    """Cuts the layer list into repeated patterns such that the fewest distinct layer bodies are compiled.

    Dynamic programming over prefixes; the cost of a group is the length of its pattern plus a small charge per
    group, so that Flash's 43 layers become (SWA hash) x 2, (CSA hash) x 1, (HCA, CSA) x 20. Ties go to the
    earlier cut, so the grouping is a function of the list alone.
    """
    count = len(specs)
    best: list[tuple[float, tuple[ScanGroup, ...]]] = [(0.0, ())]
    for end in range(1, count + 1):
        candidates = []
        for start in range(end):
            length = end - start
            period = next(p for p in range(1, length + 1) if length % p == 0 and _repeats(specs, start, end, p))
            group = ScanGroup(start, tuple(specs[start : start + period]), length // period)
            cost, groups = best[start]
            candidates.append((cost + period + 1e-3, (*groups, group)))
        best.append(min(candidates, key=lambda candidate: candidate[0]))
    return best[count][1]


def _repeats(specs: tuple[LayerSpec, ...], start: int, end: int, period: int) -> bool:
    return all(specs[i] == specs[i - period] for i in range(start + period, end))
