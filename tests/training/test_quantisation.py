"""Training as if stored in a released format: what the forward uses is what an export holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_config, small_model

from deepseek_v4 import RELEASED, RELEASED_BASE, Execution, Model, Placement, formats, make_mesh
from deepseek_v4.checkpoint import ParamsSource, load_params, open_checkpoint, to_hf
from deepseek_v4.nn.variables import MASTER
from deepseek_v4.parameters import flatten, stored_as
from deepseek_v4.training.masters import to_masters
from deepseek_v4.training.quantisation import export_params

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONFIG = small_config((0, 4, 128), num_hash_layers=1, swiglu_limit=10.0)
LENGTH = 140


@pytest.fixture(scope="module")
def trained():
    """A model in masters that no release holds exactly, as training leaves them."""
    released = small_model(CONFIG)
    model = Model(CONFIG, MASTER, Execution("float32", quantise=RELEASED))
    params = to_masters(released.params, model)
    rng = np.random.default_rng(0)

    def moved(a):
        return a if a.dtype != jnp.float32 else a * jnp.asarray(1 + 0.2 * rng.normal(size=a.shape), jnp.float32)

    return model, jax.tree.map(moved, params)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, LENGTH)), jnp.int32)


def logits(model, params, tokens):
    return quick(functools.partial(model.forward, draft=True))(params, tokens)[:2]


def test_the_forward_uses_what_an_export_holds(trained, tokens, tmp_path):
    model, params = trained
    released, packed = export_params(model, params, RELEASED)
    assert released.storage == RELEASED
    assert released.execution.quantise is None
    # The same numbers (``test_a_mesh_rounds_as_one_device`` compares them bit by bit), but FP4 columns are summed even
    # ones first: float32 rounding over sums of some hundred terms, through five layers; 3e-6 was seen.
    for ours, theirs in zip(logits(model, params, tokens), logits(released, packed, tokens), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    # Not because nothing was rounded.
    exact = dataclasses.replace(model, execution=Execution("float32"))
    assert np.abs(logits(exact, params, tokens)[0] - logits(model, params, tokens)[0]).max() > 1e-2

    to_hf(ParamsSource(released, packed), tmp_path / "released")
    assert open_checkpoint(tmp_path / "released").storage == RELEASED
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "released", released), packed)


def test_a_mesh_rounds_as_one_device(trained):
    # Tiles of 128 x 128 that are spread over devices, groups of 32 that are not.
    model, params = trained
    _, expected = export_params(model, params, RELEASED)
    placement = Placement(make_mesh("data=2,expert=2,tensor=2"))
    sharded = dataclasses.replace(model, execution=dataclasses.replace(model.execution, placement=placement))
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, sharded.abstract_params())
    released, found = export_params(sharded, placed, RELEASED)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(released.abstract_params()), strict=True):
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
    specs, group = model.parameter_specs()["groups"][0][0], placed["groups"][0][0]
    used = quick(lambda params: stored_as(specs, params, RELEASED))(group)
    for path, array in flatten(used).items():
        weight, scale = (flatten(expected["groups"][0][0]).get((*path[:-1], leaf)) for leaf in (path[-1], "scale"))
        np.testing.assert_array_equal(array, formats.dequantize(weight, scale, array.dtype), err_msg=str(path))


@pytest.mark.parametrize("storage", [RELEASED, RELEASED_BASE])
def test_exports_keep_their_bytes_when_trained_on(trained, storage):
    model, params = trained
    _, packed = export_params(model, params, storage)
    again = to_masters(jax.tree.map(jnp.copy, packed), model)
    _, repacked = export_params(model, again, storage)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(packed), jax.tree.leaves(repacked), strict=True):
        assert a.dtype == b.dtype
        if path[-1].key == "scale" and storage == RELEASED_BASE:
            # amax / 448 of amax = 448 * scale: two roundings.
            np.testing.assert_allclose(b, a, rtol=2.0**-23)
        else:
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_released_weights_keep_their_values():
    # Any bytes: groups whose largest code is small come back in other codes and the same values.
    rng = np.random.default_rng(2)
    packed = rng.integers(0, 256, (64, 128), dtype=np.uint8)
    packed[:8] &= 0x33  # codes up to 1.5
    packed[8:16] &= 0x99  # 0.5 and zeros of both signs
    scale = formats.encode_e8m0(jnp.asarray(2.0 ** rng.integers(-20, 20, (64, 8)), jnp.float32))
    value = formats.dequantize(jnp.asarray(packed), scale)
    codes, scales = formats.quantize(value, "fp4")
    np.testing.assert_array_equal(formats.dequantize(codes, scales), value)
    largest = np.abs(np.asarray(value)).reshape(64, 8, 32).max(-1) / np.asarray(formats.decode_scale(scale))
    same = largest >= 4
    assert same.any()
    assert not same.all()
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8)[same], np.asarray(scale).view(np.uint8)[same])
    grouped = np.asarray(codes).reshape(64, 8, 16), packed.reshape(64, 8, 16)
    np.testing.assert_array_equal(grouped[0][same], grouped[1][same])

    fp8 = rng.normal(size=(300, 200)).astype(np.float32)
    once = formats.quantize(jnp.asarray(fp8), "fp8")
    twice = formats.quantize(formats.dequantize(*once), "fp8")
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("stored", ["fp4", "fp8"])
def test_no_power_of_two_rounds_a_block_better_than_the_scale_chosen(stored):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(200, 32) if stored == "fp4" else (128, 128)) * np.exp(rng.normal())
    codes, scale = formats.quantize(jnp.asarray(weight, jnp.float32), stored)
    error = np.abs(np.asarray(formats.dequantize(codes, scale), np.float64) - weight)
    step = np.asarray(formats.decode_scale(scale), np.float64)
    rounded = {
        "fp4": lambda x: formats.e2m1_to_float(formats.float_to_e2m1(x)),
        "fp8": lambda x: formats.round_e4m3(x).astype(jnp.float32),
    }[stored]
    other = np.asarray(rounded(jnp.asarray(weight / (2 * step), jnp.float32)), np.float64) * 2 * step
    # Twice the scale has fewer codes below the largest value, and up to there none that are not in reach here.
    assert (error <= np.abs(other - weight) + 1e-6).all()


def test_gradients_go_straight_to_the_masters(trained, tokens):
    model, params = trained
    exact = dataclasses.replace(model, execution=Execution("float32"))
    rounded = to_masters(export_params(model, params, RELEASED)[1], model)
    weights, rest = jax.tree.flatten(params)
    trainable = [i for i, a in enumerate(weights) if a.dtype == jnp.float32]

    def gradient(model, leaves):
        def loss(chosen):
            joined = [chosen.get(i, leaf) for i, leaf in enumerate(leaves)]
            out = model.forward(jax.tree.unflatten(rest, joined), tokens)
            return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) - out.logits[..., 3])

        return jax.tree.leaves(quick(jax.grad(loss))({i: leaves[i] for i in trainable}))

    found = gradient(model, weights)
    expected = gradient(exact, jax.tree.leaves(rounded))
    scale = max(float(jnp.abs(a).max()) for a in expected)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * scale, rtol=1e-4)
    reached = sum(bool(np.asarray(a).any()) for a in found)
    # All but the draft, which was not asked for, the indexers, whose top-k stops gradients, and the router biases.
    assert reached > len(found) / 2


def test_simulated_rounding_passes_gradients_straight_through():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 256)) * 100, jnp.float32)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(5, 256)), jnp.float32)
    for function in (
        lambda x: formats.simulate_fp8(x, formats.ACTIVATION_BLOCK),
        formats.simulate_fp4,
        lambda x: formats.simulate_kv(x, 64),
        lambda x: formats.as_stored(x, "fp4"),
        lambda x: formats.as_stored(x, "bfloat16"),
    ):
        assert (np.asarray(function(x)) != np.asarray(x)).any()
        np.testing.assert_array_equal(jax.grad(lambda x, f=function: jnp.sum(f(x) * weight))(x), weight)


def test_rounding_to_bfloat16_is_that_of_a_conversion():
    rng = np.random.default_rng(6)
    x = np.concatenate([rng.normal(size=1000), [0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3e38, 1e-38]]).astype(
        np.float32
    )
    program = jax.jit(lambda x: formats.as_stored(x, "bfloat16")).lower(x)
    np.testing.assert_array_equal(program.compile()(x), x.astype(jnp.bfloat16).astype(np.float32))
    # Not as a pair of conversions, which accelerators' compilers leave out where excess precision is allowed.
    assert "reduce_precision" in program.as_text()


def test_packed_weights_are_not_quantised_again():
    with pytest.raises(ValueError, match="not quantised yet"):
        Model(CONFIG, RELEASED, Execution(quantise=RELEASED))


def test_what_is_float32_in_every_release_stays(trained):
    model, params = trained
    _, packed = export_params(model, params, RELEASED)
    ours, theirs = flatten(params["groups"][0][1]), flatten(packed["groups"][0][1])
    for path in (("attn", "attn_sink"), ("hc_attn_fn",), ("ffn", "gate", "bias")):
        np.testing.assert_array_equal(ours[path], theirs[path])
    assert theirs["ffn", "gate", "weight"].dtype == jnp.bfloat16
    assert theirs["attn_norm", "weight"].dtype == jnp.bfloat16
