"""All parameters of a checkpoint, trained on conversations and exported in the released formats.

    python scripts/train.py --config configs/finetune_full.py --model DIR --data.paths chats.jsonl --mesh data=8 --fsdp

Weights are used from the first step on as the export will hold them (mode qat), bit for bit: the export is the model
that was evaluated. The float32 masters and the optimizer's state take 12 bytes per parameter (Muon: 8) over all
devices: see deepseek_v4/training/step.py for remat and accumulate, which save activations.
"""

from pathlib import Path

from deepseek_v4.data import DataConfig
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.run_config import TrainConfig

config = TrainConfig(
    output=Path("runs/full"),
    model=Path("demo/hf"),
    mode="qat",
    simulate=("kv", "indexer"),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=2e-5,
        final_learning_rate=2e-6,
        warmup_steps=20,
        decay_start=200,
        total_steps=400,
        clip_norm=1.0,
    ),
    data=DataConfig(paths=("chats.jsonl",), sequence_length=1024, batch_size=8, format="chat", holdout=0.05),
    remat="experts",
    eval_every=50,
    checkpoint_every=100,
    export=Path("runs/full/export"),
)
