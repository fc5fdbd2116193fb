"""What the TPU compiler says about single arrays and about where devices are, as a program of its own: prints JSON.

python tests/planning/ask_compiler.py '{"arrays": [[[3, 5], "bfloat16"]], "meshes": [["v6e", [4, 4], "expert=8"]]}'

Answers {"bytes": [...], "places": [[coordinates and core of every device in the order of its mesh], ...]}.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4.sharding import make_mesh
from pallas_kernels.targets import abstract_devices


def main(question: dict) -> dict:
    mesh = Mesh(np.array(abstract_devices("v6e")[:1]), ("x",))
    sizes = []
    for shape, dtype in question["arrays"]:
        array = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        program = jax.jit(lambda a: a).lower(array).compile()
        sizes.append(int(program.memory_analysis().argument_size_in_bytes))
    places = []
    for chip, grid, text in question["meshes"]:
        devices = make_mesh(text, abstract_devices(chip, tuple(grid))).devices
        places.append([[*map(int, device.coords), int(device.core_on_chip)] for device in devices.flat])
    return {"bytes": sizes, "places": places}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
