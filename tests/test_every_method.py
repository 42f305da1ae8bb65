"""What every method must survive: one line a method in METHODS, no method exempt.

The rest of the list (leaving, two methods at once, bad input) is in test_every_method_manners.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    SAMPLES,
    Method,
    Model,
    Numbered,
    assert_same,
    fit,
    make_loader,
    row_tensors,
    trusted,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from dataparams import (
    Consolidation,
    DataParameters,
    InstanceLearningRates,
    InstanceTaskWeights,
    LearnableSoftLabels,
    TrainingDynamics,
)
from dataparams.callbacks import ELR, GCE, LabelSmoothing, Pencil, SuperLoss, TaskWeighting
from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.self_paced import SelfPacedSelection

WIDE = (-3.0, 3.0)


def embedding() -> nn.Module:
    """The same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(5, 4)


def task_of(epoch: int) -> int:
    """A task an epoch, so that two epochs are enough for a penalty."""
    return epoch


METHODS: dict[str, Method] = {
    "dynamics": Method(TrainingDynamics, neutral=TrainingDynamics, learns=False),
    "instance": Method(lambda: DataParameters(lr=0.2), neutral=lambda: DataParameters(lr=0.0)),
    "class": Method(
        lambda: DataParameters(CLASSES, "class", class_lr=0.2),
        neutral=lambda: DataParameters(CLASSES, "class", class_lr=0.0),
    ),
    "joint": Method(lambda: DataParameters(CLASSES, "joint", lr=0.2, class_lr=0.2, bounds=WIDE)),
    "paper": Method(
        lambda: DataParameters(preset="paper", lr=2.0), neutral=lambda: DataParameters(preset="paper", lr=0.0)
    ),
    "paper_joint": Method(lambda: DataParameters(CLASSES, "joint", preset="paper", lr=20.0, class_lr=2.0, init=1.0)),
    "learning_rates": Method(
        lambda: InstanceLearningRates(meta=trusted()),
        neutral=lambda: InstanceLearningRates(meta=trusted(), lr=0.0),
    ),
    "class_learning_rates": Method(
        lambda: InstanceLearningRates(CLASSES, "class", meta=trusted()),
        neutral=lambda: InstanceLearningRates(CLASSES, "class", meta=trusted(), lr=0.0),
    ),
    "soft_labels": Method(lambda: LearnableSoftLabels(CLASSES, meta=trusted())),
    "class_soft_labels": Method(lambda: LearnableSoftLabels(CLASSES, "class", lr=0.5, meta=trusted())),
    "pencil": Method(lambda: Pencil(CLASSES, warmup_epochs=0, label_epochs=9)),
    "selection": Method(SelfPacedSelection, neutral=lambda: SelfPacedSelection(start_fraction=1.0)),
    "selection_by_features": Method(lambda: SelfPacedSelection("threshold", "features", clusters_per_class=2)),
    "selection_by_magnet": Method(lambda: SelfPacedSelection(clusters="magnet", embedding=embedding())),
    "task_weights": Method(
        lambda: InstanceTaskWeights(["criterion"], lr=0.2),
        neutral=lambda: InstanceTaskWeights(["criterion"], lr=0.0),
    ),
    "uncertainty": Method(
        lambda: TaskWeighting("uncertainty", ["criterion"], lr=0.2),
        neutral=lambda: TaskWeighting("uncertainty", ["criterion"], lr=0.0),
    ),
    "ewc": Method(
        lambda: Consolidation("ewc", strength=1.0, task_of_epoch=task_of),
        neutral=lambda: Consolidation("ewc", strength=0.0, task_of_epoch=task_of),
    ),
    "si": Method(
        lambda: Consolidation("si", strength=1.0, task_of_epoch=task_of),
        neutral=lambda: Consolidation("si", strength=0.0, task_of_epoch=task_of),
    ),
    "mas": Method(  # replay is tested by itself: its second call of training_step is one that this suite would count
        lambda: Consolidation("mas", strength=0.1, task_of_epoch=task_of),
        neutral=lambda: Consolidation("mas", strength=0.0, task_of_epoch=task_of),
    ),
    "superloss": Method(SuperLoss),
    "elr": Method(ELR),
    "gce": Method(GCE),
    "label_smoothing": Method(LabelSmoothing),
}
NEUTRAL = {name: method for name, method in METHODS.items() if method.neutral}

pytestmark = [*QUIET, INERT]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NEUTRAL.values(), ids=list(NEUTRAL))
def test_initial_state_reproduces_plain_training_bit_for_bit(method: Method):
    assert method.neutral is not None
    ours = fit(method.neutral(), max_epochs=3)
    assert_same(ours.state_dict(), fit([], max_epochs=3).state_dict())


