"""The callbacks that a run is watched with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dataparams.callbacks import TrainingDynamics
from dataparams.report import monitor
from dataparams.report.monitor import DetectionMonitor, StepTimer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_the_step_time_is_the_median_and_leaves_out_validation(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    timer = StepTimer()
    assert np.isnan(timer.step_time_ms)
    for _ in range(3):
        timer.on_train_epoch_start(None, None)  # type: ignore[arg-type]
        clock.now += 100.0  # what passes between epochs is no step
        for batch in range(6):
            clock.now += 50.0 if batch == 3 else 0.002
            timer.on_train_batch_end(None, None, None, None, batch)  # type: ignore[arg-type]
            if batch == 4:
                timer.on_validation_start(None, None)  # type: ignore[arg-type]
                clock.now += 100.0
        timer.on_train_epoch_end(None, None)  # type: ignore[arg-type]
    assert timer.step_time_ms == pytest.approx(2.0)

    later = StepTimer()
    later.load_state_dict(timer.state_dict())
    assert later.step_time_ms == timer.step_time_ms


class Trusting(TrainingDynamics):
    detectors = TrainingDynamics.detectors | {"distrust": ("trust", -1.0)}


def watched(monkeypatch, is_corrupt, method):
    rows = pd.DataFrame(
        {
            "index": [3, 1, 0, 2],
            "mean_loss": [4.0, 2.0, 1.0, 3.0],
            "mean_margin": [-4.0, -2.0, -1.0, -3.0],
            "trust": [0.0, 1.0, 3.0, 2.0],
        }
    )
    monkeypatch.setattr(method, "to_frame", lambda: rows)
    logged = {}
    module = SimpleNamespace(log_dict=lambda values, **_: logged.update(values))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(is_corrupt=is_corrupt))
    DetectionMonitor([method]).on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
    return logged


SHARED = {
    "auroc_mean_loss": 1.0,
    "mean_loss_clean": 1.5,
    "mean_loss_corrupt": 3.5,
    "auroc_margin": 1.0,
    "mean_margin_clean": -1.5,
    "mean_margin_corrupt": -3.5,
}


def test_the_monitor_meets_truth_and_rows_by_index(monkeypatch):
    is_corrupt = np.array([False, False, True, True])
    assert watched(monkeypatch, is_corrupt, TrainingDynamics()) == SHARED
    own = {"auroc_distrust": 0.75, "trust_clean": 2.0, "trust_corrupt": 1.0}
    assert watched(monkeypatch, is_corrupt, Trusting()) == SHARED | own


@pytest.mark.parametrize("is_corrupt", [None, np.zeros(4, dtype=bool)])
def test_the_monitor_is_silent_where_there_is_nothing_to_tell(monkeypatch, is_corrupt):
    assert watched(monkeypatch, is_corrupt, TrainingDynamics()) == {}
