"""Fixtures of the model tests."""

from collections.abc import Iterator

import jax
import pytest
from cases import CASES, Case


@pytest.fixture(scope="session", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each schedule in turn."""
    return CASES[request.param]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """The same arithmetic in less optimised code: compiling dominates these tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
