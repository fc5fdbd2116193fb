"""What is written about a run, and what stops it."""

import json
import math

import pytest

from deepseek_v4.training.metrics import Divergence, LossGuard, MetricsLog, plot_losses, read_metrics


def test_a_run_that_goes_on_drops_what_will_be_written_again(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(5):
        log.write(step, {"loss": 1 / (step + 1), "bad": math.nan if step == 1 else 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # cut short by a kill
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_metrics(tmp_path)[1] == {"step": 1, "loss": 0.5, "bad": None}
    log = MetricsLog(tmp_path, 3, tensorboard=False)
    log.write(3, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 7.0)]


def test_tensorboard_has_the_same_values(tmp_path):
    event_file_loader = pytest.importorskip("tensorboardX.record_writer")
    del event_file_loader
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(0, {"loss": 2.5})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


class TestGuard:
    @pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
    def test_what_is_not_finite_stops(self, loss, norm):
        guard = LossGuard(None)
        guard.check(0, 1e9, 1e9)
        with pytest.raises(Divergence, match="step 1: loss") as error:
            guard.check(1, loss, norm)
        assert error.value.step == 1

    def test_a_jump_stops_once_there_is_a_history(self):
        guard = LossGuard(1.0, [10.0, 9.0], warmup=4)
        guard.check(2, 12.0, 1.0)
        guard.check(3, 9.5, 1.0)
        guard.check(4, 10.7, 1.0)  # the median is 9.75
        with pytest.raises(Divergence, match=r"step 5: loss 11.1000 is more than 1.0 above the median 10.0000"):
            guard.check(5, 11.1, 1.0)
        guard.check(6, 3.0, 1.0)

    def test_the_median_is_of_recent_losses(self):
        guard = LossGuard(1.0, [10.0] * 50, window=10, warmup=10)
        for step in range(10):
            guard.check(step, 2.0, 1.0)
        with pytest.raises(Divergence):
            guard.check(10, 4.0, 1.0)


def test_a_picture_of_several_runs(tmp_path):
    runs = {
        "a": [{"step": s, "loss": 5 - s / 10} for s in range(30)] + [{"step": 30, "loss": None}],
        "b": [{"step": 0, "eval_loss": 5.0}, {"step": 10, "eval_loss": 4.0}],
        "empty": [],
    }
    plot_losses(runs, tmp_path / "loss.png", "two runs")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
