"""Data parameters on CIFAR-10 or CIFAR-100 with wrong labels, from a plain LightningModule to a table of suspects.

    python examples/cifar.py --data-dir DATA --download                    # the paper's settings: WRN-28-10, 84 epochs
    python examples/cifar.py --data-dir DATA --model resnet18 --classes 10 --method none
    python examples/cifar.py --data-dir DATA --model small --classes 10 --epochs 3 --preset ours   # minutes on a CPU

DATA holds torchvision's folders (cifar-10-batches-py, cifar-100-python) or cifar10/*.npz. Settings of the released
code of Saxena et al. (NeurIPS 2019): batch 128, model rate 0.1 divided by 10 at epoch 80, instance temperatures at
rate 0.2, stop at epoch 84. There a temperature moves by 0.2 / 128 a visit, which does little in short runs: --preset
ours for those.
"""

import argparse
from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from dataparams import DataParameters, TrainingDynamics
from dataparams.tasks import CIFARData, Classifier, SmallBNNet, WideResNet, resnet18_cifar

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data-dir", help="folder of data sets (default: $DATAPARAMS_DATA)")
parser.add_argument("--download", action="store_true", help="let torchvision fetch the data set")
parser.add_argument("--classes", type=int, choices=[10, 100], default=100)
parser.add_argument("--train-size", type=int, help="use fewer training images")
parser.add_argument("--noise", choices=["none", "permute", "symmetric", "asymmetric", "file"], default="permute")
parser.add_argument("--noise-rate", type=float, default=0.4, help="share of labels corrupted (default: %(default)s)")
parser.add_argument("--noise-file", help="labels made by people, with --noise file (.npy, .npz, .pt, .txt, .csv)")
parser.add_argument("--method", choices=["none", "data_parameters"], default="data_parameters")
parser.add_argument("--level", choices=["instance", "class", "joint"], default="instance")
parser.add_argument("--preset", choices=["paper", "ours"], default="paper")
parser.add_argument("--rate", type=float, help="learning rate of the temperatures (default: the preset's)")
parser.add_argument("--model", choices=["wrn28_10", "resnet18", "small"], default="wrn28_10")
parser.add_argument("--epochs", type=int, default=84)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--lr", type=float, default=0.1, help="the model's learning rate (default: %(default)s)")
parser.add_argument(
    "--precision",
    default="32-true",
    help="for example bf16-mixed or 16-mixed (default: %(default)s)",
)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--logger", choices=["csv", "tensorboard", "wandb"], default="csv")
parser.add_argument("--out", default="outputs/cifar", help="folder of logs and checkpoints (default: %(default)s)")
args = parser.parse_args()


def main() -> None:
    L.seed_everything(args.seed, workers=True)

    # Data. Validation labels are as wrong as the training labels: nobody has clean ones to choose an epoch with.
    data = CIFARData(
        data_dir=args.data_dir, download=args.download, num_classes=args.classes, train_size=args.train_size,
        noise=args.noise, noise_rate=args.noise_rate, noise_file=args.noise_file, batch_size=args.batch_size,
        num_workers=args.workers, seed=args.seed,
    )  # fmt: skip

    # Model: an ordinary LightningModule with self.criterion = nn.CrossEntropyLoss(). It knows nothing of this library.
    network = {"wrn28_10": WideResNet, "resnet18": resnet18_cifar, "small": SmallBNNet}[args.model](
        num_classes=args.classes
    )
    optimizer = partial(torch.optim.SGD, lr=args.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[80, 100, 160])
    model = Classifier(network, optimizer, scheduler)

    # The one line that matters.
    if args.method == "none":
        method = TrainingDynamics()
    else:
        preset = "paper" if args.preset == "paper" else None
        rates = {"lr": args.rate} if args.level != "class" else {"class_lr": args.rate}
        method = DataParameters(num_classes=args.classes, level=args.level, preset=preset, **rates)

    logger = {
        "csv": lambda: CSVLogger(args.out),
        "tensorboard": lambda: TensorBoardLogger(args.out),
        "wandb": lambda: WandbLogger(project="dataparams", save_dir=args.out),
    }[args.logger]()
    best = ModelCheckpoint(monitor="val_accuracy", mode="max")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        logger=logger,
        callbacks=[method, best],
        default_root_dir=args.out,
    )
    trainer.fit(model, datamodule=data)

    if data.is_corrupt is not None:
        print(
            "AUROC as detectors of wrong labels:",
            {name: round(value, 4) for name, value in method.auroc(data.is_corrupt).items()},
        )

    # What to look at first.
    print(method.suspects(15).to_string(index=False, float_format="%.3f"))
    file = f"{trainer.log_dir or args.out}/suspects.csv"
    method.suspects(k=None).to_csv(file, index=False)
    print(f"all samples, worst first: {file}")

    # Early stopping belongs to the method under label noise: report the best noisy-validation epoch beside the last.
    for name, path in {"last": None, "best noisy-validation": best.best_model_path}.items():
        (scores,) = trainer.test(
            model,
            datamodule=data,
            ckpt_path=path,
            verbose=False,
            weights_only=True if path else None,
        )
        print(f"clean test accuracy, {name} epoch: {scores['test_accuracy']:.4f}")


if __name__ == "__main__":
    main()
