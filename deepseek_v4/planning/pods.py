"""Pod files: a planned mesh and workload as a file that the scripts take their options from."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_v4.planning.planner import Plan
from deepseek_v4.planning.workload import Setting

OPTION = "--pod"
"""What a script is given a pod file with."""


class PodFileError(ValueError):
    """A pod file that cannot be read, or that has nothing for a script."""


def pod_file(model: str, plan: Plan) -> dict[str, Any]:
    """A plan as a pod file: what was asked for, the options of each script that runs it, and what was predicted."""
    setting, work = plan.setting, plan.setting.workload
    options: dict[str, dict[str, Any]] = {}
    if work.phase == "train":
        options["train"] = {
            "mesh": setting.mesh_text,
            "fsdp": True,
            "remat": "full",
            "mode": "full" if work.lora is None else "lora",
            "data.batch-size": work.batch,
            "data.sequence-length": work.context,
        }
        if work.lora is not None:
            options["train"]["lora.rank"] = work.lora
        options["train"] |= _travel(setting)
    else:
        options["generate"] = {
            "mesh": setting.mesh_text,
            "batch-size": work.batch,
            "max-length": work.context,
            "prefill-chunk": work.chunk,
        }
        if work.cache == "fp8":
            options["generate"]["cache"] = "published"
        options["generate"] |= _travel(setting)
    return {
        "model": model,
        "topology": setting.topology.name,
        "devices": setting.topology.devices,
        "workload": dataclasses.asdict(work),
        "options": options,
        "predicted": {
            "argument_bytes": plan.memory.argument_bytes,
            "peak_bytes": plan.memory.peak,
            "usable_bytes": plan.memory.usable,
            "least_seconds_per_step": plan.seconds,
        },
    }


def _travel(setting: Setting) -> dict[str, Any]:
    if not setting.expert_parallel:
        return {}
    precision = setting.workload.expert_precision
    return {"expert-parallel": True} | ({} if precision == "exact" else {"expert-precision": precision})


def with_pod(arguments: Sequence[str], script: str) -> list[str]:
    """Command-line arguments with ``--pod FILE`` replaced by the file's options for ``script``.

    They come first, so that options given beside ``--pod`` win. Raises ``PodFileError`` for a file that is missing, is
    not a pod file, or has no options for the script.
    """
    rest, path = [], None
    given = iter(arguments)
    for word in given:
        if word == OPTION or word.startswith(OPTION + "="):
            value = word.partition("=")[2] if "=" in word else next(given, None)
            if not value:
                raise PodFileError(f"{OPTION}: expected a file, found nothing")
            path = Path(value)
        else:
            rest.append(word)
    if path is None:
        return rest
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        options = written["options"]
    except FileNotFoundError:
        raise PodFileError(f"{path}: no such file; scripts/plan.py --write makes one") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PodFileError(f"{path}: not a pod file ({type(error).__name__}: {error})") from None
    if script not in options:
        raise PodFileError(f"{path}: has options for {', '.join(options) or 'nothing'}, not for {script}")
    words = []
    for name, value in options[script].items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words + rest
