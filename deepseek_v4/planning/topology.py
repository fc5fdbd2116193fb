"""A rented slice: its chips, their arrangement, and how fast the axes of a mesh on it can exchange data.

Times of collectives are limits, not predictions: a ring or all dims of a torus at once at full link bandwidth, plus a
microsecond per hop. On a torus the devices of a mesh axis are where ``make_mesh`` puts them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
from jax.experimental import mesh_utils

from deepseek_v4.sharding import axes_of
from pallas_kernels.targets import CHIPS, Chip

HOP_SECONDS = 1e-6
"""Latency of one hop: the order of magnitude that the vendors' own guides calculate with, not a published figure."""

# A device's link to its sibling on the same v7x chip, in torus links (Google's TPU7x page: six times as fast).
_SIBLING_LINKS = 6

_OTHER_NAMES = {"tpu7x": "v7x"}


class TopologyError(ValueError):
    """A topology that is not known or cannot be rented."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """``grid`` in chips: the torus of a TPU slice, or (GPUs per node, nodes)."""

    chip_name: str
    grid: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What it consists of."""
        return CHIPS[self.chip_name]

    @property
    def name(self) -> str:
        """As on the command line: "v6e:8x8", "h200:8", "b200:8x4"."""
        grid = self.grid[:1] if self.chip.platform == "cuda" and self.grid[1] == 1 else self.grid
        return f"{self.chip.name}:{'x'.join(map(str, grid))}"

    @property
    def devices(self) -> int:
        """Devices, as JAX counts them."""
        return math.prod(self.grid) * self.chip.devices_per_chip

    def links(self, mesh: Mapping[str, int], axes: Sequence[str]) -> "Links":
        """What the devices along ``axes`` of a mesh have to exchange data with one another."""
        names = axes_of(mesh)
        places = tuple(place for place, axis in enumerate(names) if axis in axes and mesh[axis] > 1)
        return _links(self, tuple(mesh[axis] for axis in names), places)


@dataclasses.dataclass(frozen=True)
class Links:
    """``size`` devices that exchange data over ``bandwidth`` bytes/s one way per device, at most ``hops`` apart."""

    size: int
    bandwidth: float
    hops: int
    medium: str

    def all_gather(self, received: float) -> float:
        """Seconds for every device to end with ``received`` bytes, its own part included (also a reduce-scatter)."""
        if self.size == 1:
            return 0.0
        return received * (self.size - 1) / self.size / self.bandwidth + self.hops * HOP_SECONDS

    def all_reduce(self, size: float) -> float:
        """Seconds to add up ``size`` bytes of every device and leave the sum on each."""
        return 2 * self.all_gather(size)

    def all_to_all(self, sent: float) -> float:
        """Seconds for every device to deal out ``sent`` bytes evenly: on a torus a quarter of the hops on average."""
        if self.size == 1:
            return 0.0
        distance = max(1.0, self.hops / 2) if self.medium == "torus" else 1.0
        return sent * (self.size - 1) / self.size * distance / self.bandwidth + self.hops * HOP_SECONDS


def parse_topology(text: str) -> Topology:
    """``"v6e:8x8"``, ``"tpu7x:4x4x4"``, ``"h200:8"`` (one node), ``"b200:8x4"`` (four nodes of eight GPUs).

    Raises ``TopologyError`` naming the chips, or the slices of the chip.
    """
    name, colon, shape = text.partition(":")
    name = _OTHER_NAMES.get(name, name)
    if name not in CHIPS:
        raise TopologyError(f"topology {text!r}: unknown chip {name!r}; known: {', '.join(CHIPS)} (v7x is also tpu7x)")
    chip = CHIPS[name]
    if not colon or shape not in chip.slices:
        raise TopologyError(f"topology {text!r}: {name} comes as {', '.join(f'{name}:{s}' for s in chip.slices)}")
    grid = tuple(map(int, shape.split("x")))
    if chip.platform == "cuda" and len(grid) == 1:
        grid = (*grid, 1)
    return Topology(name, grid)


def slices(chip: Chip) -> list[Topology]:
    """Every slice of a chip, smallest first."""
    return [parse_topology(f"{chip.name}:{shape}") for shape in chip.slices]


@functools.cache
def _coordinates(topology: Topology, shape: tuple[int, ...]) -> np.ndarray:
    """Physical coordinates [*shape, dims] of the devices of a mesh; the last dim counts devices on a chip."""
    chip, grid = topology.chip, topology.grid
    if chip.platform == "cuda":
        places = np.stack(np.unravel_index(np.arange(topology.devices), tuple(reversed(grid))), -1)
        return places.reshape(*shape, 2)
    fake = []
    for number, place in enumerate(np.ndindex(*reversed(grid))):
        coords = tuple(reversed(place)) + (0,) * (3 - len(grid))
        for core in range(chip.devices_per_chip):
            fake.append(
                SimpleNamespace(
                    id=number * chip.devices_per_chip + core,
                    platform="tpu",
                    device_kind=chip.device_kind,
                    coords=coords,
                    core_on_chip=core,
                    process_index=0,
                    slice_index=0,
                )
            )
    mesh = mesh_utils.create_device_mesh(shape, fake, allow_split_physical_axes=True)
    return np.array([(*device.coords, device.core_on_chip) for device in mesh.flat]).reshape(*shape, 4)


@functools.cache
def _links(topology: Topology, shape: tuple[int, ...], axes: tuple[int, ...]) -> Links:
    size = math.prod(shape[axis] for axis in axes)
    if size == 1:
        return Links(1, math.inf, 0, "none")
    places = _coordinates(topology, shape)
    others = [axis for axis in range(len(shape)) if axis not in axes]
    groups = places.transpose(*others, *axes, len(shape)).reshape(-1, size, places.shape[-1])
    spans = [np.unique(groups[0][:, dim]) for dim in range(places.shape[-1])]
    chip = topology.chip
    if chip.platform == "cuda":
        nodes, local = len(spans[0]), size // len(spans[0])
        if nodes == 1:
            return Links(size, chip.link_bandwidth, 1, "NVLink")
        # Every GPU of a node sends its part of the node's data over its own adapter.
        between = chip.network_bandwidth * local
        bandwidth = 1 / (1 / between + (1 / chip.link_bandwidth if local > 1 else 0))
        return Links(size, bandwidth, 2, "network")
    bandwidth, hops = 0.0, 0
    for dim, span in enumerate(spans[:-1]):
        if len(span) == 1:
            continue
        length = topology.grid[dim]
        whole_cubes = len(topology.grid) == 2 or min(topology.grid) >= chip.wraps_from
        wraps = len(span) == length and length >= chip.wraps_from and whole_cubes
        stride = int(np.diff(span).min())
        # Interleaved groups share the links between their members.
        bandwidth += chip.link_bandwidth * (2 if wraps else 1) / stride
        hops += len(span) // 2 if wraps else int(span[-1] - span[0])
    # The devices of a chip share its links.
    bandwidth /= chip.devices_per_chip
    if not bandwidth:
        return Links(size, chip.link_bandwidth * _SIBLING_LINKS, 1, "chip")
    return Links(size, bandwidth, hops, "torus")
