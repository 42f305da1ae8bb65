"""What W&B gets of a run, read back from the files of its offline mode."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from dataparams.report.rows import read_rows
from dataparams.report.tracking import tracking_loggers, worst
from dataparams.tasks import Classifier
from dataparams.train import run

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own imports


def configured(folder: Path, *overrides: str) -> DictConfig:
    offline = ["logger=wandb", "logger.wandb.offline=true", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    quiet = ["plots=false", "progress_bar=false", "data.train_size=200", f"run_dir={folder}"]
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        return compose("config", [*offline, *quiet, *overrides])


def finished(folder: Path) -> dict[str, list[Any]]:
    """The records of the only offline run below a folder, by kind; W&B's own process may still be writing them."""
    for _ in range(600):
        by_kind: dict[str, list[Any]] = {}
        for record in records(folder):
            by_kind.setdefault(record.WhichOneof("record_type"), []).append(record)
        if "exit" in by_kind:
            return by_kind
        time.sleep(0.05)
    raise AssertionError("the run was not closed")


def records(folder: Path) -> Iterator[Any]:
    """The records of the only offline run below a folder: blocks of 32 KiB that hold parts of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    kinds: Any = wandb_internal_pb2  # made at run time
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = kinds.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    module = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield module
    module.finish()


def test_each_job_of_a_sweep_is_a_run_with_its_rows_report_and_numbers(tmp_path, wandb):
    found = {}
    for method in ("none", "elr"):
        folder = tmp_path / method
        results = run(configured(folder, f"method={method}", "logger.wandb.group=mine"))
        assert wandb.run is None  # closed: the next job must not go on with it
        by_kind = finished(folder)
        own = by_kind["run"][0].run
        found[method] = own.run_id
        assert (own.run_group, list(own.tags)) == ("mine", ["digits_noise", method])
        report = next(record.artifact for record in by_kind["artifact"] if record.artifact.type == "report")
        assert {entry.path for entry in report.manifest.contents} == {"report.html", "rows.parquet"}
        summary = {
            item.key: json.loads(item.value_json) for record in by_kind["summary"] for item in record.summary.update
        }
        assert summary["test_accuracy_last"] == results["test_accuracy_last"]
        assert by_kind["exit"][0].exit.exit_code == 0

        (path,) = folder.glob("wandb/offline-run-*/files/media/table/rows_*.json")
        table = json.loads(path.read_text())
        shown = pd.DataFrame(table["data"], columns=table["columns"])
        rows = read_rows(folder / "rows.parquet")
        expected = rows["mean_loss"].sort_values(ascending=False, kind="stable").index
        assert shown["index"].tolist() == expected.tolist()
        np.testing.assert_allclose(shown["mean_loss"], rows["mean_loss"][expected])
        assert shown["given_label"].tolist() == rows["given_label"][expected].tolist()
    assert len(set(found.values())) == 2


class Fails(Classifier):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("broken on purpose")


def test_a_run_that_fails_is_closed_as_failed(tmp_path, wandb):
    with pytest.raises(Exception, match="batch_size must be at least 1"):
        run(configured(tmp_path / "before", "data.batch_size=0"))
    assert not list(tmp_path.glob("before/wandb/*"))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(configured(tmp_path / "while", f"module._target_={__name__}.{Fails.__name__}"))
    assert wandb.run is None
    assert finished(tmp_path / "while")["exit"][0].exit.exit_code == 1


def test_loggers_without_a_group_of_their_own_belong_to_the_sweep(tmp_path):
    made = []

    class Own:
        def __init__(self, group=None, other=None):
            made.append((group, other))

    target = f"{__name__}.capture"
    globals()["capture"] = Own
    nodes = {
        "a": {"_target_": target, "group": None},
        "b": {"_target_": target, "group": "own"},
        "c": {"_target_": target, "other": 1},
    }
    for sweep in ("sweep", None):
        tracking_loggers(DictConfig({"logger": nodes}), sweep)
    assert made == [("sweep", None), ("own", None), (None, 1), (None, None), ("own", None), (None, 1)]
    assert tracking_loggers(DictConfig({"logger": None}), "sweep") == []


def test_the_table_holds_the_worst_rows_in_plain_types():
    rows = pd.DataFrame(
        {
            "index": range(5),
            "id": [("a", 1)] * 5,
            "given_label": pd.array([0, 1, None, 1, 0], dtype="Int64"),
            "mean_loss": np.array([0.1, 3.0, np.nan, 2.0, 1.0], dtype=np.float32),
            "is_corrupt": [True, False, True, False, True],
        }
    )
    shown = worst(rows, 4)
    assert shown["index"].tolist() == [1, 3, 4, 0]
    assert worst(rows)["given_label"].tolist()[-1] is None
    assert shown["id"].tolist() == ["('a', 1)"] * 4
