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
    entry_bytes: int | None = None,
    ring_bytes: int | None = None,
    causal_ratio: int = 0,
    context: int = 0,
) -> Cost:
    """What attention of ``length`` queries per row must move and compute.

    ``entries`` counts the compressed entries per query: those selected, or with ``indices`` False those visible. An
    entry that all queries of a row attend to crosses HBM once per row; a selected one once per query that selects it,
    for which queries share a selection depends on the data. With ``causal_ratio`` the queries are the last ``length``
    of ``context`` tokens and each sees its own number of entries; otherwise all see ``entries``. Queries and outputs
    cross once; window rows once per row; counts and indices are int32. An entry takes ``entry_bytes``, a window row of
    an earlier call ``ring_bytes`` (None: as one of this call).
    """
    seen = [entries] * length
    if causal_ratio:
        visible = [(context - length + i + 1) // causal_ratio for i in range(length)]
        seen = [min(count, entries) if indices else count for count in visible]
    keys = sum(seen) + length * window
    operations = 4 * batch * heads * width * keys
    rows = sum(seen) if indices else max(seen, default=0)
    index_bytes = 4 * batch * length * (entries if indices else 1)
    read = batch * (length * heads + length) * width * itemsize + index_bytes + 4 * heads
    read += batch * (window - 1) * (ring_bytes or width * itemsize)
    read += batch * rows * (entry_bytes or width * itemsize)
    kind = "bfloat16" if itemsize == 2 else "float32"
    return Cost(
        bytes_read=read,
        bytes_written=batch * length * heads * width * itemsize,
        operations=MappingProxyType({kind: operations}),
    )


def training_cost(
    *,
    batch: int,
    length: int,
    heads: int,
    width: int,
    window: int,
    entries: int,
    indices: int,
    causal_ratio: int,
    backward: bool,
    itemsize: int = 2,
) -> Cost:
    """What a training pass over whole sequences of ``length`` tokens must move and compute.

    Each of the ``entries`` of a row, its window rows and queries cross HBM once: in the forward pass queries are read,
    outputs and the log of every sum (float32) written; in the backward pass queries, outputs, their gradients and those
    logs are read, and the gradients of queries, window rows, entries (float32 sums, written once) and sinks written.
    With ``indices`` > 0 a query selects so many, and their int32 lists are read. With ``causal_ratio`` a token sees the
    entries complete by then and the window rows there are, otherwise all of both. Operations are two products per query
    and key forward and five backward, of keys that are seen: kernels that look at all entries where some are selected,
    or at whole blocks, compute more.
    """
    keys = length * (window + entries)
    if causal_ratio or not entries:
        visible = [(t + 1) // causal_ratio if causal_ratio else 0 for t in range(length)]
        keys = sum(min(count, indices or count) + min(t + 1, window) for t, count in enumerate(visible))
    queries = batch * length * heads * width * itemsize
    sums = 4 * batch * length * heads
    of_keys = batch * (length + entries) * width
    lists = 4 * batch * length * max(indices, 1 if entries else 0)
    read = (3 if backward else 1) * queries + of_keys * itemsize + lists + 4 * heads + (sums if backward else 0)
    written = queries + (4 * of_keys + 4 * heads if backward else sums)
    kind = "bfloat16" if itemsize == 2 else "float32"
    operations = (10 if backward else 4) * batch * heads * width * keys
    return Cost(bytes_read=read, bytes_written=written, operations=MappingProxyType({kind: operations}))
