"""What a ``TrainConfig`` means on the devices there are: programs, data, and the parameters to begin with."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from deepseek_v4.checkpoint import CheckpointError, open_source
from deepseek_v4.checkpoint.restore import Checkpoint
from deepseek_v4.checkpoint.source import Source
from deepseek_v4.data import Dataset, open_data
from deepseek_v4.default_model import RandomSource
from deepseek_v4.distributed import batch_share
from deepseek_v4.execution import Execution
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import MASTER
from deepseek_v4.sharding import MeshError, Placement, make_mesh
from deepseek_v4.tokenizer import Tokenizer
from deepseek_v4.training import lora
from deepseek_v4.training.checkpoints import Checkpoints
from deepseek_v4.training.masters import to_masters
from deepseek_v4.training.run_config import ConfigurationError, TrainConfig, differences, to_json
from deepseek_v4.training.step import Program, State, random_params


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, ready to begin or to go on.

    ``stages`` are (first step, program): one, or two if quantisation begins on the way; a state fits all of them.
    ``source`` is the model directory, ``tokenizer`` None if it has none.
    """

    config: TrainConfig
    stages: tuple[tuple[int, Program], ...]
    data: Dataset
    source: Source
    tokenizer: Tokenizer | None

    def program(self, step: int) -> Program:
        """The program of a step; at the end of the run, that of the last one."""
        return [program for first, program in self.stages if first <= step][-1]

    @property
    def model(self) -> Model:
        """The model that is trained, without quantisation."""
        return dataclasses.replace(
            self.stages[0][1].model, execution=dataclasses.replace(self.stages[0][1].model.execution, quantise=None)
        )

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Rows of a global batch, tokens of a row."""
        return self.config.data.batch_size, self.config.data.sequence_length

    @property
    def share(self) -> tuple[int, int]:
        """(index, count): this process's part of every batch."""
        return batch_share(self.model.execution.placement)

    @property
    def chips(self) -> int:
        """Devices that work together."""
        placement = self.model.execution.placement
        return 1 if placement is None else placement.mesh.size

    def initial_params(self) -> Params:
        """The parameters before the first step: random, or the checkpoint's; with new adapters in mode lora."""
        model, seed = self.model, self.config.seed
        if self.config.weights == "random":
            return random_params(model, seed)
        checkpoint = Checkpoint(self.config.model, self.source)
        if self.config.mode == "lora":
            return lora.attach(lora.load_base(checkpoint, model), lora.init_adapters(model, seed))
        return to_masters(checkpoint.load(dataclasses.replace(model, storage=checkpoint.storage)), model)

    # --- what a checkpoint says about itself --------------------------------------------------------------------------

    def meta(self, step: int, frozen: str) -> dict[str, Any]:
        """What to save beside the state of a run whose next step is ``step``; ``frozen`` is the digest of the rest."""
        return {
            "data": self.data.state(step),
            "config": to_json(self.config),
            "model": self.model.config.to_dict(),
            "frozen": frozen,
        }

    def check_continues(self, meta: Mapping[str, Any], accept_changes: bool = False) -> list[str]:
        """Raises ``ConfigurationError`` or ``DataError`` if this run would not go on as the one that saved ``meta``.

        Returns what differs and is accepted, one line each: what rounds differently, and with ``accept_changes`` all
        of the configuration.
        """
        altering, rounding = differences(meta["config"], self.config)
        ours, theirs = (json.loads(json.dumps(model)) for model in (self.model.config.to_dict(), meta["model"]))
        model = [f"model.{k}: {theirs.get(k)!r} so far, {v!r} now" for k, v in ours.items() if theirs.get(k) != v]
        refused = model + ([] if accept_changes else altering)
        if refused:
            listed = "\n".join(f"  {line}" for line in refused)
            raise ConfigurationError(
                f"{self.config.output}: the configuration is not the one this run began with:\n{listed}\n"
                "set it back, choose another output directory, or go on under the new one with --accept-changes"
            )
        self.data.restore(meta["data"])
        return [*altering, *(f"{line} (rounds differently)" for line in rounding)]

    def restore(self, checkpoints: Checkpoints, step: int) -> tuple[State, Params, str]:
        """(state, frozen, its digest) of a saved step; raises ``CheckpointError``."""
        program = self.program(step)
        _, _, frozen = program.split(self.initial_params())
        found = digest(frozen)
        if found != checkpoints.meta(step)["frozen"]:
            raise CheckpointError(
                f"{self.config.model}: the weights that are not trained are others than those this run began with"
            )
        return checkpoints.restore(step, program.abstract_state(self.batch_shape)), frozen, found


def open_run(config: TrainConfig, one_pass: bool = False) -> Run:
    """Reads headers and documents and decides what runs where; no weights yet. ``one_pass`` as in ``open_data``.

    Raises ``ConfigurationError``, ``CheckpointError``, ``ConfigError``, ``DataError``, ``MeshError``,
    ``TokenizerError`` or ``ValueError``, each saying what was wrong where.
    """
    if config.weights == "random":
        source: Source = RandomSource(config.model)
    else:
        try:
            source = open_source(config.model)
        except CheckpointError as error:
            raise CheckpointError(f"model: {error}; to begin without a checkpoint set weights 'random'") from error
    placement = _placement(config)
    execution = Execution(
        config.dtype,
        frozenset(config.simulate),
        placement=placement,
        implementation=config.implementation,
        unroll=config.unroll,
    )
    adapters = config.lora if config.mode == "lora" else None
    storage = source.storage if config.mode == "lora" else MASTER
    if config.mode == "qat":
        plain = dataclasses.replace(execution, simulate=frozenset())
        quantised = dataclasses.replace(execution, quantise=config.quantise)
        executions = [(0, plain), (config.quantise_from, quantised)] if config.quantise_from else [(0, quantised)]
    else:
        executions = [(0, execution)]
    stages = tuple(
        (
            first,
            Program(
                model=Model(source.config, storage, execution, adapters),
                optimizer=config.optimizer,
                objective=config.objective,
                freeze=config.freeze,
                only=config.only or (("*.lora_?",) if adapters else ()),
                accumulate=config.accumulate,
                remat=config.remat,
                packed=config.data.packing != "one_per_row",
                anticipate=config.anticipate,
            ),
        )
        for first, execution in executions
    )
    path = config.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(path) if path.exists() else None
    model = source.config
    data = open_data(config.data, tokenizer, model.vocab_size, model.bos_token_id, model.eos_token_id, one_pass)
    return Run(config, stages, data, source, tokenizer)


def _placement(config: TrainConfig) -> Placement | None:
    if config.mesh is None and jax.device_count() == 1:
        return None
    mesh = make_mesh(config.mesh if config.mesh is not None else {"data": jax.device_count()})
    placement = Placement.of(
        mesh,
        expert_parallel=config.expert_parallel,
        expert_precision=config.expert_precision,
        fsdp=config.fsdp,
    )
    rows, pieces = config.data.batch_size, placement.size("batch") * config.accumulate
    if rows % pieces:
        raise MeshError(
            f"data.batch_size {rows} does not divide over {'*'.join(placement.rules.batch)} = "
            f"{placement.size('batch')} times accumulate = "
            f"{config.accumulate}: expected a multiple of {pieces}; change data.batch_size, accumulate, or the mesh"
        )
    return placement


def digest(tree: Any) -> str:
    """A fingerprint of arrays by path, the same on every mesh."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape} {int(lora.checksum(leaf))}\n".encode())
    return found.hexdigest()
