"""Adapters beside the resident FP4 and FP8 weights of a checkpoint, trained on conversations.

    python scripts/train.py --config configs/finetune_lora.py --model DIR --data.paths chats.jsonl

A line of chats.jsonl is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; the
loss is on the assistant's turns. Writes the adapters alone; scripts/convert_checkpoint.py merge makes a model of them.
"""

from pathlib import Path

from deepseek_v4.adapters import LoRA
from deepseek_v4.data import DataConfig
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.run_config import TrainConfig
from deepseek_v4.training.step import Objective

config = TrainConfig(
    output=Path("runs/lora"),
    model=Path("demo/hf"),
    mode="lora",
    lora=LoRA(rank=16, alpha=32.0, patterns=("attn.w*", "ffn.shared_experts", "ffn.experts")),
    # Small batches say little about the load of experts: leave their balance as it is.
    objective=Objective(bias_rate=0.0),
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=2e-4,
        final_learning_rate=2e-5,
        warmup_steps=20,
        decay_start=200,
        total_steps=400,
        weight_decay=0.0,
        clip_norm=1.0,
    ),
    data=DataConfig(paths=("chats.jsonl",), sequence_length=1024, batch_size=8, format="chat", holdout=0.05),
    remat="experts",
    eval_every=50,
    checkpoint_every=100,
    export=Path("runs/lora/adapters"),
)
