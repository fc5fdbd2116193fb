"""Generates text with a DeepSeek-V4 checkpoint: a file of prompts to a file of results, or one prompt to the terminal.

    python scripts/generate.py --checkpoint DIR --input prompts.jsonl --output out.jsonl --max-new-tokens 256
    python scripts/generate.py --checkpoint DIR --prompt "It is a truth" --mesh expert=4,tensor=2

DIR is a Hugging Face directory or an Orbax directory made by scripts/convert_checkpoint.py. Input lines are
{"token_ids": [...]}, {"prompt": "..."} or {"messages": [...], "thinking_mode": "chat" | "thinking",
"reasoning_effort": null | "high" | "max"}; each may set max_new_tokens, temperature, top_p, top_k, min_p, seed, stop,
stop_ids and logprobs for itself. Output lines are {"index", "token_ids", "text", "finish_reason"}, for messages also
"message", and "logprobs" where asked for; finish_reason is "stop", "length", or "error" with an "error" text.

Results are appended as they finish and sorted into input order at the end. The same command continues a run that was
interrupted, however it was: what is finished stays, what was in flight goes on from OUTPUT.tokens. On a pod, start the
same command on every host; process 0 reads and writes. The exit code is 1 if any request failed.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepseek_v4 import distributed
from deepseek_v4.engine import (
    Engine,
    Pool,
    PrefixStore,
    Request,
    Statistics,
    check_drafts,
    chunk_sizes,
    parse_pools,
)
from deepseek_v4.engine.memory import check_fits, describe_memory, device_limit, is_out_of_memory
from deepseek_v4.engine.processes import Interruption
from deepseek_v4.engine.scheduling import round_up
from deepseek_v4.engine.session import Session, Task, read_tasks
from deepseek_v4.engine.state import cache_growth
from deepseek_v4.loading import Loaded, Parallelism, open_model, simulate_devices
from deepseek_v4.planning.pods import with_pod
from deepseek_v4.requests import Prompt, RequestError, check_context, parse_line, text_prompt
from deepseek_v4.sampling import check_sampling

_CHUNK_STEP = 64  # pieces shorter than asked for are multiples of this: few shapes
_REPORT_SECONDS = 30.0  # between lines of progress where there is no terminal to draw a bar on


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Generate text with a DeepSeek-V4 checkpoint."""

    checkpoint: Path
    """Hugging Face directory, or Orbax directory made by scripts/convert_checkpoint.py."""
    input: Path | None = None
    """JSONL of requests: token_ids, prompt, or messages."""
    output: Path | None = None
    """JSONL of results; appended to as requests finish. An interrupted run is continued by the same command."""
    prompt: str | None = None
    """One prompt instead of --input: its continuation is streamed to the terminal."""
    prompt_mode: Literal["raw", "chat", "thinking"] = "raw"
    """How --prompt is read: as raw text, or as a user message in chat or thinking mode."""
    max_new_tokens: int = 256
    """Tokens to generate per request at most."""
    temperature: float = 0.0
    """0 is greedy, ties to the lowest id."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens with this total probability."""
    top_k: int = 0
    """Sample from this many most probable tokens; 0 for all."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as probable as the most probable one."""
    seed: int = 0
    """With the index of a request, decides its random numbers."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    logprobs: int | None = None
    """Log-probabilities of the new tokens and of this many alternatives each."""
    drafts: int = 0
    """Tokens to propose per step with the checkpoint's MTP block; the output stays what it would be without."""
    parallelism: tyro.conf.OmitArgPrefixes[Parallelism] = dataclasses.field(default_factory=Parallelism)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of activations."""
    simulate: str = ""
    """Parts of the released quantisation to simulate: any of kv,indexer,activations."""
    cache: Literal["plain", "published"] = "plain"
    """published keeps rows in FP8 and index keys in FP4, as the release does (simulates kv,indexer; needs bfloat16)."""
    implementation: Literal["xla"] | None = None
    """xla runs every operation without kernels. Default: the kernels of the chip, where it has them."""
    prefill_chunk: int = 512
    """Prompt tokens per call at most."""
    token_budget: int | None = None
    """Tokens per step at most, decoding first. Default: one piece of a prompt beside every decode step."""
    batch_size: int = 8
    """Sequences that run together; rounded up to a multiple of the mesh's data axis."""
    max_length: int | None = None
    """Longest prompt plus continuation in tokens. Default: what the requests need, up to the model's context."""
    pools: str | None = None
    """Slots of several lengths instead of --batch-size and --max-length, for example 8x8192,1x262144."""
    prefix_gib: float = 0.0
    """Keep what shared beginnings of prompts have computed in this much host memory."""
    prefix_dir: Path | None = None
    """... and in this directory, for later runs with the same checkpoint."""
    strict_input: bool = False
    """Refuse to run anything if any input line is bad."""
    simulate_devices: int | None = None
    """Run on this many simulated CPU devices."""
    processes: tyro.conf.OmitArgPrefixes[distributed.Processes] = dataclasses.field(
        default_factory=distributed.Processes
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=with_pod(sys.argv[1:] if arguments is None else arguments, "generate"))
    console = Console(stderr=True, soft_wrap=True)
    try:
        check_sampling(args.temperature, args.top_p, args.top_k, args.min_p, args.seed)
        for name in ("max_new_tokens", "prefill_chunk", "batch_size", "max_length", "token_budget"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        if (args.prompt is None) == (args.input is None):
            raise ValueError("give either --prompt or --input")
        if (args.input is None) != (args.output is None):
            raise ValueError("--input and --output go together")
        simulate_devices(args.simulate_devices)
        distributed.start(args.processes)
        if not distributed.is_main():
            console = Console(stderr=True, soft_wrap=True, quiet=True)
        run = _run_prompt if args.input is None else _run_file
        return run(args, console)
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]" + ("; the same command goes on from here" if args.output else ""))
        return 130
    except (ValueError, OSError) as error:
        _complain(console, str(error))
    except jax.errors.JaxRuntimeError as error:
        _complain(console, f"the device failed: {error}")
    return 1


