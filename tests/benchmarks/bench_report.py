"""What the data report costs: time to write, size, memory, and in a browser the work of a filter, a sort, a scroll.

``python tests/benchmarks/bench_report.py``. Rows are made up, thumbnails are noise of 128x128 pixels, which JPEG
compresses worst. The browser's figures are CPU time of the page's main thread, so that other programs do not count.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dataparams.report.data_report import FILE, write_report
from dataparams.report.rows import write_rows

ASKED = {50_000: "10 s, 15 MB", 100_000: "200 ms a filter or scroll", 1_000_000: "60 s"}
ACTIONS = {
    "filter by class": "set('given', '3', 'change')",
    "model disagrees": "set('which', 'disagree', 'change')",
    "search an id": "set('find', '4242', 'input')",
    "threshold": "set('threshold', '500', 'input')",
    "rank by another score": "set('rank', '2', 'change')",
    "scroll": "document.getElementById('list').scrollTop = 300000",
    "check all": "document.getElementById('check-shown').click()",
}
SET = "const set = (id, value, kind) => { const one = document.getElementById(id); one.value = value; "
SET += "one.dispatchEvent(new Event(kind)); };"


class Noise:
    """Pictures, as a data module gives them."""

    class_names = [f"class {number}" for number in range(10)]  # noqa: RUF012

    def media(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 255, (128, 128, 3), dtype=np.uint8)


def make_run(folder: Path, count: int) -> None:
    """The files of a finished run with so many samples."""
    generator = np.random.default_rng(0)
    corrupt, given = generator.random(count) < 0.3, generator.integers(0, 10, count)
    loss = np.where(corrupt, generator.gamma(9, 0.6, count), generator.gamma(2, 0.3, count))
    right = np.where(corrupt, (given + 1) % 10, given)
    changing = {
        "visits": np.full(count, 30), "mean_loss": loss, "mean_margin": 3 - 1.5 * loss,
        "forgetting_events": generator.integers(0, 9, count), "confidence": generator.random(count),
        "variability": generator.random(count), "log_temperature": generator.normal(size=count).astype(np.float32),
        "model_label": right,
    }  # fmt: skip
    static = {"index": range(count), "id": range(count), "given_label": given, "true_label": right}
    later = {f"{name}_last": values for name, values in changing.items()}
    write_rows(pd.DataFrame({**static, "is_corrupt": corrupt, **changing, **later}), folder / "rows.parquet")
    results = {"experiment": "bench", "method": "made up", "seed": 0, "epochs": 30, "best_epoch": 20}
    results |= {"num_samples": count, "test_accuracy_best": 0.9, "test_accuracy_last": 0.8}
    (folder / "results.json").write_text(json.dumps(results))


def page_work(driver: Any, path: Path) -> dict[str, float]:
    """Milliseconds of CPU on the page's main thread, by action."""
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return 1e3 * next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def measured(act: Any) -> float:
        time.sleep(0.3)
        before = spent()
        act()
        time.sleep(1.0)
        return spent() - before

    found = {"open": measured(lambda: driver.get(path.as_uri()))}
    for name, code in ACTIONS.items():
        found[name] = measured(lambda code=code: driver.execute_script(SET + code))
    return found


def main() -> None:
    sys.path.append(str(Path(__file__).parents[1] / "report"))
    chromium = import_module("browser").chromium

    with tempfile.TemporaryDirectory() as name:
        for count, asked in ASKED.items():
            folder = Path(name) / str(count)
            folder.mkdir()
            make_run(folder, count)
            start, used = time.perf_counter(), time.process_time()
            write_report(folder, Noise())
            seconds, used = time.perf_counter() - start, time.process_time() - used
            size = (folder / FILE).stat().st_size / 1e6
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{count:>9,} samples: {seconds:5.1f} s ({used:.1f} s of CPU), {size:5.1f} MB, {memory:.1f} GB so far "
                f"(asked: {asked})"
            )
        with chromium(Path(name)) as driver:
            work = page_work(driver, Path(name) / "100000" / FILE)
        print("100,000 rows in a browser, ms of CPU: " + ", ".join(f"{name} {ms:.0f}" for name, ms in work.items()))


if __name__ == "__main__":
    main()
