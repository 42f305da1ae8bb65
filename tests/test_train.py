"""The command line and the contract of a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_class, get_method, instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import roc_auc_score

from dataparams import DataParameters
from dataparams.report.rows import detectors_in, read_rows
from dataparams.tasks import Classifier, DigitsData
from dataparams.train import AtomicCheckpointIO, list_choices, main, run

ROOT = Path(__file__).parents[1]
# After one or two epochs the rows have indeed hardly moved.
pytestmark = pytest.mark.filterwarnings("ignore:.*log_temperature has moved by.*")


def choices(group: str) -> list[str]:
    return sorted(
        path.name.removesuffix(".yaml")
        for path in files("dataparams.conf").joinpath(group).iterdir()
        if path.name.endswith(".yaml")
    )


def configured(run_dir: object, *overrides: str) -> DictConfig:
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        return compose("config", [f"run_dir={run_dir}", "progress_bar=false", "plots=false", *overrides])


def short_run(run_dir: object, *overrides: str) -> dict:
    return run(configured(run_dir, "trainer.max_epochs=2", "trainer.accelerator=cpu", *overrides))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "dataparams.train", *arguments]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("method", choices("method"))
def test_every_method_of_every_experiment_composes_and_its_callbacks_can_be_made(experiment, method):
    cfg = configured("unused", f"experiment={experiment}", f"method={method}")
    assert (cfg.experiment, cfg.method) == (experiment, method)
    OmegaConf.resolve(cfg)
    for node in cfg.callbacks.values():
        callback = instantiate(node, _convert_="all")
        assert isinstance(callback, Callback)
        for name, value in (cfg.tuned.get(method) or {}).items():  # what the experiment recommends arrives
            assert node[name] == value
    assert len(cfg.callbacks) == 1
    assert get_class(cfg.data._target_)
    assert isinstance(instantiate(cfg.data, _convert_="all"), get_class(cfg.data._target_))


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in ("data", "model", "scheduler", "trainer", "logger") for name in choices(group)],
)
def test_every_other_choice_composes_and_names_what_exists(group, name):
    cfg = configured("unused", f"{group}={name}")
    OmegaConf.resolve(cfg)
    node = cfg[group] or {}
    for part in [node, *(node.values() if group == "logger" else [])]:
        if "_target_" in part:
            assert get_method(part._target_)


def test_models_can_be_made_and_fit_their_data():
    for experiment, shape in [("digits_noise", (1, 8, 8)), ("fashion_noise", (1, 28, 28)), ("cifar10", (3, 32, 32))]:
        module = instantiate(configured("unused", f"experiment={experiment}").module, _convert_="all")
        assert module(torch.zeros(2, *shape)).shape == (2, 10)


def test_callbacks_are_nodes_by_name():
    cfg = configured(
        "unused", "method=data_parameters", "callbacks.data_parameters.lr=0.05", "+callbacks=early_stopping"
    )
    assert cfg.callbacks.data_parameters.lr == 0.05
    assert "early_stopping" in cfg.callbacks
    assert list(configured("unused", "~callbacks.data_parameters").callbacks) == []


def test_the_papers_settings_can_be_chosen():
    cfg = configured("unused", "callbacks.data_parameters.preset=paper", "~tuned.data_parameters")
    callback = instantiate(cfg.callbacks.data_parameters, _convert_="all")
    assert callback.optimizers == [] or callback.optimizers[0].param_groups[0]["lr"] == 0.2
    assert (cfg.callbacks.data_parameters.lr, cfg.callbacks.data_parameters.bounds) == (None, None)


def test_every_package_ships():
    declared = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dataparams").rglob("__init__.py")}
    assert {name.strip('", ') for name in declared.split() if name.strip('", ')} == packages | {"dataparams.conf"}


def test_the_list_names_every_choice():
    text = list_choices()
    for group in ("experiment", "method"):
        for name in choices(group):
            assert f"\n  {name}" in text


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, short_run(folder, "method=data_parameters", "plots=true", "ema=0.9")


def test_a_run_writes_its_contract(finished):
    folder, results = finished
    expected = {"config.yaml", "metrics.csv", "results.json", "rows.parquet", "report.html"}
    assert expected | {"accuracy.png", "detectors.png"} <= files_in(folder)
    assert not [path for path in folder.rglob(".*") if path.is_file()]  # nothing half-written is left beside
    written = json.loads((folder / "results.json").read_text())
    assert written == results
    assert all(not isinstance(value, dict | list) for value in written.values())
    assert (written["experiment"], written["method"], written["seed"], written["epochs"]) == (
        "digits_noise",
        "data_parameters",
        0,
        2,
    )
    for key in ("test_accuracy_best", "test_accuracy_last", "test_accuracy_ema_best", "test_accuracy_ema_last"):
        assert 0.2 < written[key] <= 1.0
    assert written["step_time_ms"] > 0
    assert written["peak_memory_mb"] > 50
    assert (written["noise"], written["noise_rate"]) == ("symmetric", 0.4)
    config = OmegaConf.load(folder / "config.yaml")
    assert config.callbacks.data_parameters.lr == 0.094  # resolved


def test_rows_hold_every_sample_with_the_truth_of_the_data(finished):
    folder, _ = finished
    rows = read_rows(folder / "rows.parquet")
    changing = ["visits", "mean_loss", "mean_margin", "forgetting_events", "log_temperature"]
    assert {
        "index",
        "id",
        "given_label",
        "true_label",
        "is_corrupt",
        *changing,
        *(f"{name}_last" for name in changing),
    } <= set(rows)
    data = DigitsData(batch_size=32, noise="symmetric", noise_rate=0.4, seed=0)
    data.setup("fit")
    assert data.true_labels is not None
    assert rows["index"].tolist() == list(range(len(data.train_set)))
    assert rows["id"].tolist() == data.ids
    np.testing.assert_array_equal(rows["given_label"], data.given_labels)
    np.testing.assert_array_equal(rows["true_label"], data.true_labels)
    np.testing.assert_array_equal(rows["is_corrupt"], data.is_corrupt)
    assert (rows["visits_last"] == 2).all()


def test_rows_hold_the_labels_of_the_model_at_both_epochs(finished):
    folder, results = finished
    rows = read_rows(folder / "rows.parquet")
    data = DigitsData(batch_size=32, noise="symmetric", noise_rate=0.4, seed=0)
    data.setup("fit")
    for name, suffix in (("best", ""), ("last", "_last")):
        module = instantiate(configured("unused", "method=none").module, _convert_="all")
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        module.load_state_dict(checkpoint["current_model_state"])  # the raw weights, beside the averaged
        images = torch.stack([data.train_set[place][0] for place in range(len(data.train_set))])
        with torch.no_grad():
            expected = module.eval()(images).argmax(1)
        assert (rows[f"model_label{suffix}"].to_numpy() == expected.numpy()).mean() > 0.999
    np.testing.assert_allclose(rows["label_quality"], np.exp(-rows["mean_loss"]))
    assert rows["is_label_issue"].dtype == bool
    assert results["num_samples"] == len(rows)


def test_the_page_of_a_run_shows_its_worst_samples(finished, tmp_path, monkeypatch, capsys):
    folder, results = finished
    rows = read_rows(folder / "rows.parquet")

    def data_of(page):
        return json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])

    data = data_of(folder / "report.html")
    assert f"{results['test_accuracy_last']:.1%} at the last" in data["paragraph"]
    worst = rows["mean_loss"].sort_values(ascending=False, kind="stable").index[:200]
    assert {str(place) for place in worst} <= set(data["media"])

    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    for arguments, pictures in (([], True), (["--no-data"], False)):
        (copied / "report.html").unlink()
        monkeypatch.setattr(sys, "argv", ["dataparams", "report", str(copied), *arguments])
        main()
        assert bool(data_of(copied / "report.html")["media"]) is pictures
    config = OmegaConf.load(copied / "config.yaml")
    config.data.seed = 1  # another division of the data: its pictures would be of other samples
    OmegaConf.save(config, copied / "config.yaml")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["dataparams", "report", str(copied)])
    main()
    assert "no pictures in the page: the data now has other labels" in capsys.readouterr().err
    assert data_of(copied / "report.html")["media"] == {}


def test_areas_and_gap_follow_from_the_rows(finished):
    folder, results = finished
    rows = read_rows(folder / "rows.parquet")
    assert detectors_in(rows).keys() == {"log_temperature", "mean_loss", "margin"}
    for detector, (column, sign) in detectors_in(rows).items():
        for when, suffix in (("best", ""), ("last", "_last")):
            expected = roc_auc_score(rows["is_corrupt"], sign * rows[column + suffix])
            assert results[f"auroc_{detector}_{when}"] == pytest.approx(expected, abs=1e-6)
    last, corrupt = rows["log_temperature_last"].to_numpy(), rows["is_corrupt"].to_numpy(dtype=bool)
    assert results["log_temperature_gap_last"] == pytest.approx(last[corrupt].mean() - last[~corrupt].mean())
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics["auroc_mean_loss"].dropna().iloc[-1] == pytest.approx(results["auroc_mean_loss_last"], abs=1e-5)


class Counting(DataParameters):
    """A method with a detector, numbers and a matrix of its own, of which the report knows nothing."""

    detectors = DataParameters.detectors | {"evenness": ("oddness", -1.0)}

    def columns(self, frame):
        return super().columns(frame) | {"oddness": frame["index"].to_numpy() % 2}

    def summary(self, rows):
        return super().summary(rows) | {"odd_last": float(rows["oddness_last"].sum())}

    def matrices(self):
        frame = self.to_frame()
        counts = frame.pivot_table(index="given_label", columns="forgetting_events", values="index", aggfunc="size")
        return {"forgetting_matrix": counts.reindex(columns=range(10), fill_value=0).rename_axis(columns="times")}


def test_a_method_brings_its_own_detector_numbers_and_matrix(tmp_path, monkeypatch, capsys):
    target = f"callbacks.data_parameters._target_={__name__}.{Counting.__name__}"
    results = short_run(tmp_path, target, "plots=true")
    rows = read_rows(tmp_path / "rows.parquet")
    expected = roc_auc_score(rows["is_corrupt"], -rows["oddness_last"])
    assert results["auroc_evenness_last"] == pytest.approx(expected, abs=1e-6)
    assert results["odd_last"] == len(rows) // 2
    assert "log_temperature_gap_last" in results
    assert {"oddness.png", "oddness_histogram.png", "forgetting_matrix.png"} <= files_in(tmp_path)
    matrix = pd.read_csv(tmp_path / "forgetting_matrix.csv", index_col=0)
    assert matrix.index.name == "given_label \\ times"
    assert matrix.index.tolist() == list(range(10))
    never = rows["given_label"].to_numpy(dtype=int)[rows["forgetting_events_last"].to_numpy() == 0]
    assert matrix["0"].tolist() == np.bincount(never).tolist()

    monkeypatch.setattr(sys, "argv", ["dataparams", "report", str(tmp_path), "--by", "evenness", "-k", "3"])
    main()
    printed = capsys.readouterr().out
    assert "most suspicious by evenness" in printed
    assert "oddness_last" in printed
    monkeypatch.setattr(sys, "argv", ["dataparams", "report", str(tmp_path), "--by", "luck"])
    with pytest.raises(SystemExit, match="this run has no luck: choose --by one of log_temperature, evenness"):
        main()
    short_run(tmp_path, "trainer.max_epochs=1")
    assert "forgetting_matrix.csv" not in files_in(tmp_path)


def test_the_meta_set_is_held_out_of_a_run(tmp_path):
    results = short_run(tmp_path, "experiment=digits_meta", "method=none")
    assert (results["meta_size"], results["train_size"], results["num_samples"]) == (117, 1050, 1050)
    assert (results["meta_use"], results["meta_clean"]) == ("hold_out", True)
    rows = read_rows(tmp_path / "rows.parquet")
    data = DigitsData(batch_size=32, noise="symmetric", noise_rate=0.4, meta_fraction=0.1, meta_clean=True, seed=0)
    data.setup("fit")
    assert rows["id"].tolist() == data.ids
    np.testing.assert_array_equal(rows["given_label"], data.given_labels)
    np.testing.assert_array_equal(rows["is_corrupt"], data.is_corrupt)


def test_logged_validation_equals_the_evaluation_from_checkpoints(finished):
    folder, results = finished
    for suffix in ("", "_ema"):
        curve = pd.read_csv(folder / "metrics.csv").groupby("epoch")[f"val_accuracy{suffix}"].last()
        assert results[f"val_accuracy{suffix}_last"] == pytest.approx(curve.iloc[-1], abs=1e-6)
        assert results[f"val_accuracy{suffix}_best"] == pytest.approx(curve.max(), abs=1e-6)
        assert results[f"best_epoch{suffix}"] == curve.idxmax()


class ValidationGetsWorse(Classifier):
    """Validation falls from the first epoch on, while the model, and with it the test, goes on getting better."""

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", 1.0 - 0.1 * self.current_epoch)


def test_the_best_epoch_is_chosen_on_validation_and_not_on_test(tmp_path):
    name = f"{__name__}.{ValidationGetsWorse.__name__}"
    results = short_run(tmp_path, "method=none", "trainer.max_epochs=4", f"module._target_={name}")
    assert results["best_epoch"] == 0
    assert results["test_accuracy_last"] > results["test_accuracy_best"] + 0.05
    rows = read_rows(tmp_path / "rows.parquet")
    assert (rows["visits"] == 1).all()
    assert (rows["visits_last"] == 4).all()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    numbers = [
        {
            key: value
            for key, value in short_run(tmp_path / name, f"seed={seed}").items()
            if key.startswith(("test_", "auroc_"))
        }
        for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    ]
    assert numbers[0] == numbers[1]
    assert numbers[0] != numbers[2]


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = short_run(tmp_path / "whole", "trainer.max_epochs=3", "ema=0.9")
    short_run(tmp_path / "parts", "ema=0.9")
    resumed = short_run(tmp_path / "parts", "trainer.max_epochs=3", "ema=0.9", "resume=true")
    timing = ("step_time_ms", "peak_memory_mb", "data_wait_share")
    assert {k: v for k, v in resumed.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}
    rows = [read_rows(tmp_path / name / "rows.parquet") for name in ("whole", "parts")]
    pd.testing.assert_frame_equal(rows[0], rows[1])
    steps = [pd.read_csv(tmp_path / name / "metrics.csv")["step"].tolist() for name in ("whole", "parts")]
    assert steps[0] == steps[1]


def test_resuming_a_finished_run_keeps_it(tmp_path):
    first = short_run(tmp_path)
    stamp = (tmp_path / "results.json").stat().st_mtime_ns
    assert short_run(tmp_path, "resume=true") == first
    assert (tmp_path / "results.json").stat().st_mtime_ns == stamp


def test_resuming_a_run_that_stopped_early_keeps_it(tmp_path):
    stopping = [
        "+callbacks=early_stopping",
        "callbacks.early_stopping.min_delta=1.0",
        "callbacks.early_stopping.patience=1",
    ]
    first = short_run(tmp_path, "trainer.max_epochs=4", *stopping)
    assert first["epochs"] == 2
    assert short_run(tmp_path, "trainer.max_epochs=4", "resume=true", *stopping) == first


def test_a_new_run_in_an_old_folder_does_not_mix_with_it(tmp_path):
    short_run(tmp_path, "trainer.max_epochs=3", "ema=0.9")
    (tmp_path / "notes.txt").write_text("mine")
    results = short_run(tmp_path, "method=none")
    assert results["epochs"] == 2
    assert "test_accuracy_ema_best" not in results
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].max() == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_fails_leaves_no_results(tmp_path):
    short_run(tmp_path)
    with pytest.raises(Exception, match="batch_size must be at least 1"):
        short_run(tmp_path, "data.batch_size=0")
    assert not {"results.json", "rows.parquet", "metrics.csv"} & files_in(tmp_path)


class FailsInTheSecondEpoch(Classifier):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            raise RuntimeError("broken on purpose")


def test_an_error_in_training_is_no_interruption(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        short_run(tmp_path, f"module._target_={__name__}.{FailsInTheSecondEpoch.__name__}")
    assert signal.getsignal(signal.SIGINT) is before
    assert not {"results.json", "rows.parquet"} & files_in(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_one(tmp_path):
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match=r"pickle|local object"):  # the wording depends on Python
        plugin.save_checkpoint({"epoch": 2, "bad": lambda: None}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"epoch": 1}
    assert files_in(tmp_path) == {"last.ckpt"}


# -- the command line --------------------------------------------------------------------------------------------------


def test_a_mistyped_command_is_told_of_those_there_are(tmp_path):
    done = command(tmp_path, "reprot", "outputs/run")
    assert done.returncode == 1
    assert done.stderr.startswith("dataparams: 'reprot' is no command: report FOLDER, compare FOLDER")


def test_a_sweep_ends_with_its_table_and_every_run_with_its_files(tmp_path, monkeypatch, capsys):
    done = command(tmp_path, "method=none,data_parameters", "trainer.max_epochs=2", "hydra.sweep.dir=sweep", "-m")
    assert done.returncode == 0, done.stderr
    assert "AUROC log temperature" in done.stdout
    assert f"sweep: {tmp_path / 'sweep'}" in done.stdout
    assert f"page: {tmp_path / 'sweep' / 'compare.html'}" in done.stdout
    assert f"page: {tmp_path / 'sweep' / '0-none-seed0' / 'report.html'}" in done.stdout
    assert {"0-none-seed0", "1-data_parameters-seed0", "summary.csv"} <= files_in(tmp_path / "sweep")
    for name in ("0-none-seed0", "1-data_parameters-seed0"):
        assert {"config.yaml", "metrics.csv", "results.json", "rows.parquet", "accuracy.png"} <= files_in(
            tmp_path / "sweep" / name
        )
    assert "epoch 2 of 2" in done.stdout  # the progress bar
    for noise in ("does not have many workers", "Tip:", "available:", "LeafSpec"):
        assert noise not in done.stdout + done.stderr

    summary = pd.read_csv(tmp_path / "sweep" / "summary.csv").set_index("method")
    accuracies = {
        name: json.loads((path / "results.json").read_text())["test_accuracy_last"]
        for name, path in [
            ("none", tmp_path / "sweep/0-none-seed0"),
            ("ours", tmp_path / "sweep/1-data_parameters-seed0"),
        ]
    }
    difference = summary.loc["data_parameters", "test_accuracy_last_diff_mean"]
    assert difference == pytest.approx(accuracies["ours"] - accuracies["none"])

    for arguments, expected in [
        (["report", "sweep/1-data_parameters-seed0", "-k", "3"], "most suspicious by mean loss"),
        (["compare", "sweep"], summary_text(done.stdout)),
    ]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dataparams", *arguments])
        main()
        assert expected in capsys.readouterr().out


def summary_text(output: str) -> str:
    """The table at the end of a sweep's output."""
    return output[output.rindex("method  ") : output.index("In brackets")].rstrip()


