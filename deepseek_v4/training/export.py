"""The end of a run as a directory that others load: a Hugging Face checkpoint, or adapters."""

import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_v4.checkpoint import ParamsSource, Share, to_hf
from deepseek_v4.distributed import is_main
from deepseek_v4.model import Params
from deepseek_v4.nn.variables import Storage
from deepseek_v4.training import lora
from deepseek_v4.training.quantisation import export_params
from deepseek_v4.training.run import Run
from deepseek_v4.training.run_config import ConfigurationError


def check_target(run: Run, complete: bool) -> None:
    """Raises ``ConfigurationError`` for an export that could not be written, before anything is trained.

    ``complete`` says whether the run has reached its end before: then what is there may be its export.
    """
    path = run.config.export
    if path is not None and path.exists() and not (complete and path.is_dir()):
        raise ConfigurationError(f"export: {path} exists already; delete it, or choose another directory")


def export(run: Run, params: Params) -> str:
    """Writes what ``config.export`` asks for, and says what in one line.

    ``params`` are all of the model's. Every process calls this and process 0 writes; the directory appears under its
    name when it is complete, and one that is there already is left alone.
    """
    config, directory = run.config, run.config.export
    assert directory is not None
    if directory.exists():
        return f"{directory} is there already; delete it to export again"
    temporary = directory.with_name(f".{directory.name}.unfinished")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
    if config.mode == "lora":
        lora.save_adapters(temporary, run.model, params)
        said = (
            f"wrote {directory}: adapters of rank {config.lora.rank}; to merge them into the weights: "
            f"scripts/convert_checkpoint.py merge {config.model} {directory} TARGET"
        )
    else:
        model, stored = export_params(run.model, params, config.export_storage)
        stored = _on_main(stored)
        if is_main():
            files = {name: data for name, data in run.source.travelling_files().items() if name != "config.json"}
            described = config_json(run.source.config_json(), model.storage)
            to_hf(ParamsSource(model, stored, described, files), temporary, share=Share())
        storage = config.export_storage
        said = f"wrote {directory}: experts in {storage.experts}, linears in {storage.linears}, {storage.matrices}"
    if is_main():
        os.replace(temporary, directory)
    return said


def config_json(data: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """A model's ``config.json``, saying what weights in ``storage`` need said."""
    data = dict(data)
    if storage.packed:
        data["expert_dtype"] = storage.experts
    else:
        for name in ("expert_dtype", "quantization_config"):
            data.pop(name, None)
    return data


def _on_main(tree: Any) -> Any:
    """Arrays of all processes' devices as arrays of process 0 (in host memory, leaf by leaf)."""
    if jax.process_count() == 1:
        return tree
    cpu = jax.local_devices(backend="cpu")[0]

    def fetch(array: jax.Array) -> jax.Array | None:
        whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        return jax.device_put(np.asarray(whole), cpu) if is_main() else None

    return jax.tree.map(fetch, tree)
