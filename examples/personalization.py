"""Personalisation: train on everybody's images, for one slice of them.

    python examples/personalization.py                              # digits of scikit-learn; the slice: 1, 4 and 8
    python examples/personalization.py --classes 3,5 --noise-rate 0.4
    python examples/personalization.py --tilt 60                    # the slice: who writes tilted by 60 degrees
    python examples/personalization.py --data fashion --data-dir DATA --classes 2,4,6

Some images of the slice, with labels that were checked, are the meta set. `InstanceLearningRates` trains on all other
images and learns which of them serve the meta set. Beside it: plain training; plain training with the meta set among
its images; and fine-tuning, which is plain training followed by epochs on the meta set alone, at a tenth of the rate.
So fine-tuning has more updates than the others; and as every method is judged at its best epoch by the slice's
validation images (checked, too), fine-tuning is stopped early, or not begun, where it does harm.

Prints test accuracy on the slice and on all images at that epoch and at the last one, mean and deviation over seeds;
OUT gets the table, the curves and their picture.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import rotate

from dataparams import InstanceLearningRates
from dataparams.callbacks import FineTuneMeta
from dataparams.tasks import Classifier, DigitsData, FashionMNISTData, ImageDataset, SmallCNN, corrupt_labels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
parser.add_argument("--data-dir", help="folder of data sets (default: $DATAPARAMS_DATA); digits need none")
parser.add_argument("--classes", default="1,4,8", help="the slice's classes, at least two (default: %(default)s)")
parser.add_argument("--tilt", type=int, choices=[-60, -30, 0, 30, 60], help="the slice is a writer, not some classes")
parser.add_argument("--meta-size", type=int, default=60, help="checked images of the slice (default: %(default)s)")
parser.add_argument("--noise-rate", type=float, default=0.0, help="share of wrong training labels (default: 0)")
parser.add_argument("--width", type=int, default=4, help="of the network (default: %(default)s, small)")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--tune-epochs", type=int, default=5, help="of fine-tuning, after the others (default: %(default)s)")
parser.add_argument("--seeds", type=int, default=5, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--out", default="outputs/personalization", help="folder of table and picture")


def slices(data: DigitsData | FashionMNISTData, args: argparse.Namespace) -> dict[str, tuple[ImageDataset, torch.Tensor]]:
    """By name, a set of images and which of them are in the slice, bool (N,)."""
    data.setup()
    parts = {"train": data.train_set, "validation": data.val_set, "test": data.test_set}
    if args.tilt is None:
        chosen = torch.tensor([int(number) for number in args.classes.split(",")])
        return {name: (part, torch.isin(part.labels, chosen)) for name, part in parts.items()}
    # Five writers, each with a tilt of their own, in place of data that says who wrote what.
    draw = torch.Generator().manual_seed(data.seed)
    result = {}
    for name, part in parts.items():
        tilts = 30 * torch.randint(-2, 3, (len(part),), generator=draw)
        images = torch.stack([rotate(image, int(tilt)) for image, tilt in zip(part.images, tilts, strict=True)])
        result[name] = (ImageDataset(images, part.labels, data.mean, data.std), tilts == args.tilt)
    return result


class Curves(L.Callback):
    """Accuracy on the slice's validation images, its test images and all test images, after every epoch."""

    def __init__(self, parts: dict[str, tuple[ImageDataset, torch.Tensor]]) -> None:
        self.parts = parts
        self.rows = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad():
            right = {
                name: (pl_module(part.normalise(part.images).to(pl_module.device)).argmax(1).cpu() == part.labels).float()
                for name, (part, _) in self.parts.items()
            }
        pl_module.train()
        validation, test = (right[name][self.parts[name][1]].mean() for name in ("validation", "test"))
        self.rows.append(
            {"epoch": trainer.current_epoch + 1, "validation": 100 * validation.item(), "slice": 100 * test.item(),
             "overall": 100 * right["test"].mean().item()}
        )  # fmt: skip


