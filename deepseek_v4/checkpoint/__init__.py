"""Checkpoints: released and transformers-written Hugging Face directories, Orbax directories, and ways between them."""

from deepseek_v4.checkpoint.convert import Share, plan_conversion, to_orbax
from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.export import plan_export, to_hf
from deepseek_v4.checkpoint.huggingface import HuggingFaceSource, open_huggingface
from deepseek_v4.checkpoint.inspection import Inspection, inspect_checkpoint
from deepseek_v4.checkpoint.orbax_directory import OrbaxSource
from deepseek_v4.checkpoint.restore import (
    Checkpoint,
    ParamsSource,
    load_params,
    open_checkpoint,
    open_source,
    save_params,
)
from deepseek_v4.checkpoint.verify import Comparison, compare

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "HuggingFaceSource",
    "Inspection",
    "OrbaxSource",
    "ParamsSource",
    "Share",
    "compare",
    "inspect_checkpoint",
    "load_params",
    "open_checkpoint",
    "open_huggingface",
    "open_source",
    "plan_conversion",
    "plan_export",
    "save_params",
    "to_hf",
    "to_orbax",
]
