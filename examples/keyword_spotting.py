"""Keywords in noise: temperatures of classes, of utterances and of both, learned from clean and noisy or clean speech.

    python examples/keyword_spotting.py                            # a small set that espeak-ng speaks: no data on disk
    python examples/keyword_spotting.py --data-dir DATA --seeds 5  # Google Speech Commands in DATA, in its usual layout
    python examples/keyword_spotting.py --data-dir DATA --download # fetch all of it first, 2.4 GB
    python examples/keyword_spotting.py --data-dir DATA --model resnet --shared-rows

Every training utterance is there clean and mixed with background noise at -10 to 10 dB. The default model is the one of
Saxena et al. (5 layers of 64 on a frame and 9 neighbours to each side, an output a frame); the other a small residual
network with an output an utterance. All arms of a seed begin with the same weights and see the same batches. The epoch
is chosen by accuracy on validation speakers.

Prints accuracy on clean and noisy speech of unseen speakers, false rejects on a stream of their utterances, other words
and noise, at the threshold that has 10 false alarms an hour on the validation stream, and beside them the published
relative reductions of false rejects, from 1.5 million utterances of another set.

A folder in OUT gets the table, the trade-off curves (det.png), accuracy by SNR (snr.png), temperatures over epochs and
against SNR (temperatures.png), and for each arm with temperatures of its own a page with the hardest utterances, to be
heard (report_<arm>/report.html). The same command goes on where it was interrupted, and keeps finished runs.
"""

