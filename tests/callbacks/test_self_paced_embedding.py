"""The embedding of a self-paced selection: where features come from, and whether they move."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    assert_same,
    fit,
    make_loader,
    make_trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Subset

from dataparams.callbacks import self_paced
from dataparams.callbacks.self_paced import SelfPacedSelection
from dataparams.sampling.clusters import cluster_by_class

pytestmark = [*QUIET, INERT]


class Embedding(nn.Module):
    """Remembers whom it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.trained: Counter[int] = Counter()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.trained.update(x[:, -1].int().tolist())
            self.steps += 1
        return self.body(x[:, :-1])


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def magnet(embedding: nn.Module, mode: Any = "concurrent", **options: Any) -> SelfPacedSelection:
    options = {"growth": 1.0, "clusters_per_class": 2, **options}
    return SelfPacedSelection(clusters="magnet", embedding=embedding, mode=mode, **options)


# -- features ---------------------------------------------------------------------------------------------------------


def test_an_array_is_taken_by_position():
    features = np.random.default_rng(0).normal(size=(SAMPLES, 3)).astype(np.float32)
    callback = SelfPacedSelection(clusters="features", embedding=features, clusters_per_class=2, seed=4)
    fit(callback, make_loader(shuffle=True), max_epochs=2)
    expected = cluster_by_class(features, Numbered().y, 2, 4).cluster
    assert torch.equal(callback.cluster, expected)
    frame = callback.to_frame()
    for cluster in frame["cluster"].unique():
        own = frame.query(f"cluster == {cluster}").sort_values("selection_loss")
        assert own["selected"].is_monotonic_decreasing
        assert own["given_label"].nunique() == 1


@pytest.mark.parametrize("rows", [SAMPLES - 1, SAMPLES + 1, 1])
def test_an_array_of_another_length_is_refused_before_the_first_step(rows: int):
    model = Model()
    with pytest.raises(ValueError, match="embedding"):
        fit(SelfPacedSelection(clusters="features", embedding=np.zeros((rows, 3))), model=model)
    assert not model.visits


def test_an_array_of_the_whole_data_set_is_refused_for_a_subset():
    model, data = Model(), Subset(Numbered(), list(range(12, 24)))
    with pytest.raises(ValueError, match="embedding"):
        fit(SelfPacedSelection(clusters="features", embedding=np.zeros((SAMPLES, 3))), make_loader(data), model)
    assert not model.visits


def test_the_trunk_gives_its_features_and_loses_the_hook():
    callback, model = SelfPacedSelection(clusters="features", embedding="net.1", clusters_per_class=2), Model()
    fit(callback, make_loader(shuffle=True, batch_size=7), model, max_epochs=2)
    model.eval()
    with torch.no_grad():
        features = model.net[:2](Numbered().x[:, :-1])
    assert torch.equal(callback.cluster, cluster_by_class(features, Numbered().y, 2, 0).cluster)
    assert not any(child._forward_hooks for child in model.modules())


def test_an_unknown_name_is_refused_before_the_first_step():
    model = Model()
    with pytest.raises(ValueError, match="neither a submodule of Model nor"):
        fit(SelfPacedSelection(clusters="features", embedding="trunk"), model=model)
    assert not model.visits


def test_a_network_of_the_users_is_used_as_it_stands():
    network = Embedding()
    before = weights(network)
    callback = SelfPacedSelection(clusters="features", embedding=network, clusters_per_class=2)
    fit(callback, make_loader(shuffle=True, batch_size=7), max_epochs=3)
    assert_same(weights(network), before)
    assert network.training
    assert not network.steps
    network.eval()
    with torch.no_grad():
        features = network(Numbered().x)
    assert torch.equal(callback.cluster, cluster_by_class(features, Numbered().y, 2, 0).cluster)


