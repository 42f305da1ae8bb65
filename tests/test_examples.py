"""The examples run as a person runs them, write where they are told to, and compare what they say they compare."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from dataparams import LearnableSoftLabels
from dataparams.tasks import DigitsData

EXAMPLES = Path(__file__).parents[1] / "examples"
# The examples score all their sets themselves. Run as scripts they silence what Lightning says to that.
pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def personalization() -> ModuleType:
    return load("personalization")


@pytest.fixture(scope="module")
def distillation() -> ModuleType:
    return load("distillation")


@pytest.fixture(scope="module")
def curves(personalization):
    """Two epochs of training, and one of fine-tuning after them."""
    args = personalization.parser.parse_args(["--epochs", "2", "--tune-epochs", "1"])
    return personalization.run(1, args).set_index(["method", "epoch"])


@pytest.fixture(scope="module")
def data() -> DigitsData:
    data = DigitsData(seed=0, train_size=200, noise="symmetric", noise_rate=0.4, meta_fraction=0.1, meta_clean=True)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("personalization", {"accuracy.png", "curves.csv", "table.csv"}),
        ("distillation", {"labels.png", "scores.csv", "table.csv"}),
    ],
)
def test_the_script_ends_without_a_warning_and_writes_to_out_only(name, files, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--seeds", "1", "--epochs", "1", "--out", "here"]
    # Python's own warnings of a release that is about to change are not the example's.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "matplotlib"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == files
    table = pd.read_csv(tmp_path / "here" / "table.csv")
    for method in table.iloc[:, 1 if name == "distillation" else 0]:
        assert method in result.stdout


class TestPersonalization:
    def test_fine_tuning_is_plain_training_and_then_something_else(self, curves):
        plain, tuned = curves.loc["plain training"], curves.loc["fine-tuning"]
        assert len(tuned) == len(plain) + 1
        pd.testing.assert_frame_equal(plain, tuned.iloc[:-1])
        assert tuned["test slice"].iloc[-1] != tuned["test slice"].iloc[-2]

    def test_methods_differ_and_the_same_seed_says_the_same(self, personalization, curves):
        at_end = curves.xs(2, level="epoch")[["validation overall", "test slice", "test overall"]].drop("fine-tuning")
        assert not at_end.duplicated().any()
        args = personalization.parser.parse_args(["--epochs", "2", "--tune-epochs", "1"])
        pd.testing.assert_frame_equal(personalization.run(1, args).set_index(["method", "epoch"]), curves)

    def test_scores_are_those_of_the_slice_and_of_all(self, personalization):
        args = personalization.parser.parse_args(["--classes", "0,6"])
        parts = personalization.slices(DigitsData(seed=0), args)
        curve = personalization.Curves(parts)

        class Zero(torch.nn.Module):  # always says 0
            device = torch.device("cpu")

            def forward(self, images):
                return F.one_hot(torch.zeros(len(images), dtype=torch.int64), 10).float()

        class Trainer:
            current_epoch = 4

        curve.on_train_epoch_end(Trainer(), Zero())
        labels = parts["test"][0].labels
        (row,) = curve.rows
        assert row["epoch"] == 5
        assert row["test overall"] == pytest.approx(100 * (labels == 0).double().mean().item(), abs=1e-4)
        of_slice = (labels == 0).sum() / torch.isin(labels, torch.tensor([0, 6])).sum()
        assert row["test slice"] == pytest.approx(100 * of_slice.item(), abs=1e-4)

    def test_the_tilted_slice_holds_the_images_of_one_writer(self, personalization):
        upright = personalization.slices(DigitsData(seed=0), personalization.parser.parse_args(["--tilt", "0"]))
        tilted = personalization.slices(DigitsData(seed=0), personalization.parser.parse_args(["--tilt", "60"]))
        data = DigitsData(seed=0)
        data.setup()
        for name, original in (("train", data.train_set), ("test", data.test_set)):
            (images, members), (same, others) = upright[name], tilted[name]
            assert torch.equal(images.images, same.images)  # everybody's images do not depend on whose slice it is
            assert torch.equal(images.labels, original.labels)
            assert not (members & others).any()
            assert 0.15 < members.float().mean() < 0.25
            assert torch.equal(images.images[members], original.images[members])
            assert not torch.equal(images.images[others], original.images[others])

    def test_the_best_epoch_is_chosen_by_validation_and_not_by_test(self, personalization):
        validation, test = [[60.0, 90.0, 90.0], [80.0, 70.0, 75.0]], [[99.0, 50.0, 70.0], [30.0, 98.0, 20.0]]
        curves = pd.DataFrame(
            [
                {"method": "a", "seed": s, "epoch": e + 1, "validation slice": validation[s][e],
                 "test slice": test[s][e], "test overall": test[s][e] / 2}
                for s in (0, 1)
                for e in range(3)
            ]
        )  # fmt: skip
        table = personalization.summary(curves)
        assert table.loc["a"].to_dict() == {
            "slice, best": "40.0 ± 14.1", "slice, last": "45.0 ± 35.4",
            "overall, best": "20.0 ± 7.1", "overall, last": "22.5 ± 17.7",
        }  # fmt: skip


class TestDistillation:
    def test_students_differ_in_their_labels_and_in_nothing_else(self, distillation, data):
        given = data.train_set
        images, one_hot = given.normalise(given.images), F.one_hot(given.labels, 10).float()
        network, scores = distillation.train(data, given, 8, 4)
        same, same_scores = distillation.train(data, TensorDataset(images, one_hot), 8, 4)
        for weight, other in zip(network.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-5)
        assert scores.test == pytest.approx(same_scores.test, abs=0.6)  # an image or two on the edge
        uniform, _ = distillation.train(data, TensorDataset(images, torch.full_like(one_hot, 0.1)), 8, 4)
        assert distillation.predictions(uniform, given).std() < 0.03

    def test_the_best_weights_are_those_of_the_best_validation_epoch(self, distillation, data):
        network, scores = distillation.train(data, data.train_set, 8, 6)
        best = int(np.argmax(scores.validation))
        assert scores.best == scores.test[best]
        network.load_state_dict(scores.weights)
        for images, seen in ((data.val_set, scores.validation), (data.test_set, scores.test)):
            right = distillation.predictions(network, images).argmax(1) == images.labels
            assert 100 * right.float().mean().item() == pytest.approx(seen[best], abs=1e-4)

    def test_a_student_gets_the_learned_labels(self, distillation, data):
        labels = LearnableSoftLabels(10, lr=0.2, meta=data.meta_dataloader())
        distillation.train(data, data.train_set, 8, 2, labels)
        corrected = labels.corrected_dataset(data.train_set, soft=True)
        table = labels.to_frame()
        images, targets = zip(*[corrected[i] for i in range(len(corrected))], strict=True)
        given = data.train_set.labels
        assert torch.equal(torch.stack(images), data.train_set.normalise(data.train_set.images))
        share = torch.stack(targets).gather(1, given[:, None]).squeeze(1)
        np.testing.assert_allclose(share, table["soft_label_given"], atol=1e-6)
        assert share.std() > 0.01  # they were learned