def _complain(console: Console, text: str) -> None:
    console.print(f"error: {text}", style="red", markup=False, highlight=False)


def _open(args: Arguments) -> tuple[Loaded, int]:
    loaded = open_model(
        args.checkpoint,
        dtype=args.dtype,
        simulate=args.simulate,
        parallelism=args.parallelism,
        implementation=args.implementation,
    )
    if args.cache == "published":
        execution = loaded.model.execution.with_published_cache()
        loaded = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, execution=execution))
    check_drafts(loaded.model, args.drafts)
    if args.stop and loaded.tokenizer is None:
        raise RequestError(f"{args.checkpoint}: --stop needs the checkpoint's tokenizer.json, which is missing")
    context = loaded.model.config.max_position_embeddings
    return loaded, context if args.max_length is None else min(context, args.max_length)


def _settings(args: Arguments) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs")
    return {name: getattr(args, name) for name in names}


def _pools(args: Arguments, requests: Sequence[Request]) -> tuple[Pool, ...]:
    if args.pools is not None:
        return parse_pools(args.pools)
    length = round_up(max(request.total for request in requests), 128)
    return (Pool(min(args.batch_size, len(requests)), length),)


def _engine(args: Arguments, loaded: Loaded, requests: Sequence[Request], console: Console) -> Engine:
    """A compiled engine for all of ``requests``: its shapes, and so its results, are those of an uninterrupted run."""
    longest = max(len(request.token_ids) for request in requests)
    chunk = min(args.prefill_chunk, round_up(longest, _CHUNK_STEP))
    prefixes = None
    if args.prefix_gib or args.prefix_dir is not None:
        chunk = round_up(args.prefill_chunk, 128)
        prefixes = PrefixStore(
            chunk,
            int(args.prefix_gib * 2**30) or 2**30,
            directory=args.prefix_dir,
            fingerprint=f"{_fingerprint(args.checkpoint)} drafts={args.drafts} {args.parallelism.expert_precision}",
        )
    pools = _pools(args, requests)
    check_fits(loaded.model, pools, args.drafts, device_limit())
    wanted = [request.logprobs for request in requests if request.logprobs is not None]
    with _memory_explained(loaded, pools, args.drafts):
        with console.status("restoring the checkpoint"):
            params = jax.block_until_ready(loaded.restore())
        engine = Engine(
            loaded.model,
            params,
            pools,
            chunks=chunk_sizes(chunk),
            token_budget=args.token_budget,
            drafts=args.drafts,
            top_logprobs=max(wanted, default=None),
            tokenizer=loaded.tokenizer,
            prefixes=prefixes,
        )
        with console.status("compiling"):
            seconds = engine.compile()
    per_token, fixed = cache_growth(loaded.model, engine.max_length, args.drafts)
    console.print(
        f"{loaded.description}; compiled in {seconds:.1f} s; cache: {per_token:.1f} bytes per token of context and "
        f"{fixed} fixed per sequence, {engine.cache_bytes / 2**20:.1f} MiB in all",
        highlight=False,
    )
    return engine


@contextlib.contextmanager
def _memory_explained(loaded: Loaded, pools: Sequence[Pool], drafts: int) -> Iterator[None]:
    """Turns the device's out of memory into numbers that would fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of device memory: {describe_memory(loaded.model, pools, drafts, device_limit())}"
        ) from error


def _fingerprint(directory: Path) -> str:
    """Names the weights of a checkpoint by its files' names, sizes and times."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    told = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _rates(statistics: Statistics, chips: int) -> str:
    return (
        f"{statistics.decode_rate / chips:.1f} tokens/s per chip, {statistics.sequence_rate:.1f} tokens/s per sequence"
    )


def _summary(engine: Engine, chips: int) -> str:
    s = engine.statistics
    text = (
        f"{s.prompt_tokens} prompt tokens ({s.prompt_rate / chips:.1f} per second and chip), "
        f"{s.new_tokens} new tokens: {_rates(s, chips)} ({'1 chip' if chips == 1 else f'{chips} chips'}); "
        f"host work {1e6 * s.host_overhead:.0f} us per step, {100 * s.host_share:.1f} % of the time"
    )
    if s.reused_tokens:
        text += f"; {s.reused_tokens} prompt tokens reused"
    if s.proposed_drafts:
        text += f"; {100 * s.acceptance:.1f} % of drafts accepted, {s.tokens_per_step:.2f} tokens per step"
    return text


