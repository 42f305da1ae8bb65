"""The data report as a person meets it: in a browser, driven by clicks and keys."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import LEAST_CONTRAST, chromium, console, open_page, scheme

from dataparams.report.data_report import write_report
from dataparams.report.rows import write_rows

SHOWN = re.compile(r"([\d,]+) of ([\d,]+) samples shown, ([\d,]+) checked")
HOSTILE = "<script>window.hit=1</script>"
COUNT = 3000


def table() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    corrupt = generator.random(COUNT) < 0.3
    given = generator.integers(0, 4, COUNT)
    loss = np.where(corrupt, generator.gamma(9, 0.6, COUNT), generator.gamma(2, 0.3, COUNT))
    right = np.where(corrupt, (given + 1) % 4, given)
    rows = pd.DataFrame(
        {
            "index": np.arange(COUNT),
            "id": [f'=cmd|"x",{place}' if place == 7 else f"image-{place}" for place in range(COUNT)],
            "given_label": given,
            "true_label": right,
            "is_corrupt": corrupt,
            "visits": 5,
            "mean_loss": loss,
            "mean_margin": 1.5 - loss,
            "log_temperature": generator.normal(size=COUNT).astype(np.float32),
            "model_label": right,
        }
    )
    return rows.assign(**{f"{name}_last": rows[name] for name in ("visits", "mean_loss", "mean_margin")})


class Data:
    class_names = (HOSTILE, "<img src=x onerror=window.hit=1>", "b & c", '"quoted"')

    def media(self, index: int) -> object:
        if index % 3 == 0:
            return np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        if index % 3 == 1:
            return np.sin(np.arange(800) / 10.0), 8000
        return f"a text with {HOSTILE} in it, of sample {index}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_rows(table(), folder / "rows.parquet")
    results = {"experiment": "demo </script><b>", "method": "m", "seed": 0, "epochs": 5, "best_epoch": 3}
    results |= {"num_samples": COUNT, "test_accuracy_best": 0.9, "test_accuracy_last": 0.8}
    (folder / "results.json").write_text(json.dumps(results))
    metrics = {
        "epoch": range(5),
        "val_accuracy": np.linspace(0.5, 0.9, 5),
        "mean_loss_clean": 1.0,
        "mean_loss_corrupt": 2,
    }
    pd.DataFrame(metrics).to_csv(folder / "metrics.csv", index=False)
    matrix = pd.DataFrame(np.eye(4), index=list(Data.class_names), columns=list(Data.class_names))
    matrix.to_csv(folder / "label_matrix.csv", index_label="given \\ learned")
    return write_report(folder, Data())


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads):
    with chromium(downloads) as made:
        yield made


@pytest.fixture
def opened(driver, page):
    open_page(driver, page)
    yield driver
    assert console(driver) == []


def counts(driver) -> tuple[int, ...]:
    match = SHOWN.fullmatch(driver.find_element("id", "count").text)
    assert match is not None
    return tuple(int(part.replace(",", "")) for part in match.groups())


def choose(driver, select: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("id", select)).select_by_visible_text(text)


def cards(driver) -> list:
    found = driver.find_elements("css selector", "#list .sample")
    return sorted(found, key=lambda card: int(card.get_attribute("id").split("-")[1]))


def positions(driver) -> list[int]:
    """Of the samples that are there now, in the page's order."""
    return driver.execute_script(
        "const place = (card) => Number(card.id.split('-')[1]);"
        "return [...document.querySelectorAll('#list .sample')].sort((a, b) => place(a) - place(b))"
        ".map((card) => Number(card.querySelector('.head span').textContent.slice(1)))"
    )


def saved(folder: Path, name: str) -> Path:
    for _ in range(100):
        if (folder / name).exists():
            return folder / name
        time.sleep(0.05)
    raise AssertionError(f"{name} was not downloaded")


def test_samples_stand_worst_first_by_the_chosen_score(opened):
    rows = table()
    assert counts(opened) == (COUNT, COUNT, 0)
    worst = rows["mean_loss"].sort_values(ascending=False, kind="stable").index
    shown = positions(opened)
    assert len(shown) >= 10
    assert shown == worst[: len(shown)].tolist()  # label quality ranks as the mean loss does
    choose(opened, "rank", "mean margin, last epoch")
    choose(opened, "direction", "least suspicious first")
    best = rows["mean_margin"].sort_values(ascending=False, kind="stable").index
    shown = positions(opened)
    assert shown == best[: len(shown)].tolist()


def test_filters_keep_what_the_table_says(opened):
    rows = table()
    choose(opened, "given", f"1: {Data.class_names[1]}")
    of_class = rows[rows["given_label"] == 1]
    assert counts(opened)[0] == len(of_class)
    choose(opened, "which", "model disagrees")
    assert counts(opened)[0] == (of_class["model_label"] != 1).sum()
    choose(opened, "model", "2: b & c")
    assert counts(opened)[0] == (of_class["model_label"] == 2).sum()
    choose(opened, "given", "all")
    choose(opened, "model", "all")
    choose(opened, "which", "known wrong")
    assert counts(opened)[0] == rows["is_corrupt"].sum()
    choose(opened, "which", "label issues")
    flagged = counts(opened)[0]
    assert abs(flagged - rows["is_corrupt"].sum()) < 0.1 * COUNT
    choose(opened, "which", "all samples")
    opened.find_element("id", "find").send_keys("image-42")
    assert counts(opened)[0] == rows["id"].str.contains("image-42").sum()


