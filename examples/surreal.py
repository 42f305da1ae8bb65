"""People in pictures: pose, depth and body parts by one network, where some clips have wrong labels for one task.

    python examples/surreal.py                              # a miniature, written once in a minute; then 10 minutes
    python examples/surreal.py --data-dir PATH              # SURREAL as it is distributed: PATH/cmu/train/run0/...
    python examples/surreal.py --corrupt parts=0.3          # other labels; several: --corrupt depth=0.3 pose3d=0.2
    python examples/surreal.py --weightings equal task_weights --seeds 3
    python examples/surreal.py --depth metric               # depth in metres instead of 19 bins

One frame of each clip: in training a random one, in testing the middle one. Tasks are pose2d, pose3d (16 joints), depth
(19 bins and background) and parts (14 and background). A corrupt label is that of another clip, for one task;
validation and test labels are right. Every weighting begins with the same weights and sees the same frames in the same
order.

Prints a table with the tasks' errors on test data for each way to weigh them, at the epoch with the best validation
score and at the last one, and how well each task's column finds the corrupt labels (AUROC; that of another task should
be near 0.5). The column is the learned log sigma of `task_weights`, the running mean of the plain loss of the others.

A folder in OUT, named by the settings, gets table.csv, detection.csv and clips.png: a few training clips, with label,
prediction and learned weights, those first whose label looks most wrong. The same command keeps finished runs.
"""

import argparse
import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from dataparams import InstanceTaskWeights
from dataparams.callbacks import TaskWeighting
from dataparams.report.files import replacing, write_json
from dataparams.report.rows import auroc
from dataparams.tasks import SurrealData, SurrealModel, SurrealNet, surreal_tasks

TASKS = {
    "pose2d": "joints in the picture (px)",
    "pose3d": "joints (mm)",
    "depth": "depth (mm)",
    "parts": "parts (IoU, %)",
}
SCORES = {"pose2d": "pose2d_error", "pose3d": "pose3d_error", "depth": "depth_error", "parts": "parts_accuracy"}
BASELINES = {
    "equal": "equal", "uncertainty": "uncertainty", "dwa": "dwa", "gradnorm": "gradnorm", "random_weighting": "random",
}  # fmt: skip
WEIGHTINGS = (*BASELINES, "task_weights")
BONES = [
    (0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (10, 11), (11, 12), (12, 8), (8, 13),
    (13, 14), (14, 15),
]  # fmt: skip
LABEL, PREDICTION, WRONG = "#E69F00", "#0072B2", "#D50000"  # told apart by colour-blind readers too


def share(text: str) -> tuple[str, float]:
    """What --corrupt says: TASK=SHARE."""
    task, _, value = text.partition("=")
    if task not in TASKS or not 0 < float(value) <= 1:
        raise ValueError
    return task, float(value)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data-dir", help="folder that holds SURREAL's cmu (default: the miniature)")
parser.add_argument(
    "--corrupt", type=share, nargs="+", default=[("depth", 0.3)], metavar="TASK=SHARE",
    help=f"share of training clips with another clip's label, of {', '.join(TASKS)} (default: depth=0.3)",
)  # fmt: skip
parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=list(WEIGHTINGS), help="(default: all)")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seeds", type=int, default=1, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--depth", choices=["bins", "metric"], default="bins")
parser.add_argument("--image-size", type=int, default=64, help="pixels; published: 256 (default: %(default)s)")
parser.add_argument(
    "--label-size", type=int, default=32, help="of depth and parts; published: 64 (default: %(default)s)"
)
parser.add_argument("--train-size", type=int, help="training clips, evenly spaced (default: all)")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=0.003, help="of RMSprop (default: %(default)s)")
parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
parser.add_argument("--out", default="outputs/surreal", help="folder of runs, tables and picture")


def load(args: argparse.Namespace, seed: int) -> SurrealData:
    """The clips with this seed's corrupt labels."""
    data = SurrealData(
        args.data_dir, batch_size=args.batch_size, image_size=args.image_size, label_size=args.label_size,
        depth=args.depth, corrupt=dict(args.corrupt), train_size=args.train_size, seed=seed, num_workers=args.workers,
    )  # fmt: skip
    data.setup()
    return data


def build(args: argparse.Namespace, seed: int) -> SurrealModel:
    """The model with this seed's first weights."""
    L.seed_everything(seed, verbose=False)
    net = SurrealNet(args.image_size, args.label_size, depth=args.depth)
    return SurrealModel(net, surreal_tasks(args.depth, args.image_size), partial(torch.optim.RMSprop, lr=args.lr))


