"""How self-paced selection loads samples beside the training: as the user's loader does, and the same ones again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, SAMPLES, Model, Numbered, assert_same, fit, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from self_paced_helpers import Watching, true_losses
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataparams import DataParameters
from dataparams.callbacks import evaluation_pass, magnet
from dataparams.callbacks.self_paced import SelfPacedSelection
from dataparams.functional.dynamics import Observation

MANY = 300  # several batches of the embedding's a round
pytestmark = [*QUIET, INERT]


class Augmented(Numbered):
    """Draws from every generator; tells how it was asked."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(samples)
        self.alone: list[int] = []
        self.together: list[list[int]] = []

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.alone.append(index)
        return self.sample(index)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        x = x.clone()
        x[0] += float(torch.rand(())) + np.random.rand()  # noqa: NPY002 (as users do)
        return x, y


class Batched(Augmented):
    """Reads a batch at once, as data sets on a disk do."""

    def __getitems__(self, index: list[int]) -> list[tuple[Tensor, Tensor]]:
        self.together.append(list(index))
        return [self.sample(i) for i in index]


class Embedding(nn.Module):
    """Remembers its inputs; only while it trains does it see what is augmented."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = nn.Linear(4, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.clone())
            return self.body(x[:, :-1])
        return self.body(unaugmented(x)[:, :-1])


class Blind(Model):
    """Does not see what is augmented."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(unaugmented(x))


def unaugmented(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)


def magnet_fit(
    data: Numbered, epochs: int = 3, *more: Any, workers: int = 0, ckpt: Path | None = None, **options: Any
) -> Embedding:
    network = Embedding()
    callback = SelfPacedSelection(clusters="magnet", embedding=network, clusters_per_class=2)
    trainer = make_trainer([callback, *more], epochs, **options)
    trainer.fit(Blind(), make_loader(data, 64, num_workers=workers), ckpt_path=ckpt)
    return network


# -- the embedding's batches -------------------------------------------------------------------------------------------


def test_the_embeddings_batches_are_read_at_once():
    data = Batched()
    network = magnet_fit(data)
    assert len(network.seen) == 2
    assert not data.alone
    asked = [batch for batch in data.together if batch == network.seen[-1][:, -1].int().tolist()]
    assert len(asked) == 1


@pytest.mark.parametrize("kind", [Augmented, Batched])
def test_the_embeddings_samples_do_not_depend_on_who_loads_them(kind: type[Augmented]):
    data = kind(MANY)
    alone, helped = magnet_fit(data), magnet_fit(data, workers=1)
    assert_same(alone.seen, helped.seen)
    assert_same(alone.state_dict(), helped.state_dict())
    noise = [float(batch[0, 0] - data.x[int(batch[0, -1]), 0]) for batch in alone.seen]
    assert len(set(noise)) == len(noise) == 10  # another one in every step


@pytest.mark.parametrize("workers", [0, 1])
def test_the_embedding_goes_on_in_mid_epoch_with_the_same_samples(workers: int, tmp_path: Path):
    whole = magnet_fit(Augmented(MANY), 4, workers=workers)
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    magnet_fit(Augmented(MANY), 3, save, workers=workers, enable_checkpointing=True)
    again = magnet_fit(Augmented(MANY), 4, ckpt=tmp_path / "step=12.ckpt", workers=workers)
    assert len(whole.seen) == 15  # five an epoch, after the first
    # The model's own loader begins its epoch anew in Lightning; the embedding's batches of the epoch do not.
    assert_same(again.seen[:3], whole.seen[7:10])


def test_the_workers_of_the_embedding_leave_with_a_fit_that_is_stopped():
    callback = SelfPacedSelection(clusters="magnet", embedding=Embedding(), clusters_per_class=2)
    training = callback.clusterer.magnet
    assert training is not None
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(callback, make_loader(Numbered(MANY), 64, num_workers=1), Blind(stop_at=7), max_epochs=3)
    assert training.steps == 2  # batches of the round are left
    assert training._batches is None