def test_the_threshold_cuts_at_the_score_it_names(opened):
    choose(opened, "rank", "mean loss")
    opened.execute_script(
        "const slider = document.getElementById('threshold');"
        "slider.value = 800; slider.dispatchEvent(new Event('input'))"
    )
    text = opened.find_element("id", "threshold-text").text
    match = re.fullmatch(r"mean loss ≥ ([\d.]+) \(precision ([\d.]+), recall ([\d.]+)\)", text)
    assert match is not None, text
    rows = table()
    limit, precision, recall = map(float, match.groups())
    flagged = rows.nlargest(COUNT // 5, "mean_loss")
    assert counts(opened)[0] == len(flagged)
    assert limit == pytest.approx(flagged["mean_loss"].min(), abs=1e-3)
    assert precision == pytest.approx(flagged["is_corrupt"].mean(), abs=0.02)
    assert recall == pytest.approx(flagged["is_corrupt"].sum() / rows["is_corrupt"].sum(), abs=0.02)


def test_what_is_checked_is_exported_also_under_another_filter(opened, downloads):
    for name in ("checked.csv", "checked.json"):
        (downloads / name).unlink(missing_ok=True)
    buttons = [opened.find_element("id", f"export-{kind}") for kind in ("csv", "json")]
    assert not any(button.is_enabled() for button in buttons)
    chosen = positions(opened)[1:3]
    for card in cards(opened)[1:3]:
        card.find_element("tag name", "input").click()
    find = opened.find_element("id", "find")
    find.send_keys('=cmd|"x"')
    assert positions(opened) == [7]
    cards(opened)[0].find_element("css selector", ".head span").click()  # the name is the box's label
    assert counts(opened) == (1, COUNT, 3)
    for button in buttons:
        button.click()
    with saved(downloads, "checked.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = table().set_index("index")
    records = json.loads(saved(downloads, "checked.json").read_text())
    assert [int(line["index"]) for line in lines] == [record["index"] for record in records]
    assert {record["index"] for record in records} == {*chosen, 7}
    for line, record in zip(lines, records, strict=True):
        known = rows.loc[record["index"]]
        assert record["given_label"] == known["given_label"] == int(line["given_label"])
        assert record["given_name"] == Data.class_names[known["given_label"]] == line["given_name"]
        assert record["model_label"] == known["model_label"]
        assert float(line["mean_loss"]) == pytest.approx(known["mean_loss"], rel=1e-5)
        assert line["new_label"] == ""
    formula = next(line for line in lines if line["index"] == "7")
    assert formula["id"] == '\'=cmd|"x",7'  # a spreadsheet shows it and does not run it
    assert next(record for record in records if record["index"] == 7)["id"] == '=cmd|"x",7'
    opened.find_element("id", "clear").click()
    assert counts(opened)[2] == 0


def test_keys_alone_check_samples(opened):
    from selenium.webdriver import ActionChains, Keys

    opened.find_element("id", "check-shown").send_keys(Keys.TAB)  # the disabled buttons are passed over
    assert opened.execute_script("return document.activeElement.closest('.sample')?.id") == "sample-0"
    across = opened.execute_script("return across")
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.SPACE, Keys.END, Keys.SPACE).perform()
    assert opened.execute_script("return document.activeElement.closest('.sample').id") == f"sample-{COUNT - 1}"
    order = table()["mean_loss"].sort_values(ascending=False, kind="stable").index
    found = opened.execute_script("return [...checked.keys()].filter((row) => checked[row]).map((row) => index[row])")
    assert set(found) == {order[1 + across], order[-1]}
    visible = "const box = document.activeElement.getBoundingClientRect(), list = document.getElementById('list')"
    visible += ".getBoundingClientRect(); return box.top >= list.top && box.bottom <= list.bottom"
    assert opened.execute_script(visible)
    ActionChains(opened).send_keys(Keys.HOME).perform()
    assert opened.execute_script("return document.activeElement.closest('.sample').id") == "sample-0"


def test_texts_of_the_data_are_shown_and_not_run(opened):
    assert opened.execute_script("return window.hit") is None
    body = opened.find_element("tag name", "body").text
    assert HOSTILE in body
    assert "demo </script><b>, m, seed 0" in body
    assert opened.title == "demo </script><b>, m, seed 0"
    assert opened.find_elements("css selector", "#list script, #list b:not(.flag), main img:not([src^='data:'])") == []
    kinds = ("img", "audio", "p")
    assert all(opened.find_elements("css selector", f"#list .medium {kind}") for kind in kinds)
    sound = opened.find_element("css selector", "#list audio")
    opened.execute_script("arguments[0].preload = 'auto'; arguments[0].load()", sound)
    for _ in range(100):
        if opened.execute_script("return arguments[0].readyState", sound) >= 1:
            break
        time.sleep(0.05)
    assert opened.execute_script("return arguments[0].duration", sound) == pytest.approx(0.1, abs=0.02)


def test_the_page_asks_for_nothing_from_elsewhere(opened, page):
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text.split('id="data"')[0])


def test_only_rows_in_sight_exist(opened):
    assert len(positions(opened)) < 100
    last = table()["mean_loss"].sort_values(ascending=False, kind="stable").index[-1]
    opened.execute_script("document.getElementById('list').scrollTop = 1e7")
    for _ in range(100):
        if positions(opened)[-1] == last:
            break
        time.sleep(0.05)
    assert positions(opened)[-1] == last
    assert len(positions(opened)) < 100


@pytest.mark.parametrize("name", ["light", "dark"])
def test_texts_have_contrast_and_narrow_pages_do_not_scroll_sideways(driver, page, name):
    scheme(driver, name)
    driver.set_window_size(600, 1000)
    try:
        open_page(driver, page)
        least, text = driver.execute_script(LEAST_CONTRAST)
        assert least >= 4.5, text
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        driver.set_window_size(1280, 1000)
        scheme(driver, "light")
