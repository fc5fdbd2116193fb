"""Memory and least times of plans against real arrays and closed forms; search, advice and pod files."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small_models import FLASH_LIKE, small_config

from deepseek_v4 import Config, Execution, Model, Placement, make_mesh
from deepseek_v4.cache import ENTRY_LAYOUTS
from deepseek_v4.planning.cache_bytes import bytes_per_token
from deepseek_v4.planning.memory import memory
from deepseek_v4.planning.planner import advice_lines, advise, check, explain, largest_batch, meshes, plan, search
from deepseek_v4.planning.pods import PodFileError, pod_file, with_pod
from deepseek_v4.planning.program import collectives, step_arguments
from deepseek_v4.planning.roofline import stages, step_seconds
from deepseek_v4.planning.topology import HOP_SECONDS, parse_topology
from deepseek_v4.planning.workload import Setting, Workload, WorkloadError
from deepseek_v4.sharding import MeshError, parse_mesh
from pallas_kernels.targets import CHIPS

_CONFIGS = Path(__file__).parents[2] / "configs"
FLASH = Config.from_file(_CONFIGS / "flash")
SMALL = small_config(FLASH_LIKE)


def setting(topology, mesh, workload, config=FLASH):
    return Setting.of(config, parse_topology(topology), parse_mesh(mesh), workload)


def parts(found, name):
    return {part.name: part for stage in found if stage.name == name for part in stage.parts}


def test_bytes_are_those_of_arrays_on_a_real_mesh():
    # GPUs pad nothing: the plan of a node is what eight devices hold of real arrays.
    planned = memory(setting("h200:8", "data=2,expert=2,tensor=2", Workload("decode", 4, 640), SMALL))
    placement = Placement(make_mesh("data=2,expert=2,tensor=2", jax.devices()[:8]))
    model = Model(SMALL, execution=Execution(placement=placement, entry_layout="plain"))

    def held(tree):
        device = jax.devices()[0]
        arrays = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), tree)
        return sum(s.data.nbytes for a in jax.tree.leaves(arrays) for s in a.addressable_shards if s.device == device)

    assert planned.arguments["experts"] + planned.arguments["other weights"] == held(model.abstract_params())
    assert planned.arguments["cache"] == held(model.abstract_cache(4, 640, 4))


@pytest.mark.skipif("published" not in ENTRY_LAYOUTS, reason="caches are bfloat16")
def test_published_format_of_the_cache_has_its_published_bytes():
    # TPUs keep whole tiles; of what grows, only rows of words hold padding: 640 bytes for 584, of every fourth token in
    # the 21 layers that select.
    padding = 21 * (640 - 584) / 4
    for topology, mesh, padded in (("h200:8", "expert=8", 0), ("v6e:2x4", "expert=8", padding)):
        sizes = []
        for context in (1 << 19, 1 << 20):
            case = setting(topology, mesh, Workload("decode", 1, context, cache="fp8"))
            sizes.append(memory(case).arguments["cache"])
        assert bytes_per_token(FLASH) == 3514.25
        assert (sizes[1] - sizes[0]) / (1 << 19) == 3514.25 + padded


def test_arguments_of_a_plan_are_those_that_are_compiled():
    for phase in ("decode", "prefill"):
        case = setting("h200:8", "data=2,expert=2,tensor=2", Workload(phase, 4, 640, chunk=256), SMALL)
        leaves = jax.tree.leaves(step_arguments(case, case.placement))
        sizes = [jnp.dtype(a.dtype).itemsize * _product(a.sharding.shard_shape(a.shape)) for a in leaves]
        assert memory(case).argument_bytes == sum(sizes)


def _product(shape):
    total = 1
    for size in shape:
        total *= size
    return total


def test_least_times_of_one_token_in_closed_form():
    chip = CHIPS["h200"]
    case = setting("h200:8", "expert=8", Workload("decode", 1, 1 << 17))
    csa, hca = (parts(stages(case), kind) for kind in ("CSA", "HCA"))
    # Of 32 experts on a device a token chooses 6/256; FP4 with a scale per 32: 17/32 bytes per number.
    experts = 32 * 6 / 256 * 3 * 4096 * 2048 * 17 / 32
    rows = 6 / 8 * (4096 * (2 + 4) + 3 * 2 * 2048)
    assert csa["routed experts"].limit == "HBM"
    assert csa["routed experts"].seconds == pytest.approx((experts + rows) / chip.hbm_bandwidth)
    # All index keys are read once.
    keys = (1 << 17) // 4
    assert csa["index scores"].seconds == pytest.approx(keys * 128 * 2 / chip.hbm_bandwidth)
    stored = setting("h200:8", "expert=8", Workload("decode", 1, 1 << 17, cache="fp8"))
    # In FP4 they take 68 bytes each, which cross sooner than they are multiplied with 64 heads.
    products = 2 * keys * 128 * 64 / chip.peak["bfloat16"]
    assert products > keys * 68 / chip.hbm_bandwidth
    assert parts(stages(stored), "CSA")["index scores"].seconds == pytest.approx(products)
    # HCA reads one entry per 128 tokens, the window, queries and outputs, a count and the sinks.
    read = ((1 << 17) // 128 + 128 + 2 * 64) * 512 * 2 + 4 + 4 * 64
    assert hca["attention"].seconds == pytest.approx(read / chip.hbm_bandwidth)
    # In the bytes of the release entries and earlier tokens take 584 each, not 1,024.
    read -= ((1 << 17) // 128 + 127) * (1024 - 584)
    assert parts(stages(stored), "HCA")["attention"].seconds == pytest.approx(read / chip.hbm_bandwidth)
    # Float32 sums of the experts' outputs over eight GPUs.
    assert hca["expert outputs"].limit == "all-reduce over expert (NVLink)"
    assert hca["expert outputs"].seconds == pytest.approx(2 * (4 * 4096 * 7 / 8 / 450e9 + HOP_SECONDS))
    # Nothing is split over one tensor shard: no sum of index scores, attention or shared expert.
    assert not {"index score sums", "attention output", "shared expert output"} & set(csa)


@pytest.mark.parametrize(("topology", "medium"), [("v6e:2x4", "torus"), ("h200:8", "NVLink")])
def test_kernels_read_index_keys_alone_and_share_out_queries(topology, medium):
    chip, entries = CHIPS[topology.partition(":")[0]], (1 << 17) // 4
    csa = parts(stages(setting(topology, "expert=4,tensor=2", Workload("decode", 4, 1 << 17))), "CSA")
    # Four rows over two devices, which exchange their halves of the heads.
    assert csa["index scores"].seconds == pytest.approx(4 / 2 * entries * 128 * 2 / chip.hbm_bandwidth)
    assert csa["index queries"].limit == f"all-to-all over tensor ({medium})"
    assert csa["selected entries"].limit == f"all-gather over tensor ({medium})"
    one = parts(stages(setting(topology, "expert=4,tensor=2", Workload("decode", 1, 1 << 17))), "CSA")
    assert one["index scores"].seconds == pytest.approx(entries * 128 * 2 / chip.hbm_bandwidth)
    assert one["index queries"].limit == f"all-gather over tensor ({medium})"
    assert "selected entries" not in one
    assert "index score sums" not in one


def test_tokens_that_travel_are_counted_in_closed_form():
    chip, d, choices, weight = CHIPS["h200"], 4096, 6, 4 / 4096

    def of(work):
        case = Setting.of(FLASH, parse_topology("h200:8"), parse_mesh("expert=8"), work, expert_parallel=True)
        return parts(stages(case), "HCA")

    # Eight tokens are gathered in bfloat16, and their float32 sums scattered; a device has the rows of its sequence.
    few = of(Workload("decode", 8, 1 << 17))
    for name, kind, size in (("tokens to experts", "all-gather", 2), ("expert outputs", "reduce-scatter", 4)):
        assert few[name].limit == f"{kind} over expert (NVLink)"
        assert few[name].seconds == pytest.approx(size * 8 * d * 7 / 8 / chip.link_bandwidth + HOP_SECONDS)
    experts = 32 * (1 - (1 - 6 / 256) ** 8) * 3 * 4096 * 2048 * 17 / 32
    assert few["routed experts"].seconds == pytest.approx((experts + 6 * (d * 6 + 6 * 2048)) / chip.hbm_bandwidth)
    many = of(Workload("prefill", 8, 4096, chunk=4096))
    for name, size in (("tokens to experts", 2 + weight), ("expert outputs", 4)):
        assert many[name].limit == "ragged-all-to-all over expert (NVLink)"
        sent = size * 4096 * choices * d * 7 / 8
        assert many[name].seconds == pytest.approx(sent / chip.link_bandwidth + HOP_SECONDS)
    # In FP8 with a byte of scale per 128, and back in bfloat16; tokens that are gathered stay as they are.
    assert of(Workload("decode", 8, 1 << 17, expert_precision="fp8-bfloat16")) == few
    rounded = of(Workload("prefill", 8, 4096, chunk=4096, expert_precision="fp8-bfloat16"))
    for name, size in (("tokens to experts", 129 / 128 + weight), ("expert outputs", 2)):
        sent = size * 4096 * choices * d * 7 / 8
        assert rounded[name].seconds == pytest.approx(sent / chip.link_bandwidth + HOP_SECONDS)
    rows = of(Workload("prefill", 8, 4096, chunk=4096, expert_precision="fp8"))
    assert (rows["tokens to experts"], rows["expert outputs"]) == (rounded["tokens to experts"], many["expert outputs"])


def test_more_tokens_move_the_limit_from_memory_to_arithmetic():
    few = parts(stages(setting("h200:8", "expert=8", Workload("prefill", 1, 4096, chunk=16))), "HCA")
    many = parts(stages(setting("h200:8", "expert=8", Workload("prefill", 8, 4096, chunk=4096))), "HCA")
    assert few["projections"].limit == "HBM"
    assert many["projections"].limit == "bfloat16"
    # 32768 tokens through wq_b on every device; through wq_a, wkv, wo_a and wo_b a device's eighth of them.
    products = 1024 * 32768 + (4096 * 1024 + 4096 * 512 + 8192 * 4096 + 4096 * 8192) / 8
    assert many["projections"].seconds == pytest.approx(2 * 32768 * products / CHIPS["h200"].peak["bfloat16"])


def test_every_layer_of_the_model_is_in_the_step():
    found = stages(setting("v6e:4x4", "expert=8,tensor=2", Workload("decode", 1, 65536)))
    counts = {stage.name: stage.count for stage in found}
    assert counts == {"SWA, hash": 2, "CSA, hash": 1, "CSA": 20, "HCA": 20, "embedding and head": 1, "MTP": 1}
    assert step_seconds(found) == pytest.approx(sum(s.count * p.seconds for s in found for p in s.parts))
    undrafted = stages(setting("v6e:4x4", "expert=8,tensor=2", Workload("decode", 1, 65536, draft=False)))
    assert "MTP" not in {stage.name for stage in undrafted}


def test_search_ranks_what_fits_first_and_explains():
    found = search(FLASH, parse_topology("v6e:4x4"), Workload("decode", 16, 65536))
    fits = [p.memory.fits for p in found.plans]
    assert fits == sorted(fits, reverse=True)
    times = [p.seconds for p in found.plans if p.memory.fits]
    assert times == sorted(times)
    assert {p.setting.title for p in found.plans}.isdisjoint(dict(found.illegal))
    # Every mesh, and those that split experts and not a context with tokens that travel too.
    travelling = [mesh for mesh in meshes(16) if mesh["expert"] > 1 and mesh["context"] == 1]
    assert len(list(meshes(16))) == 35
    assert len(found.plans) + len(found.illegal) == 35 + len(travelling)
    assert any(p.setting.expert_parallel for p in found.plans)
    text = "\n".join(explain(found))
    assert found.plans[0].setting.title in text
    assert found.plans[1].setting.title in text
    assert "o_groups" in text


def test_what_does_not_fit_is_told_what_would():
    topology, work = parse_topology("v6e:2x4"), Workload("decode", 16, 1 << 20)
    found = search(FLASH, topology, work)
    assert not found.fits
    advice = advise(FLASH, topology, work)
    smaller = dataclasses.replace(work, batch=advice.batch)
    assert search(FLASH, topology, smaller).fits
    shorter = dataclasses.replace(work, context=advice.context)
    assert search(FLASH, topology, shorter).fits
    assert not search(FLASH, topology, dataclasses.replace(work, context=2 * advice.context)).fits
    assert memory(advice.smallest).fits
    assert advice.smallest.topology.devices > 8
    text = "\n".join(advice_lines(found, advice))
    for expected in ("too much", f"batch {advice.batch}", f"{advice.context:,}", advice.smallest.topology.name):
        assert expected in text


def test_largest_batch_is_the_largest():
    topology, work = parse_topology("v6e:4x4"), Workload("decode", 1, 1 << 20)
    best = largest_batch(FLASH, topology, work)
    assert memory(best).fits
    more = dataclasses.replace(best.workload, batch=best.workload.batch + best.sizes["data"])
    assert not memory(dataclasses.replace(best, workload=more)).fits


def test_impossible_settings_say_what_is_wrong():
    for topology, mesh, work, error, message in (
        ("v6e:4x4", "expert=8", Workload("decode", 1, 64), MeshError, "16"),
        ("v6e:4x4", "data=16", Workload("decode", 8, 64), WorkloadError, "does not divide over data = 16"),
        ("v6e:4x4", "tensor=16", Workload("decode", 8, 64), MeshError, "o_groups"),
        ("v6e:4x4", "expert=16", Workload("decode", 8, 1 << 21), WorkloadError, "1,048,576"),
    ):
        with pytest.raises(error, match=message):
            check(setting(topology, mesh, work))
    with pytest.raises(WorkloadError, match="batch"):
        Workload("decode", 0, 64)
    with pytest.raises(WorkloadError, match="lora"):
        Workload("decode", 1, 64, lora=4)


def test_meshes_that_the_expert_kernel_does_not_serve_are_not_planned():
    # The kernel's tiles are 256 wide, of a v5p for each of its two cores: 3072 / 8 is no whole tile, 3072 / 4 three.
    pro = Config.from_file(_CONFIGS / "pro")
    work = Workload("decode", 4, 4096)
    for topology, mesh in (("v7x:2x4x4", "expert=8,tensor=8"), ("v5p:4x4x4", "expert=16,tensor=4")):
        with pytest.raises(WorkloadError, match="expert kernel"):
            check(setting(topology, mesh, work, pro))
    for topology, mesh in (("v7x:2x4x4", "expert=16,tensor=4"), ("v5p:4x4x4", "expert=32,tensor=2")):
        check(setting(topology, mesh, work, pro))


def test_collectives_in_loops_are_counted_as_often_as_they_run():
    mesh = Mesh(jax.devices()[:4], ("x",))

    def body(x, _):
        return jax.lax.psum(x, "x") / 4, None

    def run(x):
        x = jax.lax.scan(body, x, length=5)[0]
        return jax.lax.all_gather(x, "x")

    spec = PartitionSpec()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    array = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = {c.kind: c for c in collectives(jax.jit(sharded).lower(array).compile().as_text())}
    assert (found["all-reduce"].times, found["all-reduce"].bytes) == (5, 5 * 8 * 16 * 4)
    assert (found["all-gather"].times, found["all-gather"].largest) == (1, 4 * 8 * 16 * 4)


def test_loops_of_tpu_programs_state_their_number_in_the_condition():
    program = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(19), backend_config={}
  ROOT %lt = pred[]{:T(512)} compare(%g, %c), direction=LT
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = bf16[16,4096]{1,0:T(8,128)} all-reduce(%f), channel_id=2, to_apply=%add
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), channel_id=3
}
"""
    found = {c.kind: c for c in collectives(program)}
    assert (found["all-reduce"].times, found["all-reduce"].largest) == (19, 16 * 4096 * 2)
    assert (found["all-gather"].times, found["all-gather"].bytes) == (1, 32)


