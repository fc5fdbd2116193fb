"""Generates text with a DeepSeek-V4 checkpoint: a file of prompts to a file of results, or one prompt to the terminal.

    python scripts/generate.py --checkpoint DIR --input prompts.jsonl --output out.jsonl --max-new-tokens 256
    python scripts/generate.py --checkpoint DIR --prompt "It is a truth" --mesh expert=4,tensor=2

DIR is a Hugging Face directory or an Orbax directory made by scripts/convert_checkpoint.py. Input lines are
{"token_ids": [...]}, {"prompt": "..."} or {"messages": [...], "thinking_mode": "chat" | "thinking",
"reasoning_effort": null | "high" | "max"}. Output lines, in input order, are {"index", "token_ids", "text",
"finish_reason"} and for messages also "message"; finish_reason is "stop", "length", or "error" with an "error" text.
The exit code is 1 if any request failed.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepseek_v4.chat import parse_message_from_completion_text
from deepseek_v4.generation import Generator, Request, Step, round_up
from deepseek_v4.loading import Loaded, open_model, simulate_devices
from deepseek_v4.requests import Prompt, RequestError, check_context, parse_line, read_lines, text_prompt
from deepseek_v4.results import ResultFile
from deepseek_v4.sampling import check_sampling

_CHUNK_STEP = 64  # chunks shorter than asked for are multiples of this: few shapes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Generate text with a DeepSeek-V4 checkpoint."""

    checkpoint: Path
    """Hugging Face directory, or Orbax directory made by scripts/convert_checkpoint.py."""
    input: Path | None = None
    """JSONL of requests: token_ids, prompt, or messages."""
    output: Path | None = None
    """JSONL of results, in input order; appended to as requests finish."""
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
    seed: int = 0
    """With the index of a request, decides its random numbers."""
    mesh: str | None = None
    """For example data=1,expert=4,tensor=2. Default: all devices, most of them along expert, some along tensor."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of activations."""
    simulate: str = ""
    """Parts of the released quantisation to simulate: any of kv,indexer,activations."""
    implementation: Literal["xla"] | None = None
    """xla runs every operation without kernels. Default: the kernels of the chip, where it has them."""
    prefill_chunk: int = 512
    """Prompt tokens per sequence and call."""
    batch_size: int = 8
    """Sequences that run together; rounded up to a multiple of the mesh's data axis."""
    max_length: int | None = None
    """Longest prompt plus continuation in tokens. Default: what the requests need, up to the model's context."""
    resume: bool = False
    """Continue an existing output: finished requests are kept, the rest is run."""
    strict_input: bool = False
    """Refuse to run anything if any input line is bad."""
    simulate_devices: int | None = None
    """Run on this many simulated CPU devices."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments)
    console = Console(stderr=True, soft_wrap=True)
    try:
        check_sampling(args.temperature, args.top_p, args.seed)
        for name in ("max_new_tokens", "prefill_chunk", "batch_size", "max_length"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        if (args.prompt is None) == (args.input is None):
            raise ValueError("give either --prompt or --input")
        if (args.input is None) != (args.output is None):
            raise ValueError("--input and --output go together")
        simulate_devices(args.simulate_devices)
        run = _run_prompt if args.input is None else _run_file
        return run(args, console)
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]; finished results are kept" if args.output else "[yellow]stopped[/]")
        return 130
    except (ValueError, OSError) as error:
        _complain(console, str(error))
    except jax.errors.JaxRuntimeError as error:
        _complain(console, f"the device failed: {error}\ntry a smaller --batch-size, --max-length or --prefill-chunk")
    return 1


def _complain(console: Console, text: str) -> None:
    console.print(f"error: {text}", style="red", markup=False, highlight=False)


def _open(args: Arguments) -> tuple[Loaded, int]:
    loaded = open_model(
        args.checkpoint,
        dtype=args.dtype,
        simulate=args.simulate,
        mesh=args.mesh,
        implementation=args.implementation,
    )
    context = loaded.model.config.max_position_embeddings
    return loaded, context if args.max_length is None else min(context, args.max_length)


def _request(args: Arguments, prompt: Prompt, index: int) -> Request:
    return Request(prompt.token_ids, args.max_new_tokens, args.temperature, args.top_p, args.seed, index)


def _generator(args: Arguments, loaded: Loaded, prompts: Sequence[Prompt], console: Console) -> Generator:
    """A compiled generator for all of ``prompts``: its shapes, and so its results, are those of an unresumed run."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    with console.status("restoring the checkpoint"):
        params = jax.block_until_ready(loaded.restore())
    generator = Generator(
        loaded.model,
        params,
        batch_size=min(args.batch_size, len(prompts)),
        max_length=longest + args.max_new_tokens,
        prefill_chunk=min(args.prefill_chunk, round_up(longest, _CHUNK_STEP)),
    )
    with console.status("compiling"):
        seconds = generator.compile()
    console.print(f"{loaded.description}; compiled in {seconds:.1f} s", highlight=False)
    return generator


def _rates(generator: Generator, chips: int) -> str:
    statistics = generator.statistics
    return (
        f"{statistics.decode_rate / chips:.1f} tokens/s per chip, {statistics.sequence_rate:.1f} tokens/s per sequence"
    )


