"""What a training step takes of a device's memory and time, against the step's own abstract state and closed forms."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small_models import FLASH_LIKE, small_config

from deepseek_v4 import Config
from deepseek_v4.planning.memory import memory, trained_specs
from deepseek_v4.planning.planner import experts_unserved
from deepseek_v4.planning.program import default_level, step_arguments
from deepseek_v4.planning.roofline import stages
from deepseek_v4.planning.topology import HOP_SECONDS, parse_topology
from deepseek_v4.planning.workload import Setting, Workload
from deepseek_v4.sharding import parse_mesh
from pallas_kernels.targets import CHIPS

SMALL = small_config(FLASH_LIKE)
FLASH = Config.from_file(Path(__file__).parents[2] / "configs" / "flash")


def setting(topology, mesh, workload, config=SMALL):
    return Setting.of(config, parse_topology(topology), parse_mesh(mesh), workload)


def test_experts_that_are_not_packed_need_no_kernel():
    """A width of 128 is below the kernel's tiles: packed experts are refused, masters are planned."""
    small = dataclasses.replace(SMALL, hidden_size=256, moe_intermediate_size=128)
    masters = setting("v6e:2x2", "data=2,expert=2", Workload("train", 4, 256), small)
    assert experts_unserved(masters) is None
    assert experts_unserved(dataclasses.replace(masters, workload=Workload("train", 4, 256, lora=8))) is not None


def test_training_steps_for_tpus_are_compiled_at_a_lower_level():
    step, decode = Workload("train", 8, 256), Workload("decode", 8, 256)
    levels = [default_level(setting(*case)) for case in (("v6e:2x4", "data=8", step), ("v6e:2x4", "data=8", decode))]
    assert [*levels, default_level(setting("h200:8", "data=8", step))] == ["O1", None, None]


def test_training_keeps_masters_and_moments_cut_over_data():
    small = Workload("train", 8, 256)
    whole = memory(setting("h200:1", "data=1", small, SMALL)).arguments
    cut = memory(setting("h200:8", "data=8", small, SMALL)).arguments
    # Muon keeps one moment, AdamW two; nearly all parameters are matrices that Muon updates or embeddings.
    assert whole["trained weights"] < whole["optimizer"] < 2 * whole["trained weights"]
    for name in ("trained weights", "optimizer"):
        assert whole[name] / 8 <= cut[name] < 1.1 * whole[name] / 8  # vectors stay whole
    lora = memory(setting("h200:1", "data=1", dataclasses.replace(small, lora=4), SMALL)).arguments
    assert lora["trained weights"] < 0.1 * whole["trained weights"]
    assert 0 < lora["frozen weights"] < 0.4 * whole["trained weights"]


@pytest.mark.parametrize("travel", [False, True])
@pytest.mark.parametrize("lora", [None, 4])
def test_arguments_of_a_plan_are_those_of_the_step(lora, travel):
    case = setting("h200:8", "data=2,expert=2,tensor=2", Workload("train", 4, 640, lora=lora))
    case = dataclasses.replace(case, expert_parallel=travel)
    leaves = jax.tree.leaves(step_arguments(case, case.placement))
    sizes = [jnp.dtype(a.dtype).itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in leaves]
    assert memory(case).argument_bytes == sum(sizes)


def test_weights_are_gathered_twice_and_gradients_scattered_once():
    case = setting("h200:8", "data=8", Workload("train", 8, 256))
    parts = {part.name: part for stage in stages(case) if stage.name == "HCA" for part in stage.parts}
    layer = case.descriptions.layers
    spec = next(spec for spec in layer if spec.kind == "HCA" and not spec.hash_router)
    cut = [s for s in jax.tree.leaves(layer[spec], is_leaf=lambda x: hasattr(x, "role")) if len(s.shape) >= 2]
    cut = [s for s in cut if case.shard(s) != s.shape]
    # Linears and experts travel in bfloat16, the rest in float32; gradients are float32.
    moved = sum(math.prod(s.shape) * (2 if s.role in ("linear", "expert") else 4) for s in cut)
    seven_eighths = 7 / 8 / CHIPS["h200"].link_bandwidth
    assert parts["weights"].limit == "all-gather over data (NVLink)"
    assert parts["weights"].seconds == pytest.approx(2 * moved * seven_eighths, rel=1e-2, abs=2e-6)
    scattered = sum(math.prod(s.shape) * 4 for s in cut)
    assert parts["gradients"].seconds == pytest.approx(scattered * seven_eighths, rel=1e-2, abs=2e-6)


def test_rows_that_travel_pass_three_times_and_their_gradients_once():
    chip, d, choices, tokens = CHIPS["h200"], SMALL.hidden_size, SMALL.num_experts_per_tok, 2048

    def parts(precision):
        work = Workload("train", 8, tokens, expert_precision=precision)
        case = dataclasses.replace(setting("h200:8", "data=4,expert=2", work), expert_parallel=True)
        return {part.name: part for stage in stages(case) if stage.name == "HCA" for part in stage.parts}

    weight = 4 / d
    sizes = {"exact": (2 + weight, 4), "fp8-bfloat16": (1 + 1 / 128 + weight, 2)}
    for precision, (sent, returned) in sizes.items():
        found = parts(precision)
        moved = {"tokens to experts": 3 * sent, "expert outputs": 3 * returned, "expert gradients": 2 + weight}
        for name, size in moved.items():
            seconds = size * tokens * choices * d / 2 / chip.link_bandwidth + HOP_SECONDS
            assert found[name].seconds == pytest.approx(seconds), name


def test_adapters_are_all_that_is_trained_beside_packed_weights():
    full = setting("v6e:8x8", "data=64", Workload("train", 64, 4096), FLASH)
    lora = setting("v6e:8x8", "data=64", Workload("train", 64, 4096, lora=16), FLASH)
    assert {spec.role for spec in trained_specs(lora)} == {"adapter"}
    planned = memory(lora)
    # 160 GB of released weights over 64 chips, embedding, norms and tables whole or cut less.
    assert 159.6e9 / 64 < planned.arguments["frozen weights"] < 1.1 * 159.6e9 / 64
    assert planned.arguments["optimizer"] < 0.02 * memory(full).arguments["optimizer"]
