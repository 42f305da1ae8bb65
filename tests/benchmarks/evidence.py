"""``make evidence``: the reference experiments over 5 seeds, and what they show, in RESULTS.md beside this file.

Runs go into ``outputs/evidence``; a second call continues where the first was interrupted. ``--jobs`` runs share the
cores. ``--device`` is a Lightning accelerator. Experiments whose data is not on disk are left out, and RESULTS.md says
so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from checks import CHECKS
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SEEDS = range(5)
BASELINES = ("none", "data_parameters", "elr", "gce", "superloss", "label_smoothing")
DATA = {"digits_noise": None, "fashion_noise": "FashionMNIST", "cifar10": "cifar10"}
TITLES = {
    "digits_noise": "Digits, 40% symmetric noise, 40 epochs, batch 32, model rate 0.01",
    "fashion_noise": "Fashion-MNIST, first 4,000, 40% symmetric noise, 24 epochs, batch 64, model rate 0.03",
    "cifar10_large": "CIFAR-10, all images from the JPEG pack, 40% symmetric noise, ResNet-18, 84 epochs",
    "cifar10": "CIFAR-10, the 8,068 lossless images, 40% symmetric noise, small BatchNorm network, 15 epochs",
}
# With --device gpu: all 50,000 images, the paper's length
LARGE, LARGE_METHODS = "cifar10_large", ("none", "data_parameters", "elr", "gce")
EXTRA = {
    "cifar10": ["data.source=lossless"],
    LARGE: [
        "model=resnet18", "data.source=jpeg", "data.augment=true", "trainer.max_epochs=84",
        "optimizer.lr=0.1", "optimizer.weight_decay=5e-4", "scheduler=multistep",
    ],
}  # fmt: skip
# The grid on which the defaults must do no harm: data, noise and the model's rate vary, data parameters stay untuned.
HARMLESS_RATES = (0.01, 0.05)
HARMLESS_NOISE = (0.0, 0.4)
HARMLESS_EXTRA = {
    "fashion_noise": ["trainer.max_epochs=12"],
    "cifar10": ["data.train_size=4000", "data.source=lossless", "trainer.max_epochs=6"],
}
TOLERANCE = -0.5


@dataclass(frozen=True)
class Job:
    """One training run: where it goes and what it overrides."""

    folder: str
    overrides: tuple[str, ...]


def reference_jobs(experiments: list[str]) -> list[Job]:
    """Every method and seed of the reference experiments, averaged weights beside."""
    jobs = []
    for experiment in experiments:
        name, extra = "cifar10" if experiment == LARGE else experiment, EXTRA.get(experiment, [])
        for seed in SEEDS:
            for method in LARGE_METHODS if experiment == LARGE else BASELINES:
                overrides = (
                    f"experiment={name}",
                    f"method={method}",
                    f"seed={seed}",
                    "ema=0.995",
                    *extra,
                )
                jobs.append(Job(f"{experiment}/{method}/seed{seed}", overrides))
    return jobs


def harmless_jobs(experiments: list[str]) -> list[Job]:
    """Plain training and the defaults of data parameters on every cell of the grid."""
    jobs = []
    for experiment in experiments:
        for noise in HARMLESS_NOISE:
            for rate in HARMLESS_RATES:
                for seed in SEEDS:
                    for method in ("none", "data_parameters"):
                        overrides = (
                            f"experiment={experiment}", f"method={method}", f"seed={seed}", f"optimizer.lr={rate}",
                            f"data.noise_rate={noise}", f"data.noise={'symmetric' if noise else 'none'}",
                            *(["~tuned.data_parameters"] if method == "data_parameters" else []),
                            *HARMLESS_EXTRA.get(experiment, []),
                        )  # fmt: skip
                        jobs.append(
                            Job(
                                f"harmless/{experiment}-noise{noise}-rate{rate}/{method}/seed{seed}",
                                overrides,
                            )
                        )
    return jobs


def run_job(arguments: tuple[Job, Path, str, bool]) -> str | None:
    """Train one run unless it is there already; returns what went wrong, or None."""
    job, root, device, pin = arguments
    folder = root / job.folder
    if (folder / "results.json").exists():
        return None
    import torch  # in the worker: the parent stays light, and every worker keeps to one core
    from hydra import compose, initialize_config_module

    from dataparams.train import run

    if pin:
        torch.set_num_threads(1)
    options = [
        "plots=false",
        "progress_bar=false",
        f"run_dir={folder}",
        f"trainer.accelerator={device}",
        "resume=true",
    ]
    try:
        with initialize_config_module("dataparams.conf", version_base="1.3"):
            cfg = compose("config", overrides=[*job.overrides, *options])
        run(cfg)
    except Exception as error:
        return f"{job.folder}: {type(error).__name__}: {error}"
    return None


def read(root: Path, folder: str, method: str) -> list[dict[str, Any]]:
    """Results of one method, a dictionary a seed."""
    paths = [root / folder / method / f"seed{seed}" / "results.json" for seed in SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _cell(runs: list[dict[str, Any]], key: str, factor: float = 100.0, digits: int = 1) -> str:
    values = pd.Series([run.get(key) for run in runs], dtype=float).dropna() * factor
    return "" if values.empty else f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def reference_section(root: Path, experiment: str) -> str:
    """The table of one experiment, and its checks."""
    plain = read(root, experiment, "none")
    lines = [
        f"## {TITLES[experiment]}",
        "",
        "| method | best | last | last - plain | averaged weights, best | averaged weights, last | AUROC log "
        "temperature | AUROC mean loss "
        "| AUROC margin |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in LARGE_METHODS if experiment == LARGE else BASELINES:
        runs = read(root, experiment, method)
        difference = (
            pd.Series([r["test_accuracy_last"] - p["test_accuracy_last"] for r, p in zip(runs, plain, strict=True)])
            * 100
        )
        gain = "" if method == "none" else f"{difference.mean():+.1f} ± {difference.std():.1f}"
        cells = [_cell(runs, f"test_accuracy_{k}") for k in ("best", "last")] + [gain]
        cells += [_cell(runs, f"test_accuracy_ema_{k}") for k in ("best", "last")]
        cells += [_cell(runs, f"auroc_{k}_best", 1, 3) for k in ("log_temperature", "mean_loss", "margin")]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    if experiment in CHECKS:
        checks = CHECKS[experiment](plain, read(root, experiment, "data_parameters"))
        lines += ["", "| asked of `data_parameters` | at least | seen | |", "|---|---|---|---|"]
        lines += [
            f"| {c.name} | {c.at_least:g} | {c.seen:.3f} | {'ok' if c.passed else '**missed**'} |" for c in checks
        ]
    return "\n".join(lines)


def harmless_section(root: Path, experiments: list[str]) -> str:
    """Best-epoch accuracy of the defaults against plain training, a line a cell."""
    lines = [
        "## Do the defaults do harm?",
        "",
        "Test accuracy at the best noisy-validation epoch, data parameters with their defaults; asked: not below "
        "plain training by more than "
        f"{-TOLERANCE} points (mean of {len(SEEDS)} seeds).",
        "",
        "| data | noise | model rate | plain, best | data parameters, best | difference | last: difference | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for experiment in experiments:
        for noise in HARMLESS_NOISE:
            for rate in HARMLESS_RATES:
                folder = f"harmless/{experiment}-noise{noise}-rate{rate}"
                plain, method = read(root, folder, "none"), read(root, folder, "data_parameters")
                if not plain or len(plain) != len(method):
                    continue
                gains = {
                    k: pd.Series(
                        [m[f"test_accuracy_{k}"] - p[f"test_accuracy_{k}"] for p, m in zip(plain, method, strict=True)]
                    )
                    * 100
                    for k in ("best", "last")
                }
                verdict = "ok" if gains["best"].mean() >= TOLERANCE else "**missed**"
                text = [f"{g.mean():+.2f} ± {g.std():.2f}" for g in gains.values()]
                cells = [
                    _cell(plain, "test_accuracy_best"),
                    _cell(method, "test_accuracy_best"),
                    *text,
                    verdict,
                ]
                lines.append(f"| {experiment} | {noise:.0%} | {rate} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(root: Path, experiments: list[str], missing: list[str], minutes: float, device: str) -> None:
    """RESULTS.md: every table, with seeds, versions and time."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "scikit-learn"))
    parts = [
        "# Evidence\n\nWritten by `make evidence`. Clean test accuracy in percent, mean ± standard deviation over "
        "seeds "
        f"{SEEDS[0]} to {SEEDS[-1]}; *best* is the epoch with the highest accuracy on noisy validation labels, "
        "*last* the last one. "
        "The AUROC is that of each score as a detector of wrong labels at the best epoch, computed against the data "
        "module's own record. "
        "*Averaged weights*: an exponential moving average (0.995, ramped) kept in the same run.\n\n"
        f"{date.today()}, {platform.machine()} ({os.cpu_count()} cores), {device}, Python "
        f"{platform.python_version()}, {packages}. "
        f"{minutes:.0f} minutes of this call.",
        *[
            reference_section(root, experiment)
            for experiment in [*experiments, LARGE]
            if read(root, experiment, "none")
        ],
        harmless_section(root, experiments),
    ]
    if missing:
        parts.append("## Left out\n\nNot on disk (`DATAPARAMS_DATA`): " + ", ".join(missing) + ".")
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="runs at a time (default: a run a core)",
    )
    parser.add_argument("--device", default="cpu", help="Lightning accelerator (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/evidence"),
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(DATA),
        choices=list(DATA),
        help="experiments (default: all)",
    )
    options = parser.parse_args()
    beside = HERE.parents[1].parent / "shared" / "data"
    if beside.is_dir():
        os.environ.setdefault("DATAPARAMS_DATA", str(beside))
    data = Path(os.environ.get("DATAPARAMS_DATA", "."))
    experiments = [name for name in options.only if DATA[name] is None or (data / str(DATA[name])).is_dir()]
    root = options.out.resolve()
    start = time.time()
    large = [LARGE] if options.device != "cpu" and "cifar10" in experiments else []
    jobs = [*reference_jobs([*experiments, *large]), *harmless_jobs(experiments)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        tasks = [(job, root, options.device, options.jobs > 1) for job in jobs]
        failures = [text for text in tqdm(pool.imap(run_job, tasks), total=len(tasks), unit="run") if text]
    if failures:
        raise SystemExit(
            "\n".join(
                [
                    f"{len(failures)} of {len(jobs)} runs failed; call again to retry them:",
                    *failures,
                ]
            )
        )
    write_results(
        root,
        experiments,
        [name for name in options.only if name not in experiments],
        (time.time() - start) / 60,
        options.device,
    )
    print(HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
