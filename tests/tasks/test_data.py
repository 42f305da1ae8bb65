"""The data modules on real data: splits, noise, truth, loaders and the errors of a missing data
set.
"""

import lzma
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from dataparams.tasks import CIFARData, DigitsData, EpochSampler, FashionMNISTData, MNISTData
from dataparams.tasks.splits import long_tail, stratified_split


def ready(module):
    module.setup("fit")
    return module


def digits(**arguments):
    return ready(DigitsData(**{"noise": "symmetric", "noise_rate": 0.4, **arguments}))


def test_digits_are_divided_into_disjoint_stratified_parts():
    from sklearn.datasets import load_digits

    published: Any = load_digits()
    module = ready(DigitsData(seed=4))
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [
        1167,
        270,
        360,
    ]
    every_image = torch.cat([part.images for part in (module.train_set, module.val_set, module.test_set)])
    assert Counter(map(bytes, every_image.numpy().reshape(1797, -1))) == Counter(
        map(bytes, published.images.astype(np.uint8).reshape(1797, -1))
    )
    assert module.ids is not None
    assert module.true_labels is not None
    assert np.array_equal(published.target[module.ids], module.true_labels)
    shares = np.bincount(published.target) / 1797
    for part in (module.train_set, module.val_set, module.test_set):
        assert np.abs(np.bincount(part.labels) - shares * len(part)).max() <= 2


def test_digits_are_normalised():
    images = torch.stack([image for image, _ in ready(DigitsData()).train_set])
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_long_tail_falls_geometrically_from_class_to_class():
    module, whole = (ready(DigitsData(seed=2, imbalance=imbalance)) for imbalance in (16.0, 1.0))
    assert module.true_labels is not None
    assert module.ids is not None
    assert whole.ids is not None
    kept = np.bincount(module.true_labels)
    assert kept.tolist() == pytest.approx([kept[0] * 16 ** (-k / 9) for k in range(10)], abs=1)
    assert set(module.ids) < set(whole.ids)
    assert torch.equal(module.val_set.images, whole.val_set.images)
    assert torch.equal(module.test_set.images, whole.test_set.images)
    assert ready(DigitsData(seed=2, imbalance=16.0)).ids == module.ids
    assert ready(DigitsData(seed=3, imbalance=16.0)).ids != module.ids


@pytest.mark.parametrize("counts", [(100, 100, 100), (300, 100, 50), (50, 100, 300)])
def test_long_tail_takes_as_many_as_there_are(counts):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], counts))
    kept = np.bincount(labels[long_tail(labels, 25.0, seed=0)])
    assert (kept <= counts).all()
    assert (kept == counts).any()
    assert kept[0] / kept[1] == pytest.approx(5, rel=0.05)
    assert kept[0] / kept[2] == pytest.approx(25, rel=0.1)
    assert np.array_equal(long_tail(labels, 1.0, seed=0), np.arange(len(labels)))


def test_long_tail_has_noise_at_the_rate_asked_for():
    module = digits(imbalance=4.0, seed=1)
    assert module.is_corrupt is not None
    assert module.is_corrupt.mean() == pytest.approx(0.4, abs=0.05)
    assert module.describe()["imbalance"] == 4.0


@pytest.mark.parametrize("imbalance", [0.5, float("nan")])
def test_imbalance_below_one_is_refused(imbalance):
    with pytest.raises(ValueError, match="imbalance must be at least 1"):
        DigitsData(imbalance=imbalance)


def test_stratified_split_of_uneven_classes():
    labels = np.repeat([0, 1, 2], [100, 250, 650])
    first, second = stratified_split(labels, 500, 300, seed=0)
    assert len(first) == 500
    assert len(second) == 300
    assert not set(first) & set(second)
    assert np.all(np.diff(first) > 0)
    assert np.all(np.diff(second) > 0)
    for part in (first, second):
        expected = np.array([0.1, 0.25, 0.65]) * len(part)
        assert np.abs(np.bincount(labels[part]) - expected).max() <= 2
    other, _ = stratified_split(labels, 500, 300, seed=1)
    assert not np.array_equal(first, other)


