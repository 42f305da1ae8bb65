"""Tasks one after another: a Hebbian trace, penalties and replay side by side, from the same initial weights.

    python examples/continual.py                                          # two digits a task, no data on disk, a minute
    python examples/continual.py --scenario permuted --data-dir DATA      # ten tasks of 12,000 digits, 15 minutes
    python examples/continual.py --scenario split --data-dir DATA         # all of MNIST, five tasks
    python examples/continual.py --scenario split --single-head --data-dir DATA     # all ten classes compete
    python examples/continual.py --scenario mixture --data-dir DATA       # MNIST, notMNIST, Fashion-MNIST, ...: a CNN
    python examples/continual.py --init kaiming                           # the last layer as published

Prints average accuracy, forgetting, forward transfer and the accuracy right after a task, in percent, mean and
deviation over seeds, and beside them the published average accuracy, where there is one: of another network and other
tasks of the same kind, longer trained. Every method begins with the same weights and sees the same batches.

A folder in OUT gets the table, the matrix of each method and seed (accuracy on task j after task i), and matrices.png,
the mean over seeds. The same command goes on where it was interrupted, and keeps finished runs.
"""

import argparse
import logging
import math
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
from torch.utils.data import Subset
from tqdm import tqdm

from dataparams import Consolidation
from dataparams.report.files import replacing
from dataparams.tasks import (
    ContinualClassifier,
    ContinualCNN,
    ContinualMLP,
    DigitsData,
    PermutedMNISTData,
    SplitMNISTData,
    TaskData,
    TaskSequence,
    VisionMixtureData,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
SCENARIOS = ("digits", "permuted", "imbalanced", "split", "mixture")
parser.add_argument("--scenario", choices=SCENARIOS, default="digits")
parser.add_argument("--data-dir", default=os.environ.get("DATAPARAMS_DATA"), help="(default: $DATAPARAMS_DATA)")
parser.add_argument("--methods", nargs="+", help="some of those that the table shows (default: all)")
parser.add_argument("--single-head", action="store_true", help="no method is told which task a sample belongs to")
parser.add_argument("--init", choices=["linear", "kaiming"], default="linear", help="of the last layer, every method's")
parser.add_argument("--epochs", type=int, help="of each task (default: 2; split and mixture 4, digits 20)")
parser.add_argument("--train-size", type=int, help="training images (permuted, mixture: of each task)")
parser.add_argument("--seeds", type=int, default=1, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--out", default="outputs/continual", help="folder of matrices, table and picture")

EPOCHS = {"digits": 20, "permuted": 2, "imbalanced": 2, "split": 4, "mixture": 4}
LR = {"digits": 0.05, "mixture": 0.05}  # others 0.01
# Strengths by penalty, chosen on validation data of another seed: importances differ in scale with the data.
PERMUTED = {"ewc": 50.0, "si": 60.0, "mas": 0.1}
STRENGTHS = {
    "permuted": PERMUTED, "imbalanced": PERMUTED, "digits": {"ewc": 50.0, "si": 5.0, "mas": 0.2},
    "split": {"ewc": 500.0, "si": 5.0, "mas": 1.0}, "mixture": {"ewc": 50.0, "si": 5.0, "mas": 0.1},
}  # fmt: skip
PENALTIES = {"finetune": None, "EWC": "ewc", "SI": "si", "MAS": "mas"}
METHODS = [*PENALTIES, "DHP", "DHP + EWC", "DHP + SI", "DHP + MAS", "replay"]
MEMORY = 200  # samples that replay keeps
# Average accuracy, %, in the order of METHODS. Thangarasa, Miconi and Taylor, "Enabling Continual Learning with
# Differentiable Hebbian Plasticity", IJCNN 2020, from their poster.
PUBLISHED = {
    "permuted": [76.73, 86.24, 84.72, 88.52, 78.49, 87.30, 85.20, 89.53],
    "imbalanced": [76.44, 87.18, 85.92, 87.32, 80.85, 87.43, 85.39, 88.80],
    "split": [92.75, 97.35, 97.18, 98.23, 97.44, 98.49, 99.11, 98.60],
}
MEASURES = {
    "average_accuracy": "average accuracy",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
    "learning_accuracy": "right after a task",
}


def load(args: argparse.Namespace, seed: int) -> TaskSequence:
    """The tasks, in the order of this seed."""
    options: dict[str, Any] = {"seed": seed, "multi_head": not args.single_head}
    if args.scenario == "digits":
        return digits(options)
    options |= {"data_dir": args.data_dir, "train_size": args.train_size}
    if args.scenario == "split":
        return SplitMNISTData(**options)
    if args.scenario == "mixture":
        options["train_size"] = args.train_size or 4000
        return VisionMixtureData(**options)
    del options["multi_head"]  # the tasks share their classes
    shares = (0.1, 1.0) if args.scenario == "imbalanced" else None
    options["train_size"] = args.train_size or 12_000
    return PermutedMNISTData(**options, val_size=500, class_shares=shares)


def digits(options: dict[str, Any]) -> TaskSequence:
    """scikit-learn's digits, two a task: how any data sets become tasks."""
    data = DigitsData(seed=options["seed"])
    data.setup()
    tasks = []
    for classes in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)):
        wanted = torch.tensor(classes)
        parts = [
            Subset(part, torch.isin(part.labels, wanted).nonzero().flatten().tolist())
            for part in (data.train_set, data.val_set, data.test_set)
        ]
        tasks.append(TaskData(*parts, name=f"{classes[0]}/{classes[1]}", classes=classes))
    return TaskSequence(tasks, num_classes=10, batch_size=16, **options)