@every_method
def test_trains_moves_its_rows_and_logs_the_travel(method: Method, tmp_path: Path):
    callback, logger = method.make(), CSVLogger(tmp_path)
    model = fit(callback, logger=logger)
    first = method.make()
    fit(first, max_epochs=1)
    before, after = row_tensors(first), row_tensors(callback)
    assert before.keys() <= after.keys()
    # a count of steps not taken, and a mean that is held: neither is a row
    rows = [
        path
        for path in before
        if "skipped" not in path and path != "/mean" and "/selection/" not in path and "/weighting/" not in path
    ]
    assert all(not torch.equal(before[path], after[path]) for path in rows)

    plain = fit([])
    changed = any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert changed == method.learns

    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv") if callback.tables else None
    for name, table in callback.tables.items():
        assert logged is not None
        travel = logged[f"{callback.log_name}/{name}_travel"].dropna()
        assert len(travel) == 2  # one an epoch
        assert travel.iloc[-1] == pytest.approx((table.values - table.init).abs().mean().item(), rel=1e-5)
        assert travel.iloc[-1] > 0.01
        assert logged[f"{callback.log_name}/batch_{name}_travel"].notna().sum() == 6  # one a step


@every_method
def test_resume_equals_the_uninterrupted_run(method: Method, tmp_path: Path):
    whole = method.make()
    model = fit(whole, max_epochs=4)

    save = ModelCheckpoint(tmp_path, filename="half", save_top_k=-1)
    fit([method.make(), save], max_epochs=2, enable_checkpointing=True)
    resumed = method.make()
    again = fit(resumed, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")

    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())
    pd.testing.assert_frame_equal(resumed.to_frame(), whole.to_frame())


class CountingLoader(DataLoader):
    """A loader that can resume in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    given = 0
    skip = 0

    def __iter__(self) -> Any:
        batches, skip = super().__iter__(), self.skip
        self.skip, self.given = 0, skip
        for number, batch in enumerate(batches):
            if number >= skip:
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["given"]


@every_method
def test_resume_in_the_middle_of_an_epoch_equals_the_uninterrupted_run(method: Method, tmp_path: Path):
    def train(callbacks: Any, **options: Any) -> Model:
        return fit(callbacks, loader=CountingLoader(Numbered(), batch_size=6), max_epochs=3, **options)

    whole = method.make()
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    model = train([whole, save], enable_checkpointing=True)
    resumed = method.make()
    again = train(resumed, ckpt_path=tmp_path / "step=6.ckpt")  # 4 steps an epoch

    assert sum(again.visits.values()) == 6 * 6
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())


@every_method
def test_gradient_accumulation_equals_the_joint_batch(method: Method):
    joint, split = method.make(), method.make()
    model = fit(joint, make_loader(batch_size=8))
    again = fit(split, make_loader(batch_size=4), accumulate_grad_batches=2)
    assert_same(again.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(split.state_dict(), joint.state_dict(), rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_stays_near_full_precision(method: Method, precision: str):
    full, half = method.make(), method.make()
    fit(full)
    if precision == "bf16-mixed":
        fit(half, precision="bf16-mixed")
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        fit(half, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
        assert scaler.get_scale() > 2.0**12  # it steps, and grows
    # a gradient that is not unscaled, or unscaled twice, is wrong by orders of magnitude
    tables = {"rtol": 0.1, "atol": 0.02 if precision == "bf16-mixed" else 0.004}
    ours, theirs = row_tensors(half), row_tensors(full)
    assert_same(ours, theirs, **tables)
    for path, value in theirs.items():
        norms = (float(tensor.float().nan_to_num().norm()) for tensor in (value, ours[path]))
        assert next(norms) == pytest.approx(next(norms), rel=0.02), path


@every_method
def test_compiled_module_equals_the_eager_one(method: Method):
    torch._dynamo.reset()
    eager, compiled = method.make(), method.make()
    model, again = fit(eager), Model()
    fit(compiled, model=torch.compile(again, backend="aot_eager"))  # type: ignore[arg-type]
    assert_same(again.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(compiled.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)
    assert compiled.to_frame()["visits"].sum() == 2 * SAMPLES


# -- every index meets its sample ------------------------------------------------------------------------------------


def assert_every_index_met_its_sample(callback: MethodCallback, model: Model, data: Numbered) -> None:
    frame = callback.to_frame()
    assert frame["index"].tolist() == frame["id"].tolist() == list(range(len(data)))
    visits = [model.visits[i] for i in range(len(data))]
    assert frame["visits"].tolist() == visits
    seen = frame["visits"] > 0
    assert frame["given_label"][seen].tolist() == data.y[torch.from_numpy(seen.to_numpy(copy=True))].tolist()
    truth = [model.losses[i] / visits[i] for i in range(len(data)) if visits[i]]
    assert frame["mean_loss"][seen].tolist() == pytest.approx(truth, rel=1e-5)


LOADERS: dict[str, dict[str, Any]] = {
    "shuffled, short last batch": {"shuffle": True, "batch_size": 7},
    "workers": {"shuffle": True, "batch_size": 7, "num_workers": 2},
    "persistent workers": {"shuffle": True, "batch_size": 7, "num_workers": 2, "persistent_workers": True},
    # some samples up to four times in a batch, others never
    "duplicates": {"batch_size": 7, "sampler": [i * i % SAMPLES for i in range(40)]},
    "with replacement": {"batch_size": 7, "sampler": RandomSampler(range(SAMPLES), replacement=True, num_samples=200)},
}


@every_method
@pytest.mark.parametrize("options", LOADERS.values(), ids=list(LOADERS))
def test_every_index_meets_its_sample(method: Method, options: dict[str, Any]):
    callback, data = method.make(), Numbered()
    model = fit(callback, make_loader(data, **options))
    assert_every_index_met_its_sample(callback, model, data)


# -- processes -------------------------------------------------------------------------------------------------------


def train_in_two_processes(folder: Path) -> list[dict[str, Any]]:
    """What each of two real processes (gloo) ended with, for every method, trained one after the other in one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("every_method_ddp.py")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    inherited = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**inherited, **common, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


