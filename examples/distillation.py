"""Learned soft labels as teachers: one student network, trained on the same images from different labels.

    python examples/distillation.py                       # digits of scikit-learn with their right labels
    python examples/distillation.py --noise-rate 0.4      # 40% of the labels wrong
    python examples/distillation.py --data fashion --data-dir DATA --train-size 4000 --epochs 15

Teachers are a network trained on the given labels, one on smoothed labels, and two that learn the labels while they
train: a soft label for each class, or for each image, judged by a small checked meta set (`LearnableSoftLabels`). The
student, a quarter as wide, never sees a teacher's weights: it gets the training images and for each of them a
distribution over classes, which is learned, or predicted by a teacher at its best epoch. Students differ in these
labels and in nothing else: first weights, order of images and number of epochs are the same. One student gets the
meta set's images and labels as well, and so knows what the learned labels know.

Prints test accuracy at the best epoch by validation (whose labels are as wrong as those of training) and at the last
one, mean and deviation over seeds; OUT gets the table and a picture of the learned labels, K x K. The settings were
chosen on validation images of other seeds.
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
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dataparams import LabelSmoothing, LearnableSoftLabels
from dataparams.tasks import Classifier, DigitsData, FashionMNISTData, ImageDataset, NoisyDataModule, SmallCNN

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
parser.add_argument("--data-dir", help="folder of data sets (default: $DATAPARAMS_DATA); digits need none")
parser.add_argument("--train-size", type=int, default=600, help="training images (default: %(default)s)")
parser.add_argument("--noise-rate", type=float, default=0.0, help="share of labels made wrong (default: %(default)s)")
parser.add_argument("--meta-fraction", type=float, default=0.1, help="checked share of them (default: %(default)s)")
parser.add_argument("--smoothing", type=float, default=0.1, help="of smoothed labels (default: %(default)s)")
parser.add_argument("--image-lr", type=float, default=0.2, help="rate of the labels of images (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seeds", type=int, default=5, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--out", default="outputs/distillation", help="folder of the table and the picture")

TEACHER_WIDTH, STUDENT_WIDTH = 16, 4


class Scores(L.Callback):
    """Accuracy (%) after every epoch, and the weights of the epoch that is best on the validation images."""

    def __init__(self, data: NoisyDataModule) -> None:
        self.data = data
        self.validation, self.test, self.weights = [], [], {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for scores, images in ((self.validation, self.data.val_set), (self.test, self.data.test_set)):
            right = predictions(pl_module, images).argmax(1) == images.labels
            scores.append(100 * right.float().mean().item())
        if self.validation[-1] > max(self.validation[:-1], default=-1.0):
            self.best = self.test[-1]
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


@torch.no_grad()
def predictions(model: L.LightningModule, images: ImageDataset) -> torch.Tensor:
    """The model's distributions over classes, (N, K)."""
    model.eval()
    logits = model(images.normalise(images.images).to(model.device))
    model.train()
    return logits.softmax(1).cpu()


def train(
    data: NoisyDataModule, labelled: Dataset, width: int, epochs: int, *methods: L.Callback
) -> tuple[Classifier, Scores]:
    """A network of this width after its last epoch on `labelled`, and its scores."""
    L.seed_everything(data.seed, verbose=False)
    size = data.train_set.images.shape[-1]
    model = Classifier(SmallCNN(1, data.num_classes, width, size), partial(torch.optim.SGD, lr=0.05))
    scores = Scores(data)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[*methods, scores], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    order = torch.Generator().manual_seed(data.seed)
    trainer.fit(model, DataLoader(labelled, batch_size=32, shuffle=True, generator=order))
    return model, scores


def run(seed: int, args: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Scores of all teachers and students with this seed, and the learned labels by given class."""
    make = partial(
        {"digits": DigitsData, "fashion": FashionMNISTData}[args.data], data_dir=args.data_dir, seed=seed,
        train_size=args.train_size, noise="symmetric", noise_rate=args.noise_rate, meta_fraction=args.meta_fraction,
        meta_clean=True,
    )  # fmt: skip
    data, with_meta = make(), make(meta_use="add")
    data.setup()
    with_meta.setup()
    classes, given = data.num_classes, data.train_set
    rows = []

    def score(role: str, name: str, labelled: Dataset, width: int, *methods: L.Callback) -> torch.Tensor:
        started = time.monotonic()
        model, scores = train(data, labelled, width, args.epochs, *methods)
        rows.append({"network": role, "labels": name, "seed": seed, "best": scores.best, "last": scores.test[-1]})
        print(f"seed {seed}  {role}, {name}: {scores.test[-1]:.1f}  ({time.monotonic() - started:.0f} s)", flush=True)
        model.load_state_dict(scores.weights)
        return predictions(model, given)

    of_classes = LearnableSoftLabels(classes, level="class", meta=data.meta_dataloader())
    of_images = LearnableSoftLabels(classes, lr=args.image_lr, meta=data.meta_dataloader())
    predicted = score("teacher", "given", given, TEACHER_WIDTH)
    predicted_smooth = score("teacher", "smoothed", given, TEACHER_WIDTH, LabelSmoothing(args.smoothing))
    score("teacher", "learned, of classes", given, TEACHER_WIDTH, of_classes)
    score("teacher", "learned, of images", given, TEACHER_WIDTH, of_images)

    images = given.normalise(given.images)
    smoothed = F.one_hot(given.labels, classes) * (1 - args.smoothing) + args.smoothing / classes
    students = {
        "given": given,
        "given, and the meta set's": with_meta.train_set,
        "smoothed": TensorDataset(images, smoothed),
        "predicted by the teacher of given labels": TensorDataset(images, predicted),
        "predicted by the teacher of smoothed labels": TensorDataset(images, predicted_smooth),
        "learned, of classes": of_classes.corrected_dataset(given, soft=True),
        "learned, of images": of_images.corrected_dataset(given, soft=True),
    }
    for name, labelled in students.items():
        score("student", name, labelled, STUDENT_WIDTH)
    return pd.DataFrame(rows), {"of classes": of_classes.label_matrix(), "of images": of_images.label_matrix()}


def picture(matrices: dict[str, np.ndarray], file: Path) -> None:
    """Mean learned label by given class. Small probabilities are what matters, so colours end at 0.1."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(1, len(matrices))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=0.1)
        for given, row in enumerate(matrix):
            for learned, share in enumerate(row):
                if share >= 0.005:
                    style = {"color": "white" if share > 0.06 else "black", "ha": "center", "va": "center", "size": 8}
                    axes.text(learned, given, f"{share:.2f}".lstrip("0"), **style)
        axes.set(title=f"labels {name}", xlabel="learned label", ylabel="given label")
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
    figure.savefig(file, dpi=120, bbox_inches="tight")  # titles stand outside of square panels


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [run(seed, args) for seed in range(args.seeds)]
    scores = pd.concat([rows for rows, _ in runs])
    by_labels = scores.groupby(["network", "labels"], sort=False)[["best", "last"]]
    table = by_labels.agg(lambda column: f"{column.mean():.1f} ± {column.std():.1f}")
    print(table.to_string())
    scores.to_csv(out / "scores.csv", index=False)
    table.to_csv(out / "table.csv")
    picture({name: np.mean([labels[name] for _, labels in runs], axis=0) for name in runs[0][1]}, out / "labels.png")
    print(f"table, scores and picture: {out}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|isinstance.treespec).*")
    main(parser.parse_args())
