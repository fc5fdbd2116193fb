"""One run on several processes: every process takes the same decisions; process 0 reads and writes for all.

Each process of ``jax.distributed`` runs the same engine over the same requests and sees the same new tokens, so the
engines stay in step by themselves. What only one process can know, it tells the others here.
"""

import json
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_v4.distributed import is_main


def on_main(function: Callable[[], Any]) -> Any:
    """What ``function`` returns on process 0 (JSON data), on every process; its ``ValueError`` or ``OSError`` too."""
    if jax.process_count() == 1:
        return function()
    told: dict[str, Any] = {}
    if is_main():
        try:
            told = {"value": function()}
        except (ValueError, OSError) as error:
            told = {"error": str(error)}
    data = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = multihost_utils.broadcast_one_to_all(data if is_main() else np.zeros(size, np.uint8))
    told = json.loads(np.asarray(data, np.uint8).tobytes())
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


class Interruption:
    """Whether the run was asked to stop (SIGINT or SIGTERM, at any process): all processes stop at the same step.

    A second signal ends the process at once. Use as a context manager; outside the main thread signals are left alone.
    """

    def __init__(self, every: int = 16):
        self._every = every
        self._asked = False
        self._checks = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:
            pass
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def requested(self) -> bool:
        """Whether to stop now; on several processes they agree on it every few calls, which all must make alike."""
        if jax.process_count() == 1:
            return self._asked
        self._checks += 1
        if self._checks % self._every:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.bool_(self._asked))))
