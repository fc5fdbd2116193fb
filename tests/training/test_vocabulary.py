"""Embedding and cross-entropy where their tables are cut: one device's values, and never a whole table on any."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4 import Execution, Placement, Rules, make_mesh, vocabulary
from deepseek_v4.training.losses import cross_entropy

VOCAB, D, ROWS, LENGTH = 1000, 16, 8, 11
TRAVEL = Rules.expert_parallel(fsdp=True)


def program(execution: Execution):
    """Losses of one step through both tables, and the gradients of all that is given."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    following, wanted = jnp.roll(ids, -1, axis=1), jnp.asarray(rng.random((ROWS, LENGTH)) < 0.8)

    def loss(table, head, mix):
        hidden = vocabulary.embed(table, ids, execution) @ mix
        found = cross_entropy(hidden, head, following, wanted, execution)
        return found.loss + 0.1 * found.z, (found.correct, found.greedy)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


def arrays():
    rng = np.random.default_rng(1)
    # Two equal rows of the head, which one device and shards have to take for the first.
    head = rng.normal(size=(VOCAB, D))
    head[VOCAB // 2 :] = head[: VOCAB // 2]
    return [jnp.asarray(a, jnp.float32) for a in (rng.normal(size=(VOCAB, D)), head, rng.normal(size=(D, D)))]


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        (TRAVEL, "data=2,expert=2,tensor=2"),
        (TRAVEL, "data=2,expert=4"),
        (Rules(fsdp=("data",)), "data=4,expert=2"),
        (Rules(), "data=2,tensor=4"),
    ],
)
def test_tables_are_never_whole(rules, mesh, monkeypatch):
    (expected, (correct, greedy)), wanted = jax.jit(program(Execution("float32")))(*arrays())
    # So that a device of four has 22 tokens and pieces of 40 rows, of which the last repeats some.
    monkeypatch.setattr(vocabulary, "LOGITS", 22 * 40)
    placement = Placement(make_mesh(mesh), rules)
    table = jax.NamedSharding(placement.mesh, placement.stored_spec(("vocab", "embed"), (VOCAB, D)))
    given = [jax.device_put(a, s) for a, s in zip(arrays(), (table, table, placement.replicated()), strict=True)]
    step = jax.jit(program(Execution("float32", placement=placement))).lower(*given).compile()
    (loss, found), gradients = step(*given)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(found[0]) == float(correct)
    np.testing.assert_array_equal(found[1], greedy)
    for a, b in zip(gradients, wanted, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))

    if rules.fsdp:
        assert all(g.sharding.is_equivalent_to(table, 2) for g in gradients[:2])
        arrays_of = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", step.as_text())
        # Rows of the tokens of a group, pieces of the head and logits of a piece are all smaller than a share of it.
        shares = placement.size("vocab") * placement.size("fsdp")
        assert max(math.prod(map(int, dims.split(","))) for dims in arrays_of) == VOCAB * D // shares
