"""``compare.html``: what its data say, and the page in a browser."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import LEAST_CONTRAST, chromium, console, open_page, scheme

from dataparams.report.compare_page import compare

HOSTILE = "<img src=x onerror=window.hit=1>"
SCORES = {"none": (0.5, 0.6, 0.7), "ours": (0.7, 0.9, 0.8), HOSTILE: (0.1, 0.2, 0.3)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for method, scores in SCORES.items():
        for seed, score in enumerate(scores):
            run = folder / f"{list(SCORES).index(method)}-seed{seed}"
            run.mkdir()
            results = {"experiment": "digits", "method": method, "seed": seed, "test_accuracy_best": score}
            results |= {"test_accuracy_last": score / 2, "step_time_ms": 10 * score, "peak_memory_mb": 500.0}
            (run / "results.json").write_text(json.dumps(results))
            (run / "config.yaml").write_text(yaml.safe_dump({"method": method, "seed": seed}))
            epochs = 4 if (method, seed) != ("ours", 2) else 3  # early stopping
            curve = {"epoch": range(epochs), "val_accuracy": score + 0.01 * np.arange(epochs), "step": range(epochs)}
            pd.DataFrame(curve).to_csv(run / "metrics.csv", index=False)
            if seed == 0:
                (run / "report.html").write_text("<p>the run</p>")
    compare(folder)
    return folder


@pytest.fixture(scope="module")
def section(sweep):
    text = (sweep / "compare.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    (one,) = json.loads(text)["sections"]
    return one


def test_curves_are_means_over_seeds_with_bands_where_all_have_values(section):
    (chart,) = section["curves"]
    assert chart["x"] == [0, 1, 2, 3]
    series = {one["name"]: one for one in chart["series"]}
    np.testing.assert_allclose(series["none"]["values"], 0.6 + 0.01 * np.arange(4))
    np.testing.assert_allclose(series["none"]["high"], 0.7 + 0.01 * np.arange(4), rtol=1e-4)
    assert series["ours"]["values"][3] is None  # one seed stopped early: no mean of the others
    np.testing.assert_allclose(series["ours"]["values"][:3], 0.8 + 0.01 * np.arange(3))
    assert series["ours"]["place"] == [line["method"] for line in section["lines"]].index("ours")


def test_lines_and_differences_are_those_of_the_summary(section, sweep):
    summary = pd.read_csv(sweep / "summary.csv").set_index("method")
    titles = [column["title"] for column in section["columns"]]
    assert titles == ["test % best", "test % last", "ms a step", "MB at most"]
    line = next(line for line in section["lines"] if line["method"] == "ours")
    cell = line["cells"][0]
    for part, name in (("mean", "mean"), ("std", "std"), ("difference", "diff_mean"), ("low", "diff_low")):
        assert cell[part] == pytest.approx(100 * summary.loc["ours", f"test_accuracy_best_{name}"], rel=1e-4)
    assert "difference" not in line["cells"][2]  # of costs there is none
    assert [chart["title"] for chart in section["differences"]] == titles[:2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("downloads")) as made:
        yield made


def column(driver, place: int) -> list[str]:
    rows = driver.find_elements("css selector", "main section > .scroll tbody tr")
    return [row.find_elements("css selector", "th, td")[place].text for row in rows]


def test_a_click_on_a_heading_sorts_best_first_and_again_worst_first(driver, sweep):
    open_page(driver, sweep / "compare.html")
    assert column(driver, 0) == ["none", "ours", HOSTILE]
    heads = driver.find_elements("css selector", "main section > .scroll thead button")
    heads[2].click()
    assert column(driver, 0) == ["ours", "none", HOSTILE]
    assert column(driver, 2)[0].split("\n") == ["80.0 ± 10.0", "+20.0 (\u22124.8 to +44.8)"]
    heads[2].click()
    assert column(driver, 0) == [HOSTILE, "none", "ours"]
    heads[4].click()  # of a cost the least is best
    assert column(driver, 0) == [HOSTILE, "none", "ours"]
    driver.find_element("tag name", "summary").click()
    links = driver.find_elements("css selector", "details a")
    assert sorted(link.text for link in links) == ["0-seed0", "1-seed0", "2-seed0"]
    links[0].click()
    assert driver.find_element("tag name", "p").text == "the run"
    assert console(driver) == []


@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_page_is_readable_and_runs_nothing_of_the_data(driver, sweep, name):
    scheme(driver, name)
    driver.set_window_size(600, 900)
    open_page(driver, sweep / "compare.html")
    least, text = driver.execute_script(LEAST_CONTRAST)
    assert least >= 4.5, text
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert driver.execute_script("return window.hit") is None
    assert driver.find_elements("tag name", "img") == []
    driver.set_window_size(1280, 1000)
    assert console(driver) == []
