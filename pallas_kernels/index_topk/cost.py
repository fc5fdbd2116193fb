"""Exact bytes and operations of ``index_topk``, from its shapes."""

from types import MappingProxyType

from pallas_kernels.registry import Cost


def topk_cost(
    *,
    batch: int,
    length: int,
    heads: int,
    width: int,
    entries: int,
    k: int,
    itemsize: int = 2,
    key_bytes: int | None = None,
    causal_ratio: int = 0,
    context: int = 0,
) -> Cost:
    """Scores of ``length`` queries per row against the keys that they see, and the indices of the ``k`` best.

    Keys cross HBM once per row, however many queries look at them; queries, their float32 weights, int32 counts and
    indices once. A key takes ``key_bytes`` (None: as a query does). With ``causal_ratio`` the queries are the last
    ``length`` of ``context`` tokens and each sees its own number of keys; otherwise all see ``entries``. Comparisons
    are vector arithmetic and not counted.
    """
    seen = [entries] * length
    if causal_ratio:
        seen = [(context - length + i + 1) // causal_ratio for i in range(length)]
    queries = length * heads * (width * itemsize + 4) + 4 * length
    kind = "bfloat16" if itemsize == 2 else "float32"
    return Cost(
        bytes_read=batch * (queries + max(seen, default=0) * (key_bytes or width * itemsize)),
        bytes_written=batch * 4 * length * min(k, entries),
        operations=MappingProxyType({kind: 2 * batch * heads * width * sum(seen)}),
    )
