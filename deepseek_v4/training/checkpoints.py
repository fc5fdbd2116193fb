"""Checkpoints of a run: Orbax, written while training goes on, complete or absent."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_v4.checkpoint.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one run in ``directory``, one folder per step, the last ``keep`` of them (None: all).

    A state is any pytree of arrays; it is stored flat, by path. A folder gets its name only when everything in it is
    written, so that a run killed at any moment leaves complete checkpoints and nothing that looks like one; what it
    leaves unfinished the next run removes. Every process of a run has one of these, on the same directory, and calls
    the same methods.
    """

    def __init__(self, directory: str | Path, keep: int | None = 3):
        # Orbax reports every step of every save at the info level.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.directory = Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        handlers: dict[str, Any] = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or of one that is being written by this run."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all of them, in order."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Begins to save; returns when ``state`` may be overwritten or donated. ``meta`` is JSON data.

        ``step`` must be above all that are there. An error of the previous save, which went on in the background, is
        raised here (and in ``wait``).
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(_flat(state)), meta=ocp.args.JsonSave(dict(meta)))
        if not self._manager.save(step, args=items):
            raise CheckpointError(f"{self.path(step)}: not saved; expected a step above {self.latest}")

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON data saved with a step; raises ``CheckpointError`` if it cannot be read."""
        return self._restore(step, "meta", ocp.args.JsonRestore())

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of ``step`` in the structure, dtypes and layout of ``abstract``, whatever mesh saved it.

        ``abstract`` are ShapeDtypeStructs with shardings. Raises ``CheckpointError`` if the arrays are not those that
        it describes, or cannot be read.
        """
        wanted = _flat(abstract)
        try:
            found = dict(self._manager.item_metadata(step)["state"])
        except Exception as error:
            raise self._unreadable(step, error) from error
        stored = {name: (tuple(a.shape), str(a.dtype)) for name, a in found.items()}
        expected = {name: (tuple(a.shape), str(a.dtype)) for name, a in wanted.items()}
        different = sorted(n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n))
        if different:
            raise CheckpointError(
                f"{self.path(step)}: not a checkpoint of this configuration",
                [f"{n}: this run has {expected.get(n)}, the checkpoint {stored.get(n)}" for n in different],
            )
        restored = self._restore(step, "state", ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    def wait(self) -> None:
        """Waits until everything begun is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _restore(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # of many types: file systems, formats, threads
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        earlier = [str(s) for s in self.steps if s < step]
        hint = f"to go on from step {earlier[-1]}, delete it" if earlier else "there is none before it"
        return CheckpointError(f"{self.path(step)}: cannot be read ({type(error).__name__}: {error}); {hint}")


def _flat(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
