"""The first 400 steps of configs/train_default.py with AdamW for every parameter, all else equal: for the comparison.

python scripts/train.py --config configs/train_default_adamw.py
python scripts/plot_runs.py runs/default runs/default-adamw --output docs/training.png
"""

import dataclasses
import runpy
from pathlib import Path

_muon = runpy.run_path(str(Path(__file__).with_name("train_default.py")))["config"]

config = dataclasses.replace(
    _muon,
    output=Path("runs/default-adamw"),
    optimizer=dataclasses.replace(_muon.optimizer, name="adamw"),
    steps=400,
    mode="full",  # the other quantises from a later step on
    simulate=(),
    quantise_from=0,
    export=None,
)
