"""Hyper-connections, every implementation against a float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hyper_connection import gpu, post_mix, pre_mix, seam, tpu
from pallas_kernels.registry import operations
from pallas_kernels.targets import chip

IMPLEMENTATIONS = ("xla", "tpu_interpret", "gpu_interpret")
N = 4
CONSTANTS = {"sinkhorn_iters": 20, "norm_eps": 1e-6, "hc_eps": 1e-6}


def problem(tokens, width, dtype="bfloat16", seed=0):
    """Arguments of ``seam`` by name, [tokens, 1, ...], with coefficients as a sublayer before would leave them."""
    rng = np.random.default_rng(seed)
    mixes = (2 + N) * N
    comb = rng.uniform(0.1, 1, (tokens, 1, N, N))
    return {
        "y": jnp.asarray(rng.normal(size=(tokens, 1, width)), dtype),
        "streams": jnp.asarray(rng.normal(size=(tokens, 1, N, width)) * np.arange(1, N + 1)[:, None], dtype),
        "post": jnp.asarray(rng.uniform(0, 2, (tokens, 1, N)), jnp.float32),
        "comb": jnp.asarray(comb / comb.sum(-1, keepdims=True), jnp.float32),
        "fn": jnp.asarray(rng.normal(size=(mixes, N * width)) / np.sqrt(N * width), jnp.float32),
        "scale": jnp.asarray([0.9, 1.2, 1.5], jnp.float32),
        "base": jnp.asarray(rng.normal(size=mixes), jnp.float32),
    }


def part(arguments, *names):
    return {name: arguments[name] for name in names}


def into(arguments):
    return part(arguments, "streams", "fn", "scale", "base") | CONSTANTS


def back(arguments):
    return part(arguments, "y", "streams", "post", "comb")


def mixed_back(arguments):
    y, streams, post, comb = (np.asarray(arguments[name], np.float64) for name in ("y", "streams", "post", "comb"))
    return post[..., None] * y[..., None, :] + np.einsum("...jk,...jd->...kd", comb, streams)


def mixed_into(arguments):
    """x, post and comb by their definition, token by token, in float64."""
    streams, fn, scale, base = (np.asarray(arguments[name], np.float64) for name in ("streams", "fn", "scale", "base"))
    eps, found = CONSTANTS["hc_eps"], []
    for rows in streams[:, 0]:
        flat = rows.reshape(-1)
        mixes = fn @ flat / np.sqrt(np.mean(flat**2) + CONSTANTS["norm_eps"])
        mixes = mixes * np.repeat(scale, [N, N, N * N]) + base
        pre, post = 1 / (1 + np.exp(-mixes[:N])) + eps, 2 / (1 + np.exp(-mixes[N : 2 * N]))
        comb = np.exp(mixes[2 * N :].reshape(N, N))
        comb = comb / comb.sum(1, keepdims=True) + eps
        comb = comb / (comb.sum(0, keepdims=True) + eps)
        for _ in range(CONSTANTS["sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(1, keepdims=True) + eps)
            comb = comb / (comb.sum(0, keepdims=True) + eps)
        found.append((pre @ rows, post, comb))
    return [np.stack(values)[:, None] for values in zip(*found, strict=True)]


def check_rows(found, expected, dtype):
    assert found.dtype == dtype
    # One rounding to bfloat16 (2^-9 relative), or float32 sums of five terms of size up to 20: a few times 2^-24 * 20.
    rtol = 2.0**-8 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=2e-5)


def check_coefficients(found, expected):
    assert found.dtype == jnp.float32
    # float32 sums of a thousand products of unit norm together are good to about 1e-6, twenty iterations keep that.
    # Weights rounded to bfloat16, or a second bfloat16 pass left out, would be wrong by 1e-3 and 1e-5 and more.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=4e-6)


@functools.cache
def compiled(function, implementation):
    constants = {} if function is post_mix else CONSTANTS
    return jax.jit(functools.partial(function, implementation=implementation, **constants))


# Fewer tokens than a tile of rows; several blocks, the last one partial; channels that are no multiple of anything.
@pytest.mark.parametrize(
    ("tokens", "width", "dtype"), [(5, 256, "bfloat16"), (150, 256, "bfloat16"), (3, 24, "float32")]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_float64(implementation, tokens, width, dtype):
    arguments = problem(tokens, width, dtype)
    streams = compiled(post_mix, implementation)(**back(arguments))
    check_rows(streams, mixed_back(arguments), dtype)
    after = arguments | {"streams": streams}
    expected = mixed_into(after)
    x, post, comb = compiled(pre_mix, implementation)(**part(after, "streams", "fn", "scale", "base"))
    check_rows(x, expected[0], dtype)
    check_coefficients(post, expected[1])
    check_coefficients(comb, expected[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_seam_is_both_mixes(implementation):
    """Bit for bit: what is mixed in are the streams as they are stored."""
    arguments = problem(20, 256)
    streams, *rest = compiled(seam, implementation)(**arguments)
    apart = compiled(post_mix, implementation)(**back(arguments))
    np.testing.assert_array_equal(np.asarray(streams, np.float32), np.asarray(apart, np.float32))
    after = part(arguments | {"streams": apart}, "streams", "fn", "scale", "base")
    for found, expected in zip(rest, compiled(pre_mix, implementation)(**after), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("implementation", ["tpu_interpret", "gpu_interpret"])
def test_a_token_is_the_same_in_any_company(implementation):
    """Alone, in another place, among several blocks, beside tokens that are not numbers: the same bits."""
    arguments = problem(150, 256)
    call = compiled(seam, implementation)
    together = call(**arguments)

    def check(rows, changed):
        found = call(**changed)
        for one, other in zip(found, together, strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32)[: len(rows)], np.asarray(other, np.float32)[rows])

    tokenwise = ("y", "streams", "post", "comb")
    for rows in (np.array([140]), np.array([149, 3, 130])):
        check(rows, arguments | {name: arguments[name][rows] for name in tokenwise})
    rows = np.array([7, 129])
    beside = {name: jnp.concatenate([arguments[name][rows], arguments[name][:30] * jnp.nan]) for name in tokenwise}
    check(rows, arguments | beside)


def test_gradients_are_the_twins():
    arguments = problem(6, 128)

    def gradient(implementation):
        def value(arguments):
            results = seam(**arguments, **CONSTANTS, implementation=implementation)
            weights = [jnp.cos(jnp.arange(a.size).reshape(a.shape)) for a in results]
            return sum(jnp.sum(a.astype(jnp.float32) * w) for a, w in zip(results, weights, strict=True))

        return jax.jit(jax.grad(value))(arguments)

    ours, theirs = gradient("tpu_interpret"), gradient("xla")
    assert set(ours) == set(arguments)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name], np.float32), np.asarray(expected, np.float32), name)


def test_what_the_kernels_do_not_serve_has_a_reason():
    arguments = problem(2, 24)
    with pytest.raises(ValueError, match="'tpu': hidden size 24 is not a multiple of 128"):
        post_mix(**back(arguments), implementation="tpu")
    with pytest.raises(ValueError, match="'tpu_interpret': there are no tokens"):
        post_mix(**back(problem(0, 24)), implementation="tpu_interpret")
    wide = jax.ShapeDtypeStruct((1, 1, N, 7168), jnp.float32)
    assert tpu.unserved(chip("v6e"), wide) is None
    assert gpu.unserved(chip("h200"), wide) == "streams are float32, expected bfloat16"


def test_costs_are_hand_sums():
    cases = {case.name: case.cost for case in operations()["seam"].cases()}
    cost = cases["flash/decode/64"]
    row = 4096 * 2
    assert cost.bytes_read == 64 * (5 * row + 20 * 4) + 24 * (4 * 4096 + 1) * 4 + 3 * 4
    assert cost.bytes_written == 64 * (5 * row + 20 * 4)
    assert cost.operations == {"float32": 2 * 64 * 24 * 4 * 4096}
