"""Indices of the user's own: integer and string ids, keys of every kind, streams, ids numbered as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    WithIds,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    snapshot,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from dataparams import DataParameters, TrainingDynamics

pytestmark = [*QUIET, INERT]
NAMES = [f"img_{i:04d}" for i in range(SAMPLES)]


class Mapped(Dataset):
    """Samples as dictionaries."""

    def __init__(self, names: list[Any], data: Numbered) -> None:
        self.names, self.data = names, data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.data[index]
        return {"x": x, "y": y, "id": self.names[index]}


class Stream(IterableDataset):
    """The same samples without positions."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.data[i] for i in range(start, len(self.data), step))  # type: ignore[arg-type]


class MappedModel(Model):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        return super().training_step([batch["x"], batch["y"]], batch_idx)


def by_name(callback: Any) -> dict[Any, tuple[Any, ...]]:
    frame = callback.to_frame()
    columns = ("given_label", "visits", "mean_loss", "log_temperature")
    return {row["id"]: tuple(row[column] for column in columns) for _, row in frame.iterrows()}


def truth(model: Model, data: Numbered, names: list[Any]) -> dict[Any, tuple[Any, ...]]:
    return {name: (int(data.y[i]), model.visits[i], model.losses[i] / model.visits[i]) for i, name in enumerate(names)}


def assert_names_meet_their_samples(
    callback: Any, model: Model, names: list[Any], data: Numbered | None = None
) -> None:
    ours, theirs = by_name(callback), truth(model, Numbered() if data is None else data, names)
    assert ours.keys() == theirs.keys()
    for name, (label, visits, loss) in theirs.items():
        assert ours[name][:2] == (label, visits)
        assert ours[name][2] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "key", [2, lambda batch: batch[2], lambda batch: batch[2].numpy(), lambda batch: batch[2].tolist()]
)
def test_integer_ids_give_the_numbers_of_positions(key: Any):
    own, followed = DataParameters(lr=0.2, index_key=key), DataParameters(lr=0.2)
    model = fit(own, make_loader(WithIds()))
    assert_same(model.state_dict(), fit(followed, make_loader()).state_dict())
    assert_same(own.state_dict(), followed.state_dict())


def test_dictionary_key_and_shuffled_strings():
    callback = DataParameters(lr=0.2, index_key="id", ids=NAMES)
    model = fit(callback, make_loader(Mapped(NAMES, Numbered()), shuffle=True, num_workers=2), model=MappedModel())
    assert_names_meet_their_samples(callback, model, NAMES)
    assert callback.to_frame()["id"].tolist() == NAMES


def test_listed_ids_may_have_any_order():
    listed = NAMES[::-1]
    callback, straight = (
        DataParameters(lr=0.2, index_key="id", ids=listed),
        DataParameters(lr=0.2, index_key="id", ids=NAMES),
    )
    for each in (callback, straight):
        fit(each, make_loader(Mapped(NAMES, Numbered())), model=MappedModel())
    assert callback.to_frame()["id"].tolist() == listed
    assert by_name(callback) == by_name(straight)


def test_large_integer_ids_are_listed():
    numbers = [10**9 + 7 * i for i in range(SAMPLES)]
    callback = DataParameters(lr=0.2, index_key="id", ids=numbers)
    model = fit(callback, make_loader(Mapped(numbers, Numbered()), shuffle=True), model=MappedModel())
    assert_names_meet_their_samples(callback, model, numbers)


@pytest.mark.parametrize("listed", [np.array(NAMES), pd.Series(NAMES), tuple(NAMES)], ids=["array", "series", "tuple"])
def test_listed_ids_may_be_any_sequence_and_the_checkpoint_stays_plain(listed: Any, tmp_path: Path):
    callback, save = DataParameters(lr=0.2, index_key="id", ids=listed), ModelCheckpoint(tmp_path, filename="last")
    loader = make_loader(Mapped(NAMES, Numbered()))
    model = fit([callback, save], loader, model=MappedModel(), enable_checkpointing=True)
    assert_names_meet_their_samples(callback, model, NAMES)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    alone = DataParameters(lr=0.2)
    alone.load_state_dict(state)
    assert by_name(alone) == by_name(callback)


