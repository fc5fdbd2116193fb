"""scripts/plan.py as a user runs it, without a compiler."""

import json

import pytest
import tyro

from deepseek_v4.planning.pods import with_pod


@pytest.fixture(scope="module")
def planner(script):
    return script("plan")


DECODE = ["--model", "flash", "--topology", "v6e:4x4", "--workload", "decode", "--batch", "16", "--context", "65536"]


def test_finds_a_mesh_and_writes_tables_picture_json_and_pod_file(planner, script, capsys, tmp_path):
    files = {name: tmp_path / name for name in ("plan.png", "plan.json", "pod.json")}
    options = ["--search", "--picture", "plan.png", "--json", "plan.json", "--write", "pod.json"]
    assert planner.main([*DECODE, *(str(files.get(option, option)) for option in options)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "Meshes of v6e:4x4",
        "is first of",
        "experts",
        "arguments",
        "HBM",
        "all-reduce",
        "Nothing here was measured",
    ):
        assert text in printed
    written = json.loads(files["plan.json"].read_text())["plans"]
    assert written[0]["fits"]
    assert written[0]["peak_bytes"] < written[0]["usable_bytes"]
    assert written[0]["seconds"] == pytest.approx(sum(written[0]["seconds_by_limit"].values()))
    assert files["plan.png"].read_bytes().startswith(b"\x89PNG")
    # The pod file's options are options of the script that they are for.
    arguments = with_pod(["--checkpoint", "x", "--prompt", "y", "--pod", str(files["pod.json"])], "generate")
    options = tyro.cli(script("generate").Arguments, args=arguments)
    assert (options.batch_size, options.max_length) == (16, 65536)
    sizes = dict(part.split("=") for part in options.parallelism.mesh.split(","))
    assert written[0]["mesh"] == {"data": 1, "expert": 1, "tensor": 1} | {axis: int(n) for axis, n in sizes.items()}


def test_one_mesh_without_search(planner, capsys):
    assert planner.main([*DECODE, "--mesh", "expert=8,tensor=2"]) == 0
    printed = capsys.readouterr().out
    assert "expert=8,tensor=2" in printed
    # What the real compiler takes for these arguments (tests/test_full_size.py compiles such a step).
    assert "21,126,818,816" in printed


def test_says_what_to_change_where_nothing_fits(planner, capsys):
    arguments = [*DECODE[:-3], "512", "--context", "1048576"]
    assert planner.main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "too much" in printed
    assert "Fits with batch" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--topology", "v6e:3x3"], "v6e:8x8"),
        (["--topology", "v9:2"], "b200"),
        (["--model", "nothing"], "no such file"),
        (["--mesh", "expert=8"], "16"),
        (["--mesh", "experts=8"], "AXIS=SIZE"),
        (["--batch", "0"], "at least 1"),
        (["--lora", "8"], "adapters are trained"),
    ],
)
def test_bad_arguments_are_named(planner, capsys, change, message):
    assert planner.main([*DECODE, *change]) == 1
    assert message in " ".join(capsys.readouterr().out.split())
