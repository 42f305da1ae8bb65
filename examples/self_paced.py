"""Self-paced selection: easy samples first, compared with training on all of them at the same number of updates.

    python examples/self_paced.py --data-dir DATA                  # Fashion-MNIST, the first 7,000, 40% wrong labels
    python examples/self_paced.py --data-dir DATA --noise 0 --max-fraction none                   # right labels
    python examples/self_paced.py --data-dir DATA --noise 0 --max-fraction none --imbalance 50    # and a long tail
    python examples/self_paced.py --data digits --max-fraction 0.6 --seeds 1     # needs no data on disk, a minute

Five ways to train one small CNN: on all samples (uniform); on those below the threshold of self-paced learning (SPL),
of SPL with diversity in clusters of principal components (SPLD), or in clusters of an embedding that the Magnet loss
trains beside the network (SPL-ADVisE); and on the same share of every class, which is the default of
`SelfPacedSelection` (stratified). A round is an epoch, and every epoch has as many updates as a uniform one.

Prints test accuracy at the best epoch by validation (whose labels are as wrong as those of training) and at the last
one, the share of right labels in the first and the last selection (purity), and when the target accuracy was reached.
A folder in OUT, named by the settings, gets the table and the pictures: accuracy.png, entry_<arm>.png (who came in
when) and embedding.png. After Ctrl-C the same command goes on behind the last finished epoch; finished runs are kept.
"""

import argparse
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataparams import SelfPacedSelection, TrainingDynamics
from dataparams.report.files import replacing
from dataparams.tasks import CIFARData, Classifier, DigitsData, FashionMNISTData, NoisyDataModule, SmallCNN


def share(text: str) -> float | str | None:
    """What --max-fraction says, for SelfPacedSelection."""
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["fashion", "cifar10", "digits"], help="default: fashion; digits if not on disk")
parser.add_argument("--data-dir", default=os.environ.get("DATAPARAMS_DATA"), help="(default: $DATAPARAMS_DATA)")
parser.add_argument("--train-size", type=int, help="training images (default: 7,000; digits: 1,167)")
parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels (default: %(default)s)")
parser.add_argument("--imbalance", type=float, default=1.0, help="first class to last, of a long tail (default: 1)")
parser.add_argument("--max-fraction", type=share, default="auto", help="most selected: 0.6, none or auto (default)")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seeds", type=int, default=3, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--target", type=float, help="test accuracy (%%) to reach (default: 80; cifar10 40, digits 90)")
parser.add_argument("--out", default="outputs/self_paced", help="folder of runs, table and pictures")

SETS = {  # images, batch size, training images, target accuracy
    "fashion": (FashionMNISTData, 64, 7000, 80.0),
    "cifar10": (partial(CIFARData, augment=False), 64, 7000, 40.0),
    "digits": (DigitsData, 32, None, 90.0),
}
PAPER = {"rule": "threshold", "class_floor": 0.0}
SELECTIONS = {
    "SPL": {**PAPER, "diversity": 0.0},
    "SPLD": {**PAPER, "clusters": "features"},
    "SPL-ADVisE": {**PAPER, "clusters": "magnet"},
    "stratified": {},
}
STYLES = {  # told apart by colour-blind readers too
    "uniform": ("#000000", "--"), "SPL": ("#E69F00", "-."), "SPLD": ("#56B4E9", (0, (4, 1))),
    "SPL-ADVisE": ("#CC79A7", ":"), "stratified": ("#0072B2", "-"),
}  # fmt: skip
TEN = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]
WRONG = "#D50000"
DIMENSIONS = 16  # of the embedding


