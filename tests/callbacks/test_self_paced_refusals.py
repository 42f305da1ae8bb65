"""What self-paced selection refuses, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, SAMPLES, Numbered, WithIds, fit, make_loader
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from self_paced_helpers import Watching, true_losses
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from dataparams.callbacks.self_paced import SelfPacedSelection

pytestmark = [*QUIET, INERT]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        data = Numbered()
        return iter([(*data[i], i) for i in range(len(data))])


def divided() -> DistributedSamplerWrapper:
    """As Lightning hands a sampler of the user's to each process."""
    return DistributedSamplerWrapper(WeightedRandomSampler([1.0] * SAMPLES, SAMPLES), num_replicas=1, rank=0)


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (lambda: make_loader(sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)), {}, "WeightedRandomSampler"),
        (lambda: make_loader(sampler=divided()), {}, "WeightedRandomSampler"),
        (lambda: make_loader(Stream()), {"index_key": 2, "num_rows": SAMPLES}, "map-style"),
        (lambda: [make_loader(), make_loader()], {}, "one training loader"),
        (lambda: make_loader(), {"logits": "head"}, "no such submodule"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(loader: Any, options: dict[str, Any], message: str):
    model = Watching()
    with pytest.raises(ValueError, match=message):
        fit(SelfPacedSelection(**options), loader(), model)
    assert not model.epochs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": -1}, "refresh_every"),
        ({"warmup_rounds": 0}, "warmup_rounds"),
        ({"epoch": "long"}, "epoch"),
        ({"clusters": "cluster"}, "clusters"),
        ({"mode": "parallel"}, "mode"),
        ({"clusters": "class", "embedding": "net"}, "needs no embedding"),
        ({"clusters": "magnet"}, "embedding"),
        ({"clusters": "magnet", "embedding": np.zeros((24, 2))}, "clusters='features'"),
        ({"clusters": "features", "clusters_per_class": 0}, "clusters_per_class"),
        ({"eval_dataset": Stream()}, "map-style"),
        ({"start_fraction": 2.0}, "start_fraction"),
        ({"class_floor": 2.5}, "class_floor|minimum"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SelfPacedSelection(**options)


def test_a_collate_function_that_drops_samples_is_right_or_refused_with_a_reason():
    class Numbers(Numbered):
        def __getitem__(self, index: int) -> Any:
            return (*super().__getitem__(index), index)

    def collate(samples: list[Any]) -> Any:
        return torch.utils.data.default_collate([sample for sample in samples if sample[2] % 5])

    callback, model = SelfPacedSelection(index_key=2), Watching()
    with suppress(ValueError):  # refusing is right, too
        fit(callback, DataLoader(Numbers(), 8, collate_fn=collate), model, max_epochs=3)
    if len(model.epochs) < 3:
        return
    frame, losses = callback.to_frame(), true_losses(model)
    seen = frame["selection_loss"].to_numpy()
    known = ~np.isnan(seen)
    assert np.flatnonzero(~known).tolist() == [0, 5, 10, 15, 20]
    assert seen[known] == pytest.approx(losses.numpy()[known], rel=1e-5)


def test_output_that_is_not_logits_is_refused_with_the_way_out():
    class Pair(Watching):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return self.criterion(self(batch[0])["logits"], batch[1])

    with pytest.raises((ValueError, TypeError), match="logits="):
        fit(SelfPacedSelection(), model=Pair(), max_epochs=2)


def test_batches_of_a_batch_sampler_with_ids_are_whole():
    batches = BatchSampler(SequentialSampler(range(SAMPLES)), 5, drop_last=False)
    callback = SelfPacedSelection(index_key=2)
    fit(callback, DataLoader(WithIds(), batch_sampler=batches), max_epochs=2)
    assert 12 <= callback.to_frame()["first_round"].notna().sum() < SAMPLES
