"""The README's code runs, and its command lines compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks("python"):
        exec(block, namespace)
    frame = namespace["callback"].to_frame()
    assert len(frame) == 512
    assert (frame["visits"] == 3).all()
    assert frame["log_temperature"].abs().gt(0).all()
    assert (namespace["table"].values != 0).sum() == namespace["index"].unique().numel()


def override_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    runs = [line for line in lines if line.startswith("dataparams ") and "=" in line]
    return [line for line in runs if not line.startswith(("dataparams compare", "dataparams report"))]


@pytest.mark.parametrize("line", override_lines())
def test_command_lines_compose(line):
    overrides = [word.split(",")[0] for word in shlex.split(line)[1:] if word != "-m"]
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    for override in overrides:
        if override.startswith(("method=", "experiment=")):
            key, value = override.split("=")
            assert cfg[key] == value
