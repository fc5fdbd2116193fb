"""The whole model: scanned layer groups between embedding and head, with a cache or without.

Parameters and caches are plain nested dicts, tuples and arrays; the Flax modules are merged with them inside the traced
function, so calling a compiled step flattens nothing but arrays.

    params = {"shell": {...}, "groups": ((member, ...), ...), "drafts": (block, ...)}
    cache  = {"position": int32 [B], "groups": ((member, ...), ...), "drafts": (...), "streams": [B, R, n, d]}

``groups[g][j]`` holds member j of scan group g, every leaf stacked over the repetitions of the group.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_v4.adapters import LoRA, adaptable, check_patterns
from deepseek_v4.cache import ENTRIES, layer_cache_shapes
from deepseek_v4.config import Config
from deepseek_v4.execution import Execution
from deepseek_v4.formats import from_bytes, sliceable
from deepseek_v4.layer_spec import LayerSpec, ScanGroup, draft_specs, layer_specs, scan_groups
from deepseek_v4.nn.mixing import Unmixed, mixed, unmixed
from deepseek_v4.nn.variables import RELEASED, Packed, Storage
from deepseek_v4.parameters import (
    ParameterSpec,
    Path,
    block_module,
    describe,
    draft_module,
    flatten,
    map_specs,
    nest,
    shell_module,
    stacked,
    stored_as,
)
from deepseek_v4.positions import Tokens, Training
from deepseek_v4.remat import REMAT_POLICIES, in_turn
from deepseek_v4.sharding import check_placement
from deepseek_v4.stored_rows import entry_axes, map_shapes
from deepseek_v4.vocabulary import embed

Params = dict[str, Any]
Cache = dict[str, Any]


class Output(NamedTuple):
    """What a forward pass returns: float32 logits, the draft's float32 logits (or None), the cache (or None)."""

    logits: jax.Array
    draft_logits: jax.Array | None
    cache: Cache | None


Observed = dict[str, Any]
"""What training sees of the layers: {"groups": ((member, ...), ...), "drafts": (block, ...)} of dicts by name."""


class Hidden(NamedTuple):
    """What a training pass returns: the inputs [B, S, d] of the vocabulary projection, and what the layers saw.

    ``draft`` is that of the MTP block, or None. Values of ``observed`` are those that ``nn.block.Block`` returns,
    stacked over the repetitions of a scan group.
    """

    main: jax.Array
    draft: jax.Array | None
    observed: Observed


