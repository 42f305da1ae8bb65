"""MultiMNIST: what is in a picture, whose labels are wrong, and what follows from the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataparams.tasks import MNISTData, MultiMNISTData
from dataparams.tasks.data import ImagePool
from dataparams.tasks.multimnist import MEAN, STD, TASKS, MultiTaskImages, gross_errors, overlay

CLEAN: dict[str, float] = dict.fromkeys(TASKS, 0.0)


def pool(size, seed):
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.integers(0, 256, (size, 1, 28, 28), dtype=np.uint8))
    return ImagePool(images, generator.integers(0, 10, size), np.arange(size), size)


@pytest.fixture
def made(monkeypatch):
    """Data modules of 200 and 50 pictures, made from random digits and set up."""
    published = pool(600, 0), pool(81, 1)
    monkeypatch.setattr(MNISTData, "load", lambda self: published)

    def make(**arguments):
        data = MultiMNISTData(**{"train_size": 200, "val_size": 50, **arguments})
        data.setup("fit")
        return data

    make.published = published  # pyright: ignore[reportFunctionMemberAccess]
    return make


def test_a_picture_is_the_brighter_of_two_shifted_digits(made):
    data, (published, _) = made(corrupt=CLEAN), made.published
    for position in (0, 7, 199):
        left, right = map(int, data.ids[position].split("+"))
        expected = np.zeros((36, 36), np.uint8)
        for number, corner in ((left, 0), (right, 8)):
            digit = published.images[number, 0].numpy()
            for y in range(28):
                for x in range(28):
                    expected[corner + y, corner + x] = max(expected[corner + y, corner + x], digit[y, x])
        image, labels = data.train_set[position]
        np.testing.assert_allclose(image[0], (expected - MEAN) / STD, rtol=1e-5, atol=1e-5)
        assert labels["left"] == published.labels[left]
        assert labels["right"] == published.labels[right]
        ink = data.train_set.images.double().sum((1, 2, 3)).numpy()
        assert labels["ink"] == pytest.approx((expected.sum() - ink.mean()) / ink.std(), rel=1e-5)


def test_every_digit_is_in_one_picture_of_one_part(made):
    data = made()
    numbers = np.array([list(map(int, name.split("+"))) for name in data.ids])
    assert sorted(numbers.ravel()) == list(range(400))
    others = made.published[0].take(np.arange(400, 500))
    corners = data.val_set.images[:, 0, :8, :8]  # only the left digit reaches there
    assert all(any(torch.equal(corner, digit[0, :8, :8]) for digit in others.images) for corner in corners)
    assert len(data.test_set) == 40  # of 81 digits one stays alone


def test_corruption_is_exact_and_the_truth_is_kept(made):
    data, clean = made(seed=1), made(seed=1, corrupt={})
    assert torch.equal(data.train_set.images, clean.train_set.images)
    for task, count in (("left", 80), ("right", 0), ("ink", 60)):
        assert data.is_corrupt[task].sum() == count
        np.testing.assert_array_equal(data.is_corrupt[task], data.given_labels[task] != data.true_labels[task])
        np.testing.assert_array_equal(data.true_labels[task], clean.given_labels[task])
        np.testing.assert_array_equal(data.train_set.labels[task], data.given_labels[task])
    assert not clean.is_corrupt["left"].any()


def test_corrupt_ink_is_a_gross_error(made):
    true = np.linspace(-2, 2, 5_000, dtype=np.float32)
    given = gross_errors(true, 0.3, [1, 2])
    wrong = given != true
    assert wrong.sum() == 1_500
    assert given[wrong].std() == pytest.approx(3, rel=0.05)
    assert np.corrcoef(given[wrong], true[wrong])[0, 1] == pytest.approx(0, abs=0.08)
    data = made()
    assert data.given_labels["ink"].dtype == np.float32
    assert np.abs(data.given_labels["ink"][data.is_corrupt["ink"]]).max() > 4


def test_validation_is_as_corrupt_with_a_draw_of_its_own_and_the_test_is_clean(made):
    same = {"train_size": 150, "val_size": 150}  # with one stream for both, the same positions would be drawn
    data, clean = made(**same), made(**same, corrupt=CLEAN)
    for task, count in (("left", 60), ("ink", 45)):
        wrong = (data.val_set.labels[task] != clean.val_set.labels[task]).numpy()
        assert wrong.sum() == count
        assert not np.array_equal(wrong, data.is_corrupt[task])
        assert torch.equal(data.test_set.labels[task], clean.test_set.labels[task])


def test_tasks_are_corrupted_independently(made):
    data = made(corrupt={"left": 0.5, "right": 0.5, "ink": 0.5})
    for one, other in (("left", "right"), ("left", "ink"), ("right", "ink")):
        both = (data.is_corrupt[one] & data.is_corrupt[other]).sum()
        assert abs(both - 50) < 5 * np.sqrt(200 / 16)


def test_the_seed_decides_everything_and_seeds_differ(made):
    first, again, other = made(seed=2), made(seed=2), made(seed=3)
    assert first.ids == again.ids
    assert first.ids != other.ids
    assert torch.equal(first.test_set.images, again.test_set.images)
    for task in TASKS:
        np.testing.assert_array_equal(first.given_labels[task], again.given_labels[task])
        assert torch.equal(first.val_set.labels[task], again.val_set.labels[task])
    assert first.is_corrupt["left"].tolist() != other.is_corrupt["left"].tolist()
    assert [batch[1]["ink"].tolist() for batch in first.train_dataloader()] == [
        batch[1]["ink"].tolist() for batch in again.train_dataloader()
    ]


def test_batches_have_a_target_a_task(made):
    images, targets = next(iter(made(batch_size=32).train_dataloader()))
    assert images.shape == (32, 1, 36, 36)
    assert {task: (y.shape, y.dtype) for task, y in targets.items()} == {
        "left": ((32,), torch.int64), "right": ((32,), torch.int64), "ink": ((32,), torch.float32),
    }  # fmt: skip


def test_describe_is_flat_and_true(made):
    assert made().describe() == {
        "data": "MultiMNIST", "train_size": 200, "val_size": 50, "test_size": 40,
        "corrupt_left": 0.4, "corrupt_right": 0.0, "corrupt_ink": 0.3,
        "val_corrupt_left": 0.4, "val_corrupt_right": 0.0, "val_corrupt_ink": 0.3,
    }  # fmt: skip


def test_real_digits_stay_whole(require):
    data = MultiMNISTData(require("MNIST"), corrupt=CLEAN)
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [4000, 1000, 5000]
    pixels = data.train_set.images.float()
    assert (float(pixels.mean()), float(pixels.std())) == pytest.approx((MEAN, STD), rel=0.01)
    digits = data.digits.load()[0].take(np.array([7, 11]))
    left, right = digits.take(np.array([0])), digits.take(np.array([1]))
    picture = overlay(left, right)[0, 0]
    assert (picture[:28, :28] >= left.images[0, 0]).all()
    assert (picture[8:, 8:] >= right.images[0, 0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corrupt": {"middle": 0.1}}, "corrupt names a task 'middle': choose among left, right, ink"),
        ({"corrupt": {"ink": 1.5}}, r"share of corrupt ink labels is in \[0, 1\], not 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"train_size": 1}, "train_size must be at least 2, not 1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiMNISTData(**arguments)


def test_more_digits_than_there_are_is_refused(made):
    with pytest.raises(ValueError, match="take 602 digits, two a picture, and MNIST has 600"):
        made(train_size=251)


def test_missing_data_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST not found: looked for .*MNIST/raw"):
        MultiMNISTData(tmp_path).setup("fit")


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 images but 3 labels of task 'left'"):
        MultiTaskImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), {"left": np.zeros(3)}, 0.0, 1.0)
