"""The scripts as functions, and one tiny checkpoint in both formats."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import write_tiny_checkpoint

from deepseek_v4.checkpoint import open_huggingface, to_orbax

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="session")
def script():
    """script(name) is the module scripts/NAME.py."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where tyro looks for the source of nested dataclasses
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def orbax_checkpoint(hf_checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "orbax"
    to_orbax(open_huggingface(hf_checkpoint), directory)
    return directory