def test_noise_is_exact_and_the_truth_is_kept():
    module = digits(seed=1)
    assert module.is_corrupt is not None
    assert module.is_corrupt.sum() == round(0.4 * 1167)
    assert torch.equal(module.given_labels, module.train_set.labels)
    assert np.array_equal(module.is_corrupt, (module.given_labels != module.true_labels).numpy())
    assert [label for _, label in module.train_set] == module.given_labels.tolist()


def test_validation_is_as_noisy_and_the_test_is_clean():
    noisy, clean = digits(seed=1), ready(DigitsData(seed=1))
    assert (noisy.val_set.labels != clean.val_set.labels).sum() == round(0.4 * 270)
    assert torch.equal(noisy.test_set.labels, clean.test_set.labels)
    assert torch.equal(noisy.train_set.images, clean.train_set.images)
    assert clean.describe()["wrong_labels"] == 0


def test_the_seed_decides_everything_and_seeds_differ():
    first, again, other = digits(seed=2), digits(seed=2), digits(seed=3)
    assert torch.equal(first.given_labels, again.given_labels)
    assert first.ids == again.ids
    assert torch.equal(first.val_set.labels, again.val_set.labels)
    assert first.ids != other.ids


def test_training_and_validation_noise_are_independent():
    # With one stream for both, the same positions would be drawn wherever the sizes agree.
    module = digits(train_size=270, val_size=270)
    clean = ready(DigitsData(train_size=270, val_size=270))
    assert module.is_corrupt is not None
    wrong_in_val = (module.val_set.labels != clean.val_set.labels).numpy()
    both = (module.is_corrupt & wrong_in_val).sum()
    assert abs(both - 0.16 * 270) < 5 * np.sqrt(270 * 0.16)


def test_describe_is_flat_and_true():
    assert digits(seed=0).describe() == {
        "data": "digits",
        "num_classes": 10,
        "train_size": 1167,
        "val_size": 270,
        "test_size": 360,
        "noise": "symmetric",
        "noise_rate": 0.4,
        "wrong_labels": pytest.approx(467 / 1167),
        "val_wrong_labels": pytest.approx(0.4),
        "imbalance": 1.0,
    }


def test_setup_twice_changes_nothing():
    module = digits()
    before = module.train_set
    module.setup("test")
    assert module.train_set is before


def test_a_label_file_may_cover_the_published_data_or_the_pool(tmp_path):
    from sklearn.datasets import load_digits

    published: Any = load_digits()
    shifted = (published.target + 1) % 10
    np.save(tmp_path / "all.npy", shifted)
    module = ready(DigitsData(noise="file", noise_file=tmp_path / "all.npy", train_size=500))
    assert module.true_labels is not None
    assert torch.equal(module.given_labels, (module.true_labels + 1) % 10)
    pool, _ = DigitsData().load()
    np.save(tmp_path / "pool.npy", (pool.labels + 2) % 10)
    module = ready(DigitsData(noise="file", noise_file=tmp_path / "pool.npy", train_size=500))
    assert module.true_labels is not None
    assert torch.equal(module.given_labels, (module.true_labels + 2) % 10)
    np.save(tmp_path / "short.npy", shifted[:-1])
    with pytest.raises(ValueError, match=r"holds 1796 labels; digits needs 1797 .* or 1437"):
        DigitsData(noise="file", noise_file=tmp_path / "short.npy").setup()


def test_the_training_loader_reshuffles_by_epoch_only():
    loader = digits(batch_size=100).train_dataloader()
    first = torch.cat([labels for _, labels in loader])
    assert torch.equal(torch.cat([labels for _, labels in loader]), first)
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(1)
    assert not torch.equal(torch.cat([labels for _, labels in loader]), first)
    assert len(first) == 1167


