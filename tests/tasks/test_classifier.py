"""The classifier and the data modules inside a trainer: scores, augmentation, workers and
resuming.
"""

import functools

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from dataparams.tasks import (
    Classifier,
    DigitsData,
    EpochSampler,
    SmallCNN,
    calibrated_scores,
    evaluate,
)
from dataparams.tasks.augmentation import draw_crop_and_flip
from dataparams.tasks.loading import AUGMENTATION

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class AugmentedDigits(DigitsData):
    """Digits with the augmentation of CIFAR, of a size that fits them."""

    padding = 1

    def __init__(self, **arguments):
        super().__init__(train_size=200, val_size=100, augment=True, **arguments)


class Recorder(L.Callback):
    """Keeps what each training and validation step was given."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append((batch[0].clone(), batch[1].clone()))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append((batch[0].clone(), batch[1].clone()))


def trainer(tmp_path, epochs, *callbacks):
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def classifier(seed=0, **arguments):
    L.seed_everything(seed, verbose=False)
    return Classifier(SmallCNN(width=4), SGD, **arguments)


def fit(tmp_path, data, epochs=2, model=None, **arguments):
    recorder = Recorder()
    runner = trainer(tmp_path, epochs, recorder)
    model = classifier() if model is None else model
    runner.fit(model, datamodule=data, **arguments)
    return runner, model, recorder


def test_workers_change_nothing_with_augmentation(tmp_path):
    _, _, alone = fit(tmp_path, AugmentedDigits(batch_size=64))
    _, _, helped = fit(tmp_path, AugmentedDigits(batch_size=64, num_workers=2))
    assert len(alone.train) == len(helped.train) == 8
    for mine, theirs in zip(alone.train + alone.val, helped.train + helped.val, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_only_training_batches_are_augmented_and_each_anew(tmp_path):
    data = AugmentedDigits(batch_size=200)
    _, _, recorder = fit(tmp_path, data)
    (first, first_labels), (second, second_labels) = recorder.train
    in_order = data.train_set.normalise(data.train_set.images)
    sampler = EpochSampler(200, data.seed)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert torch.equal(first_labels, data.given_labels[orders[0]])
    assert torch.equal(second_labels, data.given_labels[orders[1]])
    # One draw in 18 leaves an image as it is, and the same image gets another draw in the next
    # epoch.
    unchanged = (first == in_order[orders[0]]).flatten(1).all(1).float().mean()
    assert unchanged < 0.2
    of_first, of_second = (
        images[torch.tensor(order).argsort()] for images, order in [(first, orders[0]), (second, orders[1])]
    )
    assert (of_first == of_second).flatten(1).all(1).float().mean() < 0.2
    assert torch.equal(recorder.val[0][0], data.val_set.normalise(data.val_set.images))


def test_every_batch_of_every_epoch_has_a_draw_of_its_own(tmp_path, monkeypatch):
    seeds = []

    def spy(batch_size, padding, seed):
        seeds.append(seed)
        return draw_crop_and_flip(batch_size, padding, seed)

    monkeypatch.setattr("dataparams.tasks.data.draw_crop_and_flip", spy)
    fit(tmp_path, AugmentedDigits(batch_size=64, seed=5))
    assert seeds == [[5, AUGMENTATION, epoch, batch, 0] for epoch in range(2) for batch in range(4)]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    _, whole, seen = fit(tmp_path, AugmentedDigits(batch_size=64), epochs=3)
    runner, _, _ = fit(tmp_path, AugmentedDigits(batch_size=64), epochs=1)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    torch.rand(3)  # a resumed process has another random state
    _, resumed, rest = fit(
        tmp_path,
        AugmentedDigits(batch_size=64),
        epochs=3,
        model=classifier(seed=9),
        ckpt_path=tmp_path / "one.ckpt",
        weights_only=True,
    )
    assert len(rest.train) == 8
    for mine, theirs in zip(seen.train[4:], rest.train, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_scores_agree_with_the_logits(tmp_path):
    data = DigitsData(noise="symmetric", noise_rate=0.4, train_size=400)
    runner, model, _ = fit(tmp_path, data, epochs=4)
    logged = {name: float(value) for name, value in runner.callback_metrics.items()}
    val_logits, val_labels = evaluate(model, data.val_dataloader())
    test_logits, test_labels = evaluate(model, data.test_dataloader())
    assert logged["val_accuracy"] == pytest.approx(accuracy(val_logits, val_labels))
    assert logged["val_loss"] == pytest.approx(float(F.cross_entropy(val_logits, val_labels)), rel=1e-5)
    assert 0 < logged["train_loss"] < 5
    scores = runner.test(model, datamodule=data, verbose=False)[0]
    assert scores["test_accuracy"] == pytest.approx(accuracy(test_logits, test_labels))
    reference = calibrated_scores(val_logits, val_labels, test_logits, test_labels)
    assert scores["test_nll"] == pytest.approx(reference["test_nll"], rel=1e-5)
    assert scores["test_ece"] == pytest.approx(reference["test_ece"], abs=1e-5)


def accuracy(logits, labels):
    return float((logits.argmax(1) == labels).double().mean())


def test_the_scheduler_steps_once_an_epoch(tmp_path):
    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    model = classifier(scheduler=halving)
    runner, _, _ = fit(tmp_path, DigitsData(train_size=100), epochs=2, model=model)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 4)


def test_an_optimizer_that_cannot_be_called_is_explained():
    model = SmallCNN()
    with pytest.raises(TypeError, match="_partial_: true"):
        Classifier(model, torch.optim.SGD(model.parameters(), lr=0.1))  # pyright: ignore[reportArgumentType]
