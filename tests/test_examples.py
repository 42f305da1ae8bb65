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
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch.utils.data import TensorDataset
from tqdm import tqdm

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
def self_paced() -> ModuleType:
    return load("self_paced")


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


SHORT = ["--train-size", "200", "--epochs", "3", "--seeds", "1", "--target", "20", "--max-fraction", "0.6"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Run by a person who has no data on disk: what was printed, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("self_paced")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(folder / "matplotlib")}
    environment.pop("DATAPARAMS_DATA", None)
    command = [sys.executable, str(EXAMPLES / "self_paced.py"), *SHORT, "--out", "here"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert {path.name for path in folder.iterdir()} <= {"here", "matplotlib"}
    (out,) = (folder / "here").iterdir()
    return result.stdout, out


@pytest.fixture(scope="module")
def small_digits(self_paced):
    return self_paced.load(self_paced.parser.parse_args(["--data", "digits", *SHORT]), 0)


class TestSelfPaced:
    def test_it_says_what_it_trains_on_and_draws_it(self, self_paced, script):
        printed, out = script
        assert "scikit-learn's digits instead" in printed
        assert "5 of 5 runs" in printed
        pictures = {"accuracy.png", "embedding.png", *(f"entry_{arm}.png" for arm in self_paced.SELECTIONS)}
        assert {path.name for path in out.iterdir()} == {"table.csv", *pictures, *self_paced.STYLES}
        for name in pictures:
            pixels = imread(out / name)[..., :3]
            assert min(pixels.shape[:2]) > 300
            assert 0.01 < (pixels < 0.9).any(2).mean() < 0.9
        assert not list(out.rglob("*.ckpt"))

    def test_the_table_says_what_the_runs_say(self, self_paced, script, small_digits):
        printed, out = script
        table = pd.read_csv(out / "table.csv", index_col=0)
        assert list(table.index) == ["uniform", "SPL", "SPLD", "SPL-ADVisE", "stratified"]
        for arm, row in table.iterrows():
            curve = pd.read_csv(out / str(arm) / "seed0" / "curve.csv").to_dict("records")
            samples = pd.read_csv(out / str(arm) / "seed0" / "samples.csv")
            assert [r["updates"] for r in curve] == [7, 14, 21]  # as many as uniform training has
            np.testing.assert_array_equal(samples["given_label"], small_digits.given_labels)
            np.testing.assert_array_equal(samples["is_corrupt"], small_digits.is_corrupt)
            assert row["test, best"] == round(max(curve, key=lambda r: r["validation"])["test"], 1)
            assert row["test, last"] == round(curve[-1]["test"], 1)
            first = samples["first_round"] == (0 if arm == "uniform" else 1)
            assert row["purity, first"] == round(100 - 100 * small_digits.is_corrupt[first].mean(), 1)
            assert row["purity, last"] == round(100 - 100 * small_digits.is_corrupt[samples["selected"]].mean(), 1)
            reached = [r for r in curve if r["test"] >= 20]
            assert str(row["updates to 20"]) == (str(float(reached[0]["updates"])) if reached else "never")
            assert f"{arm} " in printed
            if arm != "uniform":
                assert 0.3 < first.mean() < 0.6
                assert 0.3 < samples["selected"].mean() <= 0.6
        assert len({(out / arm / "seed0" / "curve.csv").read_text() for arm in table.index}) == 5

    def test_finished_runs_are_not_trained_again(self, self_paced, script, monkeypatch, capsys):
        _, out = script
        files = sorted(out.glob("*/seed*/*"))
        before, table = [path.stat().st_mtime_ns for path in files], (out / "table.csv").read_text()
        monkeypatch.setattr(self_paced, "train", None)
        for name in ("draw_entry", "draw_embedding"):  # which take seconds
            monkeypatch.setattr(self_paced, name, lambda *args: Figure())
        self_paced.main(self_paced.parser.parse_args(["--data", "digits", *SHORT, "--out", str(out.parent)]))
        assert "0 of 5 runs" in capsys.readouterr().out
        assert [path.stat().st_mtime_ns for path in sorted(out.glob("*/seed*/*"))] == before
        assert (out / "table.csv").read_text() == table

    def test_an_interrupted_run_goes_on_as_if_it_had_not_been(self, self_paced, script, monkeypatch, tmp_path):
        _, out = script
        arguments = self_paced.parser.parse_args(["--data", "digits", *SHORT])
        measure = self_paced.Curve.on_train_epoch_end

        trained = []

        def stop_in_the_second(curve, trainer, module):
            trained.append(trainer.current_epoch)
            if trained == [0, 1]:
                raise RuntimeError("power cut")
            measure(curve, trainer, module)

        monkeypatch.setattr(self_paced.Curve, "on_train_epoch_end", stop_in_the_second)
        with pytest.raises(RuntimeError, match="power cut"):
            self_paced.train("SPL-ADVisE", 0, arguments, tmp_path, tqdm(disable=True))
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
        bar = tqdm(total=3)
        self_paced.train("SPL-ADVisE", 0, arguments, tmp_path, bar)
        assert trained == [0, 1, 1, 2]
        assert bar.n == 3
        bar.close()
        for name in ("curve.csv", "samples.csv"):
            pd.testing.assert_frame_equal(
                pd.read_csv(tmp_path / name), pd.read_csv(out / "SPL-ADVisE" / "seed0" / name), rtol=1e-4
            )
        there = np.load(out / "SPL-ADVisE" / "seed0" / "embedding.npy")
        np.testing.assert_allclose(np.load(tmp_path / "embedding.npy"), there, rtol=1e-3, atol=1e-3)

    def test_the_grid_shows_the_samples_of_each_round(self, self_paced, small_digits):
        rng = np.random.default_rng(0)
        rounds = rng.choice([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 12, np.nan], len(small_digits.train_set))
        samples = pd.DataFrame({"first_round": rounds, "is_corrupt": small_digits.is_corrupt})
        groups = self_paced.by_entry(samples)
        assert list(groups) == [
            "round 1", "rounds 2 to 3", "rounds 4 to 5", "round 6", "round 7", "round 8", "round 9", "round 12", "never"
        ]  # fmt: skip
        np.testing.assert_array_equal(np.sort(np.concatenate(list(groups.values()))), np.arange(len(rounds)))
        assert set(rounds[groups["rounds 4 to 5"]]) == {4, 5}
        assert np.isnan(rounds[groups["never"]]).all()

        images = small_digits.train_set.images[:, 0].numpy()
        figure = self_paced.draw_entry(small_digits, samples, "title", columns=4)
        shown = np.array(figure.axes).reshape(len(groups), 4)
        for row, (name, members) in zip(shown, groups.items(), strict=True):
            assert row[0].texts[0].get_text().startswith(f"{name}\nn = {len(members)}\n")
            seen = set()
            for axes in row:
                (position,) = np.flatnonzero((images == axes.images[0].get_array()).all((1, 2)))
                assert position in members
                seen.add(position)
                assert axes.get_title() == str(int(small_digits.given_labels[position]))
                framed = axes.spines["left"].get_edgecolor() == to_rgba(self_paced.WRONG)
                assert framed == bool(small_digits.is_corrupt[position])
            assert len(seen) == 4

    def test_accuracy_is_that_of_the_noisy_validation_and_of_the_test_labels(self, self_paced, small_digits):
        class Zero(torch.nn.Module):  # always says 0
            device = torch.device("cpu")

            def forward(self, images):
                return F.one_hot(torch.zeros(len(images), dtype=torch.int64), 10).float()

        class Trainer:
            current_epoch, global_step = 4, 35

        curve = self_paced.Curve(small_digits, tqdm(disable=True))
        curve.on_train_epoch_end(Trainer(), Zero())
        validation, test = small_digits.val_set.labels, small_digits.test_set.labels
        assert curve.rows == [{
            "epoch": 5, "updates": 35, "validation": pytest.approx(100 * (validation == 0).double().mean().item()),
            "test": pytest.approx(100 * (test == 0).double().mean().item()),
        }]  # fmt: skip
        assert (validation == 0).double().mean() != (test == 0).double().mean()

    def test_the_best_epoch_is_chosen_by_validation_and_not_by_test(self, self_paced, tmp_path):
        validation, test = [[60.0, 90.0, 90.0], [80.0, 70.0, 75.0]], [[99.0, 50.0, 70.0], [30.0, 98.0, 20.0]]
        for seed in (0, 1):
            (tmp_path / str(seed)).mkdir()
            curve = {"epoch": [1, 2, 3], "updates": [7, 14, 21], "validation": validation[seed], "test": test[seed]}
            pd.DataFrame(curve).to_csv(tmp_path / str(seed) / "curve.csv")
            samples = {"is_corrupt": [True, False], "first_round": [1, 2], "selected": [True, True]}
            pd.DataFrame(samples).to_csv(tmp_path / str(seed) / "samples.csv")
        table = self_paced.summary({"a": [tmp_path / "0", tmp_path / "1"]}, target=98.5)
        assert table.loc["a"].to_dict() == {
            "test, best": "40.0 ± 14.1", "test, last": "45.0 ± 35.4", "purity, first": "0.0 ± 0.0",
            "purity, last": "50.0 ± 0.0", "epochs to 98.5": "1.0 (1 of 2)", "updates to 98.5": "7.0 (1 of 2)",
        }  # fmt: skip

    def test_what_not_every_seed_reached_is_said(self, self_paced):
        assert self_paced.spread(pd.Series([2.0, 4.0, np.nan])) == "3.0 ± 1.4 (2 of 3)"
        assert self_paced.spread(pd.Series([np.nan, np.nan])) == "never"
        assert self_paced.spread(pd.Series([2.0, 3.0])) == "2.5 ± 0.7"

    def test_data_that_is_not_there_is_said_and_limits_are_checked(self, self_paced, tmp_path):
        arguments = ["--data", "fashion", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match=r"(?s)FashionMNIST not found.*--data digits"):
            self_paced.main(self_paced.parser.parse_args(arguments))
        with pytest.raises(SystemExit):
            self_paced.parser.parse_args(["--max-fraction", "1.5"])
        assert self_paced.parser.parse_args(["--max-fraction", "none"]).max_fraction is None
