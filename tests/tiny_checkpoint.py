"""A tiny released-format checkpoint with every layer kind, for tests that need files rather than arrays."""

import json
import shutil
from pathlib import Path

from deepseek_v4.checkpoint import to_hf
from deepseek_v4.default_model import CONFIG_DIRECTORY, RandomSource

# One layer of each kind is compiled once each; everything else is as small as a mesh of 2 x 2 x 2 or 4 x 2 allows.
_CHANGES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "head_dim": 32,
    "index_head_dim": 32,
    "index_topk": 8,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "o_lora_rank": 32,
    "hc_sinkhorn_iters": 3,
    "max_position_embeddings": 4096,
}


def write_tiny_checkpoint(directory: Path) -> Path:
    """Writes config, tokenizer and weights to ``directory`` / "hf" and returns that."""
    model = directory / "model"
    model.mkdir()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CONFIG_DIRECTORY / name, model / name)
    config = json.loads((CONFIG_DIRECTORY / "config.json").read_text()) | _CHANGES
    (model / "config.json").write_text(json.dumps(config, indent=2))
    to_hf(RandomSource(model, seed=3), directory / "hf")
    return directory / "hf"