def make_model(args: argparse.Namespace, head: Any) -> torch.nn.Module:
    """The network of a scenario; both heads begin with the same weights."""
    if args.scenario == "mixture":
        return ContinualCNN(num_classes=50, head=head, head_init=args.init)
    hidden = {"digits": (64, 64), "split": (256, 256)}.get(args.scenario, (400, 400))
    pixels = 64 if args.scenario == "digits" else 784
    return ContinualMLP(pixels, 10, hidden, head=head, head_init=args.init)


def train(method: str, seed: int, args: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, float]]:
    """Learn all tasks by one method: the matrix of accuracies, and what it says."""
    L.seed_everything(seed, verbose=False)
    data = load(args, seed)
    head = "dhp" if method.startswith("DHP") else "linear"
    penalty = PENALTIES.get(method.removeprefix("DHP + "))
    strength = STRENGTHS[args.scenario][penalty] if penalty else 1.0
    rate = LR.get(args.scenario, 0.01)
    module = ContinualClassifier(make_model(args, head), partial(torch.optim.SGD, lr=rate))
    callback = Consolidation(penalty=penalty, strength=strength, replay=MEMORY if method == "replay" else 0)
    trainer = L.Trainer(
        max_epochs=data.num_tasks * (args.epochs or EPOCHS[args.scenario]),
        reload_dataloaders_every_n_epochs=1,
        callbacks=[callback],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return module.matrices()["task_accuracy_matrix"], module.scores(data)


def draw(matrices: dict[str, pd.DataFrame], title: str) -> Figure:
    """The matrices side by side, in one scale."""
    columns = min(math.ceil(math.sqrt(len(matrices))), 4)
    rows = math.ceil(len(matrices) / columns)
    figure = Figure(figsize=(3.3 * columns + 0.8, 3.3 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    drawn = None
    for axes, (method, matrix) in zip(panels, matrices.items(), strict=False):
        values = 100 * matrix.to_numpy()
        drawn = axes.imshow(values, cmap="cividis", vmin=0, vmax=100)
        long = max(len(str(name)) for name in matrix.columns) > 3
        axes.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=90 if long else 0, size=7)
        axes.set_yticks(range(len(matrix)), matrix.index, size=7)
        axes.set_title(f"{method}: {values[-1].mean():.1f}", size="medium")
        axes.set(xlabel="accuracy on", ylabel="after task")
        for (row, column), value in np.ndenumerate(values):
            color = "black" if value > 55 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=6, color=color)
    assert drawn is not None
    figure.colorbar(drawn, ax=panels, label="test accuracy, %", shrink=0.7)
    return figure


def summary(scores: dict[str, list[dict[str, float]]], scenario: str) -> pd.DataFrame:
    """A line a method: mean ± deviation over seeds in percent, and the published average accuracy."""
    lines = {}
    for method, runs in scores.items():
        line = {}
        for key, name in MEASURES.items():
            values = 100 * np.array([run[key] for run in runs])
            line[name] = f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")
        if scenario in PUBLISHED:
            known = dict(zip(METHODS, PUBLISHED[scenario], strict=False))
            line["published average"] = f"{known[method]:.2f}" if method in known else "-"
        lines[method] = line
    return pd.DataFrame(lines).T.rename_axis("method")


def main(args: argparse.Namespace) -> None:
    methods = args.methods or METHODS
    if unknown := set(methods) - set(METHODS):
        sys.exit(f"no such methods: {', '.join(sorted(unknown))}. Choose among {', '.join(METHODS)}")
    if args.scenario == "mixture" and not args.data_dir:
        sys.exit("the mixture needs --data-dir or $DATAPARAMS_DATA; --scenario digits needs no data on disk")
    try:
        names = _tasks(args)
    except FileNotFoundError as error:
        sys.exit(f"{error}\nor, without data on disk, --scenario digits")
    kind = f"{args.scenario}{'_single_head' if args.single_head else ''}_{args.init}"
    size = f"_{args.train_size}" if args.train_size else ""
    out = Path(args.out) / f"{kind}{size}_{args.epochs or EPOCHS[args.scenario]}epochs"
    out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    matrices: dict[str, list[pd.DataFrame]] = {method: [] for method in methods}
    jobs = [(method, seed) for seed in range(args.seeds) for method in methods]
    for method, seed in (bar := tqdm(jobs, unit="run")):
        bar.set_description(f"{method}, seed {seed}")
        file = out / f"{method.replace(' + ', '_')}_seed{seed}.csv"
        scored = file.with_suffix(".json")
        if not scored.exists():
            matrix, found = train(method, seed, args)
            with replacing(file) as beside:
                matrix.to_csv(beside)
            with replacing(scored) as beside:
                pd.Series(found).to_json(beside)
        matrices[method].append(pd.read_csv(file, index_col=0))
        scores[method].append(pd.read_json(scored, typ="series").to_dict())
    table = summary(scores, args.scenario)
    print(table.to_string())
    table.to_csv(out / "table.csv")
    means = {method: sum(found[1:], found[0]) / len(found) for method, found in matrices.items()}
    seeds = f"mean of {args.seeds} seeds" if args.seeds > 1 else "seed 0"
    title = f"{names} tasks, {kind.replace('_', ' ')} head: accuracy on each task after each, {seeds}"
    draw(means, f"{title}\nabove each: average accuracy at the end").savefig(out / "matrices.png", dpi=130)
    for method, matrix in means.items():
        print(f"\n{method}: accuracy (%) on each task after each, {seeds}\n{(100 * matrix).round(1).to_string()}")
    print(f"table, matrices and picture: {out}")


def _tasks(args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(args, 0).num_tasks


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = "does not have many workers|isinstance.treespec|smaller than the logging interval"
    warnings.filterwarnings("ignore", f".*({quiet}).*")
    main(parser.parse_args())
