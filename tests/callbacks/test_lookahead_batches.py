"""Where a batch holds the network's input and the loss's target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    Numbered,
    StepModel,
    make_loader,
)
from lookahead_helpers import cross_entropy, learned, refused
from torch import Tensor

from dataparams import InstanceLearningRates

pytestmark = [*QUIET, INERT]


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Named(NamedTuple):
    id: Tensor
    x: Tensor
    y: Tensor


class Shaped(Numbered):
    """Samples in another shape."""

    def __init__(self, shape: Callable[[int, Tensor, Tensor], Any], samples: int = 24) -> None:
        super().__init__(samples)
        self.shape = shape

    def __getitem__(self, index: int) -> Any:
        return self.shape(index, self.x[index], self.y[index])


SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "usual_keys": (lambda i, x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"]), {}),
    "with_ids": (
        lambda i, x, y: {"x": x, "y": y, "number": i}, lambda b: (b["x"], b["y"]), {"index_key": "number"}
    ),
    "keys": (
        lambda i, x, y: {"spectrum": x, "word": y}, lambda b: (b["spectrum"], b["word"]),
        {"input_key": "spectrum", "target_key": "word"},
    ),
    "nested": (
        lambda i, x, y: {"in": {"x": x}, "out": {"y": y}}, lambda b: (b["in"]["x"], b["out"]["y"]),
        {"input_key": lambda b: b["in"]["x"], "target_key": lambda b: b["out"]["y"]},
    ),
    "ids_first": (lambda i, x, y: (i, x, y), lambda b: (b[1], b[2]), {"index_key": 0}),
    "ids_between": (lambda i, x, y: (x, i, y), lambda b: (b[0], b[2]), {"index_key": 1}),
    "ids_last": (lambda i, x, y: (x, y, i), lambda b: (b[0], b[1]), {"index_key": -1}),
    "positions": (lambda i, x, y: (y, i, x), lambda b: (b[2], b[0]), {"input_key": 2, "target_key": 0}),
    "from_the_end": (lambda i, x, y: (i, x, y), lambda b: (b[1], b[2]), {"input_key": -2, "target_key": -1}),
    "named_ids": (lambda i, x, y: Named(torch.tensor(i), x, y), lambda b: (b.x, b.y), {"index_key": "id"}),
    "named": (
        lambda i, x, y: Named(torch.tensor(i), x, y), lambda b: (b.x, b.y), {"input_key": "x", "target_key": "y"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_input_and_target_are_found(name: str):
    shape, read, options = SHAPES[name]
    model = StepModel(lambda m, b: cross_entropy(m, read(b)))
    callback = InstanceLearningRates(meta_fraction=0.25, update="sgd", normalize=False, **options)
    learned(callback, model, make_loader(Shaped(shape)))
    usual = InstanceLearningRates(meta_fraction=0.25, update="sgd", normalize=False)
    learned(usual, StepModel(cross_entropy))
    assert torch.equal(callback.table.values, usual.table.values)


def collate(samples: list[Sample]) -> Sample:
    return Sample(torch.stack([s.x for s in samples]), torch.stack([s.y for s in samples]))


def test_a_batch_of_the_users_own_class():
    loader = make_loader(Shaped(lambda i, x, y: Sample(x, y)), collate_fn=collate)
    model = StepModel(lambda m, b: cross_entropy(m, (b.x, b.y)))
    learned(InstanceLearningRates(meta_fraction=0.25, input_key="x", target_key="y"), model, loader)
    message = refused(InstanceLearningRates(), "input_key", StepModel(model.step), loader, error=KeyError)
    assert "Sample" in message


UNKNOWN = [
    (lambda i, x, y: {"spectrum": x, "word": y}, {}, "input_key", "spectrum"),
    (lambda i, x, y: {"x": x, "word": y}, {}, "target_key", "word"),
    (lambda i, x, y: {"x": x, "image": x, "y": y}, {}, "input_key", "image"),
    (lambda i, x, y: {"x": x, "y": y}, {"input_key": "z"}, "input_key='z'", "'y'"),
    (lambda i, x, y: (x, y), {"target_key": 2}, "target_key=2", "2 positions"),
    (lambda i, x, y: (i, x, y), {"index_key": lambda b: b[0]}, "input_key", "logits="),
]


@pytest.mark.parametrize(("shape", "options", "match", "named"), UNKNOWN)
def test_a_batch_that_does_not_say(shape: Any, options: dict[str, Any], match: str, named: str):
    def step(model: Any, batch: Any) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else batch[-2:]
        return cross_entropy(model, (parts[0], parts[-1]))

    error = (KeyError, ValueError)
    assert named in refused(InstanceLearningRates(**options), match, StepModel(step), make_loader(Shaped(shape)), error)


def test_ids_of_the_training_data_alone():
    """The meta loader's batches are (x, y), the training's (x, y, id)."""
    loader = make_loader(Shaped(lambda i, x, y: (x, y, i)))
    learned(InstanceLearningRates(meta=make_loader(Numbered(9)), index_key=2), StepModel(cross_entropy), loader)
