"""Measuring and tuning kernels: rows, their arguments and the table are what they should be; times are not asserted."""

import dataclasses
import json
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from deepseek_v4.benchmarks.kernels import KernelBenchmark, case_arrays, run
from deepseek_v4.benchmarks.timing import arrays_like
from deepseek_v4.benchmarks.tune import best_blocks, tune
from pallas_kernels import tuned
from pallas_kernels.registry import Case, Cost, Operation, Tuning, operations
from pallas_kernels.targets import CHIPS, chip


def test_a_row_for_every_case_that_fits(tmp_path):
    quick = {"max_mib": 1, "cold_mib": 0, "samples": 1, "sample_seconds": 0.0}
    args = KernelBenchmark(ops=("post_mix", "pre_mix"), json=tmp_path / "found.json", **quick)
    console = Console(record=True, width=170)
    assert run(args, console) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert [(row["operation"], row["case"], row["implementation"]) for row in found["rows"]] == [
        ("post_mix", "flash/decode/1", "xla"),
        ("post_mix", "pro/decode/1", "xla"),
    ]
    assert set(found["ceilings"]) == {"bytes_per_second", "operations_per_second"}
    for row in found["rows"]:
        assert row["memory_share"] == row["bytes_per_second"] / found["ceilings"]["bytes_per_second"]
        assert row["seconds"] > 0
    text = console.export_text()
    assert "flash/decode/1" in text
    assert "18 cases of more than 1 MiB were left out" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ("nothing",)}, "unknown operations"),
        ({"max_mib": 0}, "no case is left"),
        ({"tune": True}, "no kernels"),
    ],
)
def test_what_cannot_be_measured_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        run(KernelBenchmark(**({"ops": ("post_mix",)} | options)), Console(quiet=True))


@pytest.mark.parametrize("name", sorted(operations()))
def test_integer_arguments_fit_their_shapes(name):
    for case in operations()[name].cases():
        if not case.representative:
            continue
        known = case.values(np.random.default_rng(0))
        for key, value in known.items():
            assert np.shape(value) == case.arguments[key].shape, key
            assert np.asarray(value).dtype == case.arguments[key].dtype, key
        integers = {k for k, a in case.traced().items() if getattr(a, "dtype", None) == jnp.int32 and a.shape}
        # What is not named stays 0, which must be a legal value: no index and no count is left out by mistake.
        assert integers <= set(known) | {"first_window"}, (case.name, integers)


def test_attention_selects_distinct_visible_entries():
    case = next(c for c in operations()["compressed_attention"].cases() if c.name == "pro/csa/prefill/2048x8K")
    values = case.values(np.random.default_rng(1))
    indices, counts = values["indices"][0], values["counts"][0]
    assert values["start"] == 8192 - 2048
    assert counts[0] == (8192 - 2048 + 1) // 4
    assert counts[-1] == 2048
    assert np.all(indices >= 0)
    assert np.all(indices < counts[:, None])
    assert all(len(set(row)) == len(row) for row in indices[::500])


