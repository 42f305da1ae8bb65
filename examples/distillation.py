"""Learned soft labels as teachers: the same student, trained from six kinds of labels for the same images.

    python examples/distillation.py                       # digits of scikit-learn with their right labels
    python examples/distillation.py --noise-rate 0.4      # 40% of the labels wrong
    python examples/distillation.py --data fashion --data-dir DATA --epochs 15

Teachers: a network trained on the given labels, one on smoothed labels, and two that learn the labels while they
train, a soft label for each class or for each image, judged by a small checked meta set (`LearnableSoftLabels`). A
student, which is a quarter as wide, never sees a teacher's weights: it gets the training images and a distribution over
classes for each. Nothing but these labels differs between students: not the first weights, the order of samples or
the number of updates. What knows as much as the learned labels is the student that gets the meta set as well.

Prints clean test accuracy at the best epoch by validation (whose labels are as wrong as those of training) and at the
last one, mean and deviation over seeds; OUT gets the table and a picture of the learned K x K label matrices.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import matplotlib as mpl
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dataparams import LabelSmoothing, LearnableSoftLabels
from dataparams.tasks import Classifier, DigitsData, FashionMNISTData, ImageDataset, NoisyDataModule, SmallCNN

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
parser.add_argument("--data-dir", help="folder of data sets (default: $DATAPARAMS_DATA); digits need none")
parser.add_argument("--noise-rate", type=float, default=0.0, help="share of labels made wrong (default: %(default)s)")
parser.add_argument("--meta-fraction", type=float, default=0.1, help="share of checked images (default: %(default)s)")
parser.add_argument("--smoothing", type=float, default=0.1, help="of smoothed labels (default: %(default)s)")
parser.add_argument("--temperature", type=float, default=1.0, help="of teachers' predictions (default: %(default)s)")
parser.add_argument("--class-lr", type=float, default=1.0, help="rate of the labels of classes (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=25)
parser.add_argument("--seeds", type=int, default=5, help="number of runs, with seeds 0, 1, ... (default: %(default)s)")
parser.add_argument("--first-seed", type=int, default=0)
parser.add_argument("--out", default="outputs/distillation", help="folder of the table and the picture")


class Scores(L.Callback):
    """Accuracy after every epoch, and the weights of the epoch with the best one on the validation set."""

    def __init__(self, data: NoisyDataModule) -> None:
        self.sets = {"validation": data.val_set, "test": data.test_set}
        self.epochs = pd.DataFrame(columns=[*self.sets])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scores = {}
        for name, images in self.sets.items():
            right = predictions(pl_module, images).argmax(1) == images.labels
            scores[name] = 100 * right.float().mean().item()
        if not len(self.epochs) or scores["validation"] > self.epochs["validation"].max():
            self.best = scores["test"]
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.epochs.loc[len(self.epochs)] = scores


@torch.no_grad()
def predictions(model: L.LightningModule, images: ImageDataset, temperature: float = 1.0) -> torch.Tensor:
    """Softmax of the model's logits over the temperature, (N, K)."""
    model.eval()
    logits = model(images.normalise(images.images).to(model.device)).cpu()
    model.train()
    return (logits / temperature).softmax(1)


def train(data: NoisyDataModule, labelled: Dataset, width: int, epochs: int, *methods: L.Callback):
    """A network of this width, trained on `labelled`, with the accuracies of its epochs."""
    L.seed_everything(data.seed, verbose=False)
    size = data.train_set.images.shape[-1]
    model = Classifier(SmallCNN(1, data.num_classes, width, size), partial(torch.optim.SGD, lr=0.05))
    scores = Scores(data)
    order = torch.Generator().manual_seed(data.seed)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[*methods, scores], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(labelled, batch_size=32, shuffle=True, generator=order))
    return model, scores


def main(args: argparse.Namespace) -> pd.DataFrame:
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        options = {"noise": "symmetric", "noise_rate": args.noise_rate, "seed": seed, "data_dir": args.data_dir}
        make = partial({"digits": DigitsData, "fashion": FashionMNISTData}[args.data], **options)
        data = make(meta_fraction=args.meta_fraction, meta_clean=True)
        added = make(meta_fraction=args.meta_fraction, meta_clean=True, meta_use="add")
        data.setup()
        added.setup()
        classes, given = data.num_classes, data.train_set
        one_hot = F.one_hot(given.labels, classes).float()
        images = given.normalise(given.images)

        # The teachers. Those that learn labels do so by their rate for the meta set.
        def report(role: str, name: str, scores: Scores, started: float, seed: int = seed) -> None:
            row = {"role": role, "labels": name, "seed": seed, "best": scores.best, "last": scores.epochs["test"].iloc[-1]}
            rows.append(row)
            print(f"seed {seed}: {role} of {name}: {row['last']:.1f} ({time.monotonic() - started:.0f} s)", flush=True)

        by_class = LearnableSoftLabels(classes, level="class", lr=args.class_lr, meta=data.meta_dataloader())
        by_image = LearnableSoftLabels(classes, level="instance", meta=data.meta_dataloader())
        teachers = {"given labels": [], "smoothed labels": [LabelSmoothing(args.smoothing)],
                    "labels by class": [by_class], "labels by image": [by_image]}
        predicted = {}
        for name, methods in teachers.items():
            started = time.monotonic()
            model, scores = train(data, given, 16, args.epochs, *methods)
            model.load_state_dict(scores.weights)
            predicted[name] = predictions(model, given, args.temperature)
            report("teacher", name, scores, started)
        for c in (by_class, by_image):
            print(c.label_matrix().round(2).to_string())

        students = {
            "given labels": given,
            "given labels, and the meta set": added.train_set,
            "smoothed labels": TensorDataset(images, one_hot * (1 - args.smoothing) + args.smoothing / classes),
            "predictions of a teacher of given labels": TensorDataset(images, predicted["given labels"]),
            "predictions of a teacher of smoothed labels": TensorDataset(images, predicted["smoothed labels"]),
            "learned labels by class": by_class.corrected_dataset(given, soft=True),
            "learned labels by image": by_image.corrected_dataset(given, soft=True),
            "predictions of the teacher by class": TensorDataset(images, predicted["labels by class"]),
            "predictions of the teacher by image": TensorDataset(images, predicted["labels by image"]),
        }
        for name, labelled in students.items():
            started = time.monotonic()
            report("student", name, train(data, labelled, 4, args.epochs)[1], started)
    frame = pd.DataFrame(rows)
    print(frame.groupby(["role", "labels"], sort=False)[["best", "last"]].agg(["mean", "std"]).round(1).to_string())
    return frame


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    main(parser.parse_args())
