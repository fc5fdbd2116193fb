"""Choosing which implementation of an operation runs."""

from collections.abc import Callable, Mapping


def choose(operation: str, implementations: Mapping[str, Callable], implementation: str | None) -> Callable:
    """The named implementation of ``operation``, or its default; raises ``ValueError`` naming what exists."""
    name = "xla" if implementation is None else implementation
    if name not in implementations:
        raise ValueError(f"{operation}: no implementation {name!r}; available: {sorted(implementations)}")
    return implementations[name]
