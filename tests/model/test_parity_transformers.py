"""The model against transformers' DeepseekV4ForCausalLM, which loads the same released-format checkpoint."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from cases import LENGTH, Case, compiled
from released import write_released
from small_models import small_config, small_model

from deepseek_v4 import RELEASED, Config
from deepseek_v4.layer_spec import layer_spec
from deepseek_v4.rope import apply_rope, rope_frequencies

torch = pytest.importorskip("torch", reason="needs the 'parity' extra")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs the 'parity' extra")
pytest.importorskip("accelerate", reason="needs the 'parity' extra")

# float32 on both sides, logits of size one; up to 5e-6 was measured.
ATOL = 1e-4


def load(directory):
    """transformers dequantises FP4 and FP8 while loading and leaves tensors stored in BF16 as they are: hence float."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.float().eval()


def logits(model, tokens: np.ndarray, past=None) -> tuple[np.ndarray, object]:
    with torch.no_grad():
        out = model(torch.tensor(tokens)[None], past_key_values=past, use_cache=True)
    return out.logits[0].numpy(), out.past_key_values


@pytest.fixture(scope="module")
def peer(case: Case, tmp_path_factory: pytest.TempPathFactory):
    """transformers' model of a case, from a checkpoint in the released format of that case's storage."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_released(directory, case.config, case.storage, case.seed)
    return load(directory)


def test_prefill_agrees(case: Case, peer) -> None:
    found, _ = logits(peer, case.tokens)
    np.testing.assert_allclose(case.output.logits[0], found, rtol=0, atol=ATOL)


def test_their_decode_agrees_with_our_full_pass(case: Case, peer) -> None:
    """A prompt and then token by token over the window boundary at 512, as they keep their own cache."""
    prompt = 497
    found, past = logits(peer, case.tokens[:prompt])
    rows = [found]
    for i in range(prompt, LENGTH):
        found, past = logits(peer, case.tokens[i : i + 1], past)
        rows.append(found)
    np.testing.assert_allclose(case.output.logits[0], np.concatenate(rows), rtol=0, atol=ATOL)


def test_a_prompt_of_four_thousand_tokens_agrees(tmp_path) -> None:
    """Real tokens past position 4096, where a missing YaRN shows: our chunks against their full pass."""
    # Every entry is selected, or near ties among a thousand entries would make float32 rounding visible.
    config = small_config(
        (4, 128), mtp=False, num_hash_layers=1, hc_sinkhorn_iters=3, hidden_size=128, head_dim=32, index_topk=2048
    )
    small = small_model(config, seed=4)
    write_released(tmp_path, config, RELEASED, 4)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, 4207)
    expected, _ = logits(load(tmp_path), tokens)
    model = small.model
    step = compiled(model.forward)
    cache = model.init_cache(1, len(tokens))
    rows = []
    for first in range(0, len(tokens), 601):
        out = step(small.params, jnp.asarray(tokens[None, first : first + 601]), cache)
        cache = out.cache
        rows.append(out.logits[0])
    np.testing.assert_allclose(np.concatenate(rows), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_rope_of_the_released_configs_to_a_million_tokens(name: str, shared_dir) -> None:
    """transformers' own frequency buffers and cos/sin at the released sizes, both kinds of layer."""
    path = shared_dir / "fixtures" / "configs" / f"{name}.json"
    config = Config.from_file(path)
    data = json.loads(path.read_text())
    data.pop("quantization_config")
    theirs = transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4RotaryEmbedding(
        transformers.DeepseekV4Config(**data)
    )
    positions = np.array([0, 1, 511, 4_096, 65_535, 65_536, 70_001, 1_048_575])
    for kind, ratio in (("main", 0), ("compress", 4), ("compress", 128)):
        spec = layer_spec(config, ratio, False).rope
        frequencies = getattr(theirs, f"{kind}_inv_freq").numpy()
        # One unit in the last place: their power is a float32 one.
        np.testing.assert_allclose(rope_frequencies(spec), frequencies, rtol=1.2e-7)
        cos, sin = theirs(torch.zeros(1), torch.tensor(positions)[None], layer_type=kind)
        unit = jnp.zeros((len(positions), spec.dims)).at[:, 0::2].set(1.0)
        turned = np.asarray(apply_rope(unit, jnp.asarray(positions), spec))
        # That unit is a phase of position * frequency * 1.2e-7 (plus the rounding of the angle itself).
        phase = positions[:, None] * frequencies * 2.4e-7 + 1e-6
        assert (np.abs(turned[:, 0::2] - cos[0].numpy()) <= phase).all()
        assert (np.abs(turned[:, 1::2] - sin[0].numpy()) <= phase).all()