def test_a_name_of_torchvision_makes_that_network_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    callback = SelfPacedSelection(clusters="magnet", embedding="squeezenet1_1")
    assert type(callback.clusterer.network).__name__ == "SqueezeNet"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_submodule_with_the_name_of_a_torchvision_model_is_the_submodule():
    class Own(Model):
        def __init__(self) -> None:
            super().__init__()
            self.squeezenet1_1, self.net[0] = self.net[0], nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.squeezenet1_1(x[:, :-1]))

    callback = SelfPacedSelection(clusters="features", embedding="squeezenet1_1", clusters_per_class=2)
    fit(callback, model=Own(), max_epochs=2)
    assert callback.clusterer.network is None


def test_principal_components_are_the_default_and_do_not_move():
    callback, other = (SelfPacedSelection(clusters="features", clusters_per_class=2) for _ in range(2))
    fit(callback, make_loader(shuffle=True), max_epochs=2)
    fit(other, make_loader(batch_size=5), max_epochs=4)
    assert torch.equal(callback.cluster, other.cluster)
    x = Numbered().x
    centred = (x - x.mean(0)).double()
    assert torch.equal(callback.cluster, cluster_by_class(centred, Numbered().y, 2, 0).cluster) or (
        len(callback.cluster.unique()) == 6  # a rotation may number the clusters otherwise
    )


@pytest.mark.parametrize("per_class", [1, 50])
def test_clusters_smaller_than_what_is_asked_for(per_class: int):
    data = Numbered()
    data.y[:] = 0
    data.y[3] = 2
    for rule in ("fraction", "threshold"):
        callback = SelfPacedSelection(rule, "features", clusters_per_class=per_class)  # type: ignore[arg-type]
        fit(callback, make_loader(data), max_epochs=3)
        assert callback.to_frame()["selected"].sum() >= SAMPLES // 2 - 2


# -- magnet -----------------------------------------------------------------------------------------------------------


