"""The strict config: released files, what transformers writes, and every way a file can be wrong."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config

from deepseek_v4 import Config, ConfigError
from deepseek_v4.layer_spec import layer_specs

CONFIGS = Path(__file__).parents[2] / "configs"
RELEASED = ("flash", "flash-base", "pro", "pro-base")


def flash() -> dict[str, Any]:
    return json.loads((CONFIGS / "flash" / "config.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_the_four_released_configs(name: str, shared_dir: Path) -> None:
    fixture = shared_dir / "fixtures" / "configs" / f"{name}.json"
    config = Config.from_file(CONFIGS / name)
    assert config == Config.from_file(fixture)
    assert json.loads((CONFIGS / name / "config.json").read_text()) == json.loads(fixture.read_text())


@pytest.mark.parametrize(
    ("name", "kinds", "released"),
    [("default", {"SWA", "CSA", "HCA"}, "flash"), ("small-pro", {"CSA", "HCA"}, "pro")],
)
def test_small_configs_keep_every_layer_kind_of_their_release(name: str, kinds: set[str], released: str) -> None:
    small, full = Config.from_file(CONFIGS / name), Config.from_file(CONFIGS / released)
    assert {spec.kind for spec in layer_specs(small)} == {spec.kind for spec in layer_specs(full)} == kinds
    for config in (small, full):
        assert {spec.hash_router for spec in layer_specs(config)} == {True, False}
        assert config.drafter == "mtp"
    assert layer_specs(small)[0].kind == layer_specs(full)[0].kind
    assert small.sliding_window == full.sliding_window


@pytest.mark.parametrize(
    ("name", "layers", "kinds", "topk", "scaling"),
    [
        ("flash", 43, {"SWA": 2, "CSA": 21, "HCA": 20}, 512, 1.5),
        ("pro", 61, {"SWA": 0, "CSA": 30, "HCA": 31}, 1024, 2.5),
    ],
)
def test_facts_of_the_releases(name: str, layers: int, kinds: dict, topk: int, scaling: float) -> None:
    """Values that code defaults elsewhere get wrong; the table of the architecture reference."""
    config = Config.from_file(CONFIGS / name)
    specs = layer_specs(config)
    assert len(specs) == layers == len(config.compress_ratios) - 1
    assert {kind: sum(spec.kind == kind for spec in specs) for kind in kinds} == kinds
    assert [spec.hash_router for spec in specs] == [True] * 3 + [False] * (layers - 3)
    assert (config.index_topk, config.routed_scaling_factor) == (topk, scaling)
    assert (config.rope_theta, config.compress_rope_theta, config.rope_scaling.factor) == (1e4, 1.6e5, 16)
    assert config.drafter == "mtp"
    assert config.draft_ratios == (0,)
    for spec in specs:
        assert (spec.rope.yarn is None) == (spec.kind == "SWA")
        assert spec.rope.theta == (1e4 if spec.kind == "SWA" else 1.6e5)
        assert spec.pool_rows == {"SWA": 0, "CSA": 8, "HCA": 128}[spec.kind]
        assert spec.indexer == (spec.kind == "CSA")


def test_to_dict_is_the_inverse_of_from_dict() -> None:
    for config in (Config.from_file(CONFIGS / "flash"), small_config(), small_config((4, 0, 0), mtp=False)):
        assert Config.from_dict(config.to_dict()) == config


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(key=st.sampled_from(sorted(flash())))
def test_a_missing_key_is_named_or_known_not_to_matter(key: str) -> None:
    data = flash()
    del data[key]
    inert = {
        "architectures", "attention_dropout", "expert_dtype", "initializer_range", "quantization_config", "torch_dtype",
        "transformers_version", "use_cache",
    }  # fmt: skip
    if key in inert:
        assert Config.from_dict(data) == Config.from_dict(flash())
    else:
        with pytest.raises(ConfigError, match=rf"(?m)^\s*{key}\b"):
            Config.from_dict(data)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(
    key=st.from_regex(r"[a-z_]{4,20}", fullmatch=True).filter(
        lambda k: k not in flash() and not k.startswith("dspark")
    ),
    value=st.sampled_from([None, 0, 1.5, "x", [1]]),
)
def test_an_unknown_key_is_named(key: str, value: Any) -> None:
    if key in {"dtype", "pad_token_id", "return_dict", "layer_types", "output_attentions", "output_hidden_states"}:
        return
    with pytest.raises(ConfigError, match=rf"(?m)^\s*{key}: unknown key"):
        Config.from_dict(flash() | {key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "129280"}, "vocab_size: expected a number"),
        ({"hidden_size": 4096.5}, "hidden_size: expected an integer"),
        ({"hidden_size": True}, "hidden_size: expected a number"),
        ({"hidden_size": 0}, "hidden_size: expected at least 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number"),
        ({"model_type": "deepseek_v41"}, "model_type: expected 'deepseek_v4'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: expected 1"),
        ({"scoring_func": "sigmoid"}, "scoring_func: expected 'sqrtsoftplus'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0.0"),
        ({"expert_dtype": "int4"}, "expert_dtype: expected 'fp4' or 'fp8'"),
        ({"quantization_config": {"fmt": "e5m2"}}, "quantization_config.fmt: expected 'e4m3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.bits: unknown key"),
        ({"rope_scaling": None}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: expected 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling.beta_fast: missing"),
        ({"compress_ratios": "0,4"}, "compress_ratios: expected a list of integers"),
        ({"compress_ratios": [0, 4]}, "compress_ratios: 2 entries for num_hidden_layers 43"),
        ({"compress_ratios": [0] * 46}, "compress_ratios: 3 entries after the 43 main layers"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"o_groups": 7}, "o_groups 7 does not divide num_attention_heads 64"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok 300 exceeds n_routed_experts 256"),
        ({"num_hash_layers": 44}, "num_hash_layers: expected 0..43"),
        ({"n_shared_experts": 2}, "n_shared_experts: expected 1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: expected an even number"),
        ({"qk_rope_head_dim": 640}, "qk_rope_head_dim: expected an even number"),
        ({"index_head_dim": 96}, "index_head_dim: expected a power of two"),
        ({"index_topk": 0}, "index_topk 0"),
        ({"eos_token_id": 129280}, "eos_token_id 129280 is outside vocab_size"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_dict(flash() | change)
    assert message in str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    data = flash() | {"surprise": 1, "hidden_act": "gelu"}
    del data["head_dim"]
    with pytest.raises(ConfigError) as error:
        Config.from_dict(data)
    assert all(key in str(error.value) for key in ("surprise", "hidden_act", "head_dim"))


def test_an_undocumented_ratio_is_an_error_before_anything_is_built() -> None:
    for ratio in (1, 2, 8):
        with pytest.raises(ConfigError, match=f"compress_ratios: ratio {ratio} is not a documented"):
            layer_specs(small_config((0, ratio), num_hash_layers=0))


def test_later_siblings_with_three_draft_layers_are_understood() -> None:
    """The 0731/0813 checkpoints: DSpark drafters, which are recognised and not run."""
    data = flash() | {
        "compress_ratios": flash()["compress_ratios"] + [0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [40, 41, 42],
        "dspark_markov_rank": 256,
    }
    config = Config.from_dict(data)
    assert config.drafter == "dspark"
    assert config.layer_ratios == Config.from_file(CONFIGS / "flash").layer_ratios
    assert config.draft_ratios == (0, 0, 0)


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Config.from_file(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Config.from_file(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        Config.from_file(tmp_path)


@pytest.fixture(scope="module")
def rewrite():
    transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs the 'parity' extra")

    def run(data: dict[str, Any], directory: Path) -> dict[str, Any]:
        transformers.DeepseekV4Config(**copy.deepcopy(data)).save_pretrained(
            directory
        )  # it edits rope_scaling in place
        return json.loads((directory / "config.json").read_text())

    return run


@pytest.mark.parametrize("name", [*RELEASED, "odd"])
def test_what_transformers_writes_back_is_the_same_config(name: str, rewrite, tmp_path: Path) -> None:
    if name == "odd":
        data = small_config((128, 128, 4, 128, 4, 4), num_hash_layers=0).to_dict()
    else:
        data = json.loads((CONFIGS / name / "config.json").read_text())
    written = rewrite(data, tmp_path)
    assert "compress_ratios" not in written
    assert Config.from_file(tmp_path) == Config.from_dict(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layer_types", 3), "linear_attention", r"layer_types\[3\]: unknown kind 'linear_attention'"),
        (("compress_rates",), {}, "compress_rates.compressed_sparse_attention: missing"),
        (("mlp_layer_types", 0), "moe", "mlp_layer_types: expected 'hash_moe' layers first"),
        (("rope_parameters",), None, "rope_parameters: expected an object"),
        (("rope_parameters", "main"), {"rope_type": "default"}, "rope_parameters.main.rope_theta: missing"),
        (("rope_parameters", "compress", "attention_factor"), 1.3, "attention_factor: expected 1.0"),
        (("rope_parameters", "compress", "mscale"), 1.3, "rope_scaling.mscale: unknown key"),
        (("surprise",), 1, "surprise: unknown key"),
    ],
)
def test_bad_keys_of_transformers_are_named(path, value, message: str, rewrite, tmp_path: Path) -> None:
    data = rewrite(flash(), tmp_path)
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(data)