@dataclasses.dataclass(frozen=True)
class Model:
    """A DeepSeek-V4 model as pure functions over plain pytrees.

    ``config``, ``storage`` and ``adapters`` say what the parameters are, ``execution`` how they are used. Frozen and
    hashable: close over it or pass it as a static argument. Raises ``MeshError`` when the execution's mesh does not fit
    the model, and ``ValueError`` for adapters of nothing and for packed weights that shall be quantised.
    """

    config: Config
    storage: Storage = RELEASED
    execution: Execution = dataclasses.field(default_factory=Execution)
    adapters: LoRA | None = None

    def __post_init__(self) -> None:
        if self.execution.quantise is not None and self.storage.packed:
            raise ValueError(f"execution.quantise needs weights that are not quantised yet, found {self.storage}")
        if self.adapters is not None:
            modules = [block_module(self.config, spec, self.storage) for spec in set(layer_specs(self.config))]
            modules += [draft_module(self.config, spec, self.storage) for spec in self.drafts]
            check_patterns(self.adapters, {name for module in modules for name, _ in adaptable(module)})
        if self.execution.placement is not None:
            check_placement(self.execution.placement, self.config, self.storage, self.execution.simulate)

    # --- what the model consists of ---------------------------------------------------------------------------------

    @functools.cached_property
    def groups(self) -> tuple[ScanGroup, ...]:
        """The scan groups of the main layers."""
        return scan_groups(layer_specs(self.config))

    @functools.cached_property
    def drafts(self) -> tuple[LayerSpec, ...]:
        """The MTP blocks."""
        return draft_specs(self.config)

    def shell_specs(self) -> Params:
        """Descriptions of what surrounds the layers."""
        return nest(describe(shell_module(self.config, self.storage)))

    def layer_specs(self, spec: LayerSpec) -> Params:
        """Descriptions of one layer, not stacked."""
        return nest(describe(block_module(self.config, spec, self.storage, self.adapters)))

    def draft_specs(self, spec: LayerSpec) -> Params:
        """Descriptions of one MTP block."""
        return nest(describe(draft_module(self.config, spec, self.storage, self.adapters)))

    def parameter_specs(self) -> Params:
        """Descriptions of all parameters, in the structure of ``params``."""
        return {
            "shell": self.shell_specs(),
            "groups": tuple(
                tuple(
                    map_specs(functools.partial(stacked, repeats=group.repeats), self.layer_specs(spec))
                    for spec in group.pattern
                )
                for group in self.groups
            ),
            "drafts": tuple(self.draft_specs(spec) for spec in self.drafts),
        }

    def abstract_params(self) -> Params:
        """``params`` as ShapeDtypeStructs, with shardings when there is a placement."""
        placement = self.execution.placement

        def abstract(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
            sharding = None if placement is None else placement.parameter_sharding(spec)
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

        return map_specs(abstract, self.parameter_specs())

    def abstract_cache(self, batch: int, max_length: int, rollback: int = 0) -> Cache:
        """The cache for ``batch`` rows of up to ``max_length`` tokens as ShapeDtypeStructs.

        ``rollback`` is how many tokens a row may be rolled back at once (see ``rollback``).
        """
        config, execution = self.config, self.execution
        dtype = execution.activation_dtype
        placement = execution.placement

        def array(shape, dtype, axes):
            sharding = None if placement is None else placement.sharding(axes)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def layers(spec: LayerSpec, repeats: int):
            shards = 1 if placement is None else placement.size("entries")
            shapes = layer_cache_shapes(config, spec, max_length, rollback, dtype, execution.cache_layout, shards)

            def of_layers(axes, shape, kind):
                return array((repeats, batch, *shape), kind, axes)

            axes = {name: entry_axes(parts, "entries" if name in ENTRIES else None) for name, parts in shapes.items()}
            return {name: map_shapes(functools.partial(of_layers, axes[name]), parts) for name, parts in shapes.items()}

        cache: Cache = {
            "position": array((batch,), jnp.int32, ("batch",)),
            "groups": tuple(tuple(layers(spec, group.repeats) for spec in group.pattern) for group in self.groups),
            "drafts": tuple(layers(spec, 1) for spec in self.drafts),
        }
        if self.drafts:
            # The draft of position t needs the main streams of t, which are the previous call's for its first token.
            shape = (batch, 1 + rollback, config.hc_mult, config.hidden_size)
            cache["streams"] = array(shape, dtype, ("batch", None, None, None))
        return cache

    def init_cache(self, batch: int, max_length: int, rollback: int = 0) -> Cache:
        """An empty cache: every row at position 0. See ``abstract_cache``."""
        abstract = self.abstract_cache(batch, max_length, rollback)

        def zeros():
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)

        if self.execution.placement is None:
            return zeros()
        return jax.jit(zeros, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))()

    # --- what the model computes ------------------------------------------------------------------------------------

    def forward(
        self,
        params: Params,
        token_ids: jax.Array,
        cache: Cache | None = None,
        lengths: jax.Array | None = None,
        *,
        draft: bool = False,
        last_only: bool = False,
    ) -> Output:
        """Runs the next tokens of every row: a full sequence, a chunk of a prompt, or one decoded token.

        token_ids int32 [B, S]; row b continues at its own ``cache["position"][b]`` with its first ``lengths[b]``
        tokens (default S; 0 leaves a row as it is, the rest is padding). Without a cache all rows begin at position 0.
        Returns logits float32 [B, S, vocab], or [B, 1, vocab] of each row's last real token with ``last_only``; those
        at padding are meaningless. With ``draft`` the MTP block runs too: its logits at token t, like the main ones,
        predict token t + 1, and are meaningless at position 0. A cache that was drafted from must be drafted from in
        every call. Which split of a sequence into calls was used does not matter.
        """
        if draft and not self.drafts:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0 or its drafter is not MTP)")
        batch, length = token_ids.shape
        execution = self.execution
        token_ids = execution.constrain(token_ids.astype(jnp.int32), ("batch", None))
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache["position"]
        lengths = jnp.full(batch, length, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        tokens = Tokens(token_ids, start, lengths)
        shell = self._shell(params)
        # Summed over the vocabulary's shards first, which have the same axes: else the table would come to the tokens.
        embedded = execution.split_tokens(self._embedded(shell, token_ids))
        streams, group_caches, _ = self._run_layers(embedded, params, tokens, cache)

        new_cache = None
        if cache is not None:
            new_cache = {**cache, "position": start + lengths, "groups": group_caches}

        def project(head, streams):
            if last_only:
                streams = _rows(streams, jnp.maximum(lengths - 1, 0)[:, None])
            logits = shell.head(execution.gather_tokens(head.output(streams, execution)), jnp.float32)
            return execution.constrain(logits, ("batch", None, "vocab"))

        logits = project(shell, streams)
        draft_logits = None
        if draft:
            draft_streams, block, updates, _ = self._run_draft(params["drafts"][0], embedded, streams, tokens, cache)
            draft_logits = project(block, draft_streams)
            if new_cache is not None:
                new_cache |= updates
        return Output(logits, draft_logits, new_cache)

    def draft_step(
        self,
        params: Params,
        token_ids: jax.Array,
        streams: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """One token through the MTP block alone, which may continue from its own output: what it says comes next.

        token_ids int32 [B] at ``positions`` [B]; streams [B, 1, n, d] of the token before each: ``last_streams``, or
        what this method returned for it. Rows whose ``lengths`` [B] is 0 instead of 1 are left as they are. Returns
        logits float32 [B, vocab], the block's streams, and the cache, in which only the block's own ring has changed
        and no position: the next ``forward`` with ``draft`` writes the same slots again.
        """
        execution = self.execution
        shell = self._shell(params)
        block = self._draft_block(params["drafts"][0])
        tokens = Tokens(execution.constrain(token_ids[:, None], ("batch", None)), positions, lengths)
        drafted = block.combine(self._embedded(shell, tokens.ids), streams, execution)
        drafted, member, _ = block(drafted, tokens.before(), cache["drafts"][0], 0, execution, None)
        drafted = mixed(drafted, execution)
        logits = shell.head(block.output(drafted, execution), jnp.float32)
        return logits[:, 0], drafted, {**cache, "drafts": (member,)}

    def last_streams(self, cache: Cache) -> jax.Array:
        """The main streams [B, 1, n, d] of each row's last token, as drafting needs them; 0 where there is none."""
        start = cache["position"][:, None, None, None]
        before = jnp.take_along_axis(cache["streams"], (start - 1) % cache["streams"].shape[1], axis=1)
        return jnp.where(start > 0, before, 0)

    def _draft_block(self, params: Params) -> Any:
        graph = nnx.graphdef(draft_module(self.config, self.drafts[0], self.storage, self.adapters))
        return nnx.merge(graph, self._used(self.draft_specs(self.drafts[0]), params))

    def hidden(
        self,
        params: Params,
        token_ids: jax.Array,
        *,
        training: Training,
        positions: jax.Array | None = None,
        draft: bool = False,
        chosen: Observed | None = None,
        remat: str | None = None,
    ) -> Hidden:
        """A training pass over whole rows, up to the vocabulary projection, which ``vocabulary`` returns.

        token_ids int32 [B, S]. ``positions`` int32 [B, S], if given, are those of each token in its own document: a row
        then holds several, and nothing passes from one to another. ``draft`` runs the MTP block too; what it returns
        at a token predicts the next one, and is meaningless at the first of a document. ``chosen``, in the structure
        of ``observed``, replaces the routers' choices by its "experts". ``remat`` names one of ``REMAT_POLICIES``
        (None: the backward pass finds everything). Gradients reach the indexers through ``observed`` alone.
        """
        if draft and not self.drafts:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0 or its drafter is not MTP)")
        batch, length = token_ids.shape
        execution = self.execution
        token_ids = execution.constrain(token_ids.astype(jnp.int32), ("batch", None))
        start, lengths = jnp.zeros(batch, jnp.int32), jnp.full(batch, length, jnp.int32)
        tokens = Tokens(token_ids, start, lengths, positions, training)
        shell = self._shell(params, tables_cut=True)
        embedded = execution.split_tokens(embed(shell.embed.weight[...], token_ids, execution))
        streams, _, groups = self._run_layers(embedded, params, tokens, None, chosen, remat)
        observed: Observed = {"groups": groups, "drafts": ()}
        main = execution.gather_tokens(shell.output(streams, execution))
        if not draft:
            return Hidden(main, None, observed)

        def run_draft(params, embedded, streams, chosen):
            params, (embedded, streams) = in_turn(params, (embedded, streams))
            streams, block, _, seen = self._run_draft(params, embedded, streams, tokens, None, chosen)
            return execution.gather_tokens(block.output(streams, execution)), seen

        if remat is not None:
            run_draft = jax.checkpoint(run_draft, policy=REMAT_POLICIES[remat])
        experts = None if chosen is None else chosen["drafts"][0]["experts"]
        drafted, seen = run_draft(params["drafts"][0], embedded, streams, experts)
        return Hidden(main, drafted, {**observed, "drafts": (seen,)})

    def vocabulary(self, params: Params) -> jax.Array:
        """The weight [vocab, d] of the vocabulary projection, rounded as it is used, in the layout it is stored in."""
        return self._shell(params, tables_cut=True).head.weight[...]

    def _shell(self, params: Params, tables_cut: bool = False) -> Any:
        """What surrounds the layers; with ``tables_cut`` embedding and vocabulary projection are not gathered."""
        specs = self.shell_specs()
        around = self._rounded(specs, params["shell"])
        whole = [name for name in around if not (tables_cut and name in ("embed", "head"))]
        gathered = self._gathered({name: specs[name] for name in whole}, {name: around[name] for name in whole})
        return nnx.merge(nnx.graphdef(shell_module(self.config, self.storage)), {**around, **gathered})

    def _embedded(self, shell: Any, ids: jax.Array) -> jax.Array:
        """Embeddings [B, S, d] by a table that is not cut."""
        embedded = shell.embed.weight[...][ids].astype(self.execution.activation_dtype)
        return self.execution.constrain(embedded, ("batch", None, None))

    def _run_layers(self, embedded, params, tokens: Tokens, cache, chosen=None, remat=None):
        """(streams, caches of the groups, observed of the groups) of the main layers."""
        # What a backward pass keeps of every layer is smaller where the last output is mixed in.
        streams: jax.Array | Unmixed = unmixed(embedded, self.config.hc_mult)
        if remat is not None:
            streams = mixed(streams, self.execution)
        caches, observed = [], []
        for index, group in enumerate(self.groups):
            group_cache = None if cache is None else cache["groups"][index]
            experts = None if chosen is None else tuple(member["experts"] for member in chosen["groups"][index])
            streams, group_cache, seen = self._run_group(
                group, params["groups"][index], streams, tokens, group_cache, experts, remat
            )
            caches.append(group_cache)
            observed.append(seen)
        return mixed(streams, self.execution), tuple(caches), tuple(observed)

    def _used(self, specs: Params, params: Params) -> Params:
        """Parameters of one layer as modules take them: rounded as ``quantise`` says, gathered if they are cut."""
        return self._gathered(specs, self._rounded(specs, params))

    def _rounded(self, specs: Params, params: Params) -> Params:
        return stored_as(specs, params, self.execution.quantise)

    def _gathered(self, specs: Params, params: Params) -> Params:
        execution = self.execution
        if execution.placement is None:
            return params
        return execution.placement.gathered(specs, params, execution.activation_dtype)

    def _run_group(self, group: ScanGroup, params, streams, tokens: Tokens, cache, chosen=None, remat=None):
        graphs = [nnx.graphdef(block_module(self.config, spec, self.storage, self.adapters)) for spec in group.pattern]
        specs = [self.layer_specs(spec) for spec in group.pattern]
        scanned, whole = zip(
            *(_split_whole_stacks(s, p) for s, p in zip(specs, params, strict=True)),
            strict=True,
        )

        types = jax.tree.map(lambda array: array.dtype, scanned)
        unroll = min(self.execution.unroll, group.repeats)

        def run_member(index, params, streams, cache, layer, chosen):
            if remat is not None:
                params, streams = in_turn(params, streams)
            layer_params = nest(flatten(jax.tree.map(from_bytes, params, types[index])) | whole[index])
            block = nnx.merge(graphs[index], self._used(specs[index], layer_params))
            streams, cache, seen = block(streams, tokens, cache, layer, self.execution, chosen)
            streams = streams if remat is None else mixed(streams, self.execution)
            split = self.execution.tokens(tokens.ids.shape[1])
            return jax.tree.map(lambda a: self.execution.constrain(a, split), streams), cache, seen

        def body(carry, inputs):
            streams, cache = carry
            params, layer, chosen = inputs
            members, observed = [], []
            for index in range(len(graphs)):
                run = functools.partial(run_member, index)
                if remat is not None:
                    # In a loop of single layers nothing could be merged across the barrier that this leaves out, nor
                    # computed again before the gradient is there that needs it. A loop of one turn is none.
                    alone = len(graphs) == unroll == 1 < group.repeats
                    run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=not alone)
                member = None if cache is None else cache[index]
                streams, member, seen = run(
                    params[index], streams, member, layer, None if chosen is None else chosen[index]
                )
                members.append(member)
                observed.append(seen)
            return (streams, None if cache is None else tuple(members)), tuple(observed)

        sliced = jax.tree.map(sliceable, scanned)
        (streams, cache), observed = lax.scan(
            body, (streams, cache), (sliced, jnp.arange(group.repeats), chosen), unroll=unroll
        )
        return streams, cache, observed

    def _run_draft(self, params, embedded, streams, tokens: Tokens, cache, chosen=None):
        """The MTP block over draft positions start - 1 .. start + S - 2: token t + 1 meets the main streams of t."""
        execution = self.execution
        block = self._draft_block(params)
        length = tokens.ids.shape[1]
        before = jnp.zeros_like(streams[:, :1]) if cache is None else self.last_streams(cache)
        draft_streams = block.combine(embedded, execution.shift_tokens(streams, before), execution)
        member = None if cache is None else cache["drafts"][0]
        draft_streams, member, seen = block(draft_streams, tokens.before(), member, 0, execution, chosen)
        draft_streams = mixed(draft_streams, execution)
        updates = {}
        if cache is not None:
            slots = cache["streams"].shape[1]
            # Each slot's newest position, if this call has it.
            last = (tokens.start + tokens.lengths)[:, None] - 1
            offsets = last - (last - jnp.arange(slots)) % slots - tokens.start[:, None]
            new = (offsets >= 0) & (tokens.lengths[:, None] > 0)
            rows = _rows(streams, jnp.clip(offsets, 0, length - 1))
            stored = jnp.where(new[:, :, None, None], rows, cache["streams"])
            updates = {"drafts": (member,), "streams": stored}
        return draft_streams, block, updates, seen


