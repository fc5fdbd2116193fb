"""Pieces of prompts, pools, budgets of memory and stop strings: the host's plain arithmetic."""

import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4 import Config, Execution, Model, Placement, make_mesh
from deepseek_v4.default_model import CONFIG_DIRECTORY
from deepseek_v4.engine import Pool, chunk_sizes, parse_pools
from deepseek_v4.engine.memory import DoesNotFit, check_fits, describe_memory, is_out_of_memory, parameter_bytes
from deepseek_v4.engine.scheduling import next_chunk, slots_within
from deepseek_v4.engine.state import cache_bytes
from deepseek_v4.engine.stopping import StopStrings, cut_at_stop
from deepseek_v4.tokenizer import Tokenizer


@given(largest=st.integers(1, 4096), length=st.integers(1, 20000))
def test_pieces_cover_a_prompt_and_only_its_end_is_padded(largest, length):
    sizes = chunk_sizes(largest)
    assert max(sizes) == largest
    assert len(sizes) <= 3
    left, calls = length, []
    while left > 0:
        calls.append(next_chunk(left, sizes))
        left -= calls[-1]
    assert len(calls) == math.ceil(length / largest)
    assert all(call == largest for call in calls[:-1])
    rest = left + calls[-1]
    assert 0 < rest <= calls[-1]
    assert all(size < rest for size in sizes if size < calls[-1])


def test_pools_are_read_from_text():
    assert parse_pools("8x4096, 1x131072") == (Pool(8, 4096), Pool(1, 131072))
    for text in ("8", "x4096", "8x", "8x4k", ""):
        with pytest.raises(ValueError, match="expected SLOTSxTOKENS"):
            parse_pools(text)
    with pytest.raises(ValueError, match="slots: expected at least 1"):
        parse_pools("0x128")


@pytest.fixture(scope="module")
def model():
    return Model(Config.from_file(CONFIG_DIRECTORY))


def test_what_does_not_fit_is_refused_with_numbers_that_do(model):
    pools = (Pool(64, 8192),)
    weights, row = parameter_bytes(model), cache_bytes(model, 8192, 0)
    needed = weights + 65 * row
    check_fits(model, pools, 0, needed)
    check_fits(model, pools, 0, None)
    with pytest.raises(DoesNotFit) as caught:
        check_fits(model, pools, 0, needed - 1)
    said = str(caught.value)
    assert "64 sequences of 8192 tokens" in said
    room = int((needed - 1) * 0.9) - weights
    fitting = slots_within(model, room, 8192, 0)
    assert f"{fitting} of 8192 tokens" in said
    assert weights + (fitting + 1) * row <= needed - 1
    check_fits(model, (Pool(fitting, 8192),), 0, needed - 1)
    assert "not one sequence would fit" in describe_memory(model, pools, 0, weights)
    assert "try fewer or shorter" in describe_memory(model, pools, 0, None)


def test_parameter_bytes_are_a_devices_share(model):
    mesh = Placement(make_mesh("data=2,expert=2,tensor=2"))
    split = Model(model.config, execution=Execution(placement=mesh))
    leaves = jax.tree.leaves(model.abstract_params())
    assert parameter_bytes(model) == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert parameter_bytes(model) / 4 < parameter_bytes(split) < parameter_bytes(model)


def test_errors_of_devices_are_recognised():
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"))
    assert not is_out_of_memory(RuntimeError("INTERNAL: something else"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(CONFIG_DIRECTORY)


@settings(deadline=None)
@given(data=st.data(), text=st.text(min_size=1, max_size=60))
def test_stop_strings_end_at_the_first_token_that_completes_one(tokenizer, data, text):
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin + 1, len(text)))
    stops = (text[begin:end], "\u2603\u2603")
    ids = tokenizer.encode(text)
    watch, found, cut = StopStrings(stops, tokenizer), None, 0
    for first in range(0, len(ids), 3):  # in rounds, as drafts give them
        if found := watch.push(ids[first : first + 3]):
            cut = first + found[0]
            break
    assert found is not None
    assert found[1] == stops[0]
    whole = tokenizer.decode(ids[:cut])
    assert stops[0] in whole
    # One token fewer and it is not there: a character that is cut counts as absent.
    assert stops[0] not in tokenizer.stream().push(ids[: cut - 1])
    assert cut_at_stop(whole, stops[0]) == whole[: whole.index(stops[0])]
