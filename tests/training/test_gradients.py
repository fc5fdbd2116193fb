"""Gradients of every kind of layer against float64 finite differences and against transformers' autograd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Oracle
from released import write_released
from small_models import SmallModel, compiled, small_config, small_model

from deepseek_v4.nn.variables import MASTER, Weight
from deepseek_v4.parameters import is_spec
from deepseek_v4.positions import Training
from deepseek_v4.training.losses import cross_entropy, labels
from deepseek_v4.training.partition import parameter_names

# Window, CSA and HCA layers, hash- and score-routed, and the MTP block; two HCA entries, 65 CSA entries of which 8 are
# selected, tokens beyond two sliding windows.
CONFIG = small_config((0, 4, 128, 4), num_hash_layers=1, index_topk=8, hidden_size=64, vocab_size=96)
LENGTH = 261
MTP_WEIGHT = 0.3
SEED = 6


@functools.cache
def small() -> SmallModel:
    return small_model(CONFIG, MASTER, seed=SEED)


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, CONFIG.vocab_size, LENGTH)


def loss(params, ids, mtp_weight=MTP_WEIGHT):
    """Mean cross-entropy of the next token, and the draft's: what training minimises without its smaller terms."""
    model = small().model
    hidden = model.hidden(params, ids, training=Training(jnp.ones(ids.shape, bool)), draft=True)
    everything = jnp.ones(ids.shape, bool)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    following, wanted = labels(ids, positions, everything)
    head = model.vocabulary(params)
    main = cross_entropy(hidden.main, head, following, wanted, model.execution)
    draft = cross_entropy(hidden.draft, head, following, wanted & (positions > 0), model.execution)
    return main.loss / wanted.sum() + mtp_weight * draft.loss / (wanted & (positions > 0)).sum()


def gradients(mtp_weight: float) -> dict[str, np.ndarray]:
    """By released name (a layer's experts stacked), where parameters are trained."""
    params = small().params
    varied = jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.floating) else None, params)

    def of(varied):
        whole = jax.tree.map(lambda a, b: b if a is None else a, varied, params, is_leaf=lambda a: a is None)
        return loss(whole, jnp.asarray(tokens())[None], mtp_weight)

    value, gradient = compiled(jax.value_and_grad(of))(varied)
    specs = small().model.parameter_specs()
    leaves, structure = jax.tree.flatten(specs, is_leaf=is_spec)
    found = {}
    for spec, names, leaf in zip(
        leaves,
        structure.flatten_up_to(parameter_names(specs)),
        structure.flatten_up_to(gradient),
        strict=True,
    ):
        if spec.kind is Weight:
            stack = leaf if names[0].startswith("layers.") else leaf[None]
            found |= dict(zip(names, np.asarray(stack), strict=True))
    found["loss"] = np.asarray(value)
    return found


def oracle_loss(tensors) -> float:
    result = Oracle(CONFIG.to_dict(), tensors).forward(tokens(), draft=True)

    def mean(logits, following):
        top = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        return np.mean(log_sum - logits[np.arange(len(following)), following])

    # Row t of the draft sees tokens 0 .. t + 1 and predicts token t + 2.
    return mean(result.logits[:-1], tokens()[1:]) + MTP_WEIGHT * mean(result.draft_logits[:-1], tokens()[2:])


def expert_names(name: str) -> list[str]:
    prefix, _, rest = name.partition("ffn.experts.")
    return [f"{prefix}ffn.experts.{e}.{rest}" for e in range(CONFIG.n_routed_experts)]


def test_directional_derivatives_equal_float64_finite_differences() -> None:
    """Each tensor of every kind of layer along a random direction, central differences of the float64 oracle."""
    found = gradients(MTP_WEIGHT)
    tensors = small().decoded
    np.testing.assert_allclose(found.pop("loss"), oracle_loss(tensors), rtol=1e-5)
    rng = np.random.default_rng(0)
    groups: dict[str, list[str]] = {}
    for name in found:
        parts = name.split(".")
        # One difference for all tensors of a sublayer, which moves them together, each by its own direction.
        key = parts[0]
        if parts[0] in ("layers", "mtp"):
            key = f"{parts[0]}.{parts[1]}.{'ffn' if 'ffn' in parts[2] else 'attn'}"
        if ".indexer." not in name:
            groups.setdefault(key, []).append(name)
    for key, names in groups.items():
        moved, derivative, size = {}, 0.0, 0.0
        for name in names:
            gradient = found[name].astype(np.float64)
            # Towards the gradient, and some noise: a difference that rounding does not drown.
            direction = gradient / (np.linalg.norm(gradient) + 1e-30) + rng.normal(size=gradient.shape) * 0.1 / np.sqrt(
                gradient.size
            )
            derivative += np.sum(gradient * direction)
            size += np.linalg.norm(gradient)
            for part, along in zip(
                expert_names(name) if "ffn.experts." in name else [name],
                direction if "ffn.experts." in name else [direction],
                strict=True,
            ):
                moved[part] = along
        step = 1e-5
        high, low = (
            oracle_loss({**tensors, **{n: tensors[n] + sign * step * d for n, d in moved.items()}}) for sign in (1, -1)
        )
        # float32 gradients; the difference itself is exact to about 1e-9.
        assert abs((high - low) / (2 * step) - derivative) < 2e-4 * size + 1e-7, key


def test_gradients_equal_those_of_transformers(tmp_path) -> None:
    """Of the next-token loss, on the same weights: transformers has no MTP block."""
    torch = pytest.importorskip("torch", reason="needs the 'parity' extra")
    transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs the 'parity' extra")
    write_released(tmp_path, CONFIG, MASTER, SEED)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).float()
    peer.train()
    ids = torch.tensor(tokens())[None]
    value = peer(ids, labels=ids).loss
    value.backward()
    found = gradients(0.0)
    np.testing.assert_allclose(found.pop("loss"), value.item(), rtol=1e-5)
    theirs = {name: p.grad.numpy() for name, p in peer.named_parameters() if p.grad is not None}
    compared = 0
    for name, gradient in found.items():
        expected = _of_transformers(name, theirs)
        if expected is None:
            assert name.startswith("mtp.") or ".indexer." in name, name
            assert name.startswith("mtp.") or not gradient.any(), name
            continue
        # float32 on both sides: the bound of the logits, relative to the largest entry.
        bound = 1e-4 * max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=bound, err_msg=name)
        compared += 1
    assert compared > 60


_SHELL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}


def _of_transformers(name: str, theirs: dict[str, np.ndarray]) -> np.ndarray | None:
    """Their gradient of a released tensor (checkpoint reference 3.1); None if they do not have the tensor."""
    if name.startswith("hc_head_"):
        return theirs["model.hc_head.hc_" + name.removeprefix("hc_head_")]
    if name in _SHELL:
        return theirs[_SHELL[name]]
    if not name.startswith("layers."):
        return None
    _, layer, leaf = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if leaf.startswith("hc_"):
        _, sublayer, what = leaf.split("_")
        return theirs[f"{prefix}{sublayer}_hc.{what}"]
    if leaf.startswith("ffn.experts."):
        both, width = theirs[prefix + "mlp.experts.gate_up_proj"], CONFIG.moe_intermediate_size
        down = theirs[prefix + "mlp.experts.down_proj"]
        return {"w1": both[:, :width], "w3": both[:, width:], "w2": down}[leaf.split(".")[2]]
    return theirs.get(prefix + _LAYER[leaf]) if leaf in _LAYER else None
