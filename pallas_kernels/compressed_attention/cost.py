"""Exact bytes and operations of ``compressed_attention``, from its shapes."""

from types import MappingProxyType

from pallas_kernels.registry import Cost


def attention_cost(
    *,
    batch: int,
    length: int,
    heads: int,
    width: int,
    window: int,
    entries: int,
    indices: bool,
    itemsize: int = 2,
    causal_ratio: int = 0,
    context: int = 0,
) -> Cost:
    """What attention of ``length`` queries per row must move and compute.

    ``entries`` counts the compressed entries per query: those selected, or with ``indices`` False those visible. An
    entry that all queries of a row attend to crosses HBM once per row; a selected one once per query that selects it,
    for which queries share a selection depends on the data. With ``causal_ratio`` the queries are the last ``length``
    of ``context`` tokens and each sees its own number of entries; otherwise all see ``entries``. Queries and outputs
    cross once; window rows once per row; counts and indices are int32.
    """
    seen = [entries] * length
    if causal_ratio:
        visible = [(context - length + i + 1) // causal_ratio for i in range(length)]
        seen = [min(count, entries) if indices else count for count in visible]
    keys = sum(seen) + length * window
    operations = 4 * batch * heads * width * keys
    rows = sum(seen) if indices else max(seen, default=0)
    index_bytes = 4 * batch * length * (entries if indices else 1)
    read = batch * (length * heads + rows + window - 1 + length) * width * itemsize + index_bytes + 4 * heads
    kind = "bfloat16" if itemsize == 2 else "float32"
    return Cost(
        bytes_read=read,
        bytes_written=batch * length * heads * width * itemsize,
        operations=MappingProxyType({kind: operations}),
    )
