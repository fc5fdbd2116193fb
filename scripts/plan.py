"""Plans a model on a slice of accelerators before anyone rents it: does it fit, what limits it, which mesh is best.

    python scripts/plan.py --model flash --topology v6e:8x8 --workload decode --batch 64 --context 131072 --search
    python scripts/plan.py --model pro --topology tpu7x:4x4x4 --workload prefill --batch 4 --context 1048576 --compile
    python scripts/plan.py --model flash --topology h200:8x4 --workload train --batch 32 --context 4096 --lora 16

Bytes of arguments are exact, of working memory estimated; times are limits from published peaks and from the links that
the mesh's axes have on the slice. --compile gives the real program to the chip's real compiler (extras [tpu], [gpu];
no accelerator) and puts its figures beside the plan's. Without --mesh all legal meshes are planned and the best is
shown. The exit code is 0 if it fits, and with --compile if arguments agree to the byte and the peak within 15 %.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro
from rich.console import Console

from deepseek_v4.config import Config, ConfigError
from deepseek_v4.dispatch import Precision, exchange_of
from deepseek_v4.planning import report
from deepseek_v4.planning.planner import Plan, Search, advice_lines, advise, explain, plan, search
from deepseek_v4.planning.pods import pod_file
from deepseek_v4.planning.program import Level, compile_setting
from deepseek_v4.planning.topology import Topology, parse_topology
from deepseek_v4.planning.workload import Setting, Workload, WorkloadError
from deepseek_v4.sharding import parse_mesh
from pallas_kernels.targets import TargetError

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"

PEAK_TOLERANCE = 0.15
"""How far the estimated peak may be from the compiler's, as a share of it, ..."""

SMALL = 256 << 20
"""... or in bytes, where a whole program is not much larger."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A model, a slice and a workload."""

    model: str
    """A folder of configs/ (flash, pro, flash-base, ...) or a path to a config.json or its directory."""
    topology: str
    """v6e:8x8, v5p:4x4x8, tpu7x:4x4x4, h200:8, b200:8x4 (GPUs per node x nodes)."""
    workload: Literal["decode", "prefill", "train"]
    """One token of every sequence, a chunk of every prompt, or a training step."""
    batch: int
    """Sequences on the whole slice."""
    context: int
    """Tokens that every cache has room for; of a training sequence its length."""
    mesh: str | None = None
    """For example data=2,expert=8,tensor=4. Default: the best."""
    expert_parallel: bool = False
    """With --mesh: split the batch over the expert axis too, tokens travel to their experts. A search tries both."""
    expert_precision: Precision = "exact"
    """Of tokens that travel: fp8 sends them in FP8, fp8-bfloat16 also gets bfloat16 results back and not float32."""
    search: bool = False
    """Print the legal meshes, best first, and why the first is first."""
    cache: Literal["bf16", "fp8"] = "bf16"
    """Rows and index keys of the cache; fp8 is the released format, timed as bf16 but where TPU kernels read it."""
    chunk: int = 2048
    """Prompt tokens of a sequence per prefill call."""
    draft: bool = True
    """Run the MTP block too."""
    rollback: int = 4
    """Tokens that every cache can be rolled back."""
    lora: int | None = None
    """Train adapters of this rank beside the released weights, instead of all weights."""
    compile: bool = False
    """Compile the real program for the slice and compare."""
    compile_level: Level | None = None
    """How much the compiler optimises: less is faster. Default: O1 for training on TPUs, else the compiler's own."""
    picture: Path | None = None
    """Draw memory by mesh and time by layer to this image file."""
    json: Path | None = None
    """Write everything as JSON."""
    write: Path | None = None
    """Write the mesh and workload as a pod file, which the scripts take with --pod."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        return run(args, console)
    except (ValueError, ConfigError, TargetError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1


def run(args: Arguments, console: Console) -> int:
    """Prints what was asked for; returns the exit code."""
    config = _config(args.model)
    topology = parse_topology(args.topology)
    work = Workload(
        args.workload,
        args.batch,
        args.context,
        args.chunk,
        args.draft,
        args.rollback,
        args.lora,
        args.cache,
        args.expert_precision,
    )
    found = _search(args, config, topology, work)
    best = found.best
    if args.search:
        console.print(report.search_table(found))
    for line in explain(found) if args.mesh is None else ():
        console.print(line, highlight=False)
    if not best.memory.fits:
        for line in advice_lines(found, advise(config, topology, work)):
            console.print(line, style="red", highlight=False)
    compiled = None
    agrees = True
    if args.compile:
        try:
            compiled = compile_setting(best.setting, args.compile_level)
        except Exception as error:  # whatever the compiler threw is the answer: it may say how much is missing
            console.print(f"the compiler refuses: {_message(error)}", style="red", markup=False, highlight=False)
            agrees = False
    console.print(report.memory_table(best, compiled))
    if compiled:
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if args.draft else 0)
        console.print(report.compiled_table(compiled, layers))
        agrees = _agrees(best, compiled, console)
    console.print(report.time_table(best))
    _write(args, found, compiled, console)
    return 0 if best.memory.fits and agrees else 1


def _config(name: str) -> Config:
    known = _CONFIGS / name / "config.json"
    return Config.from_file(known if known.exists() else name)


def _search(args: Arguments, config: Config, topology: Topology, work: Workload) -> Search:
    if args.mesh is None:
        return search(config, topology, work)
    exchange_of(work.expert_precision, args.expert_parallel)
    return Search((plan(Setting.of(config, topology, parse_mesh(args.mesh), work, args.expert_parallel)),), ())


def _message(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "memory" in line.lower() or "exceed" in line.lower()]
    return (told or lines or [type(error).__name__])[0][:500]


def _agrees(best: Plan, compiled, console: Console) -> bool:
    difference = compiled.arguments - best.memory.argument_bytes
    off = best.memory.peak / compiled.peak - 1
    exact = difference == 0
    near = abs(best.memory.peak - compiled.peak) <= max(SMALL, PEAK_TOLERANCE * compiled.peak)
    console.print(
        f"arguments {'agree to the byte' if exact else f'DIFFER by {difference:,} bytes'}; "
        f"estimated peak {off:+.1%} of the compiler's{'' if near else ', MORE than 15 %'}",
        style="green" if exact and near else "red",
        highlight=False,
    )
    return exact and near


def _write(args: Arguments, found: Search, compiled, console: Console) -> None:
    best = found.best
    if args.picture:
        report.picture(found.plans[:8], str(args.picture))
        console.print(f"drawn: {args.picture}")
    if args.json:
        args.json.write_text(json.dumps(report.as_json(found.plans, compiled), indent=1) + "\n")
        console.print(f"written: {args.json}")
    if args.write:
        if not best.memory.fits:
            raise WorkloadError(f"{args.write}: not written, nothing fits")
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(json.dumps(pod_file(args.model, best), indent=2) + "\n")
        console.print(f"written: {args.write}")


if __name__ == "__main__":
    sys.exit(main())
