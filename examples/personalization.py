"""Personalisation: train on everybody's images, for one slice of them.

    python examples/personalization.py                        # digits of scikit-learn; the slice: 1, 4 and 8
    python examples/personalization.py --classes 3,5 --noise-rate 0
    python examples/personalization.py --tilt 60              # the slice: who writes tilted by 60 degrees
    python examples/personalization.py --data fashion --data-dir DATA --classes 2,4,6 --epochs 10

Everybody's labels are partly wrong. Some images of the slice, with labels that were checked, are the meta set:
`InstanceLearningRates` trains on all other images and learns which of them, or which classes, serve it. Beside it:
plain training; plain training with the meta set among its images; and fine-tuning, which is plain training and then
some epochs on the meta set alone, at a tenth of the rate. So fine-tuning has more updates than the others, and as
every method is judged at its best epoch by the slice's validation images (checked, too), it is stopped early, or not
begun, where it does harm.

Prints test accuracy on the slice and on all images at that epoch and at the last one, mean and deviation over seeds;
OUT gets the table, the curves and their picture. The settings were chosen on validation images of other seeds.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
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
parser.add_argument("--noise-rate", type=float, default=0.4, help="share of wrong labels (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--tune-epochs", type=int, default=5, help="fine-tuning, on top (default: %(default)s)")
parser.add_argument("--seeds", type=int, default=5, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--out", default="outputs/personalization", help="folder of table and picture")

Part = tuple[ImageDataset, torch.Tensor]  # images, and which of them are in the slice, bool (N,)


def slices(data: DigitsData | FashionMNISTData, args: argparse.Namespace) -> dict[str, Part]:
    """Images for training, validation and test, by everybody."""
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
    """Accuracy (%) on the slice and on all images, for validation and test, after every epoch."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts = parts
        self.rows = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.eval()
        row = {"epoch": trainer.current_epoch + 1}
        for name, (part, members) in self.parts.items():
            logits = pl_module(part.normalise(part.images).to(pl_module.device)).cpu()
            right = 100 * (logits.argmax(1) == part.labels).double()
            row |= {f"{name} slice": right[members].mean().item(), f"{name} overall": right.mean().item()}
        self.rows.append(row)
        pl_module.train()


def run(seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """The curves of all methods with this seed, which decides on data, first weights and the order of images."""
    make = {"digits": DigitsData, "fashion": FashionMNISTData}[args.data]
    data = make(data_dir=args.data_dir, seed=seed)
    parts = slices(data, args)
    everything, members = parts.pop("train")
    # The slice's labels are wrong like everybody's, but for those that were checked.
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
        model = Classifier(SmallCNN(1, data.num_classes, 8, size), partial(torch.optim.SGD, lr=0.1))
        method = [] if make_method is None else [make_method(meta=loader(meta_set))]
        curve = Curves(parts)
        trainer = L.Trainer(
            max_epochs=args.epochs + args.tune_epochs * (name == "fine-tuning"), callbacks=[*method, curve],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader(images))
        curves.append(pd.DataFrame(curve.rows).assign(method=name, seed=seed))
        end = curve.rows[-1]
        line = (
            f"seed {seed}  {name:17s}  at the end: slice {end['test slice']:5.1f}, overall {end['test overall']:5.1f}"
        )
        if "rates" in name:
            factor = method[0].to_frame()["learning_rate_factor"].to_numpy()
            inside = members[others].numpy()
            line += f"; mean rate: slice {np.nanmean(factor[inside]):.2f}, others {np.nanmean(factor[~inside]):.2f}"
        print(f"{line}  ({time.monotonic() - started:.0f} s)", flush=True)
    return pd.concat(curves)


def summary(curves: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy, mean ± deviation over seeds, at the best epoch by the slice's validation and at the last."""
    table = {}
    for method, of_method in curves.groupby("method", sort=False):
        runs = [run for _, run in of_method.groupby("seed")]
        table[method] = {}
        for what in ("slice", "overall"):
            for when, highest in (("best", "validation slice"), ("last", "epoch")):
                scores = pd.Series([run[f"test {what}"].iloc[run[highest].argmax()] for run in runs])
                table[method][f"{what}, {when}"] = f"{scores.mean():.1f} ± {scores.std():.1f}"
    return pd.DataFrame.from_dict(table, orient="index")


def picture(curves: pd.DataFrame, file: Path) -> None:
    """Both accuracies over epochs: the mean over seeds and, shaded, from the lowest to the highest."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, what in zip(panels, ("slice", "overall"), strict=True):
        for method, of_method in curves.groupby("method", sort=False):
            runs = of_method.pivot(index="epoch", columns="seed", values=f"test {what}")
            # Fine-tuning is plain training at first: dashes, so that both can be seen.
            style = "--" if method == "fine-tuning" else "-"
            (line,) = axes.plot(runs.index, runs.mean(axis=1), style, label=method)
            axes.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=line.get_color(), alpha=0.1)
        axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=what, ylim=(0, 100))
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
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|isinstance.treespec).*")
    main(parser.parse_args())
