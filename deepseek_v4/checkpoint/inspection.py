"""What is in a checkpoint directory, from headers alone."""

import dataclasses
import math
from collections import Counter
from pathlib import Path as FilePath

from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.huggingface import HuggingFaceSource
from deepseek_v4.checkpoint.layout import disk_dtype, is_expert, item_specs, item_tensors, items
from deepseek_v4.checkpoint.orbax_directory import MANIFEST_FILE, OrbaxSource
from deepseek_v4.checkpoint.restore import is_orbax_directory
from deepseek_v4.checkpoint.safetensors import DTYPES
from deepseek_v4.config import Config
from deepseek_v4.layer_spec import layer_specs
from deepseek_v4.nn.variables import Storage


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A directory's contents: tensors as the release counts them, and what keeps it from being complete.

    ``dtypes`` maps an element type to (tensors, elements, bytes); ``parameters`` counts logical weights (two per FP4
    byte, no scales, no token tables), with the draft layer and without.
    """

    directory: FilePath
    format: str
    naming: str
    files: int
    config: Config
    storage: Storage
    tensors: int
    draft_tensors: int
    dtypes: dict[str, tuple[int, int, int]]
    parameters: int
    parameters_without_draft: int
    layer_kinds: dict[str, int]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the directory can be loaded."""
        return not self.problems

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size for _, _, size in self.dtypes.values())

    @property
    def elements(self) -> int:
        """Stored elements of all tensors (an FP4 pair is one)."""
        return sum(count for _, count, _ in self.dtypes.values())


def inspect_checkpoint(directory: str | FilePath) -> Inspection:
    """Looks at a Hugging Face or Orbax directory without reading a tensor.

    Incomplete directories are described too, with everything that is wrong in ``problems``; raises
    ``CheckpointError`` or ``ConfigError`` when there is too little to describe.
    """
    directory = FilePath(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    source: HuggingFaceSource | OrbaxSource
    notes: tuple[str, ...] = ()
    if is_orbax_directory(directory):
        if not (directory / MANIFEST_FILE).exists():
            finished = sorted(p.name for p in (directory / "items").iterdir() if ".orbax-checkpoint-tmp" not in p.name)
            expected = len(items(Config.from_file(directory))) if (directory / "config.json").exists() else "?"
            raise CheckpointError(
                f"{directory}: an unfinished conversion: {len(finished)} of {expected} items are there; "
                "run the same to-orbax command to finish it"
            )
        source = OrbaxSource(directory)
        found = [
            (t.name, t.dtype, t.shape)
            for item in items(source.config)
            if item.name in source.manifest["items"]
            for t in item_tensors(item, source.config, source.storage)
        ]
        naming, dropped, files = "-", source.manifest["dropped"], len(source.manifest["items"])
    else:
        source = HuggingFaceSource(directory)
        found = [(name, t.entry.dtype, t.entry.shape) for name, t in source.tensors.items()]
        naming, dropped, files = source.naming, source.dropped, len(source.files)
        notes = tuple(source.notes)
    dtypes: dict[str, tuple[int, int, int]] = {}
    for _, dtype, shape in found:
        count, elements, size = dtypes.get(dtype, (0, 0, 0))
        number = math.prod(shape)
        dtypes[dtype] = (count + 1, elements + number, size + number * DTYPES[dtype].itemsize)
    main, draft = logical_parameters(source.config, source.storage)
    return Inspection(
        directory=directory,
        format="Orbax" if isinstance(source, OrbaxSource) else "Hugging Face",
        naming=naming,
        files=files,
        config=source.config,
        storage=source.storage,
        tensors=len(found),
        draft_tensors=sum(name.removeprefix("model.").startswith("mtp.") for name, _, _ in found),
        dtypes=dict(sorted(dtypes.items(), key=lambda pair: -pair[1][2])),
        parameters=main + draft,
        parameters_without_draft=main,
        layer_kinds=dict(Counter(spec.kind for spec in layer_specs(source.config))),
        dropped=dict(dropped),
        notes=notes,
        problems=tuple(source.problems),
    )


def logical_parameters(config: Config, storage: Storage) -> tuple[int, int]:
    """Weights of the main model and of its draft layer as a model card counts them: no scales, no token tables."""
    counts = [0, 0]
    for item in items(config):
        for path, spec in item_specs(item, config, storage).items():
            if spec.role in ("scale", "token_table"):
                continue
            packed = 2 if is_expert(path) and disk_dtype(spec) == "I8" else 1
            counts[item.draft] += math.prod(spec.shape) * packed
    return counts[0], counts[1]