class JointOrder:
    """The samples of two processes, joined: Lightning's sampler repeats one of 15, in the same joint batch."""

    def __init__(self, samples: int) -> None:
        self.ranks = [DistributedSampler(range(samples), 2, rank, seed=0) for rank in range(2)]  # type: ignore[arg-type]
        self.epoch = -1

    def __iter__(self) -> Any:
        self.epoch += 1
        for sampler in self.ranks:
            sampler.set_epoch(self.epoch)
        yield from (*self.ranks[0], *self.ranks[1])

    def __len__(self) -> int:
        return 16


@pytest.mark.slow
def test_two_processes_agree_and_equal_one_with_the_joint_batch(tmp_path: Path):
    """All methods in one job, for starting processes is what takes time; and four variations of one method."""
    ranks, wrong = train_in_two_processes(tmp_path), {}
    for name in ranks[0]:
        first, second = (rank[name] for rank in ranks)
        method = METHODS[name if name in METHODS else "joint"]
        callback = method.make()
        loader = DataLoader(Numbered(15), batch_size=16, sampler=JointOrder(15))  # type: ignore[arg-type]
        model = fit(callback, loader, max_epochs=6)
        expected = {"model": model.state_dict(), "rows": rows_and_dynamics(callback.state_dict())}
        assert callback.to_frame()["visits"].sum() == 6 * 16
        try:
            assert "error" not in first, first["error"]
            assert_same(first, second)
            ours = {"model": first["model"], "rows": rows_and_dynamics(first["callback"])}
            assert_same(ours, expected, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            wrong[name] = str(error)
    assert METHODS.keys() < ranks[0].keys()
    assert not wrong, "\n\n".join(f"{name}: {error}" for name, error in wrong.items())


def rows_and_dynamics(state: dict[str, Any]) -> dict[str, Any]:
    """All but how the user names the samples."""
    return {name: value for name, value in state.items() if name not in ("ids", "base_positions")}


# -- checkpoints -----------------------------------------------------------------------------------------------------

WITHOUT_LIBRARY = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dataparams", "lightning"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
checkpoint = torch.load(sys.argv[1], weights_only=True)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
model.load_state_dict({key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
print("loaded", len(checkpoint["callbacks"]))
"""


@every_method
def test_checkpoint_is_plain_and_restores_the_table_without_a_trainer(method: Method, tmp_path: Path):
    callback, save = method.make(), ModelCheckpoint(tmp_path, filename="last")
    model = fit([callback, save], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)

    assert checkpoint["state_dict"].keys() == Model().state_dict().keys()
    Model().load_state_dict(checkpoint["state_dict"])
    assert_same(checkpoint["state_dict"], model.state_dict())

    alone = method.make()
    alone.load_state_dict(checkpoint["callbacks"][callback.state_key])
    pd.testing.assert_frame_equal(alone.to_frame(), callback.to_frame())


def test_checkpoint_of_the_model_loads_without_this_library(tmp_path: Path):
    methods = [METHODS[name].make() for name in ("instance", "class", "elr", "superloss")]
    fit([*methods, ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    command = [sys.executable, "-c", WITHOUT_LIBRARY, str(tmp_path / "last.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("loaded"), done.stderr
