"""Shared fixtures; sets up eight simulated devices before JAX is imported."""

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In order on each device, as accelerators run: see deepseek_v4.loading.simulate_devices.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Drops what a file compiled when it is done.

    Kept, the programs of all files are 8 GiB per worker and more mappings than Linux gives a process (65,530), which
    XLA ends in a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference folder beside the checkout; tests that need it skip where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"reference data not found at {path}")
    return path