def test_arrays_are_numbers_of_their_type():
    shapes = {
        "bfloat16": jnp.bfloat16,
        "codes": jnp.float8_e4m3fn,
        "scales": jnp.float8_e8m0fnu,
        "bytes": jnp.uint8,
        "words": jnp.uint32,
        "integers": jnp.int32,
    }
    found = arrays_like({k: jax.ShapeDtypeStruct((8, 64), dtype) for k, dtype in shapes.items()}, 3)
    for name, dtype in shapes.items():
        assert found[name].shape == (8, 64)
        assert found[name].dtype == dtype
    for name in ("bfloat16", "codes", "scales"):
        values = np.asarray(found[name], np.float32)
        assert np.all(np.abs(values) <= 1), name
        assert len(np.unique(values)) > 8, name
    halves = np.asarray(jax.lax.bitcast_convert_type(found["words"], jnp.bfloat16), np.float32)
    assert np.all(np.abs(halves) <= 1)
    assert not np.any(np.asarray(found["integers"]))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How a sum is cut; ``seconds`` is what the test says it takes."""

    count: int
    seconds: float


def _sum_in_parts(parts):
    def total(x):
        if parts.count == 7:
            raise RuntimeError("too large for the chip")
        wrong = 1.5 if parts.count == 3 else 1
        return {"seconds": parts.seconds, "sum": wrong * x.reshape(parts.count, -1).sum(1).sum()}

    return total


def _tunable():
    case = Case("x", {"x": jax.ShapeDtypeStruct((12,), jnp.float32)}, Cost(48, 4))
    candidates = (_Parts(1, 4.0), _Parts(2, 2.0), _Parts(3, 1.0), _Parts(4, 3.0), _Parts(7, 0.5))
    tuning = Tuning(lambda arguments: "all", lambda chip, arguments: candidates, _sum_in_parts)
    return Operation("sum", jnp.sum, lambda: (case,), tuning=MappingProxyType({"cuda": tuning})), case


def _measure(function, case):
    result = function(**case_arrays(case, 0))
    return result["seconds"], result["sum"]


def test_the_fastest_candidate_with_the_same_result_wins():
    operation, case = _tunable()
    said = []
    best, found = best_blocks(operation.tuning["cuda"], chip("h200"), [case, case], _measure, said.append)
    assert best == _Parts(2, 2.0)
    assert {blocks.count: seconds for blocks, seconds in found.items()} == pytest.approx({1: 4.0, 2: 2.0, 4: 3.0})
    assert "another result" in said[0]
    assert "too large for the chip" in said[1]


def test_winners_are_written_beside_what_is_there(tmp_path, monkeypatch):
    operation, case = _tunable()
    path = tmp_path / "tuned.json"
    path.write_text('{"other": {"v6e": {}}}')
    where = {"device": "NVIDIA H200", "command": "x", "date": "2000-01-01"}
    assert tune([(operation, case)], chip("h200"), _measure, path, where, lambda line: None) == 1
    assert tune([(operation, case)], chip("v6e"), _measure, path, where, lambda line: None) == 0
    written = json.loads(path.read_text())
    assert written["other"] == {"v6e": {}}
    entry = written["sum"]["h200"]["all"]
    assert entry == {"blocks": {"count": 2, "seconds": 2.0}, **where, "microseconds": {"default": 4e6, "best": 2e6}}
    monkeypatch.setattr(tuned, "table", lambda: written)
    assert tuned.tuned("sum", chip("h200"), "all", _Parts(1, 4.0)) == _Parts(2, 2.0)
    assert tuned.tuned("sum", chip("b200"), "all", _Parts(1, 4.0)) == _Parts(1, 4.0)
    assert tuned.tuned("sum", None, "all", _Parts(1, 4.0)) == _Parts(1, 4.0)


def test_the_committed_table_says_where_it_is_from():
    known = operations()
    for name, chips in tuned.table().items():
        for chip_name, classes in chips.items():
            tuning = known[name].tuning[CHIPS[chip_name].platform]
            cases = {tuning.shape_class(case.arguments): case for case in known[name].cases()}
            for shape_class, entry in classes.items():
                candidates = tuning.candidates(CHIPS[chip_name], cases[shape_class].arguments)
                assert entry["blocks"] in [dataclasses.asdict(blocks) for blocks in candidates]
                assert {"device", "command", "date", "microseconds"} <= set(entry)


@pytest.mark.parametrize("name", [name for name, operation in operations().items() if operation.tuning])
def test_candidates_are_distinct_and_begin_with_the_default(name):
    for platform, tuning in operations()[name].tuning.items():
        target = next(c for c in CHIPS.values() if c.platform == platform)
        for case in operations()[name].cases():
            candidates = tuning.candidates(target, case.arguments)
            assert len(set(candidates)) == len(candidates) < 64
            assert tuning.shape_class(case.arguments)