def _rows(streams: jax.Array, index: jax.Array) -> jax.Array:
    """Of streams [B, S, n, d] the tokens index [B, R]: [B, R, n, d]."""
    if streams.shape[1] == 1:
        # Nothing to look up, for which libtpu 0.0.42 may want more vector memory than there is.
        return jnp.broadcast_to(streams, (*index.shape, *streams.shape[2:]))
    return jnp.take_along_axis(streams, index[:, :, None, None], axis=1)


def _split_whole_stacks(specs: Params, params: Params) -> tuple[Params, dict[Path, jax.Array]]:
    """A scan group's parameters, cut into those that are sliced per layer and the packed experts, which are not.

    An expert's weights are read where they lie in the stack; slicing a layer's experts out of it would copy them all.
    Parameters that gradients may reach are always sliced, so that a gradient is a layer's and not a stack's.
    """
    described = flatten(specs)
    flat = flatten(params)
    whole = {path for path, spec in described.items() if spec.kind is Packed and "experts" in spec.axes}
    return nest({p: a for p, a in flat.items() if p not in whole}), {p: flat[p] for p in sorted(whole)}


def rollback(cache: Cache, positions: jax.Array) -> Cache:
    """The cache with every row back at an earlier position, as if the later tokens had never been run.

    positions int32 [B], each at most the row's position and at most the cache's ``rollback`` tokens before it (the
    bound is the caller's to keep: positions are traced values). Costs nothing: all state is indexed by position.
    """
    return {**cache, "position": positions.astype(jnp.int32)}
