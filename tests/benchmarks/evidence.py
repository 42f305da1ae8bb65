"""``make evidence``: the reference experiments over 5 seeds, and what they show, in RESULTS.md beside this file.

Runs go into ``outputs/evidence``; a second call continues where the first was interrupted, and keeps what is there:
delete a folder to measure it anew. Each run notes its date and commit, which RESULTS.md repeats. ``--jobs`` runs share
the cores. ``--device`` is a Lightning accelerator. Experiments whose data is not on disk are left out, and RESULTS.md
says so. ``--only`` trains some. RESULTS.md shows whatever is complete in the folder, and keeps the tables that stand
in it already of runs that are not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from experiments import DATA, LARGE, SEEDS, TITLES, Job, jobs_of
from result_tables import HARMLESS, complete, harmless_section, section
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LEFT_OUT = "Left out"


@lru_cache
def commit() -> str:
    """The code that this process runs."""

    def git(*arguments: str) -> str:
        called = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
        return called.stdout.strip()

    changed = git("status", "--porcelain", "--", "../../dataparams", "../../conf")
    return (git("rev-parse", "--short", "HEAD") or "no commit") + (" with changes not committed" if changed else "")


def run_job(arguments: tuple[Job, Path, str, bool]) -> str | None:
    """Train one run unless it is there already; returns what went wrong, or None."""
    job, root, device, pin = arguments
    folder = root / job.folder
    if (folder / "results.json").exists():
        return None
    code = commit()
    import torch  # in the worker: the parent stays light, and every worker keeps to one core

    if pin:
        torch.set_num_threads(1)
    try:
        _train_magnet(job, folder) if job.magnet else _train(job, folder, device)
    except Exception as error:
        return f"{job.folder}: {type(error).__name__}: {error}"
    now = datetime.now()
    entry = {"date": f"{now:%Y-%m-%d}", "time": now.timestamp(), "commit": code}
    (folder / "measured.json").write_text(json.dumps(entry) + "\n")
    return None


def _train_magnet(job: Job, folder: Path) -> None:
    from magnet_embedding import measure

    assert job.magnet is not None
    results = measure(*job.magnet)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results) + "\n")


def _train(job: Job, folder: Path, device: str) -> None:
    from hydra import compose, initialize_config_module

    from dataparams.train import run

    options = [
        "plots=false",
        "progress_bar=false",
        f"run_dir={folder}",
        f"trainer.accelerator={device}",
        "resume=true",
    ]
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*job.overrides, *options])
    run(cfg)


def sections(text: str) -> dict[str, str]:
    """The sections of RESULTS.md by title."""
    _, *parts = ("\n" + text).split("\n## ")
    return {part.split("\n", 1)[0].strip(): f"## {part.rstrip()}" for part in parts}


def write_results(path: Path, root: Path, missing: list[str], device: str) -> None:
    """RESULTS.md: every table whose runs are complete, with seeds and versions; others stay as they stood there."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "scikit-learn"))
    tables = sections(path.read_text()) if path.exists() else {}
    tables.pop(LEFT_OUT, None)
    tables |= {TITLES[name]: section(root, name) for name in [*DATA, LARGE] if complete(root, name)}
    if harmless := harmless_section(root):
        tables[HARMLESS] = harmless
    order = {title: place for place, title in enumerate([*(TITLES[name] for name in [*DATA, LARGE]), HARMLESS])}
    parts = [
        "# Evidence\n\nWritten by `make evidence`. Clean test accuracy in percent, mean ± standard deviation over "
        f"seeds {SEEDS[0]} to {SEEDS[-1]}; *best* is the epoch with the highest accuracy on noisy validation labels, "
        "*last* the last one. The AUROC is that of each score as a detector of wrong labels, at the best epoch where "
        "nothing else is said, computed against the data module's own record. *Averaged weights*: an exponential "
        "moving average (0.995, ramped) kept in the same run.\n\n"
        f"The latest on {platform.machine()} ({os.cpu_count()} cores), {device}, Python {platform.python_version()}, "
        f"{packages}. Dates and commits stand at each table, *by date* where a run did not note its commit.",
        *(tables[title] for title in sorted(tables, key=lambda title: order.get(title, len(order)))),
    ]
    if missing:
        parts.append(f"## {LEFT_OUT}\n\nNot on disk (`DATAPARAMS_DATA`): " + ", ".join(missing) + ".")
    path.write_text("\n\n".join(parts) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time (default: a run a core)")
    parser.add_argument("--device", default="cpu", help="Lightning accelerator (default: %(default)s)")
    folder = Path("outputs/evidence")
    parser.add_argument("--out", type=Path, default=folder, help="folder of the runs (default: %(default)s)")
    names, seeds = list(DATA), list(SEEDS)
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="experiments (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, choices=seeds, help="default: all")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    options = _options()
    beside = HERE.parents[1].parent / "shared" / "data"
    if beside.is_dir():
        os.environ.setdefault("DATAPARAMS_DATA", str(beside))
    data = Path(os.environ.get("DATAPARAMS_DATA", "."))
    experiments = [name for name in options.only if DATA[name] is None or (data / str(DATA[name])).is_dir()]
    root = options.out.resolve()
    jobs = jobs_of(experiments, options.device != "cpu" and "cifar10" in experiments, options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        tasks = [(job, root, options.device, options.jobs > 1) for job in jobs]
        failures = [text for text in tqdm(pool.imap(run_job, tasks), total=len(tasks), unit="run") if text]
    if failures:
        raise SystemExit(
            "\n".join([f"{len(failures)} of {len(jobs)} runs failed; call again to retry them:", *failures])
        )
    missing = [name for name in options.only if name not in experiments]
    write_results(options.results, root, missing, options.device)
    print(options.results)


if __name__ == "__main__":
    main()
