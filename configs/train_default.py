"""The built-in small model from random weights, on the six novels of configs/default/corpus.

    python scripts/train.py --config configs/train_default.py

The recipe of the report at toy size: Muon, MTP and balance losses, an indexer that learns from the attention it should
foresee, warmup, constant rate and cosine decay, and in the last part quantisation-aware training for the released
formats, in which the result is exported.
"""

from pathlib import Path

from deepseek_v4.data import DataConfig
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.run_config import TrainConfig
from deepseek_v4.training.step import Objective

HERE = Path(__file__).parent / "default"

config = TrainConfig(
    output=Path("runs/default"),
    model=HERE,
    weights="random",
    mode="qat",
    quantise_from=1000,
    simulate=("kv", "indexer"),
    dtype="float32",
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        warmup_steps=30,
        decay_start=800,
        total_steps=1400,
    ),
    objective=Objective(indexer="sparse"),
    data=DataConfig(
        paths=(str(HERE / "corpus" / "*.txt.xz"),),
        evaluation_paths=(str(HERE / "corpus" / "persuasion.txt.xz"),),
        sequence_length=512,
        batch_size=4,
        packing="one_per_row",
    ),
    eval_every=200,
    eval_batches=16,
    checkpoint_every=200,
    export=Path("runs/default/export"),
)
