"""The checks of the evidence tell a working method from broken ones, on the reference experiments themselves."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

import dataparams.index
from dataparams.optim import RowScaleFree, RowSGD
from dataparams.train import run

sys.path.insert(0, str(Path(__file__).parent))
from checks import digits_meta_labels, digits_meta_rates, digits_noise  # benchmarks are scripts, not a package

SEED = 0
META_EPOCHS = 15  # of the evidence's 25: enough to tell
# Lightning's advice on workers and intervals is for users, who see it from their own runs
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*has moved by"),  # some of the broken variants deserve it
]


def train(folder: Path, *overrides: str, experiment: str = "digits_noise") -> dict[str, Any]:
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        options = [
            f"seed={SEED}",
            "plots=false",
            "progress_bar=false",
            "trainer.accelerator=cpu",
            f"run_dir={folder}",
        ]
        return run(compose("config", overrides=[f"experiment={experiment}", *options, *overrides]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("plain"), "method=none")


def frozen(monkeypatch) -> list[str]:
    return ["callbacks.data_parameters.lr=0"]


def flipped_gradient(monkeypatch) -> list[str]:
    update = RowSGD._update
    monkeypatch.setattr(RowSGD, "_update", lambda self, state, grad, *rest: update(self, state, -grad, *rest))
    return []


def slow(monkeypatch) -> list[str]:
    return [f"callbacks.data_parameters.lr={0.094 / 15}"]


@lru_cache
def _permutation(n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def permuted(monkeypatch) -> list[str]:
    make = dataparams.index.indexed_loader

    def shifted(loader, serial=0):
        clone = make(loader, serial)
        collate: Any = clone.collate_fn
        rows = _permutation(len(loader.dataset))

        def permute(fetched):
            batch = collate(fetched)
            batch.index = rows[batch.index]
            return batch

        clone.__dict__["collate_fn"] = permute
        return clone

    monkeypatch.setattr(dataparams.index, "indexed_loader", shifted)
    return []


def test_the_working_method_passes_every_check(plain, tmp_path):
    failed = [check for check in digits_noise([plain], [train(tmp_path, "method=data_parameters")]) if not check.passed]
    assert failed == []


@pytest.mark.parametrize("breaking", [frozen, flipped_gradient, slow, permuted], ids=lambda f: f.__name__)
def test_a_broken_variant_fails(plain, tmp_path, monkeypatch, breaking):
    results = train(tmp_path, "method=data_parameters", *breaking(monkeypatch))
    failed = [check.name for check in digits_noise([plain], [results]) if not check.passed]
    print(breaking.__name__, failed)
    assert failed


META = {"instance_lr": digits_meta_rates, "soft_labels": digits_meta_labels}


def train_meta(folder: Path, *overrides: str) -> dict[str, Any]:
    return train(folder, f"trainer.max_epochs={META_EPOCHS}", *overrides, experiment="digits_meta")


@pytest.fixture(scope="module")
def plain_meta(tmp_path_factory) -> dict[str, Any]:
    return train_meta(tmp_path_factory.mktemp("plain_meta"), "method=none")


def meta_frozen(method: str, monkeypatch) -> list[str]:
    return [f"callbacks.{method}.lr=0"]


def meta_flipped(method: str, monkeypatch) -> list[str]:
    update = RowScaleFree._update
    monkeypatch.setattr(RowScaleFree, "_update", lambda self, *arguments: -update(self, *arguments))
    return []


def meta_permuted(method: str, monkeypatch) -> list[str]:
    return permuted(monkeypatch)


@pytest.mark.parametrize("method", META)
def test_a_working_method_with_a_meta_set_passes_every_check(plain_meta, tmp_path, method):
    results = train_meta(tmp_path, f"method={method}")
    assert [check for check in META[method]([plain_meta], [results]) if not check.passed] == []


@pytest.mark.parametrize("breaking", [meta_frozen, meta_flipped, meta_permuted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", META)
def test_a_broken_method_with_a_meta_set_fails(plain_meta, tmp_path, monkeypatch, method, breaking):
    results = train_meta(tmp_path, f"method={method}", *breaking(method, monkeypatch))
    failed = [check.name for check in META[method]([plain_meta], [results]) if not check.passed]
    print(method, breaking.__name__, failed)
    assert failed