class Curve(L.Callback):
    """Accuracy (%) after every epoch on the noisy validation and the test set; it chooses nothing."""

    def __init__(self, data: NoisyDataModule, bar: tqdm) -> None:
        self.loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
        self.bar = bar
        self.rows = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.eval()
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "updates": trainer.global_step}
        for name, loader in self.loaders.items():
            right = [pl_module(images.to(pl_module.device)).argmax(1).cpu() == labels for images, labels in loader]
            row[name] = 100 * torch.cat(right).double().mean().item()
        pl_module.train()
        self.rows.append(row)
        self.bar.update()

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])
        self.bar.update(len(self.rows))


def load(args: argparse.Namespace, seed: int) -> NoisyDataModule:
    """The images with this seed's wrong labels."""
    make, batch_size, train_size, _ = SETS[args.data]
    data = make(
        data_dir=args.data_dir, seed=seed, batch_size=batch_size, train_size=args.train_size or train_size,
        noise="symmetric" if args.noise else "none", noise_rate=args.noise, imbalance=args.imbalance,
    )  # fmt: skip
    data.setup()
    return data


def train(arm: str, seed: int, args: argparse.Namespace, folder: Path, bar: tqdm) -> None:
    """One run, or what is left of it; curve.csv comes last and says that it is finished."""
    data = load(args, seed)
    channels, size = data.train_set.images.shape[1:3]
    L.seed_everything(seed, verbose=False)  # first weights are the same in every arm
    model = Classifier(SmallCNN(channels, data.num_classes, 16, size), partial(torch.optim.SGD, lr=0.03, momentum=0.9))
    embedding = SmallCNN(channels, DIMENSIONS, 16, size) if arm == "SPL-ADVisE" else None
    method = TrainingDynamics()
    if arm != "uniform":
        fixed = {"embedding": embedding, "max_fraction": args.max_fraction, "seed": seed}
        method = SelfPacedSelection(**SELECTIONS[arm], **fixed)
    curve = Curve(data, bar)
    trainer = L.Trainer(
        max_epochs=args.epochs, devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[method, curve, ModelCheckpoint(folder, "last", enable_version_counter=False)],
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(model, data.train_dataloader(), ckpt_path=last if last.exists() else None)

    samples = method.to_frame().assign(is_corrupt=data.is_corrupt)
    if arm == "uniform":
        samples = samples.assign(first_round=0.0, selected=True)
    # Who would come in after the last epoch never did.
    samples["first_round"] = samples["first_round"].where(samples["first_round"] < args.epochs)
    samples.to_csv(folder / "samples.csv", index=False)
    if embedding is not None:
        embedding.cpu().eval()
        with torch.no_grad():
            points = torch.cat([embedding(images) for images, _ in DataLoader(data.train_set, 500)])
        np.save(folder / "embedding.npy", points.numpy())
    with replacing(folder / "curve.csv") as beside:
        pd.DataFrame(curve.rows).to_csv(beside, index=False)
    last.unlink()


def summary(runs: dict[str, list[Path]], target: float) -> pd.DataFrame:
    """The table: mean ± deviation over the seeds of each arm, accuracy and shares of right labels (purity) in %."""
    table = {}
    for arm, folders in runs.items():
        found = []
        for folder in folders:
            curve, samples = pd.read_csv(folder / "curve.csv"), pd.read_csv(folder / "samples.csv")
            right, entered = ~samples["is_corrupt"], samples["first_round"]
            there = curve[curve["test"] >= target].head(1)
            found.append({
                "test, best": curve["test"][curve["validation"].argmax()],
                "test, last": curve["test"].iloc[-1],
                "purity, first": 100 * right[entered == entered.min()].mean(),
                "purity, last": 100 * right[samples["selected"]].mean(),
                f"epochs to {target:g}": there["epoch"].mean(),  # NaN: not reached
                f"updates to {target:g}": there["updates"].mean(),
            })  # fmt: skip
        table[arm] = {name: spread(column) for name, column in pd.DataFrame(found).items()}
    return pd.DataFrame.from_dict(table, orient="index")


def spread(values: pd.Series) -> str:
    """Mean ± deviation of those that are there, and how many where some are not."""
    known = values.dropna()
    if known.empty:
        return "never"
    text = f"{known.mean():.1f}" + (f" ± {known.std():.1f}" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def draw_accuracy(runs: dict[str, list[Path]], target: float, title: str) -> Figure:
    """Test accuracy over updates: the mean over seeds and, shaded, from the lowest to the highest."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for arm, folders in runs.items():
        curves = pd.concat([pd.read_csv(folder / "curve.csv") for folder in folders])
        test = curves.groupby("updates")["test"].agg(["mean", "min", "max"])
        color, dashes = STYLES[arm]
        axes.plot(test.index, test["mean"], color=color, linestyle=dashes, linewidth=2, label=arm)
        axes.fill_between(test.index, test["min"], test["max"], color=color, alpha=0.12, linewidth=0)
    axes.axvline(test.index[0], color="#999999", linewidth=1, label="selection begins")
    axes.axhline(target, color="#999999", linewidth=1, linestyle=":", label=f"target, {target:g}%")
    axes.set(xlabel="updates", ylabel="test accuracy (%)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def by_entry(samples: pd.DataFrame, most: int = 7) -> dict[str, np.ndarray]:
    """Positions of the samples by round of entry, later rounds in at most so many groups, and never last."""
    entered = samples["first_round"].to_numpy()
    rounds = np.unique(entered[~np.isnan(entered)]).astype(int)
    groups = {}
    for part in [rounds[:1], *np.array_split(rounds[1:], most)]:
        if len(part):
            name = f"round {part[0]}" if len(part) == 1 else f"rounds {part[0]} to {part[-1]}"
            groups[name] = np.flatnonzero(np.isin(entered, part))
    return groups | {"never": np.flatnonzero(np.isnan(entered))}


def draw_entry(data: NoisyDataModule, samples: pd.DataFrame, title: str, columns: int = 12) -> Figure:
    """Some samples of each round of entry, by lot, with their given labels; a red frame: the label is wrong."""
    groups, is_wrong = by_entry(samples), samples["is_corrupt"].to_numpy()
    height = 1.2 * len(groups) + 0.9
    figure = Figure(figsize=(columns + 1.8, height))
    panels = figure.subplots(len(groups), columns, squeeze=False)
    figure.subplots_adjust(0.14, 0.1 / height, 0.99, 1 - 0.9 / height, 0.12, 0.3)
    figure.suptitle(title, y=1 - 0.1 / height, va="top")
    images, draw = data.train_set.images.permute(0, 2, 3, 1).numpy(), np.random.default_rng(0)
    for row, (name, members) in zip(panels, groups.items(), strict=True):
        wrong = f"\n{is_wrong[members].mean():.0%} wrong" if len(members) else ""
        text = f"{name}\nn = {len(members):,}{wrong}"
        row[0].text(-0.2, 0.5, text, transform=row[0].transAxes, ha="right", va="center")
        chosen = draw.permutation(members)[:columns]
        for axes, position in zip(row, chosen, strict=False):
            axes.imshow(images[position], cmap="gray_r")
            axes.set_title(data.class_names[int(data.given_labels[position])], size=8, pad=3)
            if is_wrong[position]:
                axes.spines[:].set(color=WRONG, linewidth=3.5)
                axes.title.set(color=WRONG)
        for axes in row:
            axes.set(xticks=[], yticks=[])
        for axes in row[len(chosen) :]:
            axes.set_axis_off()
    return figure


def draw_embedding(data: NoisyDataModule, samples: pd.DataFrame, points: np.ndarray, title: str) -> Figure:
    """The embedding in two dimensions by t-SNE, at most 2,000 samples by lot; by right class, and by loss."""
    chosen = np.random.default_rng(0).permutation(len(points))[:2000]
    x, y = TSNE(init="pca", random_state=0).fit_transform(points[chosen]).T
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    figure.suptitle(title)
    by_class, by_loss = figure.subplots(1, 2)
    assert data.true_labels is not None
    classes, loss = data.true_labels.numpy()[chosen], samples["selection_loss"].to_numpy()[chosen]
    by_class.scatter(x, y, c=np.array(TEN)[classes], s=7)
    for number, name in enumerate(data.class_names):
        members = classes == number
        if np.any(members):
            middle = np.median(x[members]), np.median(y[members])
            box = {"facecolor": "white", "edgecolor": TEN[number], "alpha": 0.8, "pad": 2}
            by_class.text(*middle, name, ha="center", va="center", size=9, bbox=box)
    drawn = by_loss.scatter(x, y, c=loss, s=7, cmap="cividis", vmin=0, vmax=np.nanquantile(loss, 0.95))
    figure.colorbar(drawn, label="loss at the last look (the highest twentieth in one colour)")
    by_class.set(title="right class", xticks=[], yticks=[])
    by_loss.set(title="loss of the network on the given label", xticks=[], yticks=[])
    return figure


def main(args: argparse.Namespace) -> None:
    if args.data is None:
        found = args.data_dir is not None and (Path(args.data_dir).expanduser() / "FashionMNIST").exists()
        args.data = "fashion" if found else "digits"
        if not found:
            print("no FashionMNIST in --data-dir or $DATAPARAMS_DATA: scikit-learn's digits instead")
    try:
        data = load(args, 0)
    except FileNotFoundError as error:
        sys.exit(f"{error}\nor, without data on disk, --data digits")
    size, target = len(data.train_set), args.target or SETS[args.data][3]
    noise, most = f"noise{args.noise:g}_imbalance{args.imbalance:g}", args.max_fraction or "all"
    out = Path(args.out) / f"{args.data}_{size}_{noise}_{args.epochs}epochs_max_{most}"
    runs = {arm: [out / arm / f"seed{seed}" for seed in range(args.seeds)] for arm in STYLES}
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in runs]
    waiting = [(arm, seed) for arm, seed in jobs if not (runs[arm][seed] / "curve.csv").exists()]
    print(f"{len(waiting)} of {len(jobs)} runs to train, in {out}")
    try:
        with tqdm(total=len(waiting) * args.epochs, unit="epoch") as bar:
            for arm, seed in waiting:
                bar.set_description(f"{arm}, seed {seed}")
                train(arm, seed, args, runs[arm][seed], bar)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes an exit of Ctrl-C
        sys.exit("interrupted: the same command goes on behind the last finished epoch")

    table = summary(runs, target)
    print(table.to_string())
    table.to_csv(out / "table.csv")
    most = f"{most:.0%}" if isinstance(most, float) else most
    what = f"{data.data_name}, {size:,} images, {args.noise:.0%} wrong labels, selected at most: {most}"
    seeds = f"mean and range of {args.seeds} seeds" if args.seeds > 1 else "seed 0"
    draw_accuracy(runs, target, f"{what}\n{seeds}").savefig(out / "accuracy.png", dpi=130)
    for arm in SELECTIONS:
        samples = pd.read_csv(runs[arm][0] / "samples.csv")
        title = f"{arm}: some of those who came in, round by round, with their given labels (red: wrong)\n{what}"
        draw_entry(data, samples, title).savefig(out / f"entry_{arm}.png", dpi=100)
    magnet = runs["SPL-ADVisE"][0]
    samples, points = pd.read_csv(magnet / "samples.csv"), np.load(magnet / "embedding.npy")
    title = f"Magnet embedding of SPL-ADVisE, by t-SNE\n{what}"
    draw_embedding(data, samples, points, title).savefig(out / "embedding.png", dpi=130)
    print(f"table and pictures: {out}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = "does not have many workers|no `val_dataloader`|isinstance.treespec|exists and is not empty"
    warnings.filterwarnings("ignore", f".*({quiet}).*")
    main(parser.parse_args())