@pytest.mark.parametrize("listed", [np.arange(SAMPLES) + 100, torch.arange(SAMPLES) + 100], ids=["array", "tensor"])
def test_listed_integers_may_be_any_sequence(listed: Any, tmp_path: Path):
    callback, save = DataParameters(lr=0.2, index_key=2, ids=listed), ModelCheckpoint(tmp_path, filename="last")
    model = fit([callback, save], make_loader(WithIds(shift=100), shuffle=True), enable_checkpointing=True)
    assert_names_meet_their_samples(callback, model, list(range(100, 100 + SAMPLES)))
    torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_callbacks_agree_on_equal_arrays_of_ids():
    left, right = np.array(NAMES), np.array(NAMES)
    options: list[dict[str, Any]] = [{"index_key": "id", "ids": each} for each in (left, right)]
    callbacks = [TrainingDynamics(**options[0]), DataParameters(**options[1])]
    fit(callbacks, make_loader(Mapped(NAMES, Numbered())), model=MappedModel())
    assert [callback.to_frame()["id"].tolist() for callback in callbacks] == [NAMES, NAMES]


@pytest.mark.parametrize("kind", [np.array, list], ids=["array", "list"])
def test_ids_that_come_as_arrays_leave_the_checkpoint_plain(kind: Any, tmp_path: Path):
    def names(batch: Any) -> Any:
        return kind([NAMES[i] for i in batch[0][:, -1].int().tolist()])

    callback, save = DataParameters(lr=0.2, index_key=names), ModelCheckpoint(tmp_path, filename="last")
    model = fit([callback, save], make_loader(Stream(Numbered())), enable_checkpointing=True)
    assert_names_meet_their_samples(callback, model, NAMES)
    torch.load(tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_data_set_with_integer_ids(workers: int):
    callback = DataParameters(lr=0.2, index_key=2, num_rows=SAMPLES)
    model = fit(callback, make_loader(Stream(WithIds()), num_workers=workers))
    assert_names_meet_their_samples(callback, model, list(range(SAMPLES)))


def test_iterable_data_set_with_strings_that_are_numbered_as_they_come():
    callback = DataParameters(lr=0.2, index_key="id")
    model = fit(callback, make_loader(Stream(Mapped(NAMES, Numbered()))), model=MappedModel())
    assert_names_meet_their_samples(callback, model, NAMES)
    assert callback.to_frame()["id"].tolist() == NAMES


@pytest.mark.parametrize(
    "names", [[f"s{i}" for i in range(2500)], [3 * i + 5 for i in range(2500)]], ids=["strings", "integers"]
)
def test_growing_ids_give_the_numbers_of_listed_ids(names: list[Any]):
    data = Mapped(names, Numbered(2500))
    growing, listed = DataParameters(lr=0.2, index_key="id"), DataParameters(lr=0.2, index_key="id", ids=names)
    model = fit(growing, make_loader(Stream(data), batch_size=100), model=MappedModel())
    again = fit(listed, make_loader(Stream(data), batch_size=100), model=MappedModel())
    assert_same(model.state_dict(), again.state_dict())
    assert by_name(growing) == by_name(listed)
    assert_names_meet_their_samples(growing, model, names, data.data)


def test_growing_ids_resume(tmp_path: Path):
    loader = make_loader(Stream(Mapped(NAMES, Numbered())))
    whole = DataParameters(lr=0.2, index_key="id")
    model = fit(whole, loader, model=MappedModel(), max_epochs=4)
    # the second half of the names comes after the stop
    first = make_loader(Stream(Mapped(NAMES, Numbered())))
    save = ModelCheckpoint(tmp_path, filename="half")
    fit(
        [DataParameters(lr=0.2, index_key="id"), save],
        first,
        model=MappedModel(),
        max_epochs=2,
        enable_checkpointing=True,
    )
    resumed = DataParameters(lr=0.2, index_key="id")
    again = fit(resumed, loader, model=MappedModel(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())
    assert by_name(resumed) == by_name(whole)


def test_growing_ids_meet_new_samples_in_a_second_fit():
    callback, more = DataParameters(lr=0.2, index_key="id"), [*NAMES, "late_1", "late_2"]
    fit(callback, make_loader(Stream(Mapped(NAMES, Numbered()))), model=MappedModel())
    before = by_name(callback)
    fit(callback, make_loader(Stream(Mapped(more, Numbered(26)))), model=MappedModel(), max_epochs=1)
    after = by_name(callback)
    assert list(after) == more
    assert all(after[name][1] == before[name][1] + 1 for name in NAMES)
    assert after["late_2"][1] == 1


# -- ids and checkpoints ---------------------------------------------------------------------------------------------


def trained_with_names(tmp_path: Path) -> Any:
    callback = DataParameters(lr=0.2, index_key="id", ids=NAMES)
    save = ModelCheckpoint(tmp_path, filename="half")
    loader = make_loader(Mapped(NAMES, Numbered()))
    fit([callback, save], loader, model=MappedModel(), max_epochs=2, enable_checkpointing=True)
    return callback


def test_resuming_with_ids_in_another_order_follows_the_samples(tmp_path: Path):
    trained_with_names(tmp_path)
    results = []
    for listed in (NAMES, NAMES[::-1]):
        callback = DataParameters(lr=0.2, index_key="id", ids=listed)
        loader = make_loader(Mapped(NAMES, Numbered()))
        fit(callback, loader, model=MappedModel(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
        results.append(by_name(callback))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "listed", [NAMES[:-2], [*NAMES, "new"], [*NAMES[:-1], "other"]], ids=["fewer", "more", "others"]
)
def test_resuming_with_other_ids_is_refused(listed: list[str], tmp_path: Path):
    trained_with_names(tmp_path)
    data = Mapped(listed, Numbered(len(listed)))
    callback = DataParameters(lr=0.2, index_key="id", ids=listed)
    with pytest.raises(ValueError, match=r"ids|samples"):
        fit(callback, make_loader(data), model=MappedModel(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")


# -- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(kind: Any, match: str, loader: DataLoader, model: Model | None = None, **options: Any) -> None:
    model = MappedModel() if model is None else model
    before = snapshot(model.state_dict())
    with pytest.raises(kind, match=match):
        fit(TrainingDynamics(**options), loader, model=model)
    assert_same(snapshot(model.state_dict()), before)


def test_ids_that_are_not_listed_are_refused():
    loader = make_loader(Mapped(NAMES, Numbered()))
    assert_refused(KeyError, r"'img_0000' was never seen before.*ids=", loader, index_key="id", ids=NAMES[8:])


def test_duplicate_ids_are_refused():
    loader = make_loader(Mapped(NAMES, Numbered()))
    assert_refused(ValueError, "1 duplicates", loader, index_key="id", ids=[*NAMES[:-1], NAMES[0]])


def test_a_key_that_the_batch_does_not_have_is_refused():
    loader = make_loader(Mapped(NAMES, Numbered()))
    assert_refused(KeyError, r"index_key='name'.*has keys \['id', 'x', 'y'\]", loader, index_key="name")
    assert_refused(KeyError, "index_key=7.*has 3 positions", make_loader(WithIds()), Model(), index_key=7)
    assert_refused(TypeError, "ids must be integers or strings", make_loader(WithIds()), Model(), index_key=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [({"num_rows": 24}, {"num_rows": 25}), ({"index_key": 2}, {"index_key": 1}), ({"ids": [1]}, {"ids": [2]})],
    ids=str,
)
def test_callbacks_that_disagree_are_refused_and_leave_no_trace(first: dict[str, Any], second: dict[str, Any]):
    trainer = make_trainer([TrainingDynamics(**first), DataParameters(**second)])
    with pytest.raises(ValueError, match=f"must agree on {next(iter(first))}"):
        trainer.fit(Model(), make_loader(WithIds()))
    assert not {"process_dataloader", "training_step"} & vars(trainer.strategy).keys()
    assert "convert_input" not in vars(trainer.precision_plugin)


# -- positions through data sets of data sets and samplers -----------------------------------------------------------


def test_subset_names_the_position_below():
    positions = [20, 3, 17, 5, 11, 8, 2, 14]
    callback = DataParameters(lr=0.2)
    nested = Subset(Subset(Numbered(), [*positions, 0]), range(len(positions)))
    model = fit(callback, make_loader(nested, batch_size=3, shuffle=True))
    frame = callback.to_frame()
    assert frame["index"].tolist() == list(range(8))
    assert frame["id"].tolist() == positions
    assert frame["given_label"].tolist() == Numbered().y[positions].tolist()
    assert frame["visits"].tolist() == [model.visits[i] for i in positions]


def test_concatenated_data_sets_number_through():
    callback = DataParameters(lr=0.2)
    fit(callback, make_loader(ConcatDataset([Numbered(10), Numbered(7)]), batch_size=4, shuffle=True))
    assert callback.to_frame()["given_label"].tolist() == [*Numbered(10).y.tolist(), *Numbered(7).y.tolist()]


def test_own_batch_sampler_and_own_collate():
    def collate(samples: list[Any]) -> dict[str, Any]:
        x, y = zip(*samples, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    callback, batches = DataParameters(lr=0.2), BatchSampler(range(SAMPLES - 1, -1, -1), 5, drop_last=True)
    model = fit(callback, DataLoader(Numbered(), batch_sampler=batches, collate_fn=collate), model=MappedModel())
    visits = callback.to_frame()["visits"]
    assert visits.tolist() == [model.visits[i] for i in range(SAMPLES)] == 4 * [0] + 20 * [2]


def test_loader_without_automatic_batching():
    class Batches(Numbered):
        def __getitem__(self, index: list[int]) -> Any:  # type: ignore[override]
            return self.x[index], self.y[index]

    callback = DataParameters(lr=0.2)
    sampler = BatchSampler(range(SAMPLES), 7, drop_last=False)
    model = fit(callback, DataLoader(Batches(), sampler=sampler, batch_size=None))
    assert_names_meet_their_samples(callback, model, list(range(SAMPLES)))


def test_data_set_with_a_batched_getitems():
    class Fast(Numbered):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[i] for i in indices]

    fast, slow = DataParameters(lr=0.2), DataParameters(lr=0.2)
    fit(fast, make_loader(Fast()))
    fit(slow, make_loader())
    assert_same(fast.state_dict(), slow.state_dict())


def test_a_sampler_of_names_is_refused():
    class Named(Numbered):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(int(index[1:]))

    loader = DataLoader(Named(), batch_size=4, sampler=[f"s{i}" for i in range(SAMPLES)])  # type: ignore[arg-type]
    assert_refused(TypeError, r"not positions in the data set.*index_key=", loader, Model())


def test_batches_keep_the_users_type():
    class Seen(Model):
        def __init__(self) -> None:
            super().__init__()
            self.kinds: set[type] = set()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.kinds.add(type(batch))
            return batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            self.kinds.add(type(batch))
            return batch

    class Batch:
        def __init__(self, samples: list[Any]) -> None:
            self.x, self.y = map(torch.stack, zip(*samples, strict=True))

        def __getitem__(self, key: int) -> torch.Tensor:
            return (self.x, self.y)[key]

    model, callback = Seen(), TrainingDynamics()
    fit(callback, make_loader(collate_fn=Batch), model=model)
    assert model.kinds == {Batch}
    assert callback.to_frame()["visits"].eq(2).all()


def test_key_names_an_attribute_of_a_batch_object():
    class Batch:
        def __init__(self, samples: list[Any]) -> None:
            self.x, self.y, self.number = map(
                torch.stack, zip(*[(x, y, torch.tensor(i)) for x, y, i in samples], strict=True)
            )

    def step(model: Any, batch: Batch) -> Any:
        return model.loss(model.logits(batch.x), batch.y)

    callback = TrainingDynamics(index_key="number")
    fit(callback, make_loader(WithIds(), collate_fn=Batch), model=StepModel(step, loss=nn.CrossEntropyLoss()))
    assert callback.to_frame()["given_label"].tolist() == Numbered().y.tolist()