@pytest.mark.parametrize("kind", ["symmetric", "permute"])
def test_wrong_labels_are_spread_over_every_epoch(kind):
    # An order drawn from the noise's own random numbers would bring them together.
    module = digits(noise=kind, seed=1)
    assert module.is_corrupt is not None
    sampler = EpochSampler(len(module.train_set), seed=1)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        wrong = module.is_corrupt[list(sampler)]
        expected = wrong.mean()
        for part in np.array_split(wrong, 3):
            assert abs(part.mean() - expected) < 5 * np.sqrt(0.24 / len(part))


def test_fashion_takes_the_first_images(require):
    from torchvision.datasets import FashionMNIST

    folder = require("FashionMNIST/raw")
    published = FashionMNIST(str(folder), train=True)
    module = ready(FashionMNISTData(folder, noise="permute", noise_rate=0.4))
    assert module.ids == list(range(4_000))
    assert len(module.val_set) == 1_000
    assert torch.equal(module.train_set.images[:, 0], published.data[:4_000])
    assert torch.equal(module.val_set.images[:, 0], published.data[4_000:5_000])
    assert torch.equal(module.given_labels[1_600:], published.targets[1_600:4_000])
    assert module.is_corrupt is not None
    assert abs(module.is_corrupt[:1_600].mean() - 0.9) < 0.03
    images = module.train_set.normalise(module.train_set.images)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_mnist_leaves_the_last_thousand_for_validation(require):
    module = ready(MNISTData(require("MNIST/raw")))
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [
        59_000,
        1_000,
        10_000,
    ]
    images = module.train_set.normalise(module.train_set.images)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_the_environment_names_the_data_folder(require, monkeypatch):
    monkeypatch.setenv("DATAPARAMS_DATA", str(require("FashionMNIST/raw")))
    assert len(ready(FashionMNISTData(train_size=100)).train_set) == 100


def test_cifar_lossless_agrees_with_the_published_labels(require):
    folder = require("cifar10/cifar10_lossless_8068_1017.npz")
    module = ready(CIFARData(folder, source="lossless", noise="asymmetric", noise_rate=0.4))
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [
        7_262,
        806,
        1_017,
    ]
    with np.load(require("cifar10/cifar10_labels.npz") / "cifar10/cifar10_labels.npz") as published:
        assert module.ids is not None
        assert module.true_labels is not None
        assert np.array_equal(published["train_labels"][module.ids], module.true_labels)
    clean = np.isin(module.true_labels, [0, 1, 6, 7, 8])
    assert module.is_corrupt is not None
    assert not module.is_corrupt[clean].any()
    assert abs(module.is_corrupt[~clean].mean() - 0.4) < 0.001
    images = module.train_set.normalise(module.train_set.images)
    # The published deviation is the mean over images of each image's own, hence not one here.
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1.23) < 0.05


def test_cifar_human_labels_reach_a_subset_by_their_published_position(require, tmp_path):
    folder = require("cifar10/cifar10_lossless_8068_1017.npz")
    human = np.random.default_rng(0).integers(0, 10, 50_000)
    np.save(tmp_path / "human.npy", human)
    module = ready(CIFARData(folder, source="lossless", noise="file", noise_file=tmp_path / "human.npy"))
    assert module.ids is not None
    assert np.array_equal(module.given_labels, human[module.ids])


def test_cifar_jpeg_agrees_with_the_lossless_images(require):
    folder = require("cifar10/cifar10_test_jpeg.npz.xz")
    require("cifar10/cifar10_lossless_8068_1017.npz")
    from dataparams.tasks.cifar import LOSSLESS, _read_jpeg, _read_lossless

    jpeg = _read_jpeg(folder / "cifar10/cifar10_test_jpeg.npz.xz")
    _, lossless = _read_lossless(folder / LOSSLESS)
    assert jpeg.images.shape == (10_000, 3, 32, 32)
    assert np.array_equal(jpeg.labels[lossless.index], lossless.labels)
    difference = jpeg.images[lossless.index].float() - lossless.images.float()
    assert difference.abs().mean() < 8


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_from_torchvision_folders(tmp_path, monkeypatch, num_classes):
    write_torchvision_cifar(tmp_path, monkeypatch, num_classes)
    module = ready(CIFARData(tmp_path, num_classes=num_classes, val_size=10))
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [
        40,
        10,
        10,
    ]
    assert len(module.class_names) == num_classes
    # Pixel (row, column, channel) of image i is i + channel in the files below.
    assert module.ids is not None
    for position, published in enumerate(module.ids):
        assert module.train_set.images[position, 2].unique().tolist() == [published + 2]


