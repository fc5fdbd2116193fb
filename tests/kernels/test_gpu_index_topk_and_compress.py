"""The GPU kernels of index_topk and compress: lowered for CUDA, in any company, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec
from lowering import lowered_for_cuda
from test_compress import CSA, EPS, HCA, ROPE, check, rings, sequences

from pallas_kernels.compress import gpu as compress_gpu
from pallas_kernels.index_topk import gpu as topk_gpu
from pallas_kernels.index_topk import index_topk
from pallas_kernels.index_topk.gpu_plan import Parts
from pallas_kernels.registry import operations
from pallas_kernels.targets import chip

KERNELS = {"index_topk": topk_gpu.ranked_topk, "compress": compress_gpu.compress}


@pytest.mark.parametrize(
    ("operation", "name"),
    [(op, case.name) for op in KERNELS for case in operations()[op].cases() if case.representative],
)
def test_released_shapes_lower_for_cuda(operation, name):
    """To Triton's language, as far as jax goes without NVIDIA's compiler; tests/kernels/test_compile_gpu.py goes on."""
    case = next(c for c in operations()[operation].cases() if c.name == name).on(chip("h200"))
    names, defaults = list(case.traced()), {"kv_ring": None, "score_ring": None} if operation == "compress" else {}
    # An H200 that is only named is not in the table of tuned blocks.
    static = case.static() | ({"parts": Parts()} if operation == "index_topk" else {})

    def call(*arrays):
        return KERNELS[operation](**defaults | static | dict(zip(names, arrays, strict=True)))

    assert "triton" in lowered_for_cuda(call, list(case.traced().values())).mlir_module()


@pytest.mark.parametrize("kind", [CSA, HCA])
def test_an_entry_is_the_same_bits_in_any_company(kind):
    """Chunks of four sequences together; the last of them alone, and its last token alone."""
    kv, score, weight = sequences(kind, 4, 400, seed=2)
    start, lengths, length = np.array([5, 130, 0, 64]), np.array([256, 200, 17, 192]), 256
    constants = {"ratio": kind.ratio, "overlap": kind.overlap, "rope": ROPE, "norm_eps": EPS, "dtype": jnp.float32}

    def run(which, start, lengths, length):
        new = [np.zeros((len(which), length, kind.channels), np.float32) for _ in range(2)]
        for rows, whole in zip(new, (kv, score), strict=True):
            for i, b in enumerate(which):
                rows[i, : lengths[i]] = whole[b, start[i] : start[i] + lengths[i]]
        kv_ring, score_ring = rings(kind, kv[which], score[which], start)
        call = jax.jit(functools.partial(compress_gpu.compress, interpret=True, layer=1, **constants))
        positions = {"start": jnp.asarray(start), "lengths": jnp.asarray(lengths)}
        arrays = {"kv": jnp.asarray(new[0]), "score": jnp.asarray(new[1]), "norm_weight": weight, **positions}
        return np.asarray(call(**arrays, kv_ring=kv_ring, score_ring=score_ring))

    together = run([0, 1, 2, 3], start, lengths, length)
    check(kind, together, kv, score, weight, start, lengths)
    np.testing.assert_array_equal(run([3, 1], start[[3, 1]], lengths[[3, 1]], length), together[[3, 1]])
    last = run([3], np.array([255]), np.array([1]), 1)[0, 0]
    np.testing.assert_array_equal(last, together[3, 255 // kind.ratio - 64 // kind.ratio])


def test_heads_that_are_split_are_served_whole():
    """Eight GPUs with eight heads each, fewer than a product takes, bring 64 of them together: the kernel runs."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((8,), ("tensor",), abstract_device=device)
    heads = PartitionSpec(None, None, "tensor")
    call = jax.shard_map(
        functools.partial(index_topk, k=512, sum_over=("tensor",)),
        mesh=mesh,
        in_specs=(heads, heads, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    arrays = (
        jax.ShapeDtypeStruct((5, 1, 64, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((5, 1, 64), jnp.float32),
        jax.ShapeDtypeStruct((1, 5, 4096, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((5, 1), jnp.int32),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert "index_topk_scores" in str(jax.make_jaxpr(call)(*arrays))


def test_what_is_not_served_is_said():
    ask = functools.partial(compress_gpu.unserved, kv_ring=None, overlap=True, rope=ROPE, dtype="float32")
    assert ask(jnp.zeros((1, 4, 256))) is None
    assert "96 channels are not a power of two" in ask(jnp.zeros((1, 4, 192)))
    assert ask(jnp.zeros((1, 4, 192)), compiled=False) is None
    assert "expected float32" in ask(jnp.zeros((1, 4, 256), jnp.bfloat16))
    assert "no rows" in ask(jnp.zeros((0, 4, 256)))
