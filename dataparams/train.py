"""The command line: ``dataparams experiment=... method=... -m``, ``dataparams report RUN``, ``dataparams compare
SWEEP``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pandas as pd
import torch
from hydra.utils import get_class, instantiate
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from dataparams.callbacks.averaging import AveragedWeights
from dataparams.callbacks.base import MethodCallback
from dataparams.report.compare_page import FILE as COMPARE_FILE
from dataparams.report.compare_page import compare
from dataparams.report.data_report import FILE as REPORT_FILE
from dataparams.report.data_report import write_report
from dataparams.report.files import check_writable, replacing, write_json
from dataparams.report.monitor import DetectionMonitor, GroupMonitor, SaveOnInterrupt, StepTimer
from dataparams.report.plots import write_plots
from dataparams.report.printed import headline, report
from dataparams.report.quality import with_quality
from dataparams.report.results import (
    add_model_labels,
    collect_results,
    load_checkpoint,
    methods_at,
    rows_of_run,
    write_matrices,
)
from dataparams.report.rows import write_rows
from dataparams.report.tracking import finishing, log_report, sweep_name, tracking_loggers

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
CHECKPOINTS = ("best", "last", "best_ema", "interrupted")
OBJECTIVES = ("val_average_accuracy", "val_score_best", "val_accuracy_best")
# Advice and notes of Lightning that a user of this command line can do nothing about.
QUIET = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*is smaller than the logging interval.*",
    ".*MPS available but not used.*",
    ".*GPU available but not used.*",
    ".*LeafSpec.* is deprecated.*",  # Lightning's own use of torch.utils._pytree
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside and renames it, so that a kill in between leaves the previous one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            super().save_checkpoint(checkpoint, beside, storage_options)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which also says how many epochs there are."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train, evaluate and write one run into ``cfg.run_dir``; returns what ``results.json`` holds.

    The best epoch is the first with the highest accuracy on the (noisy) validation labels, or whatever else the module
    names as its ``monitor``; where that is None, as with tasks one after another, none is chosen. Test labels choose
    nothing.

    Args:
        cfg: the composed configuration (``conf/config.yaml``).

    Raises:
        OSError: the folder cannot be written; before training.
        ValueError: averaged weights are asked for and the module has no single accuracy; before training.
        SystemExit: Ctrl-C or SIGTERM; what was learned so far has then been written.
    """
    run_dir = Path(cfg.run_dir).resolve()
    check_writable(run_dir)
    results_path = run_dir / "results.json"
    if cfg.resume and results_path.exists():
        results = json.loads(results_path.read_text())
        if results["max_epochs"] >= (cfg.trainer.max_epochs or 0):  # early stopping may have ended it before
            return results
    if not cfg.resume:
        _remove_outputs(run_dir)
    with replacing(run_dir / "config.yaml") as beside:
        OmegaConf.save(cfg, beside, resolve=True)

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    datamodule = instantiate(cfg.data, _convert_="all")
    module = instantiate(cfg.module, _convert_="all")
    makers = _makers(cfg, datamodule)
    interrupt = SaveOnInterrupt(run_dir / "checkpoints" / "interrupted.ckpt")
    monitor = getattr(module, "monitor", "val_accuracy")
    if cfg.ema and monitor != "val_accuracy":
        raise ValueError(f"ema={cfg.ema}: averaged weights are scored by one accuracy, this run by {monitor}: ema=null")
    trainer = _make_trainer(cfg, run_dir, [interrupt, *(make() for make in makers.values())], monitor)
    last = run_dir / "checkpoints" / "last.ckpt"
    with finishing(trainer.loggers):
        with _saving_when_interrupted(interrupt, run_dir, makers, module, datamodule):
            trainer.fit(module, datamodule=datamodule, ckpt_path=last if cfg.resume and last.exists() else None)
        return _write_outputs(cfg, run_dir, trainer, module, datamodule, makers) if trainer.is_global_zero else {}


