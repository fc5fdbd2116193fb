"""The chips kernels are written for: their published figures, and compilers for them on machines that have none.

Importing this module loads nothing and touches no environment variable; ``abstract_devices`` does, and says so.
A *device* is what one program runs on (one entry of ``jax.devices()``): a whole chip of v5e, v5p (its two TensorCores
act as one), v6e and the GPUs, half a chip of v7x.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from types import MappingProxyType

import jax

GIB = 1 << 30
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; every figure is per device and a published peak, not a measurement.

    ``hbm_bandwidth`` in bytes/s; ``peak`` in operations/s (a multiply-add is two) by operand type, where a type the
    matrix unit lacks is absent; ``fast_memory`` in bytes: VMEM of one TensorCore, or shared memory of one thread block;
    ``topology`` a slice of a few devices to compile for; ``cores`` TensorCores that share a device.

    ``usable_bytes`` is what a program may take of the memory: on TPUs the limit at which libtpu's compiler refuses a
    program, on GPUs 95 % (the compiler does not check). ``link_bandwidth`` is bytes/s one way of one torus link of a
    chip (half the published bidirectional figure over its ``links``), or of a GPU's port to its NVSwitch;
    ``network_bandwidth`` of the network between hosts per GPU. ``slices`` are the shapes that can be rented; a dim of
    a torus wraps around from ``wraps_from`` chips on. ``copies_stacks``: bfloat16 arrays that a loop slices are kept a
    second time, in tiles of 16 rows (libtpu 0.0.42).
    """

    name: str
    platform: str
    device_kind: str
    topology: str
    hbm_bytes: int
    hbm_bandwidth: float
    peak: Mapping[str, float]
    fast_memory: int
    source: str
    cores: int = 1
    sparse_cores: bool = False
    usable_bytes: int = 0
    devices_per_chip: int = 1
    link_bandwidth: float = 0
    network_bandwidth: float = 0
    slices: tuple[str, ...] = ()
    copies_stacks: bool = False
    wraps_from: int = 0

    def peak_for(self, kind: str) -> float:
        """Operations per second on operands of ``kind``; types the chip lacks run as bfloat16, float32 as six passes.

        Vector arithmetic ("vector") has no published peak and is not part of a roofline: infinity.
        """
        if kind == "vector":
            return float("inf")
        if kind == "float32":
            return self.peak.get("float32", self.peak["bfloat16"] / 6)
        return self.peak.get(kind, self.peak["bfloat16"])


def _peaks(**peaks: float) -> Mapping[str, float]:
    return MappingProxyType(peaks)


_TPU_DOCS = "https://cloud.google.com/tpu/docs/"

_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SLICES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_NODES = ("1", "2", "4", "8", "8x2", "8x4", "8x8", "8x16", "8x32")

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip(
                "v5e",
                "tpu",
                "TPU v5 lite",
                "v5e:4x4",
                16 * GIB,
                0.819e12,
                _peaks(bfloat16=197e12, int8=394e12),
                128 * MIB,
                _TPU_DOCS + "v5e",
                usable_bytes=int(15.75 * GIB),
                link_bandwidth=400e9 / 2 / 4,
                slices=_SLICES_2D,
                wraps_from=16,
            ),
            Chip(
                "v5p",
                "tpu",
                "TPU v5",
                "v5p:2x2x1",
                95 * GIB,
                2.765e12,
                _peaks(bfloat16=459e12, int8=918e12),
                64 * MIB,
                _TPU_DOCS + "v5p",
                cores=2,
                sparse_cores=True,
                usable_bytes=int(95.7 * GIB),
                link_bandwidth=1200e9 / 2 / 6,
                slices=_SLICES_3D,
                wraps_from=4,
            ),
            Chip(
                "v6e",
                "tpu",
                "TPU v6 lite",
                "v6e:4x4",
                32 * GIB,
                1.640e12,
                _peaks(bfloat16=918e12, int8=1836e12),
                128 * MIB,
                _TPU_DOCS + "v6e",
                sparse_cores=True,
                usable_bytes=int(31.2 * GIB),
                link_bandwidth=800e9 / 2 / 4,
                slices=_SLICES_2D,
                wraps_from=16,
            ),
            Chip(
                "v7x",
                "tpu",
                "TPU7x",
                "tpu7x:2x2x1",
                96 * GIB,
                7.380e12 / 2,
                _peaks(bfloat16=2307e12 / 2, float8_e4m3fn=4614e12 / 2),
                64 * MIB,
                _TPU_DOCS + "tpu7x",
                sparse_cores=True,
                usable_bytes=int(94.7 * GIB),
                devices_per_chip=2,
                link_bandwidth=1200e9 / 2 / 6,
                slices=_SLICES_3D,
                wraps_from=4,
                copies_stacks=True,
            ),
            Chip(
                "h200",
                "cuda",
                "NVIDIA H200",
                "1x1x1",
                141 * 10**9,
                4.8e12,
                _peaks(bfloat16=989e12, float8_e4m3fn=1979e12, float32=67e12),
                232_448,
                "https://www.nvidia.com/en-us/data-center/h200/ (dense)",
                usable_bytes=141 * 10**9 * 95 // 100,
                link_bandwidth=900e9 / 2,
                network_bandwidth=400e9 / 8,
                slices=_NODES,
            ),
            Chip(
                "b200",
                "cuda",
                "NVIDIA B200",
                "1x1x1",
                180 * 10**9,
                7.7e12,
                _peaks(bfloat16=2250e12, float8_e4m3fn=4500e12, float4_e2m1fn=9000e12, float32=75e12),
                232_448,
                "https://www.nvidia.com/en-us/data-center/dgx-b200/ (one eighth, dense)",
                usable_bytes=180 * 10**9 * 95 // 100,
                link_bandwidth=1800e9 / 2,
                network_bandwidth=400e9 / 8,
                slices=_NODES,
            ),
        )
    }
)
"""Every chip of the compile table, by the name used on its command line."""

