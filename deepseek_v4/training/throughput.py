"""How fast a run is: tokens per second, and the share of the machine's peak that the model's own products use."""

import dataclasses
import time
from collections import deque

import jax
import jax.numpy as jnp

from deepseek_v4.config import Config
from deepseek_v4.planning.flops import token_terms
from pallas_kernels.targets import chip_of_kind


def training_operations(config: Config, length: int, *, draft: bool = True, weights: bool = True) -> float:
    """Operations of all matrix products (a multiply-add is two) of training on one token of a row of ``length``.

    Forward products as ``planning.flops`` lists them, averaged over the positions of the row, and as many again in the
    backward pass for the gradient of activations and, with ``weights``, for that of the weights (adapters have none to
    speak of). What is recomputed is not counted, nor is the optimizer; rows of several documents attend to less.
    """
    count = min(length, 16)
    contexts = [max(1, round(length * (i + 0.5) / count)) for i in range(count)]
    forward = sum(term.operations for context in contexts for term in token_terms(config, context, draft=draft)) / count
    return forward * (3 if weights else 2)


@dataclasses.dataclass(frozen=True)
class Peak:
    """Operations per second that all devices of a run could do at most, and where the figure is from."""

    operations: float
    source: str


def peak(dtype: str) -> Peak | None:
    """The published peak of all devices for matmuls in ``dtype``, or what this CPU was just seen to do in float32.

    None for an accelerator that is not in ``pallas_kernels.targets``. The CPU figure takes half a second to measure;
    simulated devices share one CPU, and each process is taken to have its own.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        found = _cpu_ceiling() * jax.process_count()
        return Peak(found, f"{found / 1e9:.0f} GFLOP/s, float32 matmuls measured here at the start")
    chip = chip_of_kind(device.device_kind)
    if chip is None:
        return None
    found = chip.peak_for(dtype) * jax.device_count()
    return Peak(found, f"{found / 1e12:.0f} TFLOP/s, published for {jax.device_count()} x {chip.name} in {dtype}")


def _cpu_ceiling(size: int = 1024, repeats: int = 5) -> float:
    """The best of a few matmuls, in operations per second."""
    matrix = jnp.ones((size, size), jnp.float32)
    run = jax.jit(lambda a: a @ a)
    run(matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


class Meter:
    """Tokens per second over the last ``window`` steps."""

    def __init__(self, window: int = 20):
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)
        self._last: float | None = None

    def tick(self, tokens: float) -> float | None:
        """A step of so many tokens has ended: its seconds, or None if its beginning is not known."""
        now = time.perf_counter()
        seconds = None if self._last is None else now - self._last
        self._last = now
        if seconds is not None:
            self._steps.append((tokens, seconds))
        return seconds

    def pause(self) -> None:
        """Something else than steps takes the time now: the next step's beginning is not known."""
        self._last = None

    @property
    def rate(self) -> float | None:
        """Tokens per second, if a step was timed."""
        seconds = sum(s for _, s in self._steps)
        return sum(t for t, _ in self._steps) / seconds if seconds else None