def _write_outputs(
    cfg: DictConfig,
    run_dir: Path,
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: Any,
    makers: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate the checkpoints of a finished fit, write the files of the run, return what ``results.json`` holds."""
    checkpoints = _load_checkpoints(run_dir)
    datamodule.trainer = trainer  # after ddp_spawn only the children's has one
    datamodule.setup("fit")
    datamodule.setup("test")
    methods = methods_at(makers, checkpoints["last"])
    rows = rows_of_run(methods_at(makers, checkpoints.get("best", checkpoints["last"])), methods, datamodule)
    device = trainer.strategy.root_device
    add_model_labels(rows, checkpoints, module, datamodule, device)
    rows = with_quality(rows)
    write_rows(rows, run_dir / "rows.parquet")
    identity = {name: cfg[name] for name in ("experiment", "method", "seed")}
    identity["max_epochs"] = trainer.max_epochs
    results = identity | collect_results(checkpoints, rows, methods, module, datamodule, device)
    write_matrices([*methods, module], datamodule, run_dir)
    _write_metrics(run_dir)
    write_json(results, run_dir / "results.json")  # last of the tables: where it exists, the run is complete
    (run_dir / "checkpoints" / "interrupted.ckpt").unlink(missing_ok=True)
    if cfg.plots:
        write_plots(run_dir)
    if cfg.report:
        write_report(run_dir, datamodule)
    log_report(trainer.loggers, rows, [run_dir / REPORT_FILE, run_dir / "rows.parquet"], results)
    return results


def _makers(cfg: DictConfig, datamodule: Any) -> dict[str, Any]:
    """Functions that make the callbacks, by name. Where samples share rows, the data module's ``index_key`` and
    ``num_rows`` say which and how many, and methods are told."""
    options = {}
    if getattr(datamodule, "index_key", None) is not None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        options = {"index_key": datamodule.index_key, "num_rows": datamodule.num_rows}
    makers = {}
    for name, node in cfg.callbacks.items():
        own = options if issubclass(get_class(node._target_), MethodCallback) else {}
        makers[name] = partial(instantiate, node, _convert_="all", **own)
    return makers


def _make_trainer(cfg: DictConfig, run_dir: Path, callbacks: list[L.Callback], monitor: str | None) -> L.Trainer:
    folder = run_dir / "checkpoints"
    methods = [callback for callback in callbacks if isinstance(callback, MethodCallback)]
    keep = partial(ModelCheckpoint, folder, save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [
        *callbacks,
        DetectionMonitor(methods),
        GroupMonitor(methods),
        StepTimer(),
        *([keep(filename="best", monitor=monitor, mode="max")] if monitor else []),
        keep(filename="last"),
    ]
    if cfg.ema:
        callbacks.insert(1, AveragedWeights(cfg.ema))
        callbacks.append(keep(filename="best_ema", monitor="val_accuracy_ema", mode="max"))
    if cfg.progress_bar:
        callbacks.append(ProgressBar())
    loggers = [CSVLogger(run_dir, name="logs"), *tracking_loggers(cfg, sweep_name(run_dir))]
    return instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
        enable_progress_bar=cfg.progress_bar,
        _convert_="all",
    )


@contextmanager
def _saving_when_interrupted(
    interrupt: SaveOnInterrupt, run_dir: Path, makers: dict[str, Any], module: L.LightningModule, datamodule: Any
) -> Iterator[None]:
    """Where Ctrl-C or SIGTERM ends the fit, write what was learned before the program ends."""
    try:
        with interrupt.listening():
            yield
    except BaseException:
        if not interrupt.interrupted:
            raise
        checkpoints = _load_checkpoints(run_dir)
        if now := checkpoints.get("interrupted"):
            best, methods = methods_at(makers, checkpoints.get("best", now)), methods_at(makers, now)
            write_rows(with_quality(rows_of_run(best, methods, datamodule)), run_dir / "rows.parquet")
            module.on_load_checkpoint(now)
            write_matrices([*methods, module], datamodule, run_dir)
            _write_metrics(run_dir)
        print(
            f"\ninterrupted; what was learned so far is in {run_dir}\n"
            f"continue from the last finished epoch: the same command with resume=true hydra.run.dir={run_dir}\n"
            f"(a job of a sweep: with resume=true hydra.sweep.dir={run_dir.parent})",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None


def _load_checkpoints(run_dir: Path) -> dict[str, Any]:
    paths = {name: run_dir / "checkpoints" / f"{name}.ckpt" for name in CHECKPOINTS}
    return {name: load_checkpoint(path) for name, path in paths.items() if path.exists()}


def _write_metrics(run_dir: Path) -> None:
    """Join what the CSV logger wrote, a folder for each start of the run, into ``metrics.csv``.

    A resumed run goes back to the end of the last finished epoch; what an earlier start logged after that step is
    dropped.
    """
    parts: list[pd.DataFrame] = []
    folders = sorted((run_dir / "logs").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    for folder in folders:
        if (folder / "metrics.csv").exists():
            part = pd.read_csv(folder / "metrics.csv")
            parts = [earlier.loc[earlier["step"] < part["step"].min()] for earlier in parts] + [part]
    if parts:
        with replacing(run_dir / "metrics.csv") as beside:
            pd.concat(parts, ignore_index=True).to_csv(beside, index=False)


def _remove_outputs(run_dir: Path) -> None:
    """Remove the files of an earlier run in this folder, so that the two do not mix; nothing else in it is touched."""
    names = [
        "results.json",
        REPORT_FILE,
        "rows.parquet",
        "metrics.csv",
        *(f"checkpoints/{name}.ckpt" for name in CHECKPOINTS),
    ]
    patterns = ("logs/version_*/metrics.csv", "*_matrix.csv")
    for path in [run_dir / name for name in names] + [path for each in patterns for path in run_dir.glob(each)]:
        path.unlink(missing_ok=True)


@hydra.main(version_base="1.3", config_path="pkg://dataparams.conf", config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One Hydra job; returns the best noisy-validation accuracy (of several tasks: score; of tasks one after another:
    the average accuracy at the end), for sweepers that search."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        results = run(cfg)
    except FileNotFoundError as error:  # data that is not there: the message says what to do, a traceback does not
        raise SystemExit(f"dataparams: {error}") from None
    if not results:
        return None
    folder = Path(cfg.run_dir).resolve()
    page = [f"page: {folder / REPORT_FILE}"] if (folder / REPORT_FILE).exists() else []
    print(headline(results), f"run: {folder}", *page, sep="\n", flush=True)
    return next(results[key] for key in OBJECTIVES if key in results)


def list_choices() -> str:
    """Experiments and methods with the first comment line of their YAML."""
    lines = []
    for group in ("experiment", "method"):
        lines.append(f"{group}:")
        for path in sorted(files("dataparams.conf").joinpath(group).iterdir(), key=lambda path: path.name):
            if path.name.endswith(".yaml"):
                comments = [
                    line for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line
                ]
                lines.append(f"  {path.name.removesuffix('.yaml'):<27}{comments[0][2:] if comments else ''}".rstrip())
    return "\n".join(lines)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"dataparams {command}")
    if command == "report":
        parser.description = "The page report.html, plots and the most suspicious samples of a finished run."
        parser.add_argument("folder", type=Path, metavar="RUN")
        parser.add_argument(
            "--by",
            default="mean_loss",
            metavar="DETECTOR",
            help="the ranking: mean_loss, margin or one that the method adds (default: %(default)s)",
        )
        parser.add_argument("-k", type=int, default=20, help="how many samples to print (default: %(default)s)")
        parser.add_argument(
            "--no-data",
            dest="data",
            action="store_false",
            help="no pictures: do not make the run's data module, whose class its config.yaml names",
        )
    else:
        parser.description = (
            "The table of a sweep: mean, deviation, paired difference to a baseline with its confidence interval. "
            "Writes summary.csv and compare.html, which also has the curves."
        )
        parser.add_argument("folder", type=Path, metavar="SWEEP")
        parser.add_argument(
            "--baseline", help="the method subtracted (default: none, where it is absent equal or finetune)"
        )
    return parser


def main() -> None:
    """The console script ``dataparams``."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("--list", "list"):
        print(list_choices())
    elif command in ("report", "compare"):
        options = _parser(command).parse_args(sys.argv[2:])
        try:
            if command == "report":
                report(options.folder, options.by, options.k, options.data)
            else:
                print(
                    compare(options.folder, options.baseline),
                    f"{options.folder / 'summary.csv'}\n{options.folder / COMPARE_FILE}",
                    sep="\n\n",
                )
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"dataparams: {error}") from None
    elif command.isidentifier():  # Hydra's own words for it are of a parser
        raise SystemExit(
            f"dataparams: {command!r} is no command: report FOLDER, compare FOLDER, --list, or settings of a run, "
            "KEY=VALUE (dataparams --help)"
        )
    else:
        try:
            job()
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
