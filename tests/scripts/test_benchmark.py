"""scripts/benchmark.py: both sides run and every figure is there; what the figures are is nobody's assertion."""

import json

import pytest


@pytest.mark.slow
def test_inference_is_measured_beside_transformers(script, hf_checkpoint, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs the 'parity' extra")
    sizes = ["--batches", "2", "--prompt", "8", "--prefill", "40", "--new-tokens", "4", "--contexts", "128", "512"]
    files = ["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "found.json")]
    assert script("benchmark").main(["inference", "--checkpoint", str(hf_checkpoint), *sizes, *files]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    for side in ("ours", "transformers"):
        assert {"prefill", "first", "decode 2"} <= set(found[side])
        assert all(value > 0 for key, value in found[side].items() if isinstance(value, float) and key != "acceptance")
    assert [row[0] for row in found["ours"]["sweep"]] == [128, 512]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "host work" in capsys.readouterr().out


def test_bad_sizes_are_explained(script, capsys):
    assert script("benchmark").main(["inference", "--new-tokens", "0"]) == 1
    assert "--new-tokens: expected at least 1" in capsys.readouterr().err