def test_pod_files_give_scripts_their_options(tmp_path):
    path = tmp_path / "pod.json"
    decode = plan(setting("v6e:4x4", "expert=8,tensor=2", Workload("decode", 16, 65536)))
    path.write_text(json.dumps(pod_file("flash", decode)))
    expected = ["--mesh", "expert=8,tensor=2", "--batch-size", "16", "--max-length", "65536", "--prefill-chunk", "2048"]
    given = ["--checkpoint", "x", "--pod", str(path), "--batch-size", "4"]
    assert with_pod(given, "generate") == [*expected, "--checkpoint", "x", "--batch-size", "4"]
    assert with_pod([f"--pod={path}"], "generate") == expected
    assert with_pod(["--batch-size", "4"], "generate") == ["--batch-size", "4"]
    exchanged = dataclasses.replace(decode.setting.workload, expert_precision="fp8")
    for travel, options in ((False, {}), (True, {"expert-parallel": True, "expert-precision": "fp8"})):
        case = dataclasses.replace(decode.setting, workload=exchanged, expert_parallel=travel)
        written = pod_file("flash", plan(case))["options"]["generate"]
        assert {name: value for name, value in written.items() if name.startswith("expert")} == options
    with pytest.raises(PodFileError, match="generate, not for train"):
        with_pod(["--pod", str(path)], "train")
    with pytest.raises(PodFileError, match="no such file"):
        with_pod(["--pod", str(tmp_path / "missing")], "train")
    path.write_text("{}")
    with pytest.raises(PodFileError, match="not a pod file"):
        with_pod(["--pod", str(path)], "train")
    with pytest.raises(PodFileError, match="expected a file"):
        with_pod(["--pod"], "train")


@pytest.mark.parametrize("path", sorted((_CONFIGS / "pods").glob("*.json")), ids=lambda path: path.stem)
def test_committed_pod_files_are_what_the_planner_writes(path):
    written = json.loads(path.read_text())
    work = Workload(**written["workload"])
    options = next(iter(written["options"].values()))
    config, travel = Config.from_file(_CONFIGS / written["model"]), options.get("expert-parallel", False)
    case = Setting.of(config, parse_topology(written["topology"]), parse_mesh(options["mesh"]), work, travel)
    assert pod_file(written["model"], plan(case)) == written
    assert written["predicted"]["peak_bytes"] <= written["predicted"]["usable_bytes"]
