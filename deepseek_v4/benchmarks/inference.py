"""Inference beside transformers: the same checkpoint and prompts, float32, on this machine, one side after the other.

Each side runs in a process of its own. Decode is measured in a batch after prompts of equal length (transformers has no
ragged batches for this model), prefill on one long prompt; for ours a sweep over the context shows what a decoded token
costs in front of 1K to 128K tokens of cache (filled with zeros: costs do not depend on what is in it).
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_v4.parameters import flatten

_DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "default"


@dataclasses.dataclass(frozen=True)
class InferenceBenchmark:
    """Prefill and decode tokens per second, time to first token and host overhead, beside transformers."""

    checkpoint: Path = _DEFAULT
    """Hugging Face directory of a small model."""
    platform: Literal["cpu", "gpu", "tpu"] = "cpu"
    """What to run on; transformers only on cpu, or on gpu where torch finds one."""
    batches: tuple[int, ...] = (1, 8)
    """Sequences that decode together."""
    prompts: tuple[int, ...] = (128,)
    """Tokens of their prompts, one measurement for each."""
    prefill: int = 2048
    """Tokens of the prompt that is only read."""
    new_tokens: int = 32
    """Tokens that are decoded after the first, which comes with the prompt."""
    drafts: int = 0
    """Drafts per step, on our side."""
    contexts: tuple[int, ...] = ()
    """Contexts of the sweep, for example 1024 4096 16384 65536 131072. Default: no sweep."""
    plot: Path | None = None
    """Draw the sweep into this file."""
    json: Path | None = None
    """Write the figures to this file too."""


def run(args: InferenceBenchmark, console: Console) -> int:
    """Measures both sides one after the other and prints them; returns the exit code."""
    for name in ("batches", "prompts", "prefill", "new_tokens"):
        value = getattr(args, name)
        if min(value, default=0) < 1 if isinstance(value, tuple) else value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    found: dict[str, Any] = {"load": os.getloadavg()[0], "processors": os.cpu_count()}
    settings = json.dumps(dataclasses.asdict(args), default=str)
    for side in ("ours", "transformers"):
        with console.status(f"measuring {side}"):
            command = [sys.executable, "-m", "deepseek_v4.benchmarks.inference", side, settings]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            console.print(f"{side} failed: {reason}", style="yellow", markup=False, highlight=False)
            if side == "ours":
                return 1
            continue
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
    _print(args, found, console)
    if args.plot is not None and args.contexts:
        _draw(found["ours"]["sweep"], args.plot)
        console.print(f"drew {args.plot}", highlight=False)
    if args.json is not None:
        args.json.write_text(json.dumps({**dataclasses.asdict(args), "found": found}, indent=1, default=str) + "\n")
    return 0


def _print(args: InferenceBenchmark, found: dict[str, Any], console: Console) -> None:
    ours, theirs = found["ours"], found.get("transformers")
    rows = [
        ("prefill", f"{args.prefill} tokens", "prefill"),
        ("time to first token", f"{args.prefill} tokens", "first"),
    ]
    rows += [
        ("decode", f"batch {batch} after {prompt} tokens", f"decode {batch} {prompt}")
        for batch, prompt in itertools.product(args.batches, args.prompts)
    ]
    table = Table(
        title=f"float32 on {ours['device']} ({found['processors']} processors, load {found['load']:.1f} at the start)"
    )
    for column in ("", "", "ours", "transformers", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for what, shape, key in rows:
        unit, digits = ("s", 3) if key == "first" else ("tokens/s", 1)
        other = None if theirs is None else theirs[key]
        ratio = "" if other is None else f"{other / ours[key] if key == 'first' else ours[key] / other:.1f}x"
        table.add_row(
            what, shape, f"{ours[key]:.{digits}f} {unit}", "" if other is None else f"{other:.{digits}f} {unit}", ratio
        )
    console.print(table)
    for batch, prompt in itertools.product(args.batches, args.prompts):
        key = f"{batch} {prompt}"
        step, bare = ours[f"step {key}"], ours[f"bare {key}"]
        console.print(
            f"batch {batch} after {prompt} tokens: a step takes {1e3 * step:.2f} ms, "
            f"the device alone {1e3 * bare:.2f}; host overhead {1e6 * (step - bare):.0f} us, "
            f"{100 * (step / bare - 1):.1f} %, of {1e6 * ours[f'host {key}']:.0f} us of host work",
            highlight=False,
        )
        if not args.drafts:
            least = ours[f"bytes {key}"] / ours["bandwidth"]
            console.print(
                f"    it reads up to {ours[f'bytes {key}'] / 2**20:.2f} MiB, {1e6 * least:.0f} us at the "
                f"{ours['bandwidth'] / 1e9:.1f} GB/s of a large copy measured here: "
                f"{100 * least / step:.1f} % of the memory's speed",
                highlight=False,
            )
    if args.drafts:
        console.print(f"{100 * ours['acceptance']:.0f} % of drafts accepted", highlight=False)
    if args.contexts:
        sweep = Table(title="one sequence: a decoded token in front of a context")
        for column in ("context", "milliseconds", "cache MiB"):
            sweep.add_column(column, justify="right")
        for context, seconds, size in ours["sweep"]:
            sweep.add_row(f"{context}", f"{1e3 * seconds:.2f}", f"{size / 2**20:.1f}")
        console.print(sweep)


def _draw(sweep: list[list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts, seconds, _ = zip(*sweep, strict=True)
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(contexts, [1e3 * s for s in seconds], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms per decoded token")
    axes.set_title("Built-in model, one sequence, float32 on a CPU")
    figure.tight_layout()
    figure.savefig(path)


def _prompts(vocab_size: int, rows: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, vocab_size, (rows, length)).tolist()


def _ours(args: InferenceBenchmark) -> dict[str, Any]:
    import jax

    from deepseek_v4 import Execution, Model
    from deepseek_v4.benchmarks.timing import copy_bandwidth
    from deepseek_v4.checkpoint import open_checkpoint
    from deepseek_v4.engine import Engine, Pool, Request

    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != args.platform:
        raise ValueError(f"--platform {args.platform}: JAX finds {jax.default_backend()} devices only")
    checkpoint = open_checkpoint(args.checkpoint)
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32"))
    params = checkpoint.load(model)
    figures: dict[str, Any] = {"chips": 1, "acceptance": 0.0, "device": jax.devices()[0].device_kind}
    figures["bandwidth"] = copy_bandwidth()

    def engine_for(batch: int, length: int, chunk: int) -> Engine:
        pool = Pool(batch, length + args.new_tokens + 1)
        engine = Engine(model, params, [pool], chunks=(chunk,), drafts=args.drafts)
        engine.compile()
        return engine

    vocab = model.config.vocab_size
    engine = engine_for(1, args.prefill, min(args.prefill, 2048))
    (prompt,) = _prompts(vocab, 1, args.prefill)
    best = min(_timed(lambda: list(engine.run([Request(tuple(prompt), 1)]))) for _ in range(3))
    figures |= {"prefill": args.prefill / best, "first": best}
    for batch, length in itertools.product(args.batches, args.prompts):
        engine = engine_for(batch, length, min(length, 2048))
        # The model may end an answer at any time: what is counted is what was decoded.
        # The first token comes from reading the prompt.
        requests = [Request(tuple(p), args.new_tokens + 1) for p in _prompts(vocab, batch, length)]
        found = [_decoding(engine, requests) for _ in range(3)]
        key = f"{batch} {length}"
        figures[f"decode {key}"] = max(rate for rate, _, _ in found)
        figures[f"step {key}"] = min(step for _, step, _ in found)
        figures[f"host {key}"] = min(host for _, _, host in found)
        figures[f"bare {key}"] = min(engine.decode_alone(args.new_tokens) for _ in range(3))
        figures[f"bytes {key}"] = decode_bytes(model, batch, length)
        figures["acceptance"] = engine.statistics.acceptance
    figures["sweep"] = [_at_context(model, params, context) for context in args.contexts]
    return figures


def _decoding(engine, requests) -> tuple[float, float, float]:
    """Tokens per second, and per step seconds and host seconds, of requests that decode together after their prompts.

    A step costs the same when some have ended. Raises ``ValueError`` if all had ended when the last one began.
    """
    for request in requests:
        engine.submit(request)
    started: set[int] = set()
    while len(started) < len(requests):
        started |= {update.request_id for update in engine.step()}
    if engine.idle:
        raise ValueError(
            "every answer ended before all had begun: nothing to time; give more --new-tokens or other --prompts"
        )
    before, begin, tokens = dataclasses.replace(engine.statistics), time.perf_counter(), 0
    while not engine.idle:
        tokens += sum(len(update.token_ids) for update in engine.step())
    seconds, now = time.perf_counter() - begin, engine.statistics
    steps = now.steps - before.steps
    return tokens / seconds, seconds / steps, (now.host_seconds - before.host_seconds) / steps


def decode_bytes(model, batch: int, context: int) -> int:
    """Bytes that a decode step of ``batch`` sequences reads where each is read once, from the model's own shapes.

    Every dense parameter of the main model, of the embedding a row per sequence, of the routed experts as many as
    ``batch`` tokens can choose at most, and the whole caches of ``context`` tokens.
    """
    import jax

    c = model.config
    chosen = min(1.0, batch * c.num_experts_per_tok / c.n_routed_experts)
    specs = model.parameter_specs()
    total = sum(
        spec.size_bytes * (chosen if "experts" in spec.axes else 1) for spec in jax.tree.leaves(specs["groups"])
    )
    for path, spec in flatten(specs["shell"]).items():
        total += spec.size_bytes * (batch / spec.shape[0] if path[0] == "embed" else 1)
    cache = jax.eval_shape(lambda: model.init_cache(batch, context))
    return int(total) + sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))


def _at_context(model, params, context: int) -> tuple[int, float, int]:
    import jax
    import jax.numpy as jnp

    from deepseek_v4.model import rollback

    step = jax.jit(lambda p, t, c: model.forward(p, t, c, last_only=True), donate_argnums=2)
    cache = rollback(model.init_cache(1, context + 128), jnp.full(1, context, jnp.int32))
    size = sum(array.nbytes for array in jax.tree.leaves(cache))
    token, seconds = np.full((1, 1), 5, np.int32), []
    for _ in range(24):
        begin = time.perf_counter()
        logits, _, cache = step(params, token, cache)
        jax.block_until_ready(logits)
        seconds.append(time.perf_counter() - begin)
    return context, float(np.median(seconds[4:])), size


def _transformers(args: InferenceBenchmark) -> dict[str, Any]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).float().eval()
    where = "cpu" if args.platform == "cpu" else "cuda"
    if where == "cuda" and (args.platform != "gpu" or not torch.cuda.is_available()):
        raise RuntimeError(f"torch finds no {args.platform} here")
    model = model.to(where)

    def synchronised() -> float:
        if where == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    vocab = model.config.vocab_size
    figures: dict[str, Any] = {}
    with torch.no_grad():
        ids = torch.tensor(_prompts(vocab, 1, args.prefill), device=where)
        best = min(_timed(lambda: (model(ids, use_cache=True, logits_to_keep=1), synchronised())) for _ in range(3))
        figures |= {"prefill": args.prefill / best, "first": best}
        for batch, length in itertools.product(args.batches, args.prompts):
            ids = torch.tensor(_prompts(vocab, batch, length), device=where)
            rates = []
            for _ in range(2 if length <= 512 else 1):
                out = model(ids, use_cache=True, logits_to_keep=1)
                begin = synchronised()
                for _ in range(args.new_tokens):
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                rates.append(batch * args.new_tokens / (synchronised() - begin))
            figures[f"decode {batch} {length}"] = max(rates)
    return figures


def _timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _side(name: str, settings: str) -> None:
    values = json.loads(settings)
    for field in ("checkpoint", "json", "plot"):
        values[field] = None if values[field] in (None, "None") else Path(values[field])
    args = InferenceBenchmark(**values)
    print(json.dumps({"ours": _ours, "transformers": _transformers}[name](args)))


if __name__ == "__main__":
    _side(*sys.argv[1:])
