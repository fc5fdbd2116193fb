"""Full-size sparse directories for the checkpoint tests."""

import json
from pathlib import Path

import pytest
from checkpoint_cases import inventory_shards, write_sparse


@pytest.fixture(scope="session")
def sparse_release(shared_dir, tmp_path_factory):
    """A function from a release's name to a full-size directory of it, its bodies sparse."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            inventory = json.loads((shared_dir / "fixtures/checkpoint" / f"{name}.tensors.json").read_text())
            config = (shared_dir / "fixtures/configs" / f"{name}.json").read_text()
            weight_map = {}
            for filename, tensors, size in inventory_shards(inventory, json.loads(config)["n_routed_experts"]):
                write_sparse(directory / filename, tensors)
                assert (directory / filename).stat().st_size == size
                weight_map |= dict.fromkeys(tensors, filename)
            index = {"metadata": {"total_size": inventory["total_size"]}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
            (directory / "config.json").write_text(config)
            made[name] = directory
        return made[name]

    return make
