"""scripts/demo.py as README runs it, and the mesh that scripts choose by themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from deepseek_v4 import Config, MeshError
from deepseek_v4.checkpoint import inspect_checkpoint
from deepseek_v4.default_model import CONFIG_DIRECTORY, corpus, default_config, write_default
from deepseek_v4.loading import Parallelism, default_placement, open_model
from deepseek_v4.nn.variables import RELEASED
from deepseek_v4.scoring import score

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_runs_the_whole_path(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--max-new-tokens", "8", "--keep", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "restored onto cpu, data=1,expert=4,tensor=2" in done.stdout
    assert "It is a truth universally acknowledged, that" in done.stdout
    assert re.search(r"generated 32 tokens .* tokens/s per chip, .* tokens/s per sequence", done.stdout)
    assert sum(path.stat().st_size for path in (tmp_path / "hf").iterdir()) < 12e6


def test_the_built_in_model_has_learnt_its_language(tmp_path):
    """Its own checkpoint is complete, and predicts a novel it has not seen far better than chance (ln 4096 = 8.3)."""
    found = inspect_checkpoint(CONFIG_DIRECTORY)
    assert found.complete
    loaded = open_model(CONFIG_DIRECTORY, dtype="float32", parallelism=Parallelism("data=8"))
    text = dict(corpus())["persuasion"][200_000:203_000]
    tokens = loaded.tokenizer.encode(text)[:512]
    (scores,) = score(loaded.model, loaded.restore(), [tokens])
    assert -scores.logprobs.mean() < 5.0


@pytest.mark.slow
def test_the_built_in_model_is_a_function_of_its_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_default(tmp_path / name, seed)
    shard = "model-00003-of-00008.safetensors"
    first, again, other = ((tmp_path / name / shard).read_bytes() for name in "abc")
    assert first == again != other
    assert inspect_checkpoint(tmp_path / "a").complete


class TestDefaultMesh:
    @pytest.mark.parametrize(
        ("count", "expected"), [(1, None), (2, (1, 2, 1)), (4, (1, 4, 1)), (8, (1, 4, 2)), (3, (3, 1, 1))]
    )
    def test_sizes(self, count, expected):
        placement = default_placement(default_config(), RELEASED, jax.devices()[:count])
        shape = None if placement is None else tuple(placement.mesh.shape.values())
        assert shape == expected

    def test_the_mesh_leaves_simulated_activation_blocks_whole(self):
        # Experts are 128 wide: one block, which no tensor axis may cut.
        placement = default_placement(default_config(), RELEASED, jax.devices(), frozenset({"activations"}))
        assert tuple(placement.mesh.shape.values()) == (1, 8, 1)

    def test_released_models_fit_every_count_of_a_pod(self):
        for name in ("flash", "pro"):
            config = Config.from_file(ROOT / "configs" / name)
            assert default_placement(config, RELEASED, jax.devices()).mesh.size == 8

    def test_no_fit_is_an_error(self, monkeypatch):
        import deepseek_v4.loading as loading

        def refuse(*_):
            raise MeshError("no")

        monkeypatch.setattr(loading, "check_placement", refuse)
        with pytest.raises(MeshError, match="no mesh of 8 devices"):
            default_placement(default_config(), RELEASED, jax.devices())
