"""DeepSeek-V4 in JAX: V4-Flash and V4-Pro as pure functions over sharded pytrees."""

from deepseek_v4.config import Config, ConfigError
from deepseek_v4.execution import Execution
from deepseek_v4.model import Model, Output, rollback
from deepseek_v4.nn.variables import RELEASED, RELEASED_BASE, Storage
from deepseek_v4.sharding import MeshError, Placement, Rules, make_mesh

__all__ = [
    "RELEASED",
    "RELEASED_BASE",
    "Config",
    "ConfigError",
    "Execution",
    "MeshError",
    "Model",
    "Output",
    "Placement",
    "Rules",
    "Storage",
    "make_mesh",
    "rollback",
]