def write_torchvision_cifar(folder, monkeypatch, num_classes):
    """Fifty training and ten test images in torchvision's own file layout, whose checksums are then
    not checked.
    """
    import pickle

    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if num_classes == 10 else CIFAR100
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    base = folder / kind.base_folder
    base.mkdir()
    files = [name for name, _ in kind.train_list]
    per_file = 50 // len(files)
    key = "labels" if num_classes == 10 else "fine_labels"
    for number, name in enumerate(files):
        first = number * per_file
        values = first + np.arange(per_file)[:, None, None] + np.arange(3)[None, :, None]
        data = np.broadcast_to(values, (per_file, 3, 1024)).reshape(per_file, -1).astype(np.uint8)
        labels = [value % 10 for value in range(first, first + per_file)]
        (base / name).write_bytes(pickle.dumps({"data": data, key: labels}))
    test = {"data": np.zeros((10, 3072), np.uint8), key: list(range(10))}
    (base / kind.test_list[0][0]).write_bytes(pickle.dumps(test))
    names = {kind.meta["key"]: [f"class {number}" for number in range(num_classes)]}
    (base / kind.meta["filename"]).write_bytes(pickle.dumps(names))


@pytest.mark.parametrize(
    ("make", "looked_for"),
    [
        (lambda folder: MNISTData(folder), "MNIST/raw"),
        (lambda folder: FashionMNISTData(folder), "FashionMNIST/raw"),
        (lambda folder: CIFARData(folder), "cifar-10-batches-py"),
        (lambda folder: CIFARData(folder, source="lossless"), "cifar10_lossless"),
        (lambda folder: CIFARData(folder, source="jpeg"), "cifar10_train_jpeg"),
        (lambda folder: CIFARData(folder, num_classes=100), "cifar-100-python"),
    ],
)
def test_a_missing_data_set_says_where_and_what_to_do(tmp_path, make, looked_for):
    with pytest.raises(FileNotFoundError) as caught:
        make(tmp_path / "nowhere").setup()
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message
    assert looked_for in message
    assert "data.data_dir=" in message
    assert "data.download=true" in message


def test_no_folder_at_all_says_what_to_set(monkeypatch):
    monkeypatch.delenv("DATAPARAMS_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DATAPARAMS_DATA"):
        MNISTData().setup()


def test_a_truncated_pack_is_an_error_of_its_own(tmp_path):
    (tmp_path / "cifar10").mkdir()
    for part in ("train", "test"):
        (tmp_path / f"cifar10/cifar10_{part}_jpeg.npz.xz").write_bytes(lzma.compress(b"x" * 100)[:40])
    with pytest.raises(EOFError):
        CIFARData(tmp_path, source="jpeg").setup()


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown label noise"):
        DigitsData(noise="uniform")
    with pytest.raises(ValueError, match="belong together"):
        DigitsData(noise="file")
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        DigitsData(noise="symmetric", noise_rate=40)
    with pytest.raises(ValueError, match="train_size=1400 and val_size=270 do not fit"):
        DigitsData(train_size=1400).setup()
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        DigitsData(batch_size=0)
    with pytest.raises(ValueError, match="10 or 100 classes, not 20"):
        CIFARData(num_classes=20)
    with pytest.raises(ValueError, match="holds CIFAR-10 only"):
        CIFARData(num_classes=100, source="lossless")
    with pytest.raises(ValueError, match="unknown source"):
        CIFARData(source="png")
