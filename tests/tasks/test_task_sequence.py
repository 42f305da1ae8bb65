"""Sequences of tasks: which samples each epoch draws, positions, loaders of any data sets, and what is refused."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dataparams.callbacks import TrainingDynamics
from dataparams.tasks import TaskData, TaskSequence
from dataparams.tasks.task_sequence import TaskConcatenation


class Counted(Dataset):
    """Samples (position + offset, label), which count how often they are fetched in one call."""

    def __init__(self, size, offset):
        self.size, self.offset, self.calls = size, offset, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([float(self.offset + index)]), index % 2

    def __getitems__(self, indices):
        self.calls += 1
        return [self[index] for index in indices]


def parts(size, offset=0, **options):
    train, val, test = (
        TensorDataset(torch.arange(offset, offset + n).float()[:, None], torch.arange(n) % 2) for n in (size, 3, 4)
    )
    return TaskData(train, val, test, **options)


def sequence(sizes=(10, 7, 12), **options):
    return TaskSequence([parts(size, 100 * n) for n, size in enumerate(sizes)], **{"batch_size": 4, **options})


class Watcher(L.LightningModule):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 2)
        self.criterion = nn.CrossEntropyLoss()
        self.seen: list[tuple[int, list[float]]] = []

    def forward(self, x):
        return self.layer(x * 0.001)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch[0].flatten().tolist()))
        return self.criterion(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options):
    return L.Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "max_epochs": 6, "reload_dataloaders_every_n_epochs": 1, **options,
        }
    )  # fmt: skip


def epochs_of(module):
    seen = {}
    for epoch, inputs in module.seen:
        seen.setdefault(epoch, []).extend(inputs)
    return seen


def test_each_epoch_draws_every_sample_of_its_task_and_no_other():
    module, data = Watcher(), sequence()
    trainer().fit(module, datamodule=data)
    seen = epochs_of(module)
    for task, size in enumerate((10, 7, 12)):
        for epoch in (2 * task, 2 * task + 1):
            assert sorted(seen[epoch]) == [100.0 * task + place for place in range(size)]
        assert seen[2 * task] != seen[2 * task + 1]
    assert [data.task_of_epoch(epoch) for epoch in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [data.ends_task(epoch) for epoch in range(6)] == [False, True] * 3


def test_order_follows_from_seed_and_epoch():
    seen = {}
    for seed in (0, 0, 1):
        module = Watcher()
        trainer().fit(module, datamodule=sequence(seed=seed))
        seen.setdefault(seed, []).append(module.seen)
    assert seen[0][0] == seen[0][1] != seen[1][0]


def test_rows_of_a_method_are_positions_among_all_tasks():
    callback, data = TrainingDynamics(), sequence()
    trainer(callbacks=[callback], max_epochs=9).fit(Watcher(), datamodule=data)
    frame = callback.to_frame()
    assert len(frame) == len(data.train_set) == 29
    assert (frame["visits"] == 3).all()
    assert frame["given_label"].tolist() == [data.train_set[place][1] for place in range(29)]
    assert [data.positions_of(task) for task in range(3)] == [range(10), range(10, 17), range(17, 29)]
    assert data.ids == [f"{t + 1}:{place}" for t, size in enumerate((10, 7, 12)) for place in range(size)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_is_fetched_in_one_call(num_workers):
    sets = [Counted(8, 0), Counted(8, 100)]
    data = TaskSequence([(one, one, one) for one in sets], epochs_per_task=1, batch_size=4, num_workers=num_workers)
    data.setup()
    batches = list(data.task_dataloader(1))
    assert sorted(torch.cat([x for x, _ in batches]).flatten().tolist()) == [float(100 + place) for place in range(8)]
    if num_workers == 0:
        assert [one.calls for one in sets] == [0, 2]


def test_a_concatenation_holds_its_parts():
    joined = TaskConcatenation([Counted(3, 0), TensorDataset(torch.ones(2, 1), torch.tensor([5, 6]))], tasks=[4, 9])
    assert len(joined) == 5
    assert [(float(x), int(y), task) for x, y, task in joined] == [
        (0.0, 0, 4), (1.0, 1, 4), (2.0, 0, 4), (1.0, 5, 9), (1.0, 6, 9),
    ]  # fmt: skip
    mixed = joined.__getitems__([4, 0, 3, 2])
    assert [(int(y), task) for _, y, task in mixed] == [(6, 9), (0, 4), (5, 9), (0, 4)]
    assert int(joined[-1][1]) == 6
    for outside in (5, -6):
        with pytest.raises(IndexError, match="outside the 5 samples"):
            joined[outside]


def test_with_several_heads_every_sample_names_its_task():
    tasks = [parts(5, name="even", classes=(0, 2)), parts(6, name="odd", classes=[1, 3])]
    data = TaskSequence(tasks, epochs_per_task=1, multi_head=True, num_classes=5, batch_size=4)
    data.setup()
    assert data.task_names == ["even", "odd"]
    assert data.class_mask is not None
    assert data.class_mask.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    for task in (0, 1):
        for loader in (data.task_dataloader(task), data.val_dataloader()[task], data.test_dataloader()[task]):
            for batch in loader:
                assert (batch[2] == task).all()
                assert len(batch[2]) == len(batch[0])


def test_without_a_trainer_the_first_task_comes_first():
    data = sequence(epochs_per_task=2)
    data.setup()
    loader = data.train_dataloader()
    assert len(loader) == 3
    loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert len(loader) == 2
    assert sorted(torch.cat([x for x, _ in loader]).flatten().tolist()) == [100.0 + place for place in range(7)]


def test_tasks_of_one_size_need_no_reloading():
    module = Watcher()
    trainer(max_epochs=2, reload_dataloaders_every_n_epochs=0).fit(module, datamodule=sequence((6, 6)))
    assert {epoch: min(seen) for epoch, seen in epochs_of(module).items()} == {0: 0.0, 1: 100.0}


def test_tasks_of_other_sizes_need_it():
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs=1"):
        trainer(reload_dataloaders_every_n_epochs=0).fit(Watcher(), datamodule=sequence())


def test_epochs_that_do_not_fit_the_tasks_are_refused_before_a_step():
    for options, epochs in (({}, 7), ({"epochs_per_task": 1}, 6), ({}, -1)):
        module = Watcher()
        with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
            trainer(max_epochs=epochs).fit(module, datamodule=sequence(**options))
        assert not module.seen
    with pytest.raises(ValueError, match="epoch 6 is for no task"):
        sequence(epochs_per_task=2).task_of_epoch(6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSequence([]).setup(), "there is no task"),
        (lambda: TaskSequence([(Counted(3, 0), Counted(3, 0))]).setup(), "three data sets"),
        (lambda: TaskSequence([parts(3, name="2"), parts(3)]).setup(), "two tasks have one name"),
        (lambda: TaskSequence([parts(3), parts(0)]).setup(), "task 2 has no samples in train"),
        (lambda: TaskSequence([parts(3)], multi_head=True).setup(), "needs the classes of every task"),
        (lambda: TaskSequence([parts(3, classes=[7])], multi_head=True, num_classes=5).setup(), "class 7 of 5"),
        (lambda: sequence(batch_size=0), "batch_size must be at least 1"),
        (lambda: sequence(epochs_per_task=0), "epochs_per_task must be at least 1"),
        (lambda: sequence().task_dataloader(3), "task 3 of 3"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fewer_epochs_stop_after_fewer_tasks():
    module = Watcher()
    trainer(max_epochs=3).fit(module, datamodule=sequence(epochs_per_task=2))
    assert max(epochs_of(module)[2]) < 200


def test_resuming_in_the_middle_of_a_task_goes_on_with_its_samples(tmp_path):
    whole = Watcher()
    trainer().fit(whole, datamodule=sequence())
    first = trainer(max_epochs=3)
    first.fit(Watcher(), datamodule=sequence(epochs_per_task=2))
    first.save_checkpoint(tmp_path / "last.ckpt")
    rest = Watcher()
    trainer().fit(rest, datamodule=sequence(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert rest.seen == [entry for entry in whole.seen if entry[0] >= 3]
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), rest.parameters(), strict=True))
