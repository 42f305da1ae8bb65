"""The meta set of the data modules: which samples it takes, whose labels it has, and what is left to train on."""

from typing import Any

import numpy as np
import pytest
import torch

from dataparams.tasks import DigitsData


def digits(**arguments):
    module = DigitsData(**{"noise": "symmetric", "noise_rate": 0.4, **arguments})
    module.setup("fit")
    return module


def labels_by_id(module, labels):
    return dict(zip(module.ids, labels.tolist(), strict=True))


def published_positions(module, part):
    """Where the images of ``part`` stand in the published file; every image of digits is unlike the others."""
    from sklearn.datasets import load_digits

    published: Any = load_digits()
    place = {image.tobytes(): number for number, image in enumerate(published.images.astype(np.uint8))}
    return [place[image.tobytes()] for image in part.images[:, 0].numpy()]


@pytest.mark.parametrize("clean", [False, True])
def test_a_held_out_meta_set_leaves_the_others_as_they_were(clean):
    whole = digits(seed=5)
    module = digits(seed=5, meta_fraction=0.1, meta_clean=clean)
    assert module.meta_set is not None
    assert (len(module.train_set), len(module.meta_set)) == (1167 - 117, 117)
    assert module.ids is not None
    assert module.is_corrupt is not None
    assert module.true_labels is not None
    given, true = labels_by_id(whole, whole.given_labels), labels_by_id(whole, whole.true_labels)
    meta_ids = published_positions(module, module.meta_set)
    assert sorted(module.ids + meta_ids) == whole.ids
    assert module.ids == published_positions(module, module.train_set)
    assert module.given_labels.tolist() == [given[name] for name in module.ids]
    assert module.true_labels.tolist() == [true[name] for name in module.ids]
    assert module.is_corrupt.tolist() == [given[name] != true[name] for name in module.ids]
    assert torch.equal(module.train_set.labels, module.given_labels)
    own = true if clean else given
    assert module.meta_set.labels.tolist() == [own[name] for name in meta_ids]
    shares = np.bincount(list(own.values())) / 1167
    assert np.abs(np.bincount(module.meta_set.labels) - 117 * shares).max() <= 2
    for untouched in ("val_set", "test_set"):
        assert torch.equal(getattr(module, untouched).labels, getattr(whole, untouched).labels)
        assert torch.equal(getattr(module, untouched).images, getattr(whole, untouched).images)


def test_the_baselines_train_on_the_same_meta_set():
    whole = digits(seed=5)
    held_out, added, alone = (
        digits(seed=5, meta_fraction=0.1, meta_clean=True, meta_use=use) for use in ("hold_out", "add", "only")
    )
    assert held_out.meta_set is not None
    meta_ids = published_positions(held_out, held_out.meta_set)
    for module in (added, alone):
        assert module.meta_set is not None
        assert torch.equal(module.meta_set.images, held_out.meta_set.images)
        assert torch.equal(module.meta_set.labels, held_out.meta_set.labels)
        assert module.meta_dataloader() is None
    assert added.ids == whole.ids
    given, true = labels_by_id(whole, whole.given_labels), labels_by_id(whole, whole.true_labels)
    corrected = {name: true[name] if name in meta_ids else given[name] for name in whole.ids or []}
    assert labels_by_id(added, added.given_labels) == corrected
    assert added.is_corrupt is not None
    assert added.is_corrupt.tolist() == [label != true[name] for name, label in corrected.items()]
    assert torch.equal(added.train_set.images, whole.train_set.images)
    assert alone.ids == meta_ids
    assert torch.equal(alone.train_set.labels, held_out.meta_set.labels)
    assert alone.is_corrupt is not None
    assert not alone.is_corrupt.any()


def test_the_meta_loader_is_shuffled_and_repeats_with_the_seed():
    def order(loader):
        return torch.cat([images.flatten(1).sum(1) for images, _ in loader]).tolist()

    def loader_of(**arguments):
        loader = digits(meta_fraction=0.1, batch_size=50, **arguments).meta_dataloader()
        assert loader is not None
        return loader

    before = torch.get_rng_state()
    loader = loader_of()
    assert [len(labels) for _, labels in loader] == [50, 50, 17]
    first, second = order(loader_of()), order(loader)
    assert first != second
    assert sorted(first) == sorted(second)
    unshuffled = loader.dataset
    assert first != [float(image.sum()) for image, _ in unshuffled]  # type: ignore[attr-defined]
    assert order(loader_of()) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert digits(meta_fraction=0.01, batch_size=50).meta_dataloader().batch_size == 12  # type: ignore[union-attr]
    assert digits().meta_dataloader() is None


def test_meta_sets_differ_by_seed_and_not_by_use_of_the_seed():
    one, other = digits(seed=1, meta_fraction=0.5), digits(seed=2, meta_fraction=0.5)
    assert one.ids != other.ids
    # Drawn from the noise's own random numbers, the meta set would hold more wrong labels than its share, or fewer.
    whole = digits(seed=1)
    assert one.is_corrupt is not None
    assert whole.is_corrupt is not None
    left = len(one.is_corrupt)
    assert abs(one.is_corrupt.mean() - whole.is_corrupt.mean()) < 5 * np.sqrt(0.24 / left)


def test_only_a_meta_set_is_described():
    assert not [name for name in digits().describe() if name.startswith("meta")]
    described = digits(meta_fraction=0.1, meta_clean=True, meta_use="only").describe()
    assert (described["meta_size"], described["meta_use"], described["meta_clean"]) == (117, "only", True)
    assert (described["train_size"], described["wrong_labels"]) == (117, 0.0)


def test_bad_arguments():
    for share in (1.0, -0.1, 10):
        with pytest.raises(ValueError, match=r"meta_fraction is a share in \[0, 1\)"):
            DigitsData(meta_fraction=share)
    with pytest.raises(ValueError, match="unknown meta_use 'held_out': choose one of hold_out, add, only"):
        DigitsData(meta_fraction=0.1, meta_use="held_out")
    for use in ("add", "only"):
        with pytest.raises(ValueError, match=f"meta_use='{use}' without a meta set: give meta_fraction"):
            DigitsData(meta_use=use)
    with pytest.raises(ValueError, match="leaves the meta set empty"):
        DigitsData(meta_fraction=0.0004).setup()
    with pytest.raises(ValueError, match="leaves the training set beside the meta set empty"):
        DigitsData(meta_fraction=0.9999).setup()
