"""A mixed workload: prompts of every length, different sampling, shared beginnings, some lines that are wrong."""

import json

import numpy as np

BAD = (
    "{",
    {"token_ids": []},
    {"token_ids": [0], "temperature": -1},
    {"prompt": ""},
    {"token_ids": [1, 10**9]},
    {"token_ids": [5], "max_new_tokens": 10**9},
)


def mixed_workload(count: int, longest: int, new: int, vocab: int = 4000) -> list[str]:
    """``count`` input lines with prompts of 1 to ``longest`` tokens, log-uniform, and up to ``new`` new tokens each.

    A third greedy, a third sampled in some way, a third with beginnings in common; every 17th line is wrong.
    """
    rng = np.random.default_rng(count)
    stems = [rng.integers(3, vocab, longest).tolist() for _ in range(3)]
    lines = []
    for index in range(count):
        length = int(np.exp(rng.uniform(0, np.log(longest + 1))))
        row = {"token_ids": rng.integers(3, vocab, length).tolist(), "max_new_tokens": int(rng.integers(1, new + 1))}
        if index % 17 == 16:
            bad = BAD[index // 17 % len(BAD)]
            lines.append(bad if isinstance(bad, str) else json.dumps(bad))
            continue
        if index % 3 == 1:
            row |= {"temperature": float(rng.uniform(0.3, 1.5)), "seed": int(rng.integers(5))}
            row |= [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"top_p": 0.8, "top_k": 200}][index // 3 % 5]
        if index % 3 == 2:
            shared = int(rng.integers(0, length + 1))
            row["token_ids"] = stems[index // 3 % 3][:shared] + row["token_ids"][shared:]
        lines.append(json.dumps(row))
    return lines