def test_a_sweep_with_a_failed_job_fails_and_still_shows_the_others(tmp_path):
    done = command(
        tmp_path,
        "method=none",
        "data.batch_size=0,32",
        "trainer.max_epochs=1",
        "plots=false",
        "progress_bar=false",
        "hydra.sweep.dir=sweep",
        "-m",
    )
    assert done.returncode != 0
    assert "batch_size must be at least 1" in done.stderr
    assert "AUROC mean loss" in done.stdout
    assert f"sweep: {tmp_path / 'sweep'}" in done.stdout


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """Call the command line in this process, in an empty folder: what it prints to stderr, and that it fails."""
    monkeypatch.chdir(tmp_path)

    def failing(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dataparams", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code not in (0, None)
        message = stop.value.code if isinstance(stop.value.code, str) else ""
        return message + capfd.readouterr().err

    return failing


@pytest.mark.parametrize("arguments", [["hydra.run.dir=file/run"], ["hydra.sweep.dir=file/sweep", "seed=0,1", "-m"]])
def test_a_folder_that_cannot_be_written_is_one_line_before_training(tmp_path, here, arguments):
    (tmp_path / "file").write_text("")
    error = here(*arguments)
    assert error.startswith("dataparams: cannot write to the output folder file/")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_epoch=3"], "Key 'max_epoch' is not in struct"),
        (["method=none,data_paramters", "-m"], "Could not find 'method/data_paramters'"),
        (["experiment=digits_nose"], "Could not find 'experiment/digits_nose'"),
    ],
)
def test_a_misspelt_override_is_named_before_anything_runs(tmp_path, here, arguments, message):
    error = here(*arguments)
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("arguments", [["report", "nowhere"], ["compare", "."]])
def test_a_folder_without_runs_is_a_message(here, arguments):
    assert here(*arguments).startswith("dataparams: ")


def test_ctrl_c_saves_what_was_learned_and_the_run_can_go_on(tmp_path):
    folder = tmp_path / "run"
    call = [
        sys.executable,
        "-m",
        "dataparams.train",
        "trainer.max_epochs=100000",
        f"hydra.run.dir={folder}",
        "plots=false",
    ]
    process = subprocess.Popen(
        call, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"resume=true hydra.run.dir={folder}" in errors
    assert {"metrics.csv", "rows.parquet", "config.yaml"} <= files_in(folder)
    assert "results.json" not in files_in(folder)
    rows = read_rows(folder / "rows.parquet")
    assert rows["visits_last"].sum() >= len(rows)
    epochs = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] + 2
    results = short_run(folder, "resume=true", f"trainer.max_epochs={epochs}")
    assert results["epochs"] == epochs
    assert "interrupted.ckpt" not in files_in(folder / "checkpoints")
