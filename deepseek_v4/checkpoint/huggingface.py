"""Hugging Face directories: which tensors there are, what each becomes, and in which formats they are stored."""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.layout import (
    DISK_DTYPES,
    Item,
    disk_dtype,
    expert_name,
    is_draft_copy,
    is_expert,
    item_specs,
    items,
)
from deepseek_v4.checkpoint.names import Target, describe_naming, translate
from deepseek_v4.checkpoint.safetensors import DTYPES, Entry, Index, SafetensorsFile
from deepseek_v4.checkpoint.source import Leaf
from deepseek_v4.config import Config
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import ParameterSpec, Path

INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_TRAVELLING = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)

DSPARK_REASON = "DSpark drafter, structure undocumented"
COPY_REASON = "copy of {}, which the draft block shares with the main model"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A source tensor on its way to a leaf: where it is, and which of ``parts`` equal row ranges is meant."""

    file: SafetensorsFile
    entry: Entry
    part: int = 0
    parts: int = 1
    stacked: bool = False

    @property
    def row_dim(self) -> int:
        return 1 if self.stacked else 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.entry.shape)
        if self.parts > 1 and len(shape) > self.row_dim:
            shape[self.row_dim] //= self.parts
        return tuple(shape)

    def read(self, index: Index) -> np.ndarray:
        if self.parts > 1:
            offset = self.part * self.shape[self.row_dim]
            index = tuple(
                slice(s.start + offset, s.stop + offset) if dim == self.row_dim else s for dim, s in enumerate(index)
            )
        array = self.file.read(self.entry.name, index)
        if self.entry.dtype == "I8":
            return array.view(np.uint8)
        if self.entry.dtype == "I64":
            narrow = array.astype(np.int32)
            if not np.array_equal(narrow, array):
                raise CheckpointError(f"{self.file.path}: {self.entry.name}: values beyond 32 bits in a token table")
            return narrow
        return array


@dataclasses.dataclass(frozen=True)
class TensorLeaf:
    """A leaf that one source tensor holds."""

    tensor: _Tensor
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index) -> np.ndarray:
        """See ``source.Leaf``."""
        return self.tensor.read(index)

    @property
    def files(self) -> tuple[SafetensorsFile, ...]:
        """The files that are read."""
        return (self.tensor.file,)


@dataclasses.dataclass(frozen=True)
class ExpertLeaf:
    """A leaf whose rows along the first dim are one source tensor each."""

    tensors: tuple[_Tensor, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index) -> np.ndarray:
        """See ``source.Leaf``."""
        chosen = self.tensors[index[0]]
        if len(chosen) == 1:
            return chosen[0].read(index[1:])[None]
        out = np.empty((len(chosen), *(s.stop - s.start for s in index[1:])), self.dtype)
        for row, tensor in enumerate(chosen):
            out[row] = tensor.read(index[1:])
        return out

    @property
    def files(self) -> tuple[SafetensorsFile, ...]:
        """The files that are read."""
        return tuple({id(t.file): t.file for t in self.tensors}.values())


class HuggingFaceSource:
    """A directory of safetensors files with every tensor classified.

    Reads headers only. ``problems`` lists everything that keeps the directory from being a whole checkpoint (missing,
    unknown and twice-used tensors, wrong shapes and dtypes, missing files); ``dropped`` says why a tensor is not used.
    ``config`` describes the model that the tensors make up: without a drafter when there is none that can run.
    Raises ``CheckpointError`` when there is nothing to read and ``ConfigError`` for a bad ``config.json``.
    """

    def __init__(self, directory: str | FilePath):
        self.directory = FilePath(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.files = self._open_files()
        self.tensors: dict[str, _Tensor] = {}
        for file in self.files:
            for entry in file.entries.values():
                if entry.name in self.tensors:
                    first = self.tensors[entry.name].file.path.name
                    self.problems.append(f"{entry.name}: stored twice, in {first} and {file.path.name}")
                    continue
                self.tensors[entry.name] = _Tensor(file, entry)
        released_config = Config.from_file(self.directory)
        self._json = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        self.dropped: dict[str, str] = {}
        self.config = self._resolve_drafter(released_config)
        self.draft_copies: tuple[str, ...] = ()
        self._classify()

    # --- the Source protocol ---------------------------------------------------------------------------------------

    def leaves(self, item: Item) -> Mapping[Path, Leaf]:
        """The leaves of one item by path."""
        return self._leaves[item.name]

    def config_json(self) -> dict[str, Any]:
        """``config.json``, without a draft layer when the checkpoint has none that can run."""
        data = dict(self._json)
        if self.config.drafter is None:
            data = {key: value for key, value in data.items() if not key.startswith("dspark_")}
            if "num_nextn_predict_layers" in data:
                data["num_nextn_predict_layers"] = 0
            if "compress_ratios" in data:
                data["compress_ratios"] = list(self.config.compress_ratios)
        return data

    def travelling_files(self) -> Mapping[str, bytes]:
        """Tokenizer and other small files by name, and ``config.json`` as it is if it describes the whole model."""
        found = {}
        for pattern in _TRAVELLING:
            for path in sorted(self.directory.glob(pattern)):
                if path.is_file():
                    found[path.name] = path.read_bytes()
        if self.config_json() == self._json:
            found["config.json"] = (self.directory / "config.json").read_bytes()
        return found

    def fingerprint(self, item: Item) -> list[list]:
        """Name, size, time of change and header digest of every file that an item is read from."""
        files = {file.path.name: file for leaf in self._leaves[item.name].values() for file in leaf.files}
        return [[name, file.size_bytes, file.modified_ns, file.header_digest] for name, file in sorted(files.items())]

    def require_complete(self) -> None:
        """Raises ``CheckpointError`` with every problem."""
        if self.problems:
            raise CheckpointError(f"{self.directory}: not a complete checkpoint", self.problems)

    def close(self) -> None:
        """Closes the files; later reads open them again."""
        for file in self.files:
            file.close()

    # --- files -------------------------------------------------------------------------------------------------------

    def _open_files(self) -> list[SafetensorsFile]:
        present = sorted(path.name for path in self.directory.glob("*.safetensors"))
        index_path = self.directory / INDEX_FILE
        weight_map: dict[str, str] = {}
        if index_path.exists():
            weight_map = _read_index(index_path)
            expected = sorted(set(weight_map.values()))
            self.problems += [
                f"{name}: file not named by {INDEX_FILE}" for name in sorted(set(present) - set(expected))
            ]
        else:
            expected = sorted({*present, *_numbered(present)})
        if not expected:
            raise CheckpointError(f"{self.directory}: no safetensors files; expected a Hugging Face directory")
        files, failed = [], set()
        for name in expected:
            try:
                files.append(SafetensorsFile(self.directory / name))
            except FileNotFoundError:
                failed.add(name)
                count = sum(file == name for file in weight_map.values())
                self.problems.append(f"{name}: file missing" + (f" ({count} tensors)" if count else ""))
            except CheckpointError as error:
                failed.add(name)
                self.problems += [str(error)]
        self.unreadable = frozenset(failed)
        where = {name: file.path.name for file in files for name in file.entries}
        if weight_map:
            for name, filename in weight_map.items():
                if filename not in failed and where.get(name) != filename:
                    self.problems.append(f"{name}: {INDEX_FILE} places it in {filename}, where it is not")
            self.problems += [
                f"{name}: in {where[name]} but not in {INDEX_FILE}" for name in where if name not in weight_map
            ]
        self._announced = weight_map.keys() | where.keys()
        return files

    def _resolve_drafter(self, config: Config) -> Config:
        draft = [name for name in self._announced if name.removeprefix("model.").startswith("mtp.")]
        classic = any(re.search(r"\.(e_proj|h_proj|enorm|hnorm)\.", name) for name in draft)
        if config.drafter is None or classic:
            return config
        if draft:
            self.dropped |= {name: DSPARK_REASON for name in draft if name in self.tensors}
        elif self.unreadable:
            return config
        else:
            self.notes.append("config.json announces a draft layer but the files hold none: converted without it")
        return dataclasses.replace(
            config, drafter=None, num_nextn_predict_layers=0, compress_ratios=config.layer_ratios
        )

    # --- classification ----------------------------------------------------------------------------------------------

    def _classify(self) -> None:
        namings: set[str] = set()
        # Every leaf that some format of the release has; which of them exist follows from the formats found.
        slots: dict[str, tuple[Item, Path, int | None]] = {}
        stacks: dict[str, tuple[Item, Path]] = {}
        everything = Storage("fp4", "fp8")
        described = {item.name: item_specs(item, self.config, everything) for item in items(self.config)}
        for item in items(self.config):
            for path, spec in described[item.name].items():
                if is_expert(path):
                    stacks[item.prefix + ".".join(path)] = (item, path)
                    for expert in range(spec.shape[0]):
                        slots[expert_name(item.prefix, path, expert)] = (item, path, expert)
                else:
                    slots[item.prefix + ".".join(path)] = (item, path, None)

        used: dict[tuple[str, Path], dict[int | None, list[_Tensor]]] = defaultdict(lambda: defaultdict(list))
        votes: dict[str, Counter[str]] = defaultdict(Counter)
        copies = []
        for name, tensor in self.tensors.items():
            if name in self.dropped:
                continue
            targets, naming = translate(name)
            if naming != "released" or name in slots:
                namings.add(naming)
            for target in targets:
                slot = self._slot(target, slots, stacks)
                if slot is None:
                    if self.config.drafter == "mtp" and is_draft_copy(target.name):
                        copied = "head.weight" if target.name.endswith("head.weight") else "embed.weight"
                        self.dropped[name] = COPY_REASON.format(copied)
                        copies.append((name, target.name))
                    else:
                        self.problems.append(
                            f"{name}: unknown tensor ({tensor.entry.dtype} {list(tensor.entry.shape)})"
                        )
                    break
                item, path, row = slot
                part = tensor
                if target.stacked:
                    part = dataclasses.replace(tensor, part=target.part, parts=target.parts, stacked=True)
                used[item.name, path][row].append(part)
                votes[_kind(path, described[item.name][path])][tensor.entry.dtype] += 1
        self.naming = describe_naming(namings)
        self.storage = self._decide_storage(votes)
        self.draft_copies = tuple(sorted(target for _, target in copies))
        self._copy_sources = {target: name for name, target in copies}
        self._leaves: dict[str, dict[Path, Any]] = {}
        self.missing: list[str] = []
        for item in items(self.config):
            self._leaves[item.name] = self._fill(item, described[item.name], used)
        self.missing = collapse_experts(self.missing)
        self.problems += [f"{name}: missing" for name in self.missing]
        self.problems = collapse_experts(self.problems)

    @staticmethod
    def _slot(target: Target, slots, stacks) -> tuple[Item, Path, int | None] | None:
        if target.stacked:
            return (*stacks[target.name], None) if target.name in stacks else None
        return slots.get(target.name)

    def _fill(self, item: Item, possible: Mapping[Path, ParameterSpec], used) -> dict[Path, Any]:
        specs = item_specs(item, self.config, self.storage)
        leaves: dict[Path, Any] = {}
        for path in possible:
            found = used.get((item.name, path), {})
            tensors = [tensor for several in found.values() for tensor in several]
            if path not in specs:
                self.problems += [
                    f"{tensor.entry.name}: unexpected: {self._format(path)} are stored as "
                    f"{self.storage.experts if is_expert(path) else self.storage.linears}, which has no scales"
                    for tensor in tensors
                ]
                continue
            spec = specs[path]
            good = self._check_tensors(item, path, spec, found)
            if good:
                dtype = np.dtype(spec.dtype)
                whole = found.get(None)
                if whole:
                    leaves[path] = TensorLeaf(whole[0], spec.shape, dtype)
                else:
                    rows = tuple(found[expert][0] for expert in range(spec.shape[0]))
                    leaves[path] = ExpertLeaf(rows, spec.shape, dtype)
        return leaves

    def _check_tensors(self, item: Item, path: Path, spec: ParameterSpec, found) -> bool:
        before = len(self.problems) + len(self.missing)
        name = item.prefix + ".".join(path)
        experts = range(spec.shape[0]) if is_expert(path) else ()
        if is_expert(path) and None in found and len(found) > 1:
            several = [tensor.entry.name for tensors in found.values() for tensor in tensors]
            self.problems.append(f"{name}: given both stacked and per expert: {', '.join(sorted(several))}")
        for expert, tensors in found.items():
            shape = spec.shape if expert is None else spec.shape[1:]
            if len(tensors) > 1:
                names = ", ".join(sorted(tensor.entry.name for tensor in tensors))
                target = name if expert is None else expert_name(item.prefix, path, expert)
                self.problems.append(f"{target}: given {len(tensors)} times: {names}")
            for tensor in tensors:
                rows = tensor.entry.shape[tensor.row_dim] if len(tensor.entry.shape) > tensor.row_dim else 0
                if tensor.shape != shape or rows % tensor.parts:
                    expected = list(shape)
                    if tensor.parts > 1:
                        expected[tensor.row_dim] *= tensor.parts
                    self.problems.append(
                        f"{tensor.entry.name}: expected shape {expected}, found {list(tensor.entry.shape)}"
                    )
                if tensor.entry.dtype != disk_dtype(spec):
                    self.problems.append(
                        f"{tensor.entry.name}: expected dtype {disk_dtype(spec)}, found {tensor.entry.dtype}"
                    )
        if not is_expert(path) and not found:
            self.missing.append(name)
        elif is_expert(path) and None not in found:
            self.missing += [expert_name(item.prefix, path, e) for e in experts if e not in found]
        return len(self.problems) + len(self.missing) == before

    @staticmethod
    def _format(path: Path) -> str:
        return "routed experts" if is_expert(path) else "linears"

    def _decide_storage(self, votes: Mapping[str, Counter]) -> Storage:
        """The formats the tensors are in; where a kind is mixed, the most common one, and a problem."""

        def choose(kind: str, legal: Mapping[str, str], default: str) -> str:
            counts = Counter({dtype: n for dtype, n in votes.get(kind, {}).items() if dtype in legal})
            if not counts:
                return default
            if len(votes[kind]) > 1:
                found = ", ".join(f"{dtype} x {count}" for dtype, count in votes[kind].most_common())
                self.problems.append(f"{kind}: mixed formats ({found}); one checkpoint stores a kind in one format")
            return legal[counts.most_common(1)[0][0]]

        plain = {"BF16": "bfloat16", "F32": "float32"}
        experts = choose("routed experts", {"I8": "fp4", "F8_E4M3": "fp8", **plain}, "fp4")
        linears = choose("linears", {"F8_E4M3": "fp8", **plain}, "fp8")
        # FP4 scales are always E8M0, so they say nothing about those of FP8 weights.
        kinds = [k for k, fmt in (("expert scales", experts), ("linear scales", linears)) if fmt == "fp8"]
        merged: Counter[str] = sum((votes.get(kind, Counter()) for kind in kinds), Counter())
        votes = {**votes, "FP8 scales": merged}
        scales = choose("FP8 scales", {"F8_E8M0": "float8_e8m0fnu", "F32": "float32"}, "float8_e8m0fnu")
        return Storage(
            experts, linears, scales, choose("matrices", plain, "bfloat16"), choose("norms", plain, "bfloat16")
        )

    # --- values ------------------------------------------------------------------------------------------------------

    def differing_copies(self) -> list[str]:
        """The draft copies whose bytes are not those of the tensor they repeat; reads both."""
        shell = self._leaves["shell"]
        differing = []
        for target, name in self._copy_sources.items():
            original = shell[("head" if target.endswith("head.weight") else "embed", "weight")]
            copy = self.tensors[name]
            same = copy.shape == original.shape and copy.entry.dtype == DISK_DTYPES[original.dtype]
            rows = 4096
            for start in range(0, original.shape[0] if same else 0, rows):
                index = (slice(start, min(start + rows, original.shape[0])), slice(0, original.shape[1]))
                same = same and copy.read(index).tobytes() == original.read(index).tobytes()
            if not same:
                differing.append(target)
        return differing


def _kind(path: Path, spec: ParameterSpec) -> str:
    if spec.role == "scale":
        return "expert scales" if is_expert(path) else "linear scales"
    if is_expert(path):
        return "routed experts"
    return {"linear": "linears", "norm": "norms", "matrix": "matrices", "embedding": "matrices"}.get(spec.role, "other")


def _read_index(path: FilePath) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in weight_map.items()):
            raise TypeError("weight_map must map tensor names to file names")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors shards: {error!r}") from None
    return weight_map


def _numbered(present: Sequence[str]) -> Iterable[str]:
    """The names that a numbered set of shards should have."""
    for name in present:
        match = _SHARD_NAME.fullmatch(name)
        if match:
            stem, digits, count = match.groups()
            for number in range(1, int(count) + 1):
                yield f"{stem}-{number:0{len(digits)}d}-of-{count}.safetensors"


_EXPERT_LINE = re.compile(r"(.*?ffn\.experts\.|.*?mlp\.experts\.)(\d+)(\..*)")


def collapse_experts(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the number of an expert alone become one, with ranges of numbers; the order is kept."""
    grouped: dict[tuple[str, str], list[int]] = {}
    order: list[Any] = []
    for line in lines:
        match = _EXPERT_LINE.fullmatch(line)
        if not match:
            order.append(line)
            continue
        key = (match[1], match[3])
        if key not in grouped:
            grouped[key] = []
            order.append(key)
        grouped[key].append(int(match[2]))
    return [entry if isinstance(entry, str) else f"{entry[0]}{_ranges(grouped[entry])}{entry[1]}" for entry in order]


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "}"


def open_huggingface(directory: str | FilePath) -> HuggingFaceSource:
    """A complete checkpoint in a Hugging Face directory; raises ``CheckpointError`` listing every problem."""
    source = HuggingFaceSource(directory)
    source.require_complete()
    return source


__all__ = ["DTYPES", "HuggingFaceSource", "collapse_experts", "open_huggingface"]
