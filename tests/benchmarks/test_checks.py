"""The checks of the evidence tell a working method from broken ones, on the reference experiments themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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
from checks import digits_meta_labels, digits_meta_rates, digits_noise, magnet, self_paced  # scripts, not a package
from magnet_embedding import measure

SEED = 0
SEEDS = (0, 1, 2)  # of what must pass: bounds are of means, and one seed's result differs between processors
META_EPOCHS = 15  # of the evidence's 25: enough to tell
# Lightning's advice on workers and intervals is for users, who see it from their own runs
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*has moved by"),  # some of the broken variants deserve it
]


def train(folder: Path, *overrides: str, experiment: str = "digits_noise", seed: int = SEED) -> dict[str, Any]:
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        options = [
            f"seed={seed}",
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
    plains = [plain, *(train(tmp_path / f"plain{seed}", "method=none", seed=seed) for seed in SEEDS[1:])]
    results = [train(tmp_path / f"{seed}", "method=data_parameters", seed=seed) for seed in SEEDS]
    assert [check for check in digits_noise(plains, results) if not check.passed] == []


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


# -- selection ---------------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("DATAPARAMS_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
# Of the evidence's 7,000 samples. Of 2,000 for 16 epochs, selection gains 12 to 17 points by seed, too near the bound.
SHORT = ("data.train_size=4000", "trainer.max_epochs=20", "callbacks.selection.max_fraction=0.6")


@pytest.fixture(scope="module")
def fashion() -> Iterator[None]:
    if not (DATA / "FashionMNIST").is_dir():
        pytest.skip(f"no FashionMNIST in {DATA}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATAPARAMS_DATA", str(DATA))
        yield


@pytest.fixture(scope="module")
def uniform(tmp_path_factory, fashion) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("uniform"), "method=none", *SHORT[:2], experiment="self_paced")


def test_selection_passes_every_check(uniform, tmp_path):
    results = train(tmp_path, "method=self_paced", *SHORT, experiment="self_paced")
    assert [check for check in self_paced([uniform], [results]) if not check.passed] == []


def test_selection_that_ignores_the_loss_fails(uniform, tmp_path):
    results = train(tmp_path, "method=random_subset", *SHORT, experiment="self_paced")
    failed = [check.name for check in self_paced([uniform], [results]) if not check.passed]
    assert len(failed) == 2


@lru_cache
def embedded(variant: str, seed: int = SEED) -> dict[str, Any]:
    return measure(variant, seed, steps=330)


@pytest.mark.parametrize(("variant", "works"), [("magnet", True), ("random_impostors", False), ("sigma_4", False)])
def test_a_broken_magnet_loss_fails(fashion, variant, works):
    seeds = SEEDS if works else (SEED,)
    softmax, other = ([embedded(name, seed) for seed in seeds] for name in ("softmax", variant))
    assert all(check.passed for check in magnet(softmax, other)) == works
