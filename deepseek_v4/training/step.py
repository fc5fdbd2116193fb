"""One training step as a pure function: losses, gradients, optimizer, balance biases.

    program = Program(model, OptimizerConfig(...), Objective(), packed=True)
    state, frozen = program.init_state(random_params(model, seed=0), (batch, sequence))
    state, metrics = program.train_step(state, frozen, program.place_batch(batch))

``state`` is what changes and what a checkpoint holds: {"step", "trained", "biases", "optimizer"} and, with
``anticipate``, "routing". ``frozen`` is the rest of the parameters. A batch is that of ``deepseek_v4.data``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from deepseek_v4.distributed import place_rows
from deepseek_v4.initialise import initialise
from deepseek_v4.model import Hidden, Model, Observed, Params
from deepseek_v4.nn.variables import Buffer
from deepseek_v4.parameters import ParameterSpec, is_spec, map_specs
from deepseek_v4.positions import Training
from deepseek_v4.remat import REMAT_POLICIES
from deepseek_v4.sharding import MeshError
from deepseek_v4.training.evaluation import evaluation_sums
from deepseek_v4.training.losses import cross_entropy, labels
from deepseek_v4.training.optimizer import OptimizerConfig, make_optimizer, schedule, state_shardings
from deepseek_v4.training.partition import merge, split, trainable_mask

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: next-token cross-entropy plus weighted further losses (report 2.4, 4.2; V3.2 for the indexer).

    ``mtp_weight`` holds until the learning rate begins to decay, ``mtp_weight_decay`` from then on. ``balance_weight``
    is that of the sequence-wise balance loss, summed over layers; ``bias_rate`` what a router's balance bias of every
    expert moves by in a step, outside gradient and optimizer. ``z_weight`` is that of the mean squared log-sum-exp of
    the logits. ``indexer`` says how the indexers learn: "off", "dense" (the warm-up: attention over all visible
    entries, to all of which the indexer is compared) or "sparse" (over those selected); each learns from its own
    divergence, ``indexer_weight`` times. Raises ``ValueError`` for negative weights.
    """

    mtp_weight: float = 0.3
    mtp_weight_decay: float = 0.1
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3
    z_weight: float = 0.0
    indexer: Literal["off", "dense", "sparse"] = "off"
    indexer_weight: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "indexer":
                if value not in ("off", "dense", "sparse"):
                    raise ValueError(f"objective.indexer: expected 'off', 'dense' or 'sparse', found {value!r}")
            elif not value >= 0:
                raise ValueError(f"objective.{field.name}: expected a number that is not negative, found {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything static about a training run's compiled programs; hashable.

    ``model`` has float32 masters as parameters (``nn.variables.MASTER``), or adapters beside whatever is stored; with
    ``execution.quantise`` it trains as if quantised. Trained are the parameters that ``only`` names (all, if there is
    none) and ``freeze`` does not (patterns of ``names.matches``). A batch is run in ``accumulate`` parts whose
    gradients are added. ``remat`` is what a backward pass finds: "none" of the forward pass computed again, "experts"
    all but the products of routed experts, "full" everything. With ``packed`` rows hold several documents, else each
    row is one. ``anticipate`` > 0 takes the routers' choices from the parameters of so many steps ago, from the start.
    Raises ``ValueError`` for sizes below 1 and what the optimizer cannot train, ``MeshError`` for a mesh that splits
    caches.
    """

    model: Model
    optimizer: OptimizerConfig
    objective: Objective = Objective()
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    accumulate: int = 1
    remat: Literal["none", "experts", "full"] = "none"
    packed: bool = True
    anticipate: int = 0

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.anticipate < 0:
            raise ValueError(
                f"expected accumulate >= 1 and anticipate >= 0, found {self.accumulate}, {self.anticipate}"
            )
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat: expected 'none' or one of {sorted(REMAT_POLICIES)}, found {self.remat!r}")
        if not any(jax.tree.leaves(self._trained_mask)):
            raise ValueError(
                "there is nothing to train: the weights of this model are packed or frozen; train float32 masters, or "
                "adapters beside packed weights"
            )
        if split := self.model.execution.mesh_axes("entries"):
            raise MeshError(
                f"mesh axes {list(split)} split caches, which training has none of; use data, expert and tensor"
            )
        self._optimizer  # noqa: B018  what it cannot train is known now

    # --- what there is ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _trained_mask(self) -> Any:
        return trainable_mask(self.model.parameter_specs(), freeze=self.freeze, only=self.only)

    @functools.cached_property
    def _bias_mask(self) -> Any:
        moved = self.objective.bias_rate > 0

        def is_bias(spec: ParameterSpec) -> bool:
            return moved and spec.kind is Buffer and spec.role == "router_bias"

        return map_specs(is_bias, self.model.parameter_specs())

    @functools.cached_property
    def _trained_specs(self) -> Any:
        specs = self.model.parameter_specs()
        return jax.tree.map(lambda spec, keep: spec if keep else None, specs, self._trained_mask, is_leaf=is_spec)

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self._trained_specs, self.model.execution.placement)

    def split(self, params: Params) -> tuple[Any, Any, Any]:
        """(trained, biases, frozen), each in the structure of ``params`` with None where a leaf is elsewhere."""
        trained, rest = split(params, self._trained_mask)
        biases = jax.tree.map(lambda leaf, keep: leaf if keep else None, params, self._bias_mask)
        frozen = jax.tree.map(
            lambda leaf, keep: None if keep else leaf, rest, self._bias_mask, is_leaf=lambda leaf: leaf is None
        )
        return trained, biases, frozen

    def params(self, state: State, frozen: Any) -> Params:
        """The model's parameters as they are now."""
        return merge(state["trained"], merge(state["biases"], frozen))

    def init_state(self, params: Params, batch_shape: tuple[int, int]) -> tuple[State, Any]:
        """(state, frozen) of a run that begins with ``params``, which are consumed; ``batch_shape`` (rows, tokens)."""
        trained, biases, frozen = self.split(params)
        abstract = self.abstract_state(batch_shape)

        def rest(trained: Any) -> State:
            made = {"step": jnp.zeros((), jnp.int32), "optimizer": self._optimizer.init(trained)}
            if self.anticipate:
                made["routing"] = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract["routing"])
            return made

        layout = {name: jax.tree.map(lambda a: a.sharding, abstract[name]) for name in abstract}
        made = jax.jit(rest, out_shardings={n: s for n, s in layout.items() if n not in ("trained", "biases")})(trained)
        trained, biases = (
            jax.tree.map(jax.device_put, tree, layout[name])
            for name, tree in (("trained", trained), ("biases", biases))
        )
        return {**made, "trained": trained, "biases": biases}, frozen

    def abstract_state(self, batch_shape: tuple[int, int]) -> State:
        """The state as ShapeDtypeStructs with shardings, also on one device: what a checkpoint is restored into."""
        placement = self.model.execution.placement
        one = None if placement is not None else jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def described(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
            sharding = one or placement.parameter_sharding(spec)  # type: ignore[union-attr]
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

        trained, biases, _ = self.split(map_specs(described, self.model.parameter_specs()))
        state: State = {
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=one or placement.replicated()),  # type: ignore[union-attr]
            "trained": trained,
            "biases": biases,
        }
        optimizer = jax.eval_shape(self._optimizer.init, trained)
        layout = (
            jax.tree.map(lambda _: one, optimizer)
            if placement is None
            else state_shardings(self._optimizer, self._trained_specs, placement)
        )
        state["optimizer"] = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), optimizer, layout
        )
        if self.anticipate:
            choices = (*batch_shape, self.model.config.num_experts_per_tok)

            def ids(leading: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
                shape = (self.anticipate, *leading, *choices)
                axes = (None,) * (1 + len(leading)) + ("batch", None, None)
                sharding = one or placement.sharding(axes)  # type: ignore[union-attr]
                return {"experts": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)}

            state["routing"] = {
                "groups": tuple(tuple(ids((group.repeats,)) for _ in group.pattern) for group in self.model.groups),
                "drafts": tuple(ids(()) for _ in self.model.drafts[:1]),
            }
        return state

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch as arrays over all devices, rows dealt out along the data axis."""
        return place_rows(self.model.execution.placement, batch)

    # --- what is computed -------------------------------------------------------------------------------------------

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def train_step(self, state: State, frozen: Any, batch: Batch, ahead: Batch | None = None) -> tuple[State, Metrics]:
        """The state after one step on ``batch`` (rows [B, S]), and float32 scalars about it.

        ``ahead`` is the batch of ``anticipate`` steps later, whose experts are chosen now. Metrics: ``loss`` (mean
        next-token cross-entropy in nats), ``mtp_loss``, ``balance_loss`` and ``index_loss`` (means over the layers
        that have them), ``z_loss``, ``total`` (what was minimised), ``gradient_norm`` (before clipping),
        ``learning_rate``, ``targets``, ``tokens``, and ``imbalance``, the largest load of an expert over the mean.
        """
        step = state["step"]
        chosen, routing = self._anticipated(state, frozen, batch, ahead)
        weights = self._weights(step, batch)
        gradients, parts, loads = self._gradients(state, frozen, batch, weights, chosen)

        updates, optimizer = self._optimizer.update(gradients, state["optimizer"], state["trained"])
        after: State = {
            "step": step + 1,
            "trained": optax.apply_updates(state["trained"], updates),
            "biases": self._moved_biases(state["biases"], loads),
            "optimizer": optimizer,
        }
        if routing is not None:
            after["routing"] = routing
        metrics = {
            **parts,
            "gradient_norm": optax.global_norm(gradients),
            "learning_rate": schedule(self.optimizer)(step),
            "targets": weights["targets"],
            "tokens": jnp.sum(batch["real"], dtype=jnp.float32),
            "imbalance": jnp.max(jnp.stack([_imbalance(load) for load in jax.tree.leaves(loads)])),
        }
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return self._as_it_came(after, batch["tokens"].shape), metrics

    @functools.partial(jax.jit, static_argnums=0)
    def eval_step(self, state: State, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the targets of ``batch`` with the parameters as they are: see ``evaluation_sums``."""
        return evaluation_sums(self.model, self.params(state, frozen), batch, self.packed)

    def _hidden(self, params: Params, batch: Batch, *, draft: bool, indexer: str, chosen: Observed | None = None):
        return self.model.hidden(
            params,
            batch["tokens"],
            training=Training(batch["real"], indexer),
            positions=batch["positions"] if self.packed else None,
            draft=draft,
            chosen=chosen,
            remat=None if self.remat == "none" else self.remat,
        )

    def _weights(self, step: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """What sums over the whole batch are divided by, and the weight of the MTP loss at this step."""
        _, wanted = labels(batch["tokens"], batch["positions"], batch["targets"])
        drafted = wanted & (batch["positions"] > 0)
        objective = self.objective
        late = step >= self.optimizer.decay_start
        return {
            "targets": jnp.sum(wanted, dtype=jnp.float32),
            "mtp_targets": jnp.sum(drafted, dtype=jnp.float32),
            "mtp": jnp.where(late, objective.mtp_weight_decay, objective.mtp_weight),
        }

    @property
    def _drafts(self) -> bool:
        return bool(self.model.drafts) and max(self.objective.mtp_weight, self.objective.mtp_weight_decay) > 0

    def _loss(self, trained: Any, rest: Any, batch: Batch, weights: dict[str, jax.Array], chosen: Observed | None):
        """(loss, (its parts, tokens per expert)) of one part of a batch; the parts of a batch add up to its loss."""
        objective, model = self.objective, self.model
        params = merge(trained, rest)
        hidden = self._hidden(params, batch, draft=self._drafts, indexer=objective.indexer, chosen=chosen)
        following, wanted = labels(batch["tokens"], batch["positions"], batch["targets"])
        head = model.vocabulary(params)
        main = cross_entropy(hidden.main, head, following, wanted, model.execution)
        targets = jnp.maximum(weights["targets"], 1)
        parts = {"loss": main.loss / targets, "z_loss": main.z / targets, "mtp_loss": jnp.zeros(())}
        if hidden.draft is not None:
            drafted = wanted & (batch["positions"] > 0)
            mtp = cross_entropy(hidden.draft, head, following, drafted, model.execution)
            parts["mtp_loss"] = mtp.loss / jnp.maximum(weights["mtp_targets"], 1)
        total = parts["loss"] + weights["mtp"] * parts["mtp_loss"]
        if objective.z_weight:
            total += objective.z_weight * parts["z_loss"]
        for name, weight in (("balance_loss", objective.balance_weight), ("index_loss", objective.indexer_weight)):
            values = _observed(hidden, name)
            summed = sum((jnp.sum(value) for value in values), jnp.zeros(())) / self.accumulate
            parts[name] = summed / max(1, sum(value.size for value in values))
            if weight and values:
                total += weight * summed
        return total, ({**parts, "total": total}, _loads(hidden))

    def _gradients(self, state: State, frozen: Any, batch: Batch, weights, chosen: Observed | None):
        """(gradients, parts of the loss, tokens per expert) of a batch."""
        rest = merge(state["biases"], frozen)

        def run(batch: Batch, chosen: Observed | None):
            run = jax.value_and_grad(self._loss, has_aux=True)
            (_, (parts, loads)), gradients = run(state["trained"], rest, batch, weights, chosen)
            return self._laid_out(gradients), parts, loads

        if self.accumulate == 1:
            return run(batch, chosen)

        def cut(rows: jax.Array, axis: int) -> jax.Array:
            """Parts of the rows first: every part has rows of every device."""
            count = rows.shape[axis]
            if count % self.accumulate:
                raise ValueError(f"accumulate: {count} rows cannot be cut into {self.accumulate} equal parts")
            shape = (*rows.shape[:axis], count // self.accumulate, self.accumulate, *rows.shape[axis + 1 :])
            return jnp.moveaxis(rows.reshape(shape), axis + 1, 0)

        pieces = (
            {name: cut(rows, 0) for name, rows in batch.items()},
            jax.tree.map(lambda ids: cut(ids, ids.ndim - 3), chosen),
        )

        def add(total, piece):
            return jax.tree.map(jnp.add, total, run(*piece)), None

        first = jax.eval_shape(run, *jax.tree.map(lambda a: a[0], pieces))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        return lax.scan(add, (self._laid_out(zeros[0]), *zeros[1:]), pieces)[0]

    def _laid_out(self, gradients: Any) -> Any:
        placement = self.model.execution.placement
        if placement is None:
            return gradients
        return jax.tree.map(
            lambda spec, g: lax.with_sharding_constraint(g, placement.parameter_sharding(spec)),
            self._trained_specs,
            gradients,
            is_leaf=is_spec,
        )

    def _as_it_came(self, state: State, batch_shape: tuple[int, ...]) -> State:
        """The state in the layout that the next step was compiled for."""
        if self.model.execution.placement is None:
            return state
        abstract = self.abstract_state(batch_shape)  # type: ignore[arg-type]
        return jax.tree.map(lambda a, like: lax.with_sharding_constraint(a, like.sharding), state, abstract)

    def _moved_biases(self, biases: Any, loads: Observed) -> Any:
        """Every balance bias one step towards an even load (report 4.2; V3 2.1.2)."""
        rate = self.objective.bias_rate

        def member(biases: Any, seen: Mapping[str, jax.Array]) -> Any:
            bias = biases["ffn"]["gate"].get("bias")
            if bias is None:
                return biases
            load = seen["load"]
            moved = bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
            return {**biases, "ffn": {**biases["ffn"], "gate": {**biases["ffn"]["gate"], "bias": moved}}}

        groups = tuple(
            tuple(member(*pair) for pair in zip(*group, strict=True))
            for group in zip(biases["groups"], loads["groups"], strict=True)
        )
        ran = loads["drafts"]
        drafts = (
            tuple(member(*pair) for pair in zip(biases["drafts"], ran, strict=False)) + biases["drafts"][len(ran) :]
        )
        return {**biases, "groups": groups, "drafts": drafts}

    def _anticipated(self, state: State, frozen: Any, batch: Batch, ahead: Batch | None):
        """(experts for ``batch`` as chosen ``anticipate`` steps ago, the choices to keep): (None, None) without."""
        if not self.anticipate:
            return None, None
        if ahead is None:
            raise ValueError("anticipate: the batch of that many steps later is needed as well")
        params = self.params(state, frozen)

        def choose(batch: Batch) -> Observed:
            hidden = self._hidden(params, batch, draft=bool(self.model.drafts), indexer="off")
            return lax.stop_gradient(_only(hidden.observed, "experts"))

        slot = state["step"] % self.anticipate
        kept = jax.tree.map(lambda ids: lax.dynamic_index_in_dim(ids, slot, keepdims=False), state["routing"])
        # The first steps have no earlier ones.
        chosen = lax.cond(state["step"] < self.anticipate, lambda: choose(batch), lambda: kept)
        routing = jax.tree.map(
            lambda ids, new: lax.dynamic_update_index_in_dim(ids, new, slot, 0), state["routing"], choose(ahead)
        )
        return chosen, routing


def random_params(model: Model, seed: int) -> Params:
    """Random parameters in the storage and layout of ``model``; a layer's values do not depend on the mesh."""
    config, placement = model.config, model.execution.placement
    count = 1 + config.num_hidden_layers + len(model.drafts)
    seeds = jax.random.bits(jax.random.key(seed), (count,))

    def layout(specs: Any) -> Any:
        if placement is None:
            return None
        return map_specs(lambda spec: placement.parameter_sharding(spec), specs)

    def one(specs: Any, index: int) -> Any:
        return jax.jit(lambda s: initialise(config, specs, s), out_shardings=layout(specs))(seeds[index])

    def stack(specs: Any, whole: Any, indices: list[int]) -> Any:
        draw: Callable = jax.vmap(lambda s: initialise(config, specs, s))
        return jax.jit(draw, out_shardings=layout(whole))(seeds[jnp.asarray(indices)])

    described = model.parameter_specs()
    groups = tuple(
        tuple(
            stack(
                model.layer_specs(spec),
                described["groups"][g][m],
                [1 + group.layer_index(repeat, m) for repeat in range(group.repeats)],
            )
            for m, spec in enumerate(group.pattern)
        )
        for g, group in enumerate(model.groups)
    )
    drafts = tuple(one(specs, count - len(model.drafts) + i) for i, specs in enumerate(described["drafts"]))
    return {"shell": one(described["shell"], 0), "groups": groups, "drafts": drafts}


def _only(observed: Observed, name: str) -> Observed:
    return {
        "groups": tuple(tuple({name: seen[name]} for seen in group) for group in observed["groups"]),
        "drafts": tuple({name: seen[name]} for seen in observed["drafts"]),
    }


def _loads(hidden: Hidden) -> Observed:
    return _only(hidden.observed, "load")


def _observed(hidden: Hidden, name: str) -> list[jax.Array]:
    """Values of this name from all layers that have it, one array per member of a scan group."""
    members = [seen for group in hidden.observed["groups"] for seen in group] + list(hidden.observed["drafts"])
    return [seen[name] for seen in members if name in seen]


def _imbalance(load: jax.Array) -> jax.Array:
    return jnp.max(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9))