# Names that some runtimes give the same devices.
_OTHER_KINDS = {
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
    "NVIDIA H200 NVL": "NVIDIA H200",
}

# What XLA's GPU compiler asks about a device: cores, L2 bytes, clock in GHz, compute capability (vendor data sheets).
_CUDA_DEVICES = {"h200": (132, 52_428_800, 1.98, 9), "b200": (148, 132_644_864, 1.965, 10)}


class TargetError(RuntimeError):
    """A target whose compiler is not installed or that is not known."""


def chip(name: str) -> Chip:
    """The chip called ``name``; raises ``TargetError`` naming those there are."""
    if name not in CHIPS:
        raise TargetError(f"unknown target {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]


def abstract_devices(name: str, grid: tuple[int, ...] | None = None) -> list:
    """Devices of a slice of a chip, to compile for: no hardware is needed or touched.

    ``grid`` is the shape of the slice in chips, for GPUs (per node, nodes); by default a small one.

    Loads the chip's compiler (libtpu, or the CUDA plugin) into this process and, for TPUs, sets the environment
    variables that let libtpu start without a TPU, where they are not set already. Use a process of its own for the
    sake of both: one GPU kind per process is all that its plugin serves. Raises ``TargetError`` with the package to
    install when the compiler is missing.
    """
    target = chip(name)
    from jax.experimental import topologies

    try:
        if target.platform == "tpu":
            _let_libtpu_start()
            topology = topologies.get_topology_desc(platform="tpu", topology_name=_slice_name(target, grid))
        else:
            _register_plugins()
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name="gpu",
                target_config=_cuda_target_config(target),
                topology=target.topology if grid is None else "x".join(map(str, (1, *reversed(grid)))),
            )
    except Exception as error:
        extra = "tpu" if target.platform == "tpu" else "gpu"
        raise TargetError(
            f"{name}: its compiler did not start ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"install this package with the extra [{extra}]"
        ) from error
    return list(topology.devices)


def _slice_name(target: Chip, grid: tuple[int, ...] | None) -> str:
    return target.topology if grid is None else f"{target.topology.split(':')[0]}:{'x'.join(map(str, grid))}"


def current_chip() -> Chip | None:
    """The chip that code traced now will run on: the ambient mesh's, else the default backend's; None for a CPU.

    An accelerator that is not in ``CHIPS`` is None too: nothing is known about it.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return chip_of_kind(abstract.device_kind)
    if jax.default_backend() == "cpu":
        return None
    return chip_of_kind(jax.devices()[0].device_kind)


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip whose devices call themselves ``device_kind``, or None."""
    kind = _OTHER_KINDS.get(device_kind, device_kind)
    return next((c for c in CHIPS.values() if kind == c.device_kind), None)


def _let_libtpu_start() -> None:
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)


def _register_plugins() -> None:
    jax.devices()
    from jax._src import xla_bridge

    # Registering what is there already is an error, which is logged at length; it harms nothing.
    log = logging.getLogger(xla_bridge.__name__)
    log.disabled, before = True, log.disabled
    try:
        xla_bridge.discover_pjrt_plugins()
    except Exception as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
    finally:
        log.disabled = before


def _cuda_target_config(target: Chip) -> str:
    cores, cache, clock, capability = _CUDA_DEVICES[target.name]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(target.hbm_bandwidth),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": target.hbm_bytes,
        "shared_memory_per_block_optin": target.fast_memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    body = " ".join(f"{key}: {value}" for key, value in fields.items())
    return (
        f"gpu_device_info {{ {body} cuda_compute_capability {{ major: {capability} "
        'feature_extension: ACCELERATED_FEATURES } }\nplatform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f'device_description_str: "{target.device_kind}"\n'
    )
