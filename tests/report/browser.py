"""A headless browser for the tests of the pages; they skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium(downloads: Path) -> Iterator[Any]:
    """A driver whose downloads go to a folder."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed (pip install '.[dev]')")
    binary = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    service = shutil.which("chromedriver")
    if not binary or not service:
        pytest.skip("no chromium with its driver on this machine (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver

    assert selenium is not None
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    try:
        driver.set_window_size(1280, 1000)
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, path: Path) -> None:
    """Load a page and forget what an earlier one had in the console."""
    driver.get_log("browser")
    driver.get(path.as_uri())


def console(driver: Any) -> list[str]:
    """What the console holds since :func:`open_page`."""
    return [entry["message"] for entry in driver.get_log("browser")]


def scheme(driver: Any, name: str) -> None:
    """``"light"`` or ``"dark"``."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


# Smallest contrast (WCAG 2, relative luminance) of visible text against the nearest opaque background, with the text.
LEAST_CONTRAST = """
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const parse = (text) => {  // rgb(...), rgba(...) or color(srgb ...)
  const parts = numbers(text), unit = text.startsWith("color(") ? 255 : 1;
  return [...parts.slice(0, 3).map((part) => part * unit), parts[3] ?? 1];
};
const linear = (part) => (part / 255 <= 0.03928 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
let least = [99, ""];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length) continue;
  if (element.closest("svg, script, style, noscript, option, .skip")) continue;
  let back = element, color = null;
  while (back && !color) {
    const found = parse(getComputedStyle(back).backgroundColor);
    if (found[3] === 1) color = found;
    back = back.parentElement;
  }
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(color ?? [255, 255, 255])];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < least[0]) least = [contrast, element.textContent.slice(0, 60)];
}
return least;
"""
