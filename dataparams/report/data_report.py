"""``report.html`` of a finished run: one file for a person, made from the run's files and its data module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dataparams.report.compare import BASELINES, read_sweep
from dataparams.report.media import MediaSource, encode_all, media_source
from dataparams.report.page import write_page
from dataparams.report.payload import MAX_ROWS, PICTURES, build_payload, pictured
from dataparams.report.plots import by_epoch
from dataparams.report.rows import read_rows
from dataparams.report.tasks import scored_tasks

FILE = "report.html"
MODEL_NOTE = (
    "The model's label is that of the {when} weights in one pass over the training set, on which they were trained."
)


def write_report(
    run_dir: Path | str, datamodule: Any = None, pictures: int = PICTURES, max_rows: int = MAX_ROWS
) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Args:
        run_dir: holds ``rows.parquet`` and ``results.json``.
        datamodule: set up; gives pictures (see :mod:`dataparams.report.media`) and names of classes. None: without.
        pictures: how many of the worst samples are shown with a picture, sound or text, at least.
        max_rows: the page holds so many rows, the worst ones.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    run_dir = Path(run_dir)
    results_path = run_dir / "results.json"
    if not results_path.exists():
        raise FileNotFoundError(f"{run_dir} is not a finished run (no results.json); for a sweep: dataparams compare")
    results = json.loads(results_path.read_text())
    rows = read_rows(run_dir / "rows.parquet")
    metrics = run_dir / "metrics.csv"
    sequence = "tasks_learned" in results
    payload, held = build_payload(
        rows,
        title=f"{results['experiment']}, {results['method']}, seed {results['seed']}",
        paragraph=paragraph(results, len(rows), baseline_results(run_dir, results)),
        class_names=names_of_classes(datamodule),
        epochs=by_epoch(pd.read_csv(metrics)) if metrics.exists() else None,
        matrices={path.stem: pd.read_csv(path, index_col=0) for path in sorted(run_dir.glob("*_matrix.csv"))},
        marked_epoch=None if sequence else results.get("best_epoch"),
        max_rows=max_rows,
    )
    if any(name.startswith("model_") for name in rows):
        payload["note"] = MODEL_NOTE.format(when="last" if sequence else "best epoch's")
    add_media(payload, rows, held, None if datamodule is None else media_source(datamodule), pictures)
    return write_page(run_dir / FILE, "report", payload)


def data_of_run(run_dir: Path | str) -> Any:
    """The data module that a run was made with, from its ``config.yaml``, set up.

    Raises:
        FileNotFoundError: the folder has no ``config.yaml``, or the data set is not there any more.
        ValueError: the data module gives other labels than the run's table has, so that pictures would be of others.
    """
    run_dir = Path(run_dir)
    config = run_dir / "config.yaml"
    if not config.exists():
        raise FileNotFoundError(f"{config} is not there, and with it how to make the data")
    datamodule = instantiate(OmegaConf.select(OmegaConf.load(config), "data"), _convert_="all")
    datamodule.setup("fit")
    rows = read_rows(run_dir / "rows.parquet")
    given = getattr(datamodule, "given_labels", None)
    several = isinstance(given, Mapping)
    labels = {f"given_{task}": one for task, one in given.items()} if several else {"given_label": given}
    for column, values in labels.items():
        if values is None or column not in rows:
            continue
        known, values = rows[column], np.asarray(values)
        held = len(rows) == 0 or rows["index"].max() < len(values)
        if not held or not np.array_equal(values[rows["index"]][known.notna()], known.dropna().to_numpy()):
            raise ValueError(f"the data now has other labels than the run's table (column {column})")
    return datamodule


def add_media(
    payload: dict[str, Any], rows: pd.DataFrame, held: np.ndarray, source: MediaSource | None, pictures: int
) -> None:
    """Put pictures, sounds or texts of the worst samples into the page's data, where there is a source of them.

    Args:
        payload: the page's data, changed in place.
        rows: the table of samples.
        held: positions of the samples that the page holds.
        source: from a position to what a person should see; or None.
        pictures: of how many of the worst samples, at least.
    """
    if source is None or not pictures:
        return
    shown = set(held.tolist())
    wanted = [position for position in pictured(payload, rows, pictures) if position in shown]
    payload["media"] = {str(position): medium for position, medium in encode_all(source, wanted).items()}


def names_of_classes(datamodule: Any) -> Any:
    """The data module's ``class_names``: by number, or by task; None where it has none."""
    return getattr(datamodule, "class_names", None) or None


def baseline_results(run_dir: Path, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results of a baseline on the same seed and settings, where the run is one of a sweep that has it."""
    if not (run_dir.parent / "multirun.yaml").exists() or results["method"] in BASELINES:
        return None
    runs = read_sweep(run_dir.parent)
    own: Any = runs[runs["folder"] == str(run_dir)]
    if own.empty:
        return None
    same: Any = runs[(runs["context"] == own["context"].iloc[0]) & (runs["seed"] == results["seed"])]
    found = [same[same["method"] == method] for method in BASELINES]
    return next((one.iloc[0].to_dict() for one in found if len(one)), None)


def paragraph(results: Mapping[str, Any], count: int, baseline: Mapping[str, Any] | None = None) -> str:
    """The run in a few sentences: data, noise, method, scores at the best epoch and at the last, next to a baseline."""
    sentences = [f"{results.get('data', results['experiment'])}: {count:,} training samples{_noise(results)}."]
    sentences.append(f"Method {results['method']}, seed {results['seed']}, {results['epochs']} epochs.")
    tasks = scored_tasks(results)
    keys = {f"{task}_{score}": task.replace("_", " ") for task, score in tasks.items()} or {"test_accuracy": "test"}
    if "average_accuracy" in results:
        sentences.append(_sentence("Average test accuracy", results["average_accuracy"], "after all tasks"))
        if results.get("forgetting") is not None:
            sentences.append(f"Forgetting: {100 * results['forgetting']:.1f} points.")
    for key, name in keys.items():
        if f"{key}_best" not in results:
            continue
        kind = f"{name} {'error' if key.endswith('error') else 'accuracy'}"
        best, last = (_value(results[f"{key}_{when}"], key) for when in ("best", "last"))
        text = (
            f"{kind[0].upper()}{kind[1:]}: {best} at the best epoch ({results['best_epoch'] + 1}), {last} at the last"
        )
        if baseline is not None and f"{key}_best" in baseline:
            others = (_value(baseline[f"{key}_{when}"], key) for when in ("best", "last"))
            text += f" ({baseline['method']}: {', '.join(others)})"
        sentences.append(f"{text}.")
    return " ".join(sentences)


def _noise(results: Mapping[str, Any]) -> str:
    wrong = results.get("wrong_labels")
    if results.get("noise") in (None, "none") and not wrong:
        return ""
    kind = f"{results['noise']} " if results.get("noise") not in (None, "none", "file") else ""
    return f", {kind}label noise" + (f", {wrong:.1%} of the labels wrong" if wrong is not None else "")


def _value(value: float | None, key: str) -> str:
    if value is None or np.isnan(value):
        return "unknown"
    return f"{value:.3f}" if key.endswith("error") else f"{value:.1%}"


def _sentence(name: str, value: float | None, when: str) -> str:
    return f"{name}: {_value(value, name)} {when}."
