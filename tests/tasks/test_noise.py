"""Label noise: exact counts, the right classes, reproducible draws, and files that do not fit."""

import numpy as np
import pytest
import torch

from dataparams.tasks import noise
from dataparams.tasks.noise import asymmetric, corrupt_labels, permute, symmetric

LABELS = np.random.default_rng(0).integers(0, 10, 1_000)
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.4004, 1.0])
def test_symmetric_corrupts_exactly_the_rate_and_never_keeps_the_label(rate):
    noisy = symmetric(LABELS, rate, 10, seed=3)
    assert (noisy != LABELS).sum() == round(rate * 1_000)
    assert noisy.min() >= 0
    assert noisy.max() <= 9


def test_symmetric_is_uniform_over_the_other_classes():
    labels = np.full(90_000, 4)
    counts = np.bincount(symmetric(labels, 1.0, 10, seed=0), minlength=10)
    assert counts[4] == 0
    others = np.delete(counts, 4)
    assert np.abs(others - 10_000).max() < 5 * np.sqrt(10_000)


def test_symmetric_with_self_keeps_one_in_k_of_the_drawn():
    labels = np.full(100_000, 4)
    kept = (symmetric(labels, 1.0, 10, seed=0, include_self=True) == 4).sum()
    assert abs(kept - 10_000) < 5 * np.sqrt(9_000)


@pytest.mark.parametrize(("rate", "touched"), [(0.4, 400), (0.29, 290), (0.2999, 299), (0.0, 0)])
def test_permute_moves_the_first_labels_among_themselves(rate, touched):
    noisy = permute(LABELS, rate, seed=1)
    assert np.array_equal(noisy[touched:], LABELS[touched:])
    assert np.array_equal(np.sort(noisy[:touched]), np.sort(LABELS[:touched]))


def test_permute_keeps_about_one_in_k_right():
    labels = np.arange(100_000) % 10
    kept = (permute(labels, 0.5, seed=0)[:50_000] == labels[:50_000]).mean()
    assert abs(kept - 0.1) < 0.01


def test_permute_counts_in_whole_numbers():
    # 0.29 * 100 is 28.999... in floating point.
    labels = np.arange(100)
    moved = permute(labels, 0.29, seed=2) != labels
    assert moved[28]
    assert not moved[29:].any()


def test_permute_can_touch_random_samples():
    noisy = permute(LABELS, 0.4, seed=1, shuffle=True)
    moved = np.flatnonzero(noisy != LABELS)
    assert moved.max() > 900
    assert len(moved) <= 400
    assert np.array_equal(np.sort(noisy), np.sort(LABELS))


def test_asymmetric_follows_the_cifar10_confusions():
    noisy = asymmetric(LABELS, 0.4, 10, seed=0, names=CIFAR10)
    expected = {
        "truck": "automobile",
        "bird": "airplane",
        "deer": "horse",
        "cat": "dog",
        "dog": "cat",
    }
    for number, name in enumerate(CIFAR10):
        members = np.equal(LABELS, number)
        wrong = noisy[members & (noisy != LABELS)]
        assert len(wrong) == (round(0.4 * members.sum()) if name in expected else 0)
        assert all(CIFAR10[label] == expected[name] for label in wrong)


def test_asymmetric_moves_to_the_next_class_otherwise():
    noisy = asymmetric(LABELS, 0.3, 10, seed=0)
    wrong = noisy != LABELS
    assert np.array_equal(noisy[wrong], (LABELS[wrong] + 1) % 10)
    for number in range(10):
        members = np.equal(LABELS, number)
        assert wrong[members].sum() == round(0.3 * members.sum())


