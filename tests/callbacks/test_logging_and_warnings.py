"""What a fit says: metrics and histograms to every kind of logger, inert rows, losses that are not finite."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from every_method_helpers import (
    CLASSES,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    assert_same,
    fit,
    make_loader,
    snapshot,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from dataparams import DataParameters, TrainingDynamics

pytestmark = QUIET
STATISTICS = ("mean", "std", "min", "max", "travel")


class Tracing(Model):
    """Remembers the rows after every batch."""

    def __init__(self, callback: DataParameters) -> None:
        super().__init__()
        self.rows: list[torch.Tensor] = []
        self.look = lambda: callback.tables["log_temperature"].values.clone()

    def on_train_batch_end(self, *_: Any) -> None:
        self.rows.append(self.look())


def test_csv_has_the_batch_at_the_interval_and_the_table_at_the_end_of_an_epoch(tmp_path: Path):
    callback, logger = DataParameters(lr=0.2), CSVLogger(tmp_path)
    model = Tracing(callback)
    fit(callback, model=model, max_epochs=3, logger=logger, log_every_n_steps=2)
    metrics = pd.read_csv(Path(logger.log_dir) / "metrics.csv").set_index("step")

    batches = metrics["data_parameters/batch_log_temperature_mean"].dropna()
    assert batches.index.tolist() == [1, 3, 5, 7]  # every second of 9 steps, counted as Lightning counts
    for step, value in zip(batches.index.tolist(), batches, strict=True):
        batch = slice(8 * (step % 3), 8 * (step % 3) + 8)
        assert value == pytest.approx(model.rows[step][batch].mean().item(), rel=1e-5)

    for name in STATISTICS:
        column = metrics[f"data_parameters/log_temperature_{name}"].dropna()
        assert column.index.tolist() == [2, 5, 8]
    for step in (2, 5, 8):
        rows, logged = model.rows[step], metrics.loc[[step]].max()
        expected = (rows.mean(), rows.std(correction=0), rows.min(), rows.max(), rows.abs().mean())
        for name, value in zip(STATISTICS, expected, strict=True):
            assert logged[f"data_parameters/log_temperature_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_class_rows_are_logged_by_name(tmp_path: Path):
    callback, logger = DataParameters(CLASSES, "joint", lr=0.2, class_lr=0.2), CSVLogger(tmp_path)
    fit(callback, logger=logger)
    metrics = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    last = metrics["data_parameters/class_log_temperature_max"].dropna().iloc[-1]
    assert last == pytest.approx(callback.tables["class_log_temperature"].values.max().item(), rel=1e-5)
    assert metrics["data_parameters/log_temperature_max"].notna().sum() == 2


def test_tensorboard_gets_scalars_and_histograms(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback, logger = DataParameters(lr=0.2), TensorBoardLogger(tmp_path)
    fit(callback, logger=logger)
    events = event_accumulator.EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    assert len(events.Scalars("data_parameters/log_temperature_travel")) == 2
    histograms = events.Histograms("data_parameters/log_temperature")
    assert [histogram.histogram_value.num for histogram in histograms] == [SAMPLES, SAMPLES]
    last, rows = histograms[-1].histogram_value, callback.tables["log_temperature"].values
    assert (last.min, last.max) == pytest.approx((rows.min().item(), rows.max().item()), rel=1e-5)


@pytest.mark.filterwarnings("default")  # wandb's own imports
def test_wandb_offline_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    callback, logger = DataParameters(lr=0.2), WandbLogger(offline=True, save_dir=tmp_path, project="rows")
    try:
        fit(callback, logger=logger)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    travel = callback.tables["log_temperature"].values.abs().mean().item()
    assert summary["data_parameters/log_temperature_travel"] == pytest.approx(travel, rel=1e-5)
    histogram = summary["data_parameters/log_temperature_histogram"]
    assert sum(histogram["values"]) == SAMPLES
    assert next(tmp_path.glob("wandb/offline-run-*/*.wandb")).stat().st_size > 0


def test_any_other_logger_gets_scalars_only(tmp_path: Path):
    class Own(CSVLogger):
        pass

    first, second = Own(tmp_path, name="first"), CSVLogger(tmp_path, name="second")
    fit(DataParameters(lr=0.2), logger=[first, second])
    left, right = (pd.read_csv(Path(logger.log_dir) / "metrics.csv") for logger in (first, second))
    pd.testing.assert_frame_equal(left, right)


def ours(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


# -- inert rows ------------------------------------------------------------------------------------------------------


def test_inert_rows_warn_once_and_say_what_to_raise():
    with pytest.warns(UserWarning, match="log_temperature has moved by .*next to nothing") as caught:
        fit(DataParameters(lr=1e-4), max_epochs=3)
    (message,) = ours(caught)
    assert "Raise lr" in message


def test_the_papers_rate_is_named_inert_in_a_short_run():
    with pytest.warns(UserWarning, match="step per visit is lr / batch size"):
        fit(DataParameters(preset="paper", lr=0.002), max_epochs=1)


@pytest.mark.parametrize("make", [lambda: DataParameters(lr=0.2), TrainingDynamics], ids=["moving", "nothing to move"])
def test_rows_that_move_do_not_warn(make: Any):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*next to nothing.*")
        fit(make(), max_epochs=2)


def test_rows_that_were_not_visited_do_not_count_as_inert():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*next to nothing.*")
        fit(DataParameters(lr=0.2), make_loader(batch_size=1), max_epochs=1, limit_train_batches=1)


# -- losses that are not finite --------------------------------------------------------------------------------------


def broken(*numbers: int) -> Numbered:
    data = Numbered()
    data.x[list(numbers), 0] = math.nan
    return data


def standing(model: Model) -> Model:
    """A model that does not learn, so that a NaN stays where it is."""
    model.configure_optimizers = lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return model


@pytest.mark.filterwarnings("ignore:.*row steps so far")
@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_a_nan_loss_leaves_the_rows_of_its_step_and_names_its_samples(level: Any):
    callback = DataParameters(CLASSES, level, lr=0.2, class_lr=0.2)
    loader = make_loader(broken(9, 13))  # both in the second of three batches
    with pytest.warns(UserWarning, match=r"row 9, 13 is not finite") as caught:
        fit(callback, loader, model=standing(Model()), max_epochs=2)
    assert len([message for message in ours(caught) if "row 9, 13" in message]) == 1  # once a sample
    for table in callback.tables.values():
        assert torch.isfinite(table.values).all()
    if level != "class":
        moved = (callback.tables["log_temperature"].values != callback.tables["log_temperature"].init).tolist()
        assert moved == 8 * [True] + 8 * [False] + 8 * [True]
    assert all(int(optimizer.skipped_steps) == 2 for optimizer in callback.optimizers)
    frame = callback.to_frame()
    assert frame["visits"].tolist() == [0 if i in (9, 13) else 2 for i in range(SAMPLES)]
    assert frame["mean_loss"].drop([9, 13]).notna().all()


def test_row_steps_that_were_not_taken_are_counted_in_a_warning():
    model = standing(Model())
    loader = make_loader(broken(9))
    with pytest.warns(UserWarning, match="row 9"), pytest.warns(UserWarning, match=r"1 row steps? so far") as caught:
        fit(DataParameters(lr=0.2), loader, model=model, max_epochs=3)
    assert len([message for message in ours(caught) if "so far" in message]) == 1


@pytest.mark.filterwarnings("ignore:.*row steps so far")
def test_the_same_rows_as_if_the_step_had_not_been():
    callback, without = DataParameters(lr=0.2), DataParameters(lr=0.2)
    with pytest.warns(UserWarning, match="row 9 is not finite"):
        fit(callback, make_loader(broken(9)), model=standing(Model()))
    rest = [[*range(8)], [*range(16, 24)]]
    fit(without, torch.utils.data.DataLoader(Numbered(), batch_sampler=rest), model=standing(Model()))  # type: ignore[arg-type]
    assert_same(snapshot(callback.state_dict()["tables"]), snapshot(without.state_dict()["tables"]))


def test_nan_names_ids_of_many_samples_briefly():
    with pytest.warns(UserWarning, match=r"row 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 14 more is not finite"):
        fit(
            TrainingDynamics(),
            make_loader(broken(*range(SAMPLES)), batch_size=SAMPLES),
            model=standing(Model()),
            max_epochs=1,
        )


@pytest.mark.filterwarnings("ignore:.*row steps so far")
def test_infinite_loss_counts_too():
    """A probability of exactly zero for the given label."""

    def step(model: Any, batch: Any) -> Any:
        third = batch[0][:, -1] == 3
        impossible = third[:, None] & torch.nn.functional.one_hot(batch[1], CLASSES).bool()
        return model.loss(model.logits(batch[0]).masked_fill(impossible, -math.inf), batch[1])

    callback = DataParameters(lr=0.2)
    with pytest.warns(UserWarning, match="row 3 is not finite"):
        fit(callback, model=standing(StepModel(step, loss=torch.nn.CrossEntropyLoss())), max_epochs=1)
    assert torch.isfinite(callback.tables["log_temperature"].values).all()


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_num_classes_smaller_than_a_label_is_refused_before_the_first_step(level: Any):
    model = Model()
    before = snapshot(model.state_dict())
    with pytest.raises(ValueError, match=r"label 2 does not fit num_classes=2 \(labels 0 to 1\)"):
        fit(DataParameters(2, level), model=model)
    assert_same(snapshot(model.state_dict()), before)
