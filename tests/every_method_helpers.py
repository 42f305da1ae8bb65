"""A tiny fit whose truth is held outside of the library, and how states are compared: for the tests of callbacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dataparams.callbacks import MethodCallback

CLASSES = 3
SAMPLES = 24
# pytestmark of the files that fit
QUIET = [
    # tiny loaders without workers, short epochs: Lightning's advice about speed
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # a resumed trainer without the ModelCheckpoint of the first
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # torch.compile looks at what it was handed, after every break of the graph
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
INERT = pytest.mark.filterwarnings("ignore:.*next to nothing:UserWarning")  # rates of 0, and fits of a few steps


@dataclass(frozen=True)
class Method:
    """A line of the suite's table.

    Attributes:
        make: a callback with rates large enough to see in a few steps.
        neutral: the same with rates of 0, for methods that start neutral: plain training, bit for bit. None for others.
        learns: it changes training; only ``TrainingDynamics`` does not.
    """

    make: Callable[[], MethodCallback]
    neutral: Callable[[], MethodCallback] | None = None
    learns: bool = True


class Numbered(Dataset):
    """Samples whose last feature is their own number, so that a batch tells who is in it."""

    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.x = torch.randn(samples, 5, generator=generator)
        self.x[:, -1] = torch.arange(samples)
        self.y = torch.randint(CLASSES, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@lru_cache(None)
def trusted(samples: int = 9) -> DataLoader:
    """A loader of other samples, for the methods that learn from a meta set; one, for two of them must agree on it."""
    return DataLoader(Numbered(samples), batch_size=4)


class WithIds(Numbered):
    """The same, with an id in each sample: its number, plus ``shift``."""

    def __init__(self, samples: int = SAMPLES, shift: int = 0) -> None:
        super().__init__(samples)
        self.shift = shift

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:  # type: ignore[override]
        return self.x[index], self.y[index], index + self.shift


class Model(L.LightningModule):
    """Two linear layers; remembers which samples it was trained on, and their losses."""

    def __init__(self, criterion: nn.Module | None = None, stop_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.stop_at = stop_at
        self.error: BaseException = RuntimeError("stopped by the test")
        self.visits: Counter[int] = Counter()
        self.losses: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :-1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch[0], batch[1]
        logits = self(x)
        self.remember(x, nn.functional.cross_entropy(logits.detach().float(), y, reduction="none"))
        loss = self.criterion(logits, y)
        if self.stop_at == self.global_step:
            raise self.error
        return loss

    @torch.compiler.disable()
    def remember(self, x: Tensor, losses: Tensor) -> None:
        for number, loss in zip(x[:, -1].int().tolist(), losses.tolist(), strict=True):
            self.visits[number] += 1
            self.losses[number] += loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class StepModel(Model):
    """A model with the training step that a test needs, and the loss modules named by ``losses``."""

    def __init__(self, step: Callable[[StepModel, Any], Any], **losses: nn.Module) -> None:
        super().__init__()
        del self.criterion
        for name, loss in losses.items():
            setattr(self, name, loss)
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x[:, :-1])


def make_trainer(callbacks: Any, max_epochs: int = 2, **options: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    machine = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return L.Trainer(max_epochs=max_epochs, callbacks=callbacks, **{**quiet, **machine, **options})


def make_loader(dataset: Dataset | None = None, batch_size: int = 8, **options: Any) -> DataLoader:
    return DataLoader(dataset if dataset is not None else Numbered(), batch_size=batch_size, **options)


def fit(
    callbacks: Any,
    loader: DataLoader | None = None,
    model: L.LightningModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Any:
    """Train and return the model."""
    model = Model() if model is None else model
    trainer = make_trainer(callbacks, **options)
    trainer.fit(model, make_loader() if loader is None else loader, ckpt_path=ckpt_path)
    return model


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dictionaries and sequences, with where it is."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(state, (list, tuple)):
        for key, value in enumerate(state):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, state


def assert_same(left: Any, right: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Two states hold the same values: bit for bit, unless a tolerance is given."""
    ours, theirs = dict(leaves(left)), dict(leaves(right))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        if isinstance(value, (Tensor, float)):
            torch.testing.assert_close(
                torch.as_tensor(value),
                torch.as_tensor(theirs[path]),
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda text, path=path: f"{path}: {text}",
            )
        else:
            assert value == theirs[path], path


def snapshot(state: Any) -> dict[str, Any]:
    """A copy of a state by path; a callback's own state is by reference and moves on."""
    return {path: value.clone() if isinstance(value, Tensor) else value for path, value in leaves(state)}


def row_tensors(callback: MethodCallback) -> dict[str, Tensor]:
    """What a method keeps a sample or class, without the training dynamics that all keep."""
    state = snapshot(callback.state_dict())
    return {
        path: value for path, value in state.items() if isinstance(value, Tensor) and not path.startswith("/dynamics")
    }
