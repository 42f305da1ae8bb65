"""Self-paced selection: whose losses it goes by, who is selected, and that looking at them leaves no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    SAMPLES,
    Numbered,
    StepModel,
    fit,
    make_loader,
)
from hydra import compose, initialize_config_module
from self_paced_helpers import Watching, true_losses
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler

from dataparams import DataParameters, InstanceLearningRates, LearnableSoftLabels, TrainingDynamics
from dataparams.callbacks.self_paced import SelfPacedSelection
from dataparams.train import run as train

pytestmark = [*QUIET, INERT]


class Named(Dataset):
    """Samples with a string id, which says the sample's number."""

    def __init__(self) -> None:
        self.numbered = Numbered()

    def __len__(self) -> int:
        return len(self.numbered)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.numbered[index]
        return {"image": x, "label": y, "name": f"sample {index}"}


class NamedModel(Watching):
    """Reads dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch["image"], batch["label"]], batch_idx)


def expected_by_class(loss: Tensor, label: Tensor, share: float) -> set[int]:
    """The easiest share of every class, halves up, at least one: by sorting."""
    chosen: set[int] = set()
    for name in label.unique():
        own = (label == name).nonzero().flatten().tolist()
        own = sorted((i for i in own if np.isfinite(float(loss[i]))), key=lambda i: float(loss[i]))
        chosen |= set(own[: max(1, int(share * len(own) + 0.5))])
    return chosen


# -- whose losses ----------------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[[], DataLoader]] = {
    "short_last_batch": lambda: make_loader(batch_size=7),
    "shuffle": lambda: make_loader(batch_size=7, shuffle=True),
    "drop_last": lambda: make_loader(batch_size=7, shuffle=True, drop_last=True),
    "workers": lambda: make_loader(batch_size=7, shuffle=True, num_workers=2),
    "persistent": lambda: make_loader(batch_size=7, shuffle=True, num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_losses_and_selection_equal_brute_force(kind: str):
    callback, model = SelfPacedSelection(growth=1.0), Watching()
    fit(callback, LOADERS[kind](), model, max_epochs=3)
    frame, label = callback.to_frame(), Numbered().y
    losses = true_losses(model)
    torch.testing.assert_close(torch.tensor(frame["selection_loss"].to_numpy()).float(), losses)
    assert frame["cluster"].tolist() == label.tolist()
    assert set(np.flatnonzero(frame["selected"])) == expected_by_class(losses, label, 0.5)
    assert frame["id"].tolist() == list(range(SAMPLES))


def test_epochs_after_the_warmup_train_on_the_selected_only_and_equally_often():
    callback, model = SelfPacedSelection(growth=1.2), Watching()
    selections: list[set[int]] = []

    class Peek(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            frame = callback.to_frame()
            selections.append(set(np.flatnonzero(frame["selected"]).tolist()) or set(range(SAMPLES)))

    fit([callback, Peek()], make_loader(batch_size=7, shuffle=True), model, max_epochs=5)
    sizes = []
    for epoch, selected in enumerate(selections):
        counts = model.epochs[epoch]
        assert set(counts) == selected
        assert sum(counts.values()) == SAMPLES  # as many updates
        assert max(counts.values()) - min(counts.values()) <= 1
        sizes.append(len(selected))
    assert sizes[0] == SAMPLES
    assert sizes[1] < sizes[4] < SAMPLES
    first = callback.to_frame()["first_round"].to_numpy()
    for number in range(SAMPLES):
        epochs = [epoch for epoch in range(1, 5) if number in selections[epoch]]
        if epochs:
            assert first[number] == epochs[0]
        else:
            assert np.isnan(first[number]) or first[number] == 5  # of a round to come


def test_reversing_the_losses_changes_the_selection():
    class Still(Watching):
        """Learns nothing, and ranks its samples backwards where told to."""

        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign = sign

        def forward(self, x: Tensor) -> Tensor:
            margin = x[:, -1:] * 0.1 * self.sign
            right = nn.functional.one_hot(Numbered().y[x[:, -1].long()], CLASSES)
            return 0 * super().forward(x) + margin * right

    chosen = []
    for sign in (1.0, -1.0):
        callback = SelfPacedSelection(growth=1.0)
        fit(callback, make_loader(shuffle=True), Still(sign), max_epochs=3)
        chosen.append(set(np.flatnonzero(callback.to_frame()["selected"])))
    label = Numbered().y
    number = torch.arange(SAMPLES).float()
    assert chosen == [expected_by_class(-number, label, 0.5), expected_by_class(number, label, 0.5)]
    assert chosen[0] != chosen[1]


def test_rows_of_a_subset_are_positions_in_it():
    base = Numbered()
    places = [5, 3, 22, 11, 0, 17, 9, 8, 2, 20, 14]
    callback, model = SelfPacedSelection(growth=1.0), Watching()
    fit(callback, make_loader(Subset(base, places), batch_size=4, shuffle=True), model, max_epochs=3)
    frame = callback.to_frame()
    losses = true_losses(model)[places]
    torch.testing.assert_close(torch.tensor(frame["selection_loss"].to_numpy()).float(), losses)
    assert frame["id"].tolist() == places
    assert set(np.flatnonzero(frame["selected"])) == expected_by_class(losses, base.y[places], 0.5)
    assert set(model.epochs[2]) <= set(places)
    assert len(model.epochs[2]) < len(places)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_string_ids_meet_their_samples(listed: bool, workers: int):
    names = [f"sample {i}" for i in reversed(range(SAMPLES))]  # rows in another order than positions
    callback, model = SelfPacedSelection(growth=1.0, index_key="name", ids=names if listed else None), NamedModel()
    fit(callback, make_loader(Named(), batch_size=7, shuffle=True, num_workers=workers), model, max_epochs=3)
    frame = callback.to_frame()
    number = [int(name.split()[1]) for name in frame["id"]]
    losses = true_losses(model)
    torch.testing.assert_close(torch.tensor(frame["selection_loss"].to_numpy()).float(), losses[number])
    selected = {n for n, chosen in zip(number, frame["selected"], strict=True) if chosen}
    assert selected == expected_by_class(losses, Numbered().y, 0.5)
    entered = {n for n, first in zip(number, frame["first_round"], strict=True) if first <= 2}
    assert set(model.epochs[2]) <= entered


def test_samples_that_the_sampler_leaves_out_stay_out():
    inside = list(range(3, 20))
    callback, model = SelfPacedSelection(), Watching()
    fit(callback, make_loader(batch_size=4, sampler=SubsetRandomSampler(inside)), model, max_epochs=3)
    frame = callback.to_frame()
    assert set().union(*model.epochs.values()) <= set(inside)
    assert not frame["selected"][[0, 1, 2, 20, 21, 22, 23]].any()
    assert frame["selection_loss"].notna().sum() == len(inside)
    assert sum(model.epochs[2].values()) == len(inside)


def test_samples_that_a_sampler_of_the_users_own_leaves_out_stay_out():
    class Half(torch.utils.data.Sampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(0, SAMPLES, 2))

        def __len__(self) -> int:
            return SAMPLES // 2

    model = Watching()
    with suppress(ValueError):  # refusing is right, too
        fit(SelfPacedSelection(start_fraction=1.0, max_fraction=0.8), make_loader(sampler=Half()), model, max_epochs=2)
    assert all(number % 2 == 0 for epoch in model.epochs.values() for number in epoch)


@pytest.mark.parametrize("order", [1, -1])
def test_the_meta_split_of_a_look_ahead_is_not_selected(order: int):
    selection, rates = SelfPacedSelection(), InstanceLearningRates(meta_fraction=0.25, seed=3)
    model = Watching()
    fit([selection, rates][::order], make_loader(batch_size=4, shuffle=True), model, max_epochs=4)
    frame = selection.to_frame()
    held_out = set(np.flatnonzero(frame["selection_loss"].isna()))
    assert len(held_out) == SAMPLES // 4
    assert held_out.isdisjoint(set().union(*model.epochs.values()) - held_out)
    assert not frame["selected"][sorted(held_out)].any()
    trained = Counter(number for number in model.epochs[3].elements() if number not in held_out)
    assert set(trained) <= set(np.flatnonzero(frame["first_round"] <= 3))


# -- what is never selected ------------------------------------------------------------------------------------------


def test_ignored_samples_are_never_selected_or_counted():
    data = Numbered()
    data.y[::4] = -100
    seen: Counter[int] = Counter()

    def step(module: Any, batch: Any) -> Tensor:
        seen.update(batch[0][:, -1].int().tolist())
        return module.ce(module(batch[0]), batch[1])

    model = StepModel(step, ce=nn.CrossEntropyLoss())
    callback = SelfPacedSelection(class_floor=0.9, growth=3.0)
    fit(callback, make_loader(data, shuffle=True), model, max_epochs=3)
    frame = callback.to_frame()
    assert np.isnan(frame["selection_loss"].to_numpy()[::4]).all()
    assert np.isnan(frame["first_round"].to_numpy()[::4]).all()
    assert frame["selected"].sum() == SAMPLES - SAMPLES // 4
    assert all(seen[i] == 1 for i in range(0, SAMPLES, 4))  # in the warm-up


def test_a_sample_whose_loss_is_nan_is_never_selected():
    data = Numbered()

    class Half(nn.Module):
        """NaN for sample 5, in evaluation only, so that training goes on."""

        def forward(self, x: Tensor) -> Tensor:
            bad = torch.where(x[:, -1:] == 5, torch.nan, 0.0)
            return model.net(x[:, :-1]) + (0 if self.training else bad)

    def step(module: Any, batch: Any) -> Tensor:
        return module.ce(module.whole(batch[0]), batch[1])

    model: Any = StepModel(step, ce=nn.CrossEntropyLoss())
    model.whole = Half()
    callback = SelfPacedSelection(growth=3.0, logits="whole", class_floor=0.99)
    fit(callback, make_loader(data), model, max_epochs=3)
    frame = callback.to_frame()
    assert np.flatnonzero(~frame["selected"]).tolist() == [5]
    assert np.isnan(frame["first_round"][5])


@pytest.mark.parametrize("options", [{}, {"rule": "threshold"}, {"clusters": "features", "clusters_per_class": 3}])
def test_one_class_and_single_samples_of_a_class(options: dict[str, Any]):
    data = Numbered()
    data.y[:] = 1
    callback = SelfPacedSelection(**options, max_fraction=0.6)
    fit(callback, make_loader(data), max_epochs=3)
    assert 8 <= callback.to_frame()["selected"].sum() < SAMPLES
    data.y[3], data.y[4] = 0, 2  # clusters smaller than clusters_per_class
    callback = SelfPacedSelection(**options)
    fit(callback, make_loader(data), max_epochs=3)
    if not options:
        assert callback.to_frame()["selected"][[3, 4]].all()


@pytest.mark.parametrize("floor", [2, 0.5])
def test_floor_keeps_the_classes_that_the_threshold_drops(floor: float):
    data = Numbered()
    data.y[:] = 0
    data.y[:4] = 1  # the model hardly learns these
    callback = SelfPacedSelection("threshold", class_floor=floor, diversity=0.0, start_fraction=0.3)
    fit(callback, make_loader(data), max_epochs=3)
    assert callback.to_frame()["selected"][:4].sum() >= 2
    without = SelfPacedSelection("threshold", class_floor=0, diversity=0.0, start_fraction=0.3)
    fit(without, make_loader(data), max_epochs=3)
    assert without.to_frame()["selected"][:4].sum() == 0


# -- with others, and numbers ----------------------------------------------------------------------------------------


def test_data_parameters_and_soft_labels_learn_on_the_selected_only():
    meta = make_loader(Numbered(9), batch_size=4)
    parameters, selection = DataParameters(lr=0.2), SelfPacedSelection(growth=1.0)
    labels = LearnableSoftLabels(CLASSES, meta=meta)
    model = Watching()
    saved: list[dict[str, Tensor]] = []
    chosen: list[Any] = []

    class Peek(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            tables = {**parameters.tables, **labels.tables}
            saved.append({name: table.values.detach().clone() for name, table in tables.items()})
            chosen.append(selection.selected)

    fit([parameters, selection, labels, Peek()], make_loader(shuffle=True), model, max_epochs=2)
    selected = chosen[1]
    now = {**parameters.tables, **labels.tables}
    for name, before in saved[1].items():
        moved = (now[name].values != before).reshape(SAMPLES, -1).any(1)
        assert not moved[~selected].any(), name
        assert moved[selected].all(), name
    assert set(model.epochs[1]) == set(selected.nonzero().flatten().tolist())


def test_dynamics_are_of_the_samples_trained_on():
    dynamics, selection, model = TrainingDynamics(), SelfPacedSelection(growth=1.0), Watching()
    fit([selection, dynamics], make_loader(shuffle=True), model, max_epochs=3)
    assert dynamics.to_frame()["visits"].tolist() == [model.visits[i] for i in range(SAMPLES)]


def test_summary_equals_a_count_by_hand():
    rows = pd.DataFrame(
        {
            "given_label": [0, 1, 0, 1, 0, 0, 2],
            "first_round_last": [1.0, 1, 1, 2, np.nan, np.nan, np.nan],
            "selected_last": [True, True, False, True, False, False, False],
            "selection_loss_last": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, np.nan],
            "is_corrupt": [False, True, False, True, True, False, False],
        }
    )
    assert SelfPacedSelection().summary(rows) == {
        "selected_fraction_last": 3 / 6,
        "selected_class_share_first": 1 / 2,
        "selected_class_share_last": 1 / 4,
        "selection_purity_first": 2 / 3,
        "selection_purity_last": 1 / 3,
    }
    unknown = SelfPacedSelection().summary(rows.drop(columns="is_corrupt"))
    assert set(unknown) == {"selected_fraction_last", "selected_class_share_first", "selected_class_share_last"}
    assert SelfPacedSelection().summary(pd.DataFrame({"index": [0]})) == {}


@pytest.mark.parametrize("method", ["spl", "self_paced_magnet"])
@pytest.mark.filterwarnings("ignore")
def test_methods_run_from_the_command_line(method: str, tmp_path: Path):
    options = [f"run_dir={tmp_path}", "progress_bar=false", "plots=false", f"method={method}"]
    options += ["experiment=digits_noise", "trainer.max_epochs=3", "trainer.accelerator=cpu"]
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        results = train(compose("config", options))
    assert 0.4 < results["selected_fraction_last"] < 0.9
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert set(rows["first_round_last"].dropna()) <= {1, 2, 3}