# --- one prompt ------------------------------------------------------------------------------------------------------


def _run_prompt(args: Arguments, console: Console) -> int:
    loaded, context = _open(args)
    tokenizer, vocab_size = loaded.tokenizer, loaded.model.config.vocab_size
    if tokenizer is None:
        raise RequestError(f"{args.checkpoint}: --prompt needs the checkpoint's tokenizer.json, which is missing")
    if args.prompt_mode == "raw":
        prompt = Prompt(text_prompt(args.prompt, vocab_size, tokenizer))
    else:
        message = {"messages": [{"role": "user", "content": args.prompt}], "thinking_mode": args.prompt_mode}
        prompt = parse_line(json.dumps(message), vocab_size, tokenizer)
    check_context(len(prompt.token_ids), args.max_new_tokens, context)
    request = Request(prompt.token_ids, **_settings(args))
    engine = _engine(args, loaded, [request], console)

    text = tokenizer.stream()
    show = sys.stdout.write if distributed.is_main() else len
    if args.prompt_mode == "raw":
        show(args.prompt or "")
    with Interruption() as interruption:
        for update in engine.run([request], interrupted=interruption.requested):
            by_token = update.finish_reason == "stop" and not isinstance(update.stopped_by, str)
            show(text.push(update.token_ids[:-1] if by_token else update.token_ids))
            sys.stdout.flush()
    show(text.finish() + "\n")
    sys.stdout.flush()
    console.print(_summary(engine, loaded.chips), highlight=False)
    if update.error is not None:
        raise RequestError(update.error)
    return 0


# --- a file ----------------------------------------------------------------------------------------------------------


def _run_file(args: Arguments, console: Console) -> int:
    assert args.input is not None
    assert args.output is not None
    loaded, context = _open(args)
    lines, tasks = read_tasks(args.input, loaded.model.config.vocab_size, loaded.tokenizer, context, _settings(args))
    errors = [task.error for task in tasks if task.error is not None]
    if errors and args.strict_input:
        raise RequestError("\n".join(errors))
    settings = {
        "checkpoint": str(args.checkpoint.resolve()),
        "dtype": args.dtype,
        "simulate": ",".join(sorted(loaded.model.execution.simulate)),
        "cache": args.cache,
        "expert_precision": args.parallelism.expert_precision,
        "drafts": args.drafts,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in _settings(args).items()},
    }
    with Session(args.output, lines, tasks, settings, loaded.tokenizer) as session:
        if session.answered_before or session.resumed_tokens:
            console.print(
                f"{session.answered_before} of {len(lines)} requests were finished earlier; "
                f"{session.resumed_tokens} tokens of others are there already",
                highlight=False,
            )
        for problem in errors:
            _complain(console, problem)
        if session.pending:
            _run_pending(args, console, loaded, tasks, session)
    if session.failed:
        console.print(f"{session.failed} of {len(lines)} requests failed", style="red", highlight=False)
    return 1 if session.failed else 0


def _run_pending(args: Arguments, console: Console, loaded: Loaded, tasks: Sequence[Task], session: Session) -> None:
    engine = _engine(args, loaded, [task.request for task in tasks if task.request is not None], console)
    requests = dict(zip(session.pending, session.requests(), strict=True))
    work = sum(request.total - len(request.generated) for request in requests.values())
    counts = dict.fromkeys(requests, 0)
    done, reported = 0, time.monotonic()
    explained = _memory_explained(loaded, engine.pools, args.drafts)
    with explained, _progress(console) as progress, Interruption() as interruption:
        bar = progress.add_task("generating", total=work, rates="", requests=f"0/{len(requests)}")
        for index, update in session.run(engine, interruption):
            request = requests[index]
            first = not counts[index]
            counts[index] += len(update.token_ids)
            advance = len(update.token_ids) + (len(request.token_ids) if first else 0)
            if update.finish_reason is not None:
                done += 1
                advance += request.max_new_tokens - len(request.generated) - counts[index]
                _show(progress, bar, engine, loaded.chips, f"{done}/{len(requests)}")
            progress.update(bar, advance=advance)
            if not console.is_terminal and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                console.print(_report(progress, bar), highlight=False)
    console.print(_summary(engine, loaded.chips), highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[requests]} requests"),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        disable=not console.is_terminal,
    )


def _show(progress: Progress, bar: TaskID, engine: Engine, chips: int, requests: str) -> None:
    progress.update(bar, rates=_rates(engine.statistics, chips), requests=requests)


def _report(progress: Progress, bar: TaskID) -> str:
    task = progress.tasks[bar]
    left = "" if task.time_remaining is None else f", about {task.time_remaining:.0f} s left"
    return f"{task.fields['requests']} requests, {task.fields['rates']}{left}"


if __name__ == "__main__":
    sys.exit(main())
