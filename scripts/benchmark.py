"""Measures this machine beside other implementations, on the same small checkpoint: one module per measurement.

python scripts/benchmark.py inference
python scripts/benchmark.py inference --contexts 1024 4096 16384 65536 131072 --plot docs/context.png
python scripts/benchmark.py train
python scripts/benchmark.py kernels --representative
python scripts/benchmark.py kernels --ops block_scaled_matmul --tune
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console

from deepseek_v4.benchmarks import inference, kernels, train

_COMMANDS: dict[str, tuple[type, Callable[[Any, Console], int]]] = {
    "inference": (inference.InferenceBenchmark, inference.run),
    "kernels": (kernels.KernelBenchmark, kernels.run),
    "train": (train.TrainBenchmark, train.run),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.extras.subcommand_cli_from_dict({name: kind for name, (kind, _) in _COMMANDS.items()}, args=arguments)
    run = next(run for kind, run in _COMMANDS.values() if isinstance(args, kind))
    console = Console(soft_wrap=True)
    try:
        return run(args, console)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