@pytest.mark.parametrize("kind", ["permute", "symmetric", "symmetric_self", "asymmetric"])
def test_a_seed_decides_the_noise_and_the_input_is_left_alone(kind):
    before = LABELS.copy()
    first, again, other = (corrupt_labels(LABELS, kind, 0.4, 10, seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(LABELS, before)


def test_tensors_come_back_as_tensors_with_the_same_numbers():
    labels = torch.from_numpy(LABELS).to(torch.int32)
    noisy = corrupt_labels(labels, "symmetric", 0.4, 10, 7)
    assert noisy.dtype == torch.int32
    assert np.array_equal(noisy.numpy(), corrupt_labels(LABELS, "symmetric", 0.4, 10, 7))


def test_no_noise_is_a_copy():
    clean = corrupt_labels(LABELS, "none", 0.4, 10, 0)
    assert np.array_equal(clean, LABELS)
    assert clean is not LABELS


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".txt", ".csv", ".pt"])
def test_labels_from_every_kind_of_file(tmp_path, suffix):
    human = (LABELS + 1) % 10
    file = tmp_path / f"labels{suffix}"
    save = {
        ".npy": lambda: np.save(file, human),
        ".npz": lambda: np.savez(file, worst=human),
        ".txt": lambda: np.savetxt(file, human, fmt="%d"),
        ".csv": lambda: file.write_text("label\n" + "\n".join(map(str, human))),
        ".pt": lambda: torch.save(torch.from_numpy(human), file),
    }
    save[suffix]()
    assert np.array_equal(corrupt_labels(LABELS, "file", 0.0, 10, 0, file=file), human)


def test_a_csv_without_a_header_loses_no_line(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("3\n1\n2\n")
    assert noise.read_labels(file, 10).tolist() == [3, 1, 2]


def test_one_of_several_arrays_is_named_after_a_colon(tmp_path):
    # The layout of CIFAR-N's CIFAR-10_human.pt: a dictionary of numpy arrays.
    file = tmp_path / "CIFAR-10_human.pt"
    torch.save({"clean_label": LABELS, "worse_label": (LABELS + 3) % 10}, file)
    assert np.array_equal(noise.read_labels(f"{file}:worse_label", 10), (LABELS + 3) % 10)
    with pytest.raises(ValueError, match=r"clean_label, worse_label; name one"):
        noise.read_labels(file, 10)
    with pytest.raises(ValueError, match=r"no 'random' in it"):
        noise.read_labels(f"{file}:random", 10)


def test_files_that_do_not_fit(tmp_path):
    def saved(name, labels):
        np.save(tmp_path / name, labels)
        return tmp_path / name

    def read(file):
        return corrupt_labels(LABELS, "file", 0.0, 10, 0, file=file)

    with pytest.raises(ValueError, match="holds 999 labels, the data set has 1000"):
        read(saved("short.npy", LABELS[:-1]))
    with pytest.raises(ValueError, match=r"label 10 at position 17 is outside the 10 classes"):
        read(saved("outside.npy", np.where(np.arange(1_000) == 17, 10, LABELS)))
    with pytest.raises(ValueError, match="whole class numbers"):
        read(saved("half.npy", LABELS + 0.5))
    with pytest.raises(ValueError, match="one number a sample"):
        read(saved("square.npy", LABELS.reshape(10, 100)))
    with pytest.raises(FileNotFoundError, match="no label file at"):
        read(tmp_path / "absent.npy")
    (tmp_path / "labels.json").write_text("[]")
    with pytest.raises(ValueError, match=r"labels are read from \.npy"):
        read(tmp_path / "labels.json")


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown label noise 'uniform': choose one of none, permute"):
        corrupt_labels(LABELS, "uniform", 0.4, 10, 0)
    with pytest.raises(ValueError, match=r"share in \[0, 1\], not 40"):
        corrupt_labels(LABELS, "symmetric", 40, 10, 0)
    with pytest.raises(ValueError, match="outside the 5 classes"):
        corrupt_labels(LABELS, "symmetric", 0.4, 5, 0)
    with pytest.raises(ValueError, match="belongs to noise='file'"):
        corrupt_labels(LABELS, "symmetric", 0.4, 10, 0, file="labels.npy")
    with pytest.raises(ValueError, match="belongs to noise='file'"):
        corrupt_labels(LABELS, "file", 0.4, 10, 0)
    with pytest.raises(ValueError, match="must be integers"):
        corrupt_labels(LABELS.astype(float), "symmetric", 0.4, 10, 0)