def run(seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """The curves of all methods with this seed, which decides on data, first weights and the order of images."""
    make = {"digits": DigitsData, "fashion": FashionMNISTData}[args.data]
    data = make(data_dir=args.data_dir, seed=seed)
    parts = slices(data, args)
    everything, members = parts.pop("train")
    rng = np.random.default_rng(seed)
    noisy = corrupt_labels(everything.labels, "symmetric", args.noise_rate, data.num_classes, rng)
    checked = torch.from_numpy(rng.choice(np.flatnonzero(members), args.meta_size, replace=False))
    others = torch.ones(len(everything), dtype=torch.bool)
    others[checked] = False

    def subset(rows: torch.Tensor, labels: torch.Tensor) -> ImageDataset:
        return ImageDataset(everything.images[rows], labels[rows], data.mean, data.std)

    def loader(images: ImageDataset) -> DataLoader:
        return DataLoader(images, 32, shuffle=True, generator=torch.Generator().manual_seed(seed))

    train_set, meta_set = subset(others, noisy), subset(checked, everything.labels)
    both = subset(torch.ones_like(others), torch.where(others, noisy, everything.labels))
    # A class is visited at every step, an image once an epoch: hence the lower rate.
    by_class = partial(InstanceLearningRates, data.num_classes, level="class", lr=0.01)
    methods = {
        "plain training": (train_set, None),
        "with the meta set": (both, None),
        "fine-tuning": (train_set, partial(FineTuneMeta, args.tune_epochs)),
        "rates of images": (train_set, InstanceLearningRates),
        "rates of classes": (train_set, by_class),
    }
    curves = []
    for name, (images, make_method) in methods.items():
        started = time.monotonic()
        L.seed_everything(seed, verbose=False)
        size = everything.images.shape[-1]
        model = Classifier(SmallCNN(1, data.num_classes, args.width, size), partial(torch.optim.SGD, lr=0.05))
        method = [] if make_method is None else [make_method(meta=loader(meta_set))]
        curve = Curves(parts)
        trainer = L.Trainer(
            max_epochs=args.epochs + args.tune_epochs * (name == "fine-tuning"), callbacks=[*method, curve],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader(images))
        curves.append(pd.DataFrame(curve.rows).assign(method=name, seed=seed))
        end = curve.rows[-1]
        line = f"seed {seed}  {name:18s} last epoch: slice {end['slice']:5.1f}  overall {end['overall']:5.1f}"
        if "rates" in name:
            factor = method[0].to_frame()["learning_rate_factor"].to_numpy()
            inside = members[others].numpy()
            line += f"  mean factor: slice {np.nanmean(factor[inside]):.2f}, others {np.nanmean(factor[~inside]):.2f}"
        print(f"{line}  ({time.monotonic() - started:.0f} s)", flush=True)
    return pd.concat(curves)


def summary(curves: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over seeds, at the best epoch by validation and at the last."""
    runs = curves.groupby(["method", "seed"], sort=False)
    chosen = {"best": runs["validation"].idxmax(), "last": runs["epoch"].idxmax()}
    columns = {}
    for what in ("slice", "overall"):
        for when, rows in chosen.items():
            scores = curves.loc[rows].groupby("method", sort=False)[what]
            columns[f"{what}, {when}"] = scores.mean().map("{:.1f}".format) + scores.std(ddof=0).map(" ± {:.1f}".format)
    return pd.DataFrame(columns)


def picture(curves: pd.DataFrame, file: Path) -> None:
    """Both accuracies over epochs: the mean over seeds and, shaded, one deviation."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, what in zip(panels, ("slice", "overall"), strict=True):
        for name, of_method in curves.groupby("method", sort=False):
            by_epoch = of_method.groupby("epoch")[what]
            mean, deviation = by_epoch.mean(), by_epoch.std(ddof=0)
            (line,) = axes.plot(mean.index, mean, label=name)
            axes.fill_between(mean.index, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15)
        axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=what)
    panels[0].legend()
    figure.savefig(file, dpi=120)


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    curves = pd.concat([run(seed, args) for seed in range(args.seeds)], ignore_index=True)
    table = summary(curves)
    print(table.to_string())
    curves.to_csv(out / "curves.csv", index=False)
    table.to_csv(out / "table.csv")
    picture(curves, out / "accuracy.png")
    print(f"table, curves and their picture: {out}")


if __name__ == "__main__":
    mpl.use("Agg")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|isinstance.treespec).*")
    main(parser.parse_args())
