"""Entries stored as words: the same numbers, in the same bytes, in rows that kernels can address."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_config

from deepseek_v4.cache import entries_write, layer_cache_shapes
from deepseek_v4.formats import pack_words, unpack_words
from deepseek_v4.layer_spec import layer_specs
from deepseek_v4.stored_rows import KeyColumns, KVColumns, KVWords

CONFIG = small_config((4, 128), num_hash_layers=0)


def _bytes(shape, dtype):
    return int(np.prod(shape)) * dtype.itemsize


@pytest.mark.parametrize("rollback", [0, 4, 17])
def test_words_take_the_bytes_of_rows_and_whole_tiles(rollback):
    for spec in layer_specs(CONFIG):
        plain = layer_cache_shapes(CONFIG, spec, 1024, rollback, "bfloat16")
        words = layer_cache_shapes(CONFIG, spec, 1024, rollback, "bfloat16", "words")
        assert set(words) == set(plain)
        tiled = {"window", "entries", "index_entries"} & set(plain)
        for name in tiled:
            (rows, _), dtype = words[name]
            assert rows % 16 == 0
            assert plain[name][0][0] <= rows < plain[name][0][0] + 16
            assert _bytes((rows, words[name][0][1]), dtype) == rows * plain[name][0][1] * 2
        for name in set(plain) - tiled:
            (rows, width), dtype = words[name]
            assert rows % 8 == 0, name
            assert plain[name][0][0] <= rows < plain[name][0][0] + 8, name
            assert ((width,), dtype) == (plain[name][0][1:], plain[name][1]), name


def test_writing_packs_what_reading_unpacks():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(3, 4, 64)), jnp.bfloat16)
    first, complete = jnp.asarray([0, 5, 9]), jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    plain = entries_write(jnp.zeros((2, 3, 10, 64), jnp.bfloat16), 1, first, complete, rows)
    words = entries_write(jnp.zeros((2, 3, 10, 32), jnp.uint32), 1, first, complete, rows)
    np.testing.assert_array_equal(np.asarray(unpack_words(words), np.float32), np.asarray(plain, np.float32))


WRITTEN = {  # windows per call: one tile of columns, one or two, three; rows that share one, whole and in part
    "1 column": (1, KVColumns((4, 1), (8, 1), (1, 1))),
    "2 columns": (2, KeyColumns((4, 1), (1, 1))),
    "300 columns": (300, KeyColumns((4, 1), (1, 1))),
    "1 row of words": (1, KVWords((4, 8), (1, 8))),
    "6 rows of words": (6, KVWords((4, 8), (1, 8))),
    "300 rows of words": (300, KVWords((2, 8), (1, 8))),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_columns_are_written_where_rows_are_and_nothing_else_is(name):
    """Any place in a tile, the end of the cache and beyond it; a range of every device is written by it alone."""
    count, form = WRITTEN[name]
    rng = np.random.default_rng(count)
    total, first = 512, np.array([0, 127, 128, 250, 511, 505, 600, 301])
    rows = jnp.asarray(rng.choice([-6, -1.5, 0, 0.5, 3], (len(first), count, 32)), jnp.float32)
    complete = jnp.asarray(rng.random((len(first), count)) < 0.7)
    complete = complete.at[:, 0].set(jnp.arange(len(first)) != 2)
    shape = (2, len(first), total, 32)
    before = jnp.asarray(rng.choice([-4.0, 1.0, 2.0], shape), jnp.float32)
    keys = type(form)(*(jnp.zeros(shape, jnp.uint32) for shape in form)).pack(before)
    expected = np.array(before)
    for b, i in zip(*np.nonzero(complete), strict=True):
        if first[b] + i < total:
            expected[1, b, first[b] + i] = rows[b, i]
    arguments = (keys, 1, jnp.asarray(first), complete, rows)
    found = jax.jit(entries_write)(*arguments)
    np.testing.assert_array_equal(found.unpack(jnp.float32), expected)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    ranges = jax.P(None, None, "x", None) if isinstance(form, KVWords) else jax.P(None, None, None, "x")
    write = functools.partial(entries_write, rows_over=("x",))
    specs = (ranges, *[jax.P()] * 4)
    split = jax.jit(jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=ranges, check_vma=False))(*arguments)
    for part, whole in zip(split, found, strict=True):
        np.testing.assert_array_equal(part, whole)


def test_a_word_is_channel_d_low_and_channel_d_plus_half_high():
    row = jnp.asarray([1.0, 2.0, 0.0, -1.0], jnp.bfloat16)  # 0x3F80, 0x4000, 0x0000, 0xBF80
    np.testing.assert_array_equal(np.asarray(pack_words(row)), np.array([0x00003F80, 0xBF804000], np.uint32))


def test_words_hold_every_number():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    rows = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    back = np.asarray(jax.lax.bitcast_convert_type(unpack_words(pack_words(rows)), jnp.uint16))
    number = ~np.isnan(np.asarray(rows, np.float32))
    np.testing.assert_array_equal(back[number], bits[number])
    assert np.all(np.isnan(np.asarray(unpack_words(pack_words(rows)), np.float32)[~number]))


def test_what_cannot_be_packed_is_refused():
    spec = layer_specs(CONFIG)[0]
    with pytest.raises(ValueError, match="expected bfloat16"):
        pack_words(jnp.zeros((2, 4), jnp.float32))
    with pytest.raises(ValueError, match="found float32; use layout 'plain'"):
        layer_cache_shapes(CONFIG, spec, 64, 0, "float32", "words")
    with pytest.raises(ValueError, match=r"expected one of .* found 'packed'"):
        layer_cache_shapes(CONFIG, spec, 64, 0, "bfloat16", "packed")