def _summary(generator: Generator, chips: int) -> str:
    s = generator.statistics
    chip = "1 chip" if chips == 1 else f"{chips} chips"
    return (
        f"{s.prompt_tokens} prompt tokens ({s.prompt_rate / chips:.1f} per second and chip), "
        f"{s.new_tokens} new tokens: "
        f"{_rates(generator, chips)} ({chip})"
    )


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
    request = _request(args, prompt, 0)
    generator = _generator(args, loaded, [prompt], console)

    text = tokenizer.stream()
    reason = None
    if args.prompt_mode == "raw":
        sys.stdout.write(args.prompt or "")
    for step in generator.run([request]):
        reason = step.finish_reason
        shown = step.token_ids if reason != "stop" else ()
        sys.stdout.write(text.push(shown))
        sys.stdout.flush()
    sys.stdout.write(text.finish() + "\n")
    sys.stdout.flush()
    console.print(_summary(generator, loaded.chips), highlight=False)
    if reason == "error":
        raise RequestError(_NOT_FINITE)
    return 0


# --- a file ----------------------------------------------------------------------------------------------------------

_NOT_FINITE = "the model produced a logit that is not a finite number"


def _run_file(args: Arguments, console: Console) -> int:
    assert args.input is not None
    assert args.output is not None
    lines = read_lines(args.input)
    loaded, context = _open(args)
    prompts: dict[int, Prompt] = {}
    errors: dict[int, str] = {}
    for line in lines:
        try:
            prompt = parse_line(line.text, loaded.model.config.vocab_size, loaded.tokenizer)
            check_context(len(prompt.token_ids), args.max_new_tokens, context)
            prompts[line.index] = prompt
        except RequestError as error:
            errors[line.index] = f"{args.input}:{line.number}: {error}"
    if errors and args.strict_input:
        raise RequestError("\n".join(errors.values()))

    settings = {
        "checkpoint": str(args.checkpoint.resolve()),
        "dtype": args.dtype,
        "simulate": ",".join(sorted(loaded.model.execution.simulate)),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    with ResultFile(args.output, lines, settings, resume=args.resume) as results:
        if results.finished:
            console.print(f"{len(results.finished)} of {len(lines)} requests were finished earlier", highlight=False)
        for index, problem in errors.items():
            if index not in results.finished:
                _complain(console, problem)
                results.add(_error_record(index, (), "", problem))
        pending = [index for index in prompts if index not in results.finished]
        if pending:
            _run_pending(args, console, loaded, prompts, pending, results)
    if results.failed:
        console.print(f"{results.failed} of {len(lines)} requests failed", style="red", highlight=False)
    return 1 if results.failed else 0


def _run_pending(
    args: Arguments,
    console: Console,
    loaded: Loaded,
    prompts: dict[int, Prompt],
    indexes: Sequence[int],
    results: ResultFile,
) -> None:
    requests = [_request(args, prompts[index], index) for index in indexes]
    generator = _generator(args, loaded, list(prompts.values()), console)
    tokens: dict[int, list[int]] = {index: [] for index in indexes}
    with _progress(console) as progress:
        work = sum(len(request.token_ids) + request.max_new_tokens for request in requests)
        task = progress.add_task("generating", total=work, rates="", requests=f"0/{len(requests)}")
        done = 0
        for step in generator.run(requests):
            index = indexes[step.index]
            tokens[index].extend(step.token_ids)
            progress.update(task, advance=_progressed(step, requests[step.index], len(tokens[index])))
            if step.finish_reason is not None:
                done += 1
                results.add(_record(loaded, index, prompts[index], tokens.pop(index), step.finish_reason))
                _show(progress, task, generator, loaded.chips, f"{done}/{len(requests)}")
    console.print(_summary(generator, loaded.chips), highlight=False)


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


def _show(progress: Progress, task: TaskID, generator: Generator, chips: int, requests: str) -> None:
    progress.update(task, rates=_rates(generator, chips), requests=requests)


def _progressed(step: Step, request: Request, count: int) -> int:
    """Work units of a step: the prompt counts with the first token, what was not needed with the last."""
    advance = len(step.token_ids) + (len(request.token_ids) if count == len(step.token_ids) else 0)
    return advance + (request.max_new_tokens - count if step.finish_reason is not None else 0)


def _record(loaded: Loaded, index: int, prompt: Prompt, token_ids: list[int], reason: str) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    shown = token_ids[:-1] if reason == "stop" else token_ids
    text = None if tokenizer is None else tokenizer.decode(shown)
    if reason == "error":
        return _error_record(index, token_ids, text, _NOT_FINITE)
    record = {"index": index, "token_ids": token_ids, "text": text, "finish_reason": reason}
    if prompt.thinking_mode is not None and tokenizer is not None:
        completion = tokenizer.decode(token_ids)
        record["message"] = parse_message_from_completion_text(completion, prompt.thinking_mode, strict=False)
    return record


def _error_record(index: int, token_ids: Sequence[int], text: str | None, error: str) -> dict[str, Any]:
    return {"index": index, "token_ids": list(token_ids), "text": text, "finish_reason": "error", "error": error}


if __name__ == "__main__":
    sys.exit(main())
