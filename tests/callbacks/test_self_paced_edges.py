"""Sets that a selection does not like: without finite features, of one sample, of another length than before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, SAMPLES, Model, Numbered, fit, make_loader, make_trainer
from torch import Tensor, nn

from dataparams.callbacks.self_paced import SelfPacedSelection
from dataparams.sampling.clusters import cluster_by_class, filled_by_class

pytestmark = [*QUIET, INERT]


class Embedding(nn.Module):
    """Passes on what it cannot compute with; remembers whom it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = nn.Linear(4, 3)
        self.trained: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.trained |= set(x[:, -1].int().tolist())
        return self.body(x[:, :-1])


class Robust(Model):
    """Makes do with inputs that are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num(0, 0, 0))


def make(kind: str, **options: Any) -> SelfPacedSelection:
    """A selection with clusters of every kind, by rules of every kind."""
    kinds: dict[str, Any] = {
        "class": {},
        "threshold": {"rule": "threshold"},
        "count": {"rule": "count", "max_fraction": "auto"},
        "random": {"rule": "random"},
        "components": {"clusters": "features"},
        "trunk": {"clusters": "features", "embedding": "net.1"},
        "magnet": {"clusters": "magnet", "embedding": Embedding(), "clusters_per_class": 2},
    }
    return SelfPacedSelection(**kinds[kind], **options)


KINDS = ["class", "threshold", "count", "random", "components", "trunk", "magnet"]


# -- features that are not finite --------------------------------------------------------------------------------------


def test_gaps_are_filled_with_the_mean_of_the_class_or_of_all():
    nan, inf = torch.nan, torch.inf
    features = torch.tensor([[1.0, 2], [3, nan], [nan, inf], [5, 6], [nan, nan], [-inf, 9]])
    labels = torch.tensor([4, 4, 4, -1, 8, -1])
    filled = filled_by_class(features, labels)
    assert filled.tolist() == [[1, 2], [3, 2], [2, 2], [5, 6], [3, pytest.approx(17 / 3)], [5, 9]]
    assert filled_by_class(filled, labels) is filled
    with pytest.raises(ValueError, match="finite features"):
        filled_by_class(torch.tensor([[1.0, nan], [nan, 2.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_array_with_gaps_puts_them_into_clusters_of_their_class(bad: float):
    features = np.random.default_rng(0).normal(size=(SAMPLES, 3)).astype(np.float32)
    holes = [2, 7]
    features[holes, 1] = bad
    data = Numbered()
    callback = SelfPacedSelection(clusters="features", embedding=features, clusters_per_class=2, seed=4)
    fit(callback, make_loader(data, shuffle=True), max_epochs=2)
    whole = [i for i in range(SAMPLES) if i not in holes]
    index = cluster_by_class(features[whole], data.y[whole], 2, 4)
    assert torch.equal(callback.cluster[whole], index.cluster)  # as if those with gaps were not there
    for hole in holes:
        features[hole, 1] = features[[i for i in whole if data.y[i] == data.y[hole]], 1].mean()
        away = (index.centers - torch.from_numpy(features[hole])).norm(dim=1)
        away[index.classes != data.y[hole]] = torch.inf
        assert callback.cluster[hole] == away.argmin()


@pytest.mark.parametrize("kind", ["components", "trunk", "magnet"])
def test_inputs_with_gaps_are_selected_in_their_class_and_train_no_embedding(kind: str):
    data = Numbered()
    data.x[[2, 9], 0] = torch.nan
    data.y[5:] = data.y[5:].clamp(max=1)
    data.y[[3, 4]] = 2
    data.x[[3, 4], 1] = torch.inf  # a class without any features

    class Trunk(Robust):
        """Whose features are not finite, and whose losses are."""

        def forward(self, x: Tensor) -> Tensor:
            self.net[1](self.net[0](x[:, :-1]))  # where the hook listens
            return self.net[2](torch.tanh(self.net[0](x[:, :-1].nan_to_num(0, 0, 0))))

    callback = make(kind, growth=2.0)
    fit(callback, make_loader(data, shuffle=True), Trunk() if kind == "trunk" else Robust(), max_epochs=3)
    frame = callback.to_frame()
    assert frame["selected"].all()
    for cluster in frame["cluster"].unique():
        assert data.y[np.flatnonzero(frame["cluster"] == cluster)].unique().numel() == 1
    network = callback.clusterer.network
    if isinstance(network, Embedding):
        assert network.trained
        assert network.trained.isdisjoint({2, 3, 4, 9})
        assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


@pytest.mark.parametrize("kind", ["components", "magnet"])
def test_features_that_are_all_gaps_are_refused_with_a_reason(kind: str):
    data = Numbered()
    data.x[:, 0] = torch.nan
    with pytest.raises(ValueError, match="no sample has finite features"):
        fit(make(kind), make_loader(data), Robust(), max_epochs=2)


# -- few samples, no losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_set_of_one_or_two_samples_is_trained_on(kind: str, count: int):
    callback, model = make(kind), Model()
    fit(callback, make_loader(Numbered(count)), model, max_epochs=3)
    frame = callback.to_frame()
    assert len(frame) == count
    assert frame["selected"].sum() >= 1
    assert sum(model.visits.values()) == 3 * count


@pytest.mark.parametrize("kind", KINDS)
def test_few_labels_among_many_ignored(kind: str):
    data = Numbered()
    data.y[3:] = -100
    data.y[:3] = torch.arange(3)
    callback = make(kind)
    fit(callback, make_loader(data, batch_size=24), max_epochs=3)
    selected = np.flatnonzero(callback.to_frame()["selected"])
    assert len(selected)
    assert set(selected) <= {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_are_all_nan_are_refused_with_a_reason(kind: str):
    class Diverged(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if self.trainer.training else torch.nan)

    with pytest.raises(ValueError, match=r"no sample has a finite loss, .* diverged"):
        fit(make(kind), model=Diverged(), max_epochs=3)


# -- another data set in a second fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [SAMPLES - 4, SAMPLES + 6])
@pytest.mark.parametrize("epoch", ["keep", "shrink"])
def test_a_second_fit_on_another_number_of_samples_is_refused_with_a_reason(samples: int, epoch: Any):
    callback, model = SelfPacedSelection(epoch=epoch), Model()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(model, make_loader())
    trainer.fit_loop.max_epochs = 4
    with pytest.raises(ValueError, match=f"rows for {SAMPLES} samples"):
        trainer.fit(model, make_loader(Numbered(samples)))


@pytest.mark.parametrize("samples", [SAMPLES - 4, SAMPLES + 6])
def test_a_second_fit_on_more_or_fewer_ids_looks_again(samples: int):
    class Named(Numbered):
        def __getitem__(self, index: int) -> Any:
            return (*super().__getitem__(index), f"sample {index}")

    callback, model = SelfPacedSelection(index_key=2, growth=1.0, refresh_every=0), Model()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(model, make_loader(Named()))
    trainer.fit_loop.max_epochs = 4
    model.visits.clear()
    trainer.fit(model, make_loader(Named(samples)))
    assert len(model.visits) == samples
    frame = callback.to_frame().set_index("id")
    assert frame.loc[[f"sample {i}" for i in range(samples)], "selection_loss"].notna().all()
    assert frame["selected"].sum() == pytest.approx(samples / 2, abs=2)