import argparse
import copy
import json
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from dataparams import DataParameters, DataReport, TrainingDynamics
from dataparams.report.files import replacing
from dataparams.tasks import FrameMLP, KeywordResNet, KeywordSpotter, SpeechCommandsData

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data-dir", default=os.environ.get("DATAPARAMS_DATA"), help="(default: $DATAPARAMS_DATA or none)")
parser.add_argument("--spoken", action="store_true", help="the set that espeak-ng speaks, whatever is on disk")
parser.add_argument("--download", action="store_true", help="fetch Speech Commands into DATA where it is missing")
parser.add_argument("--version", choices=["0.01", "0.02"], default="0.02", help="of Speech Commands")
parser.add_argument("--arms", nargs="+", help="some of those that the table shows (default: all)")
parser.add_argument("--model", choices=["mlp", "resnet"], default="mlp", help="an output a frame, or an utterance")
parser.add_argument("--copies", type=int, default=1, help="noisy copies of an utterance (default: %(default)s)")
parser.add_argument("--snr", type=float, nargs=2, default=(-10, 10), metavar=("LOW", "HIGH"), help="decibels")
parser.add_argument("--shared-rows", action="store_true", help="an utterance's copies share one temperature")
parser.add_argument("--train-size", type=int, help="use fewer training utterances")
parser.add_argument("--epochs", type=int, default=16)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=0.1, help="rate of the model (default: %(default)s)")
parser.add_argument("--rate", type=float, default=0.02, help="of utterances' temperatures (default: %(default)s)")
parser.add_argument("--class-rate", type=float, default=0.0002, help="of classes' (default: %(default)s)")
parser.add_argument("--hours", type=float, default=0.5, help="length of the streams (default: %(default)s)")
parser.add_argument("--alarms", type=float, default=10.0, help="false alarms an hour (default: %(default)s)")
parser.add_argument("--workers", type=int, default=0, help="processes that read and mix (default: %(default)s)")
parser.add_argument("--seeds", type=int, default=1, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--out", default="outputs/keyword_spotting", help="folder of tables, pictures and pages")

LEVELS = {"plain": None, "class": "class", "instance": "instance", "joint": "joint"}
CLEAN = ", clean speech only"
ARMS = [*LEVELS, *(level + CLEAN for level in LEVELS)]
# Relative reduction of false rejects at 10 false alarms an hour, %. Saxena et al., keyword spotting: trained on clean
# and noisy speech, or on clean alone, where instance temperatures did harm.
PUBLISHED = {"joint": "7.7", "class": "7.2", "instance": "4.1", "class" + CLEAN: "3.8", "instance" + CLEAN: "worse"}
COLORS = {"plain": "black", "class": "tab:blue", "instance": "tab:orange", "joint": "tab:green"}


def load(args: argparse.Namespace, arm: str, seed: int) -> SpeechCommandsData:
    """The data of an arm: every arm of a seed has the same validation and test."""
    return SpeechCommandsData(
        data_dir=Path(args.out) / "data" if args.spoken or not args.data_dir else args.data_dir,
        spoken=args.spoken or not args.data_dir,
        download=args.download,
        version=args.version,
        batch_size=args.batch_size,
        noisy_copies=0 if arm.endswith(CLEAN) else args.copies,
        snr_range=args.snr,
        shared_rows=args.shared_rows,
        targets="frames" if args.model == "mlp" else "utterance",
        train_size=args.train_size,
        stream_hours=args.hours,
        num_workers=args.workers,
        seed=seed,
    )


def own_temperature(rows: pd.DataFrame) -> str | None:
    """The column with an utterance's own part of the temperature; None where it has none."""
    column = "log_temperature_instance" if "log_temperature_instance" in rows else "log_temperature"
    return column if column in rows and rows[column].notna().any() else None


class Watch(L.Callback):
    """Keeps the weights of the best validation epoch, and the mean temperature of clean and of noisy speech."""

    def __init__(self, method: Any) -> None:
        self.method, self.best, self.weights, self.lines = method, -1.0, {}, []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        if accuracy > self.best:
            self.best, self.weights = accuracy, copy.deepcopy(pl_module.state_dict())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        rows = self.method.to_frame()
        column = own_temperature(rows)
        if column and "is_noisy" in data.sample_columns and data.noisy_copies:
            means: Any = rows[column].groupby(pd.Series(data.sample_columns["is_noisy"])).mean()
            self.lines.append(
                {"epoch": trainer.current_epoch + 1, "clean": float(means[False]), "noisy": float(means[True])}
            )


def train(arm: str, seed: int, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One run: scores, trade-off curve, temperatures."""
    L.seed_everything(seed, verbose=False)
    data = load(args, arm, seed)
    data.prepare_data()
    data.setup()
    model = FrameMLP(data.num_classes) if args.model == "mlp" else KeywordResNet(data.num_classes)
    module = KeywordSpotter(model, partial(torch.optim.SGD, lr=args.lr, momentum=0.9), alarms_per_hour=args.alarms)
    rows: dict[str, Any] = {"index_key": data.index_key, "num_rows": data.num_rows} if args.shared_rows else {}
    level: Any = LEVELS[arm.removesuffix(CLEAN)]
    method: Any = TrainingDynamics(**rows)
    if level:
        method = DataParameters(data.num_classes, level=level, lr=args.rate, class_lr=args.class_rate, **rows)
    watch = Watch(method)
    callbacks: list[L.Callback] = [method, watch]
    if seed == 0 and level not in (None, "class"):
        title = f"Keywords in noise, {arm}: the hardest utterances"
        callbacks.append(
            DataReport(out / f"report_{arm.replace(', ', '_').replace(' ', '_')}", predict=False, title=title)
        )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=callbacks,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    last: Any = method.to_frame().assign(**data.sample_columns)
    module.load_state_dict(watch.weights)
    scores = module.scores(data)
    curve: Any = module.listen(data, "test").curve()[["alarms_per_hour", "false_reject"]]
    column = own_temperature(last) if level != "class" else None
    known = {"snr": "snr", "mean_loss": "mean_loss", **({column: "log_temperature"} if column else {})}
    return {
        "scores": scores,
        "curve": curve.to_dict("list"),
        "epochs": watch.lines,
        "rows": last.loc[last["word"] != "silence", list(known)]
        .rename(columns=known)
        .astype(float)
        .round(4)
        .to_dict("list"),
    }


def summary(runs: dict[str, list[dict[str, Any]]], alarms: float) -> pd.DataFrame:
    """A line an arm: mean ± deviation over seeds, in percent; reductions are paired by seed."""
    lines = {}
    for arm, found in runs.items():
        scores: Any = pd.DataFrame([run["scores"] for run in found])
        levels = {key: f"{key.rsplit('_', 1)[1]} dB" for key in scores if str(key).startswith("test_accuracy_snr_")}
        shown = {"test_accuracy": "clean", **levels, "false_reject": f"false rejects at {alarms:g}/h"}
        line = {title: _percent(scores[key]) for key, title in shown.items()}
        line["alarms/h in test"] = _percent(scores["false_alarms_per_hour"] / 100)
        base = "plain" + (CLEAN if arm.endswith(CLEAN) else "")
        if arm != base and base in runs:
            plain: Any = pd.DataFrame([run["scores"] for run in runs[base]])
            line["fewer rejects"] = _percent(1 - scores["false_reject"] / plain["false_reject"])
            line["published"] = PUBLISHED.get(arm, "")
        lines[arm] = line
    return pd.DataFrame(lines).T.fillna("").rename_axis("arm")


def _percent(values: Any) -> str:
    return f"{100 * values.mean():.1f}" + (f" ± {100 * values.std():.1f}" if len(values) > 1 else "")


def style(arm: str) -> dict[str, Any]:
    """One colour a level; dashed: trained on clean speech."""
    return {"color": COLORS[arm.removesuffix(CLEAN)], "linestyle": "--" if arm.endswith(CLEAN) else "-", "label": arm}


def draw_curves(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace, note: str) -> Figure:
    """False rejects against false alarms an hour, mean over seeds."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    grid = np.geomspace(1, 1000, 200)
    for arm, found in runs.items():
        curves = []
        for run in found:  # the least share of rejects that so many alarms allow
            alarms, rejects = np.array(run["curve"]["alarms_per_hour"]), np.array(run["curve"]["false_reject"])
            curves.append(rejects[np.searchsorted(alarms, grid, side="right") - 1])
        axes.plot(grid, 100 * np.mean(curves, axis=0), **style(arm))
    axes.axvline(args.alarms, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="false alarms an hour", ylabel="false rejects, %", ylim=(0, 100))
    axes.set_title(f"Detection-error trade-off on the test stream, {note}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def draw_accuracy(runs: dict[str, list[dict[str, Any]]], note: str) -> Figure:
    """Accuracy against SNR, with the deviation over seeds."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (arm, found) in enumerate(runs.items()):
        scores: Any = pd.DataFrame([run["scores"] for run in found])
        keys = [str(key) for key in scores if str(key).startswith("test_accuracy_snr_")]
        places = [float(key.rsplit("_", 1)[1]) for key in keys]
        clean = max(places) + 7
        at = np.array([*places, clean]) + 0.12 * (number - len(runs) / 2)  # beside each other, so that bars are seen
        values = 100 * scores[[*keys, "test_accuracy"]]
        error = values.std() if len(found) > 1 else None
        axes.errorbar(at, values.mean(), error, capsize=2, marker=".", linewidth=1.2, **style(arm))
        axes.set_xticks([*places, clean], [*(f"{place:g}" for place in places), "clean"])
    axes.set(xlabel="SNR, dB", ylabel="accuracy on unseen speakers, %")
    axes.set_title(f"Accuracy in noise, {note}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def draw_temperatures(runs: dict[str, list[dict[str, Any]]], note: str) -> Figure | None:
    """Over epochs, noisy and clean, and at the end against SNR; None where no arm has temperatures of noisy speech."""
    shown = {arm: found for arm, found in runs.items() if found[0]["epochs"] and "log_temperature" in found[0]["rows"]}
    shown = {arm: found for arm, found in shown.items() if pd.notna(found[0]["epochs"][-1]["noisy"])}
    if not shown:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    over_epochs, against_snr = panels
    for arm, found in shown.items():
        means: Any = pd.concat([pd.DataFrame(run["epochs"]) for run in found]).groupby("epoch").mean()
        color = COLORS[arm]
        over_epochs.plot(means.index, means["noisy"], color=color, label=f"{arm}, noisy")
        over_epochs.plot(means.index, means["clean"], color=color, linestyle=":", label=f"{arm}, clean")
        rows: Any = pd.concat([pd.DataFrame(run["rows"]) for run in found])
        noisy = rows.dropna(subset=["snr"])
        bins = np.linspace(noisy["snr"].min(), noisy["snr"].max(), 9)
        group = noisy.groupby(pd.cut(noisy["snr"], bins, include_lowest=True), observed=True)["log_temperature"]
        means_of: Any = group.mean()
        middle = [interval.mid for interval in means_of.index]
        against_snr.errorbar(middle, means_of, group.sem(), color=color, capsize=2, marker=".", label=f"{arm}, noisy")
        clean = rows.loc[rows["snr"].isna(), "log_temperature"].mean()
        against_snr.axhline(clean, color=color, linestyle=":", label=f"{arm}, clean")
    over_epochs.set(xlabel="epoch", ylabel="mean log temperature of utterances")
    against_snr.set(xlabel="SNR of the utterance, dB", ylabel="mean at the end ± standard error")
    for axes in (over_epochs, against_snr):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"Temperatures of training utterances, {note}")
    return figure


def main(args: argparse.Namespace) -> None:
    arms = args.arms or ARMS
    if unknown := set(arms) - set(ARMS):
        sys.exit(f"no such arms: {', '.join(sorted(unknown))}. Choose among {', '.join(map(repr, ARMS))}")
    try:
        data = load(args, "plain", 0)
        data.prepare_data()
        found = data.find()
        data.setup()
    except (FileNotFoundError, OSError, ImportError, ValueError) as error:
        sys.exit(str(error))
    assert found is not None
    settings = {k: v for k, v in vars(args).items() if k not in ("arms", "seeds", "out", "workers", "download")}
    kind = f"{found.name}_{args.model}{'_shared_rows' if args.shared_rows else ''}_{args.epochs}epochs"
    out = Path(args.out) / kind
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed, arm in (bar := tqdm([(seed, arm) for seed in range(args.seeds) for arm in arms], unit="run")):
        bar.set_description(f"{arm}, seed {seed}")
        file = out / f"{arm.replace(', ', '_').replace(' ', '_')}_seed{seed}.json"
        run = json.loads(file.read_text()) if file.exists() else {}
        if run.get("settings") != json.loads(json.dumps(settings)):  # none, or one with other options
            run = {**train(arm, seed, args, out), "settings": settings}
            with replacing(file) as beside:
                beside.write_text(json.dumps(run))
        runs[arm].append(json.loads(json.dumps(run)))
    note = f"{found.name}, {f'mean of {args.seeds} seeds' if args.seeds > 1 else 'seed 0'}"
    table = summary(runs, args.alarms)
    print(f"{note}: {len(data.utterances('train')[0])} training utterances; in percent\n{table.to_string()}")
    table.to_csv(out / "table.csv")
    figures: dict[str, Figure | None] = {"det": draw_curves(runs, args, note), "snr": draw_accuracy(runs, note)}
    figures["temperatures"] = draw_temperatures(runs, note)
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=130)
    print(f"table, pictures and pages with the hardest utterances: {out}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = "does not have many workers|isinstance.treespec|smaller than the logging interval"
    warnings.filterwarnings("ignore", f".*({quiet}).*")
    main(parser.parse_args())
