"""The whole path on the built-in small model: a released-format checkpoint, converted, restored sharded, generating.

    python scripts/demo.py
    python scripts/demo.py --prompt "Emma was" --mesh data=2,expert=2,tensor=2 --keep DIR

Needs no accelerator and no download: eight CPU devices are simulated. The model was trained by
configs/train_default.py on novels of Jane Austen; every step is the one a full-size release goes through.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro
from rich.console import Console

from deepseek_v4.checkpoint import open_huggingface, to_orbax
from deepseek_v4.default_model import write_default
from deepseek_v4.engine import Engine, Pool, Request
from deepseek_v4.engine.scheduling import round_up
from deepseek_v4.layer_spec import layer_specs
from deepseek_v4.loading import Parallelism, open_model, simulate_devices
from deepseek_v4.requests import text_prompt


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write, convert, restore and run the built-in small model."""

    prompt: str = "It is a truth universally acknowledged, that"
    """Text to continue."""
    max_new_tokens: int = 64
    """Tokens to generate."""
    temperature: float = 0.8
    """0 is greedy."""
    top_p: float = 0.95
    """Sample from the fewest most probable tokens with this total probability."""
    seed: int = 0
    """Decides the random numbers of sampling."""
    simulate_devices: int = 8
    """Simulated CPU devices."""
    mesh: str = "data=1,expert=4,tensor=2"
    """How the devices are used; the product of the sizes is their number."""
    batch_size: int = 4
    """Sequences to generate together, each with its own random numbers; the first is shown."""
    keep: Path | None = None
    """Keep the two checkpoints in this directory (DIR/hf, DIR/orbax) instead of a temporary one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        simulate_devices(args.simulate_devices)
        if args.keep is not None:
            _run(args, args.keep, console)
        else:
            with tempfile.TemporaryDirectory(prefix="deepseek-v4-demo-") as directory:
                _run(args, Path(directory), console)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1


def _run(args: Arguments, directory: Path, console: Console) -> None:
    begin = time.perf_counter()

    def step(text: str) -> None:
        nonlocal begin
        console.print(f"{text} [dim]({time.perf_counter() - begin:.1f} s)[/]")
        begin = time.perf_counter()

    hf, orbax = directory / "hf", directory / "orbax"
    write_default(hf)
    size = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    step(f"1. wrote the built-in model in the released layout: {size / 1e6:.1f} MB of FP4, FP8, BF16 and F32 tensors")

    source = open_huggingface(hf)
    to_orbax(source, orbax)
    step(f"2. converted {len(source.tensors)} tensors to Orbax, bytes unchanged")

    loaded = open_model(orbax, parallelism=Parallelism(args.mesh))
    params = jax.block_until_ready(loaded.restore())
    specs = layer_specs(loaded.model.config)
    kinds = ", ".join(f"{spec.kind}{' (hash-routed)' if spec.hash_router else ''}" for spec in specs)
    step(f"3. restored onto {loaded.description}: layers {kinds}{', MTP' if loaded.model.drafts else ''}")

    assert loaded.tokenizer is not None
    prompt = text_prompt(args.prompt, loaded.model.config.vocab_size, loaded.tokenizer)
    requests = [
        Request(
            prompt,
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            stream=stream,
        )
        for stream in range(args.batch_size)
    ]
    pool = Pool(args.batch_size, requests[0].total)
    engine = Engine(loaded.model, params, [pool], chunks=(round_up(len(prompt), 16),))
    engine.compile()
    step("4. compiled the programs that read prompts and decode")

    console.print(f"[bold]{args.prompt}[/]", end="", markup=True)
    text = loaded.tokenizer.stream()
    for update in engine.run(requests):
        if update.request_id == 0:
            shown = update.token_ids if update.finish_reason != "stop" else ()
            console.out(text.push(shown), end="", highlight=False)
    console.out(text.finish(), highlight=False)
    statistics = engine.statistics
    step(
        f"5. generated {statistics.new_tokens} tokens in {len(requests)} sequences: "
        f"{statistics.decode_rate / loaded.chips:.1f} tokens/s per chip, "
        f"{statistics.sequence_rate:.1f} tokens/s per sequence"
    )


if __name__ == "__main__":
    sys.exit(main())
