"""The scenarios against brute force on random images, and the real ones where they are on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataparams.tasks import MNISTData, NotMNISTData, PermutedMNISTData, SplitMNISTData, SVHNData, VisionMixtureData
from dataparams.tasks.data import ImagePool, NoisyDataModule
from dataparams.tasks.vision_mixture import MIXTURE

TRAINING, TESTING = 80, 30


def random_pool(size, seed, shape=(1, 28, 28)):
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.integers(0, 256, (size, *shape), dtype=np.uint8))
    return ImagePool(images, generator.integers(0, 10, size), np.arange(size), size)


@pytest.fixture
def digits(monkeypatch):
    published = random_pool(TRAINING, 0), random_pool(TESTING, 1)
    monkeypatch.setattr(MNISTData, "load", lambda self: published)
    return published


def normalised(images, source: type[NoisyDataModule] = MNISTData):
    return (images.float() - torch.tensor(source.mean).view(-1, 1, 1)) / torch.tensor(source.std).view(-1, 1, 1)


def everything(dataset):
    samples = [dataset[place] for place in range(len(dataset))]
    return torch.stack([sample[0] for sample in samples]), [sample[1] for sample in samples]


# -- permuted ----------------------------------------------------------------------------------------------------------


def test_permuted_tasks_are_the_same_digits_pixel_by_pixel_elsewhere(digits):
    data = PermutedMNISTData(num_tasks=3, train_size=60, val_size=15, test_size=20, seed=4, epochs_per_task=1)
    data.setup()
    pool, test = digits
    ends = [(pool, 0, 60), (pool, 60, 75), (test, 0, 20)]
    orders = []
    for task in range(3):
        views = [data.train_set.datasets[task], data.val_sets[task], data.test_sets[task]]
        for view, (published, start, stop) in zip(views, ends, strict=True):
            images, labels = everything(view)
            assert labels == published.labels[start:stop].tolist()
            original = normalised(published.images[start:stop]).flatten(1)
            order = view.permutation  # type: ignore[attr-defined]
            for pixel in (0, 5, 783):
                assert torch.equal(images.flatten(1)[:, pixel], original[:, order[pixel]])
            assert torch.equal(images.flatten(1).sort().values, original.sort().values)
        orders.append(views[0].permutation.tolist())  # type: ignore[attr-defined]
        assert sorted(orders[-1]) == list(range(784))
    assert len({tuple(order) for order in orders}) == 3


def test_permutations_follow_from_seed_and_task_alone(digits):
    def orders(**options):
        data = PermutedMNISTData(val_size=10, epochs_per_task=1, **options)
        data.setup()
        return [part.permutation.tolist() for part in data.train_set.datasets]  # type: ignore[attr-defined]

    three = orders(num_tasks=3, seed=4)
    assert orders(num_tasks=2, seed=4, train_size=20, class_shares=(0.2, 0.8)) == three[:2]
    assert orders(num_tasks=3, seed=5)[0] != three[0]


def test_permuted_tasks_share_one_copy_of_the_images(digits):
    data = PermutedMNISTData(num_tasks=4, train_size=60, val_size=15, epochs_per_task=1)
    data.setup()
    assert len({part.images.data_ptr() for part in data.train_set.datasets}) == 1  # type: ignore[attr-defined]
    assert len({part.images.data_ptr() for part in data.test_sets}) == 1  # type: ignore[attr-defined]


def test_imbalanced_tasks_keep_other_shares_of_each_class(monkeypatch):
    labels = np.repeat(np.arange(10), 200)
    np.random.default_rng(0).shuffle(labels)
    pool = ImagePool(torch.zeros(2000, 1, 28, 28, dtype=torch.uint8), labels, np.arange(2000), 2000)
    monkeypatch.setattr(MNISTData, "load", lambda self: (pool, pool))
    data = PermutedMNISTData(num_tasks=20, train_size=1900, val_size=100, class_shares=(0.1, 0.6), epochs_per_task=1)
    data.setup()
    counts = np.array([np.bincount(part.labels, minlength=10) for part in data.train_set.datasets])  # type: ignore[attr-defined]
    available = np.bincount(labels[:1900])
    shares = counts / available
    assert 0.09 < shares.min() < 0.15
    assert 0.55 < shares.max() < 0.61
    assert abs(shares.mean() - 0.35) < 0.03
    assert len({tuple(line) for line in counts}) == 20
    for part in data.train_set.datasets:
        rows = part.rows  # type: ignore[attr-defined]
        assert len(rows.unique()) == len(rows)
        assert part.labels.tolist() == labels[rows].tolist()  # type: ignore[attr-defined]
    assert all(len(part) == 100 for part in data.val_sets)  # type: ignore[arg-type]
    assert all(len(part) == 2000 for part in data.test_sets)  # type: ignore[arg-type]


# -- split -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes_per_task", "class_order"), [(2, None), (5, [9, 1, 2, 3, 4, 5, 6, 7, 8, 0])])
def test_split_tasks_have_the_samples_of_their_classes(digits, classes_per_task, class_order):
    data = SplitMNISTData(
        classes_per_task=classes_per_task, class_order=class_order, train_size=60, val_size=20, epochs_per_task=1
    )
    data.setup()
    order = class_order or list(range(10))
    pool, test = digits
    assert data.num_tasks == 10 // classes_per_task
    assert data.class_mask is not None
    for task in range(data.num_tasks):
        classes = order[task * classes_per_task : (task + 1) * classes_per_task]
        assert data.task_names[task] == "/".join(map(str, classes))
        assert data.class_mask[task].nonzero().flatten().tolist() == sorted(classes)
        views = [data.train_set.datasets[task], data.val_sets[task], data.test_sets[task]]
        for view, published, places in zip(
            views, (pool, pool, test), (range(60), range(60, 80), range(30)), strict=True
        ):
            wanted = [place for place in places if published.labels[place] in classes]
            images, labels = everything(view)
            assert torch.equal(images, normalised(published.images[wanted]))
            assert labels == published.labels[wanted].tolist()
        assert all(sample[2] == task for sample in data.val_sets[task])  # type: ignore[attr-defined]


def test_a_single_head_has_neither_masks_nor_tasks_in_the_batch(digits):
    data = SplitMNISTData(multi_head=False, val_size=20, epochs_per_task=1)
    data.setup()
    assert data.class_mask is None
    assert len(next(iter(data.task_dataloader(2)))) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitMNISTData(classes_per_task=3), "divides 10"),
        (lambda: SplitMNISTData(class_order=[0, 1]), "each of 0 to 9 once"),
        (lambda: PermutedMNISTData(num_tasks=0), "num_tasks must be at least 1"),
        (lambda: PermutedMNISTData(class_shares=(0.5, 0.2)), "class_shares: low and high"),
        (lambda: PermutedMNISTData(train_size=90, epochs_per_task=1).setup(), "train_size=90.*do not fit"),
        (lambda: PermutedMNISTData(val_size=10, test_size=31, epochs_per_task=1).setup(), "test_size=31 do not fit"),
        (lambda: VisionMixtureData(datasets=["MNIST", "Omniglot"]), "unknown data set 'Omniglot'"),
    ],
)
def test_what_cannot_be_is_refused(digits, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_mnist_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.download=true"):
        PermutedMNISTData(tmp_path).setup()


# -- mixture -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch):
    """Random images for four of the five; SVHN is missing."""
    pools = {}
    for number, (name, source) in enumerate(MIXTURE.items()):
        shape = (3, 32, 32) if name == "CIFAR10" else (1, 28, 28)
        pools[name] = random_pool(TRAINING, 2 * number, shape), random_pool(TESTING, 2 * number + 1, shape)
        monkeypatch.setattr(source, "load", lambda self, found=pools[name]: found)

    def missing(self):
        raise self.missing([self.data_folder() / "SVHN"])

    monkeypatch.setattr(SVHNData, "load", missing)
    return pools


def test_the_mixture_takes_what_is_there_as_colour_images(sources, tmp_path):
    data = VisionMixtureData(tmp_path, train_size=40, val_size=20, test_size=25, epochs_per_task=1)
    with pytest.warns(UserWarning, match="not on disk and left out: SVHN"):
        data.setup()
    assert data.left_out == ["SVHN"]
    assert data.task_names == ["MNIST", "notMNIST", "FashionMNIST", "CIFAR10"]
    for task, name in enumerate(data.task_names):
        test = sources[name][1]
        images, labels = everything(data.test_sets[task])[0], [s[1] for s in data.test_sets[task]]  # type: ignore[attr-defined]
        assert images.shape == (25, 3, 32, 32)
        assert labels == (test.labels[:25] + 10 * task).tolist()
        inner = normalised(test.images[:25], MIXTURE[name])
        if name == "CIFAR10":
            assert torch.equal(images, inner)
        else:
            assert torch.equal(images[:, :, 2:30, 2:30], inner.expand(-1, 3, -1, -1))
            assert (images[:, :, :2] == normalised(torch.zeros(1, 1, 1), MIXTURE[name])).all()
        assert data.class_mask is not None
        assert data.class_mask[task].nonzero().flatten().tolist() == list(range(10 * task, 10 * task + 10))
    train, val = data.train_set.datasets[0], data.val_sets[0]
    assert (len(train), len(val)) == (40, 20)  # type: ignore[arg-type]
    flat = {tuple(image.flatten().tolist()) for image in (*everything(train)[0], *everything(val)[0])}
    assert len(flat) == 60  # no sample in both


def test_data_sets_that_are_named_must_be_there(sources, tmp_path):
    with pytest.raises(FileNotFoundError, match="SVHN not found"):
        VisionMixtureData(tmp_path, datasets=["MNIST", "SVHN"], val_size=20).setup()
    data = VisionMixtureData(tmp_path, datasets=["CIFAR10", "MNIST"], val_size=20, epochs_per_task=1)
    data.setup()
    assert data.task_names == ["CIFAR10", "MNIST"]


def test_a_mixture_of_nothing_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match="notMNIST"):
        VisionMixtureData(tmp_path).setup()


def test_svhn_comes_from_torchvisions_files(tmp_path):
    from scipy.io import savemat

    (tmp_path / "SVHN").mkdir()
    for part, size in (("train", 5), ("test", 4)):
        images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, size), dtype=np.uint8)
        savemat(tmp_path / "SVHN" / f"{part}_32x32.mat", {"X": images, "y": np.arange(size)[:, None] + 7})
    with pytest.raises(FileNotFoundError, match="SVHN not found"):
        SVHNData(tmp_path / "SVHN").load()
    source = SVHNData(tmp_path)
    from torchvision.datasets import SVHN

    with pytest.MonkeyPatch.context() as patch:  # the published files have a checksum, these have not
        patch.setattr(SVHN, "_check_integrity", lambda self: True)
        pool, test = source.load()
    assert pool.images.shape == (5, 3, 32, 32)
    assert pool.labels.tolist() == [7, 8, 9, 0, 11]  # class 10 is the digit 0
    assert len(test.labels) == 4


# -- the real ones -----------------------------------------------------------------------------------------------------


def test_real_split_mnist(require):
    data = SplitMNISTData(require("MNIST"), epochs_per_task=1)
    data.setup()
    assert len(data.train_set) == 59_000
    assert [len(part) for part in data.test_sets] == [2115, 2042, 1874, 1986, 1983]  # type: ignore[arg-type]
    images, labels = next(iter(data.task_dataloader(3)))[:2]
    assert images.shape == (64, 1, 28, 28)
    assert set(labels.tolist()) == {6, 7}
    assert abs(float(images.mean())) < 0.2


def test_real_mixture(require):
    folder: Path = require("notMNIST")
    require("cifar10")
    data = VisionMixtureData(folder, datasets=["notMNIST", "CIFAR10"], train_size=500, test_size=300, epochs_per_task=1)
    data.setup()
    for task in (0, 1):
        images, labels, number = next(iter(data.task_dataloader(task)))
        assert images.shape == (64, 3, 32, 32)
        assert set((labels // 10).tolist()) == {task} == set(number.tolist())
        assert abs(float(images.mean())) < 0.3
        assert 0.7 < float(images.std()) < 1.3
    assert NotMNISTData.class_names[9] == "J"
