"""configs/train_default.py with AdamW for every parameter instead of Muon, all else equal: for the comparison."""

import dataclasses
import runpy
from pathlib import Path

_muon = runpy.run_path(str(Path(__file__).with_name("train_default.py")))["config"]

config = dataclasses.replace(
    _muon,
    output=Path("runs/default-adamw"),
    optimizer=dataclasses.replace(_muon.optimizer, name="adamw"),
    export=None,
)
