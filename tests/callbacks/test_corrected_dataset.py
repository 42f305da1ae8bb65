"""A data set with learned labels: everything as it was but for the target."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import CLASSES, INERT, QUIET, SAMPLES, Numbered, StepModel, WithIds, fit, make_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataparams import LearnableSoftLabels
from dataparams.callbacks.corrected_dataset import CorrectedDataset
from dataparams.callbacks.pencil import Pencil

pytestmark = [*QUIET, INERT]
Pair = namedtuple("Pair", "x y")
LABELS = torch.tensor([2, -1, 0, 1])
GIVEN = [0, 1, 0, 2]


class Shaped(Dataset):
    """Samples 0 to 3, with the target where ``make`` puts it."""

    def __init__(self, make: Callable[[Tensor, int], Any]) -> None:
        self.samples = [make(torch.tensor([float(i)]), label) for i, label in enumerate(GIVEN)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


SHAPES: dict[str, tuple[Callable[[Tensor, int], Any], Any, Any]] = {
    "tuple": (lambda x, y: (x, y), None, 1),
    "longer tuple": (lambda x, y: (x, y, "more"), None, 1),
    "list": (lambda x, y: [x, y], None, 1),
    "namedtuple": (Pair, None, 1),
    "tensor": (lambda x, y: (x, torch.tensor(y)), None, 1),
    "small tensor": (lambda x, y: (x, torch.tensor([y], dtype=torch.int16)), None, 1),
    "numpy": (lambda x, y: (x, np.int64(y)), None, 1),
    "array": (lambda x, y: (x, np.array([y], dtype=np.uint8)), None, 1),
    "dictionary": (lambda x, y: {"image": x, "label": y}, None, "label"),
    "named key": (lambda x, y: {"label": x, "fine": y}, "fine", "fine"),
    "position": (lambda x, y: (y, x), 0, 0),
    "from the end": (lambda x, y: (x, "more", y), -1, -1),
}


@pytest.mark.parametrize(("make", "target_key", "where"), SHAPES.values(), ids=list(SHAPES))
def test_only_the_target_is_replaced_in_its_own_type(make: Any, target_key: Any, where: Any):
    data = Shaped(make)
    before = copy.deepcopy(data.samples)
    corrected = CorrectedDataset(data, LABELS, target_key=target_key)
    assert len(corrected) == 4
    for i, expected in enumerate([2, GIVEN[1], 0, 1]):
        sample, own = corrected[i], data[i]
        assert type(sample) is type(own)
        target = sample[where]
        assert type(target) is type(own[where])
        assert getattr(target, "dtype", None) == getattr(own[where], "dtype", None)
        assert np.shape(target) == np.shape(own[where])
        assert np.asarray(target).item() == expected
        keys = own.keys() if isinstance(own, dict) else range(len(own))
        assert all(sample[key] is own[key] for key in keys if sample[key] is not target)
    assert str(data.samples) == str(before)  # the user's own samples are as they were


def test_positions_count_from_the_end_as_in_the_data_set():
    corrected = CorrectedDataset(Shaped(lambda x, y: (x, y)), LABELS)
    assert corrected[-1] == corrected[3]
    with pytest.raises(IndexError):
        corrected[4]


def test_soft_targets_are_distributions_also_where_none_was_learned():
    labels = torch.tensor([[0.2, 0.5, 0.3], [torch.nan] * 3, [1, 0, 0], [0, 0, 1]])
    start = torch.full((3, 3), 0.1).fill_diagonal_(0.8)
    corrected = CorrectedDataset(Shaped(lambda x, y: (x, y)), labels, start)
    assert torch.equal(corrected[0][1], labels[0])
    assert torch.equal(corrected[1][1], start[GIVEN[1]])


def test_ids_say_which_label_belongs_to_a_sample():
    """Ids in the samples, at position 0, in another order than that of training."""
    callback = Pencil(
        CLASSES, lr=60.0, warmup_epochs=0, label_epochs=9, index_key=2, ids=list(range(100, 100 + SAMPLES))
    )
    data = WithIds(shift=100)
    model = StepModel(lambda model, batch: F.cross_entropy(model.logits(batch[0]), batch[1]))
    fit(callback, make_loader(data, shuffle=True), model=model, max_epochs=9)
    learned = callback.corrected_labels()
    assert (learned != data.y).any()

    class Reversed(Dataset):
        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> Any:
            x, y, identity = data[SAMPLES - 1 - index]
            return x, y, identity

    corrected = callback.corrected_dataset(Reversed())
    assert [int(corrected[i][1]) for i in range(SAMPLES)] == learned.flip(0).tolist()


class Swapped(Numbered):
    """``(id, x, y)``."""

    def __getitem__(self, index: int) -> Any:
        return index, self.x[index], self.y[index]


def test_the_target_is_beside_the_id():
    callback = Pencil(CLASSES, index_key=0, warmup_epochs=0, label_epochs=1)
    model = StepModel(lambda model, batch: F.cross_entropy(model.logits(batch[1]), batch[2]))
    fit(callback, make_loader(Swapped()), model=model, max_epochs=1)
    callback.offsets.write(torch.arange(SAMPLES), 50 * torch.eye(CLASSES)[(Numbered().y + 1) % CLASSES])
    corrected = callback.corrected_dataset(Swapped())
    for i in range(SAMPLES):
        identity, x, y = corrected[i]
        assert identity == i
        assert torch.equal(x, Numbered()[i][0])
        assert y == (Numbered().y[i] + 1) % CLASSES


def test_a_student_trains_on_the_learned_labels():
    """Hard and soft, through a loader with workers: targets are what the callback says."""
    callback, data = Pencil(CLASSES, lr=60.0, warmup_epochs=0, label_epochs=9), Numbered()
    fit(callback, max_epochs=9)
    hard = callback.corrected_dataset(data)
    batch = next(iter(DataLoader(hard, batch_size=SAMPLES, num_workers=1)))
    assert torch.equal(batch[0], data.x)
    assert torch.equal(batch[1], callback.corrected_labels())
    assert (batch[1] != data.y).any()
    soft = callback.corrected_dataset(data, soft=True)
    targets = next(iter(DataLoader(soft, batch_size=SAMPLES)))[1]
    assert torch.equal(targets, callback.soft_labels())
    assert torch.equal(data.y, Numbered().y)


def test_samples_that_were_never_seen_keep_their_own_target():
    callback, data = Pencil(CLASSES, warmup_epochs=0, label_epochs=1), Numbered()
    fit(callback, DataLoader(data, batch_sampler=[list(range(1, SAMPLES))]), max_epochs=1)  # type: ignore[arg-type]
    assert callback.corrected_labels()[0] == -1
    assert callback.corrected_dataset(data)[0][1] == data.y[0]
    start = callback.corrected_dataset(data, soft=True)[0][1]
    assert start.argmax() == data.y[0]
    assert start.sum() == pytest.approx(1)


def test_another_data_set_is_refused():
    callback = Pencil(CLASSES, warmup_epochs=0, label_epochs=1)
    fit(callback, max_epochs=1)
    with pytest.raises(ValueError, match=f"has 25 samples, but labels were learned for {SAMPLES}"):
        callback.corrected_dataset(Numbered(25))


@pytest.mark.parametrize(
    ("make", "target_key", "message"),
    [
        (lambda x, y: (x,), None, "1 positions"),
        (lambda x, y: (x, y), 2, "2 positions"),
        (lambda x, y: (x, y), "label", "2 positions"),
        (lambda x, y: {"x": x, "z": y}, None, r"keys \['x', 'z'\]"),
        (lambda x, y: {"target": x, "label": y}, None, r"keys \['label', 'target'\]"),
        (lambda x, y: {"x": x, "y": y}, "z", r"keys \['x', 'y'\]"),
        (lambda x, y: x, None, "type Tensor"),
    ],
)
def test_a_sample_without_a_target_says_what_it_has(make: Any, target_key: Any, message: str):
    corrected = CorrectedDataset(Shaped(make), LABELS, target_key=target_key)
    with pytest.raises(KeyError, match=rf"target_key={target_key!r} does not say.*{message}"):
        corrected[0]


@pytest.mark.parametrize("target_key", [None, 1])
def test_what_is_not_the_given_label_is_not_overwritten(target_key: int | None):
    """(x, weight, y), where the callback was not told; or another data set of the same length."""
    data = Shaped(lambda x, y: (x, 5, y))
    corrected = CorrectedDataset(data, LABELS, target_key=target_key, given=torch.tensor(GIVEN))
    with pytest.raises(ValueError, match=r"sample 0 has 5 at target_key=1.*learned from class 0"):
        corrected[0]
    right = CorrectedDataset(data, LABELS, target_key=2, given=torch.tensor(GIVEN))
    assert [right[i][1:] for i in range(4)] == [(5, 2), (5, 1), (5, 0), (5, 1)]


def test_the_callbacks_own_target_key_is_the_default():
    class Weighted(Numbered):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x, 1.0, y

    def step(own: StepModel, batch: Any) -> Tensor:
        return own.criterion(own(batch[0]), batch[2])

    data = Weighted()
    callback = LearnableSoftLabels(CLASSES, meta=DataLoader(Weighted(9), batch_size=4), target_key=2)
    fit(callback, DataLoader(data, batch_size=8), model=StepModel(step, criterion=torch.nn.CrossEntropyLoss()))
    corrected = callback.corrected_dataset(data)
    assert [corrected[i][1] for i in range(SAMPLES)] == [1.0] * SAMPLES
    assert [int(corrected[i][2]) for i in range(SAMPLES)] == callback.corrected_labels().tolist()
