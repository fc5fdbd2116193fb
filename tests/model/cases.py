"""Models and reference results that several test files share; each is made once, when first asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import Oracle, Result
from released import Storage
from small_models import FLASH_LIKE, ODD, PRO_LIKE, SmallModel, compiled, small_config, small_model

from deepseek_v4 import RELEASED, RELEASED_BASE, Config, Output
from deepseek_v4.nn.variables import MASTER

# Several windows of every kind, the last of each incomplete: 4 HCA entries, 130 CSA entries, 4 sliding windows.
LENGTH = 523


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with one sequence of ``LENGTH`` tokens."""

    config: Config
    storage: Storage
    seed: int = 0

    @functools.cached_property
    def small(self) -> SmallModel:
        return small_model(self.config, self.storage, seed=self.seed)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(self.seed + 100).integers(0, self.config.vocab_size, LENGTH)

    @functools.cached_property
    def output(self) -> Output:
        """The model's full pass."""
        model = self.small.model
        run = compiled(lambda params, tokens: model.forward(params, tokens, draft=bool(model.drafts)))
        return jax.tree.map(np.asarray, run(self.small.params, jnp.asarray(self.tokens)[None]))

    @functools.cached_property
    def oracle(self) -> Result:
        oracle = Oracle(self.config.to_dict(), self.small.decoded)
        return oracle.forward(self.tokens, draft=bool(self.small.model.drafts))


def _cases() -> dict[str, Case]:
    pro = small_config(
        PRO_LIKE, num_attention_heads=8, o_groups=4, q_lora_rank=96, routed_scaling_factor=2.5, index_topk=32
    )
    single = small_config((4,), mtp=False, num_hash_layers=0, index_topk=8)
    return {
        "flash": Case(small_config(FLASH_LIKE), RELEASED),
        "pro": Case(pro, RELEASED, seed=1),
        "odd-base": Case(small_config(ODD, num_hash_layers=0, q_lora_rank=128), RELEASED_BASE, seed=2),
        "one-layer": Case(single, MASTER, seed=3),
    }


CASES = _cases()