# -- loading as the user does ------------------------------------------------------------------------------------------


def set_up(number: int) -> None:
    """A worker's init function."""


def test_other_loaders_load_as_the_users_does(monkeypatch: pytest.MonkeyPatch):
    made: list[DataLoader] = []

    class Noted(DataLoader):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(evaluation_pass, "DataLoader", Noted)
    monkeypatch.setattr(magnet, "DataLoader", Noted)
    loader = make_loader(
        num_workers=1, multiprocessing_context="forkserver", timeout=50, prefetch_factor=3, worker_init_fn=set_up
    )
    own = evaluation_pass.loading(loader)
    assert own["prefetch_factor"] == 3
    fake = type("Trainer", (), {"global_rank": 0, "world_size": 1})()
    look: Any = evaluation_pass.EvaluationPass
    look(fake, None, loader, None, torch.arange(SAMPLES), None, None)
    training = magnet.MagnetTraining(Embedding())
    training._positions, training._plan = torch.arange(3), torch.tensor([[0, 1]])
    monkeypatch.setattr(Noted, "__iter__", lambda self: iter([]))
    training._load(loader)
    assert len(made) == 2
    for other in made:
        assert evaluation_pass.loading(other) == own


# -- whose losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [(0, 5, 10), (23,)])
def test_a_collate_function_that_drops_samples_is_refused_at_the_first_short_batch(dropped: tuple[int, ...]):
    class Numbers(Numbered):
        def __getitem__(self, index: int) -> Any:
            return (*super().__getitem__(index), index)

    def without(samples: list[Any]) -> Any:
        return torch.utils.data.default_collate([sample for sample in samples if sample[2] not in dropped])

    model = Watching()
    with pytest.raises(ValueError, match=r"collate function without made a batch of .*Subset"):
        fit(SelfPacedSelection(index_key=2), DataLoader(Numbers(), 8, collate_fn=without), model, max_epochs=3)
    assert sum(model.batches.values()) == (0 if 0 in dropped else 3)  # the last batch may be short: it is looked at


def test_ids_that_another_method_names_are_the_selections_too():
    class Backwards(Numbered):
        def __getitem__(self, index: int) -> Any:
            return (SAMPLES - 1 - index, *super().__getitem__(index))

    class Reads(Watching):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[1:], batch_idx)

    callback, model = SelfPacedSelection(growth=1.0), Reads()
    fit([callback, DataParameters(index_key=0, lr=0.0)], make_loader(Backwards(), shuffle=True), model, max_epochs=3)
    torch.testing.assert_close(callback.selection_loss, true_losses(model).flip(0))
    assert callback.selected is not None
    assert len(model.epochs[2]) == pytest.approx(SAMPLES / 2, abs=2)


def test_losses_of_training_stay_on_their_device_until_the_epoch_ends():
    """The meta device has no data: whoever reads from it in a step, as a copy to the host does, fails."""
    callback = SelfPacedSelection(refresh_every=2)
    callback.selection_loss = torch.zeros(5)
    loss = torch.ones(3, device="meta")
    index, flag = torch.zeros(3, dtype=torch.int64, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    callback.observe(index, Observation(loss, loss, loss, flag, index, flag))
    assert callback.selection_loss.device.type == "meta"


def test_of_a_sample_that_comes_twice_the_larger_loss_counts_and_ignored_ones_have_none():
    callback = SelfPacedSelection(refresh_every=2)
    callback.selection_loss = torch.full((5,), 9.0)
    loss, flag = torch.tensor([1.0, 3.0, 2.0, 7.0]), torch.tensor([True, True, True, False])
    callback.observe(torch.tensor([4, 1, 4, 2]), Observation(loss, loss, loss, flag, flag.long(), flag))
    torch.testing.assert_close(callback.selection_loss, torch.tensor([9, 3, torch.nan, 9, 2]), equal_nan=True)
