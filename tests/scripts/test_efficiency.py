"""scripts/efficiency.py as a user runs it."""

import json

import pytest


@pytest.fixture(scope="module")
def efficiency(script):
    return script("efficiency")


def test_prints_every_term_and_agrees_with_the_program(efficiency, capsys, tmp_path):
    out = tmp_path / "all.json"
    arguments = ["--contexts", "1024", "1048576", "--terms", "--sensitivity", "--check", "--json", str(out)]
    assert efficiency.main(arguments) == 0
    printed = capsys.readouterr().out
    for text in ("10.21% (9.80x less)", "27.03% (3.70x less)", "3,514.25", "48,068", "13.27B", "1,573.00B", "25.9%"):
        assert text in printed
    assert "NO" not in printed.split()
    written = json.loads(out.read_text())
    assert written["contexts"] == [1024, 1048576]
    assert written["ratios"]["V4-Pro"]["operations ratio"] == pytest.approx(0.2703, abs=5e-5)
    assert {term["name"] for term in written["terms"]["V4-Flash"]} >= {"indexer scores", "routed experts", "head"}


def test_weights_and_operand_formats_are_parameters(efficiency, capsys):
    assert efficiency.main(["--contexts", "1048576", "--weights", "fp8*fp4=0.5", "--operands", "attn.wo_a=bf16"]) == 0
    # Pro: 323.528 - 24.178 + 8.187 of V3.2's 1197.111.
    assert "25.69%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "fp5=1"], "fp8"),
        (["--weights", "fp8"], "NAME=VALUE"),
        (["--weights", "fp8=x"], "number"),
        (["--operands", "attn.wo_x=bf16"], "attn.wo_a"),
        (["--operands", "head=fp5"], "fp32"),
        (["--contexts", "0"], "positive"),
    ],
)
def test_bad_arguments_are_named(efficiency, capsys, arguments, message):
    assert efficiency.main(arguments) == 1
    assert message in capsys.readouterr().out


def test_draws_both_curves(efficiency, tmp_path):
    path = tmp_path / "curves.png"
    assert efficiency.main(["--contexts", "1024", "4096", "--picture", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