def test_concurrent_takes_a_step_beside_each_of_the_models_on_the_selected_only():
    network = Embedding()
    before = weights(network)
    callback = magnet(network)
    seen: list[tuple[int, Tensor]] = []

    class Peek(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                return
            network.trained.clear()
            assert callback.selected is not None
            seen.append((network.steps, callback.selected.clone()))

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch > 0:
                chosen = set(seen[-1][1].nonzero().flatten().tolist())
                assert set(network.trained) <= chosen
                assert network.trained

    fit([Peek(), callback], make_loader(batch_size=7, shuffle=True), max_epochs=3)
    assert [steps for steps, _ in seen] == [0, 4]
    assert network.steps == 8  # four batches an epoch
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_concurrent_steps_follow_the_models_steps_under_accumulation():
    network = Embedding()
    fit(magnet(network), make_loader(batch_size=4), max_epochs=3, accumulate_grad_batches=3)
    assert network.steps == 4


def test_pretraining_comes_once_after_the_first_selection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_paced, "PRETRAIN_STEPS", 7)
    network, history = Embedding(), []
    callback = magnet(network, "pretrain")

    class Peek(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            history.append((network.steps, weights(network)))

    fit([callback, Peek()], max_epochs=4)
    assert [steps for steps, _ in history] == [0, 7, 7, 7]
    assert_same(history[1][1], weights(network))
    assert not torch.equal(history[0][1]["body.0.weight"], history[1][1]["body.0.weight"])
    assert set(network.trained) <= set(np.flatnonzero(callback.to_frame()["first_round"] == 1))


def test_frozen_does_not_move():
    network = Embedding()
    before = weights(network)
    fit(magnet(network, "frozen"), max_epochs=3)
    assert_same(weights(network), before)
    assert not network.steps


def test_the_students_training_does_not_feel_the_embeddings_steps():
    models = []
    for mode in ("concurrent", "frozen"):
        # one cluster a class: the selection is that of classes, whatever the embedding
        callback, model = magnet(Embedding(), mode, clusters_per_class=1, rule="fraction"), Model()
        torch.manual_seed(0)
        fit(callback, make_loader(shuffle=True), model, max_epochs=3)
        models.append((weights(model), torch.get_rng_state()))
    assert_same(*models)


@pytest.mark.parametrize("mode", ["pretrain", "concurrent"])
def test_an_embedding_that_would_never_be_looked_at_is_refused(mode: Any):
    with pytest.raises(ValueError, match="refresh_every=0"):
        magnet(Embedding(), mode, refresh_every=0)


def test_one_class_trains_no_embedding_and_goes_on():
    data = Numbered()
    data.y[:] = 1
    network = Embedding()
    callback = magnet(network)
    fit(callback, make_loader(data), max_epochs=3)
    assert not network.steps
    assert 10 <= callback.to_frame()["selected"].sum() < SAMPLES


@pytest.mark.parametrize("classes", [2, 3])
def test_a_class_that_comes_in_late_gets_clusters_of_its_own(classes: int):
    """The threshold rule drops whole classes at first; later their samples are no other class's."""
    data = Numbered(60)
    data.y = torch.zeros(60, dtype=torch.int64)
    data.y[40:50] = classes - 1  # hard: few, and nothing tells them from the others
    data.y[:20] = 0 if classes == 2 else 1
    network = Embedding()
    callback = magnet(network, rule="threshold", class_floor=0, diversity=0.0, start_fraction=0.3, growth=2.5)
    batches: list[tuple[list[int], list[int]]] = []
    trained: list[set[int]] = []

    class Peek(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trained.append(set())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            training = callback.clusterer.magnet
            assert training is not None
            if training._sampler is None or training._index is None:
                return
            drawn = training._plan[training._place - 1]
            told = training._index.classes[training._index.cluster[drawn]]
            batches.append((told.tolist(), data.y[drawn].tolist()))

    fit([callback, Peek()], make_loader(data, batch_size=20, shuffle=True), max_epochs=6)
    frame = callback.to_frame()
    first = frame["first_round"].to_numpy()[frame["given_label"] == classes - 1]
    assert np.nanmin(first) > 1 or np.isnan(first).any()  # else the case is not there
    assert all(told == given for told, given in batches)
    label = frame["given_label"].to_numpy()
    cluster = frame["cluster"].to_numpy()
    for number in np.unique(cluster):
        assert len(np.unique(label[cluster == number])) == 1


def test_the_embedding_is_in_the_checkpoint_and_resumes_bitwise(tmp_path: Path):
    def train(epochs: int, *more: Any, ckpt: Path | None = None, **options: Any) -> tuple[Any, Embedding, Model]:
        network, model = Embedding(), Model()
        callback = magnet(network, growth=1.1)
        trainer = make_trainer([callback, *more], max_epochs=epochs, **options)
        trainer.fit(model, make_loader(batch_size=7), ckpt_path=ckpt)
        return callback, network, model

    whole = train(5)
    train(3, ModelCheckpoint(tmp_path, "half"), enable_checkpointing=True)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    state = next(value for name, value in saved["callbacks"].items() if "SelfPaced" in name)
    assert "body.0.weight" in state["selection"]["clusters"]["magnet"]["network"]
    resumed = train(5, ckpt=tmp_path / "half.ckpt")
    assert_same(weights(resumed[1]), weights(whole[1]))
    assert_same(weights(resumed[2]), weights(whole[2]))
    assert resumed[0].to_frame().equals(whole[0].to_frame())
    assert_same(resumed[0].state_dict(), whole[0].state_dict())


def test_a_checkpoint_of_other_clusters_is_refused_with_a_reason(tmp_path: Path):
    fit([SelfPacedSelection(), ModelCheckpoint(tmp_path, "plain")], max_epochs=2, enable_checkpointing=True)
    with pytest.raises(ValueError, match="clusters"):
        fit(magnet(Embedding()), max_epochs=3, ckpt_path=tmp_path / "plain.ckpt")


def test_augmentation_in_the_transfer_hook_reaches_the_embeddings_training_but_not_the_pass():
    class Augments(Model):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            if self.trainer.training:
                x = x.clone()
                x[:, 0] += 1000
            return [x, y]

    network, largest = Embedding(), {True: 0.0, False: 0.0}

    def note(module: nn.Module, args: tuple[Tensor]) -> None:
        largest[module.training] = max(largest[module.training], float(args[0][:, 0].max()))

    network.register_forward_pre_hook(note)
    fit(magnet(network), model=Augments(), max_epochs=3)
    assert largest[True] > 900
    assert largest[False] < 100