def train(weighting: str, seed: int, data: SurrealData, args: argparse.Namespace, folder: Path) -> None:
    """One run; results.json comes last and says that it is finished."""
    model = build(args, seed)
    losses = {task: f"{task}_loss" for task in TASKS}
    if weighting == "task_weights":
        # Of the first batch, which sets the scale, joints are far off: sigma needs room below. Chosen on seed 11.
        method = InstanceTaskWeights(losses, regression_lr=0.1, regression_bounds=(-2.0, 3.0))
    else:
        method = TaskWeighting(BASELINES[weighting], losses, seed=seed)  # pyright: ignore[reportArgumentType]
    best = ModelCheckpoint(folder, "best", monitor=model.monitor, mode="max", enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=args.epochs, devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[method, best],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    results = {f"{key}_last": value for key, value in model.scores(data).items()}
    frame = method.to_frame().assign(**{f"is_corrupt_{task}": wrong for task, wrong in data.is_corrupt.items()})
    frame["id"] = data.ids
    frame.to_parquet(folder / "rows.parquet")
    torch.save(model.state_dict(), folder / "last.pt")
    model.load_state_dict(torch.load(best.best_model_path, map_location=model.device, weights_only=True)["state_dict"])
    results |= {f"{key}_best": value for key, value in model.scores(data).items()}
    Path(best.best_model_path).unlink()
    write_json(results, folder / "results.json")


def spread(values: list[float]) -> str:
    """Mean, and deviation over seeds where there are several."""
    mean = f"{np.mean(values):.1f}"
    return mean + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def summary(runs: dict[str, list[Path]]) -> pd.DataFrame:
    """Errors on test data, best / last, a line a weighting."""
    table: dict[str, dict[str, str]] = {}
    for weighting, folders in runs.items():
        found = [json.loads((folder / "results.json").read_text()) for folder in folders]
        table[weighting] = {}
        for task, title in TASKS.items():
            factor = 100 if task == "parts" else 1
            cells = [spread([factor * run[f"{SCORES[task]}_{when}"] for run in found]) for when in ("best", "last")]
            table[weighting][title] = " / ".join(cells)
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("weighting")


def detection(runs: dict[str, list[Path]], corrupt: list[str]) -> pd.DataFrame:
    """AUROC of each task's column for the corrupt labels of a task, a line a weighting."""
    table: dict[str, dict[str, str]] = {}
    for weighting, folders in runs.items():
        frames = [pd.read_parquet(folder / "rows.parquet") for folder in folders]
        column = "log_sigma" if weighting == "task_weights" else "mean_loss"
        table[f"{weighting} ({column.replace('_', ' ')})"] = {
            f"corrupt {wrong}: by {task}": _auroc(frames, f"{column}_{task}", f"is_corrupt_{wrong}")
            for wrong in corrupt
            for task in TASKS
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("weighting")


def _auroc(frames: list[pd.DataFrame], column: str, truth: str) -> str:
    values = [auroc(frame[column], frame[truth]) for frame in frames]
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def draw(data: SurrealData, model: SurrealModel, rows: pd.DataFrame, task: str, title: str, worst: int = 6) -> Figure:
    """Training clips whose label of `task` looks most wrong, worst first, and two whose looks best."""
    ranked = rows.sort_values(f"log_sigma_{task}", ascending=False)["index"].to_numpy()
    shown = [*ranked[:worst], *ranked[-2:]]
    batch = torch.utils.data.default_collate([data.train_set[int(index)] for index in shown])
    model.cpu().eval()
    images, labels = model.unpack(batch)
    with torch.no_grad():
        predictions = model(images)
    heads = ["joints", "3D label", "3D prediction", "depth label", "depth prediction", "parts label",
             "parts prediction", "learned weights"]  # fmt: skip
    figure = Figure(figsize=(1.55 * len(heads) + 1.6, 1.62 * len(shown) + 1.05))
    panels = figure.subplots(len(shown), len(heads), squeeze=False)
    figure.subplots_adjust(0.12, 0.02, 0.995, 1 - 0.95 / (1.62 * len(shown) + 1.05), 0.06, 0.06)
    figure.suptitle(f"{title}\njoints: label orange, prediction blue; a red frame: the label is wrong")
    for place, (index, line) in enumerate(zip(shown, panels, strict=True)):
        row = rows[rows["index"] == index].iloc[0]
        wrong = [name for name in TASKS if row[f"is_corrupt_{name}"]]
        rank = place + 1 if place < worst else len(rows) - len(shown) + place + 1
        note = f"rank {rank:,} of {len(rows):,}\n{row['id'].split('/')[-1]}\nlog sigma {row[f'log_sigma_{task}']:.2f}"
        line[0].text(-0.08, 0.5, note, transform=line[0].transAxes, ha="right", va="center", size=8)
        if wrong:
            text = f"wrong: {', '.join(wrong)}"
            style = {"ha": "right", "va": "center", "size": 8, "color": WRONG, "weight": "bold"}
            line[0].text(-0.08, 0.12, text, transform=line[0].transAxes, **style)
        _draw_clip(line, place, images, labels, predictions, data.train_set.depth)
        _draw_weights(line[-1], row)
        marked = {"pose2d": [0], "pose3d": [1], "depth": [3], "parts": [5]}
        for panel in (line[number] for name in wrong for number in marked[name]):
            panel.spines[:].set(color=WRONG, linewidth=3, visible=True)
        for axes, head in zip(line, heads, strict=True):
            axes.set(xticks=[], yticks=[])
            if place == 0:
                axes.set_title(head, size=9)
    return figure


def _draw_clip(line: Any, place: int, images: Tensor, labels: dict, predictions: dict, depth: str) -> None:
    line[0].imshow(images[place].permute(1, 2, 0).numpy(), extent=(0, 10, 10, 0))
    for joints, color in [(labels["pose2d"], LABEL), (predictions["pose2d"], PREDICTION)]:
        for one, other in BONES:
            line[0].plot(*joints[place, [one, other]].T.numpy(), color=color, linewidth=1.2)
    line[0].set(xlim=(0, 10), ylim=(10, 0))
    for axes, joints, color in [(line[1], labels["pose3d"], LABEL), (line[2], predictions["pose3d"], PREDICTION)]:
        x, y, z = joints[place].T.numpy()
        turned = 0.8 * x + 0.6 * z  # seen from a little to the side
        for one, other in BONES:
            axes.plot(turned[[one, other]], y[[one, other]], color=color, linewidth=1.5)
        axes.set(xlim=(-11, 11), ylim=(11, -11), aspect="equal")
    body = labels["parts"][place] > 0
    if depth == "bins":
        bins = {"label": labels["depth"][place].float(), "prediction": predictions["depth"][place].argmax(0).float()}
        maps, limits = {name: shown.masked_fill(shown <= 0, float("nan")) for name, shown in bins.items()}, (1, 19)
    else:  # of metres nobody predicts the background
        predicted = predictions["depth"][place].where(body, float("nan"))
        maps, limits = {"label": labels["depth"][place], "prediction": predicted}, (-4, 4)
    for axes, shown in zip(line[3:5], maps.values(), strict=True):
        axes.imshow(shown.numpy(), cmap="viridis", vmin=limits[0], vmax=limits[1])
        axes.set_facecolor("#eeeeee")
    for axes, values in [(line[5], labels["parts"]), (line[6], predictions["parts"].argmax(1))]:
        shown = values[place].float()
        axes.imshow(shown.masked_fill(shown <= 0, float("nan")).numpy(), cmap="tab20", vmin=1, vmax=20)
        axes.set_facecolor("#eeeeee")


def _draw_weights(axes: Any, row: pd.Series) -> None:
    """1 / sigma of each task: a factor on its loss, of classes on their logits."""
    weights = [float(np.exp(-row[f"log_sigma_{task}"])) for task in TASKS]
    axes.barh(list(TASKS), weights, color="#56B4E9")
    for number, (task, weight) in enumerate(zip(TASKS, weights, strict=True)):
        axes.text(0.07, number, f"{task} {weight:.2f}", va="center", size=7)
    axes.set(xscale="log", xlim=(0.06, 16), ylim=(3.6, -0.6), box_aspect=1)
    axes.minorticks_off()
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")


def main(args: argparse.Namespace) -> None:
    corrupt = [task for task, _ in args.corrupt]
    try:
        data = load(args, 0)
    except (FileNotFoundError, ImportError) as error:
        sys.exit(str(error))
    name = "surreal" if args.data_dir else "miniature"
    noise = "_".join(f"{task}{value:g}" for task, value in args.corrupt)
    size = f"{len(data.train_set)}_{args.image_size}_{args.label_size}_{args.depth}"
    out = Path(args.out) / f"{name}_{size}_{noise}_{args.epochs}epochs_rate{args.lr:g}_batch{args.batch_size}"
    runs = {weighting: [out / weighting / f"seed{seed}" for seed in range(args.seeds)] for weighting in args.weightings}
    jobs = [(seed, weighting) for seed in range(args.seeds) for weighting in args.weightings]
    of_seed = 0
    for seed, weighting in (bar := tqdm(jobs, unit="run")):
        bar.set_description(f"{weighting}, seed {seed}")
        folder = runs[weighting][seed]
        if not (folder / "results.json").exists():
            if seed != of_seed:
                data, of_seed = load(args, seed), seed
            folder.mkdir(parents=True, exist_ok=True)
            train(weighting, seed, data, args, folder)
    table, found = summary(runs), detection(runs, corrupt)
    seeds = f"mean ± deviation of {args.seeds} seeds" if args.seeds > 1 else "seed 0"
    print(f"\ntest, at the best validation epoch / at the last, {seeds}\n{table.to_string()}")
    print(f"\nAUROC of finding corrupt labels at the last epoch, {seeds}\n{found.T.to_string()}")
    for content, file in [(table, "table.csv"), (found, "detection.csv")]:
        with replacing(out / file) as beside:
            content.to_csv(beside)
    if "task_weights" in runs:
        folder = runs["task_weights"][0]
        data = data if of_seed == 0 else load(args, 0)
        model = build(args, 0)
        model.load_state_dict(torch.load(folder / "last.pt", weights_only=True, map_location="cpu"))
        title = (
            f"{name}: training clips whose {corrupt[0]} label looks most wrong, worst first; below, two that look best"
        )
        draw(data, model, pd.read_parquet(folder / "rows.parquet"), corrupt[0], title).savefig(
            out / "clips.png", dpi=110
        )
    print(f"\ntables and picture: {out}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = "does not have many workers|isinstance.treespec|smaller than the logging interval|exists and is not empty"
    warnings.filterwarnings("ignore", f".*({quiet}).*")
    main(parser.parse_args())
