"""What every method must survive: one line a method in METHODS, no method exempt."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from every_method_helpers import (
    CLASSES,
    SAMPLES,
    Method,
    Model,
    Numbered,
    WithIds,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    snapshot,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from dataparams import DataParameters, TrainingDynamics
from dataparams.callbacks import ELR, GCE, LabelSmoothing, SuperLoss
from dataparams.callbacks.base import MethodCallback

WIDE = (-3.0, 3.0)
METHODS: dict[str, Method] = {
    "dynamics": Method(TrainingDynamics, neutral=TrainingDynamics, learns=False),
    "instance": Method(lambda: DataParameters(lr=0.2), neutral=lambda: DataParameters(lr=0.0)),
    "class": Method(
        lambda: DataParameters(CLASSES, "class", class_lr=0.2), neutral=lambda: DataParameters(CLASSES, "class", class_lr=0.0)
    ),
    "joint": Method(lambda: DataParameters(CLASSES, "joint", lr=0.2, class_lr=0.2, bounds=WIDE)),
    "paper": Method(lambda: DataParameters(preset="paper", lr=2.0), neutral=lambda: DataParameters(preset="paper", lr=0.0)),
    "paper_joint": Method(lambda: DataParameters(CLASSES, "joint", preset="paper", lr=20.0, class_lr=2.0, init=1.0)),
    "superloss": Method(SuperLoss),
    "elr": Method(ELR),
    "gce": Method(GCE),
    "label_smoothing": Method(LabelSmoothing),
}
NEUTRAL = {name: method for name, method in METHODS.items() if method.neutral}
# Two callbacks with one state key (two DataParameters of one level) cannot share a trainer: Lightning says so.
PAIRS = [
    (left, right)
    for left, right in itertools.combinations(METHODS, 2)
    if METHODS[left].make().state_key != METHODS[right].make().state_key
]

pytestmark = [
    # tiny loaders without workers, short epochs: Lightning's advice about speed
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # a resumed trainer without the ModelCheckpoint of the first
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # torch.compile looks at what it was handed, after every break of the graph
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # rates of 0, and fits of a few steps
    pytest.mark.filterwarnings("ignore:.*next to nothing:UserWarning"),
]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


# -- training ------------------------------------------------------------------------------------------------------------


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
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[path], after[path]) for path in before if "skipped" not in path)

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
        assert float(value.float().norm()) == pytest.approx(float(ours[path].float().norm()), rel=0.02), path


@every_method
def test_compiled_module_equals_the_eager_one(method: Method):
    torch._dynamo.reset()
    eager, compiled = method.make(), method.make()
    model, again = fit(eager), Model()
    fit(compiled, model=torch.compile(again, backend="aot_eager"))  # type: ignore[arg-type]
    assert_same(again.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(compiled.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)
    assert compiled.to_frame()["visits"].eq(2).all()


# -- every index meets its sample ----------------------------------------------------------------------------------------


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


# -- processes -----------------------------------------------------------------------------------------------------------


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


class JointBatches:
    """The batches of two processes, joined: Lightning's sampler repeats one of 15 samples, in the same joint batch."""

    def __init__(self, samples: int) -> None:
        self.ranks = [DistributedSampler(range(samples), 2, rank, seed=0) for rank in range(2)]  # type: ignore[arg-type]
        self.epoch = -1

    def __iter__(self) -> Any:
        self.epoch += 1
        for sampler in self.ranks:
            sampler.set_epoch(self.epoch)
        yield [*self.ranks[0], *self.ranks[1]]

    def __len__(self) -> int:
        return 1


@pytest.mark.slow
def test_two_processes_agree_and_equal_one_with_the_joint_batch(tmp_path: Path):
    """All methods in one job, for starting processes is what takes time; and four variations of one method."""
    ranks, wrong = train_in_two_processes(tmp_path), {}
    for name in ranks[0]:
        first, second = (rank[name] for rank in ranks)
        method = METHODS[name if name in METHODS else "joint"]
        callback = method.make()
        loader = DataLoader(Numbered(15), batch_sampler=JointBatches(15))  # type: ignore[arg-type]
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


# -- checkpoints ---------------------------------------------------------------------------------------------------------

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


# -- leaving -------------------------------------------------------------------------------------------------------------


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


@every_method
@pytest.mark.parametrize("ending", [None, RuntimeError("mid-epoch"), KeyboardInterrupt()], ids=["done", "exception", "ctrl-c"])
def test_leaves_module_loader_and_trainer_as_they_were(method: Method, ending: BaseException | None):
    callback, model, loader = method.make(), Model(), make_loader(shuffle=True)
    if ending is not None:
        model.stop_at, model.error = 4, ending  # 3 steps an epoch
    trainer = make_trainer(callback)
    before = dict(vars(loader))
    criterion = dict(vars(model.criterion))
    patched = set(vars(trainer.strategy)), set(vars(trainer.precision_plugin))
    if ending is None:
        trainer.fit(model, loader)
    else:
        with pytest.raises(SystemExit if isinstance(ending, KeyboardInterrupt) else type(ending)):
            trainer.fit(model, loader)

    assert hooks(model) == 0
    assert vars(model.criterion).keys() == criterion.keys()
    after = vars(loader)
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items())
    assert not any(callable(v) and k in dir(type(trainer.strategy)) for k, v in vars(trainer.strategy).items())
    assert set(vars(trainer.precision_plugin)) == patched[1]
    assert trainer.train_dataloader is loader

    # what was learned stays, and the trainer works: it goes on where it stopped
    assert callback.to_frame()["visits"].sum() > 0
    kept = method.make()
    kept.load_state_dict(snapshot_state(callback))
    model.stop_at = None
    other = make_trainer(kept, max_epochs=1)
    twin = Model()
    twin.load_state_dict(model.state_dict())
    loader = make_loader()
    other.fit(twin, loader)
    fit(callback, loader, model=model, max_epochs=1)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(callback.state_dict(), kept.state_dict())


def snapshot_state(callback: MethodCallback) -> dict[str, Any]:
    """A state dictionary that does not follow the callback: what a checkpoint on disk is."""
    import io

    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
def test_trainer_is_usable_after_an_exception(method: Method):
    callback, model = method.make(), Model(stop_at=4)
    trainer, loader = make_trainer(callback, max_epochs=3), make_loader()
    with pytest.raises(RuntimeError, match="stopped by the test"):
        trainer.fit(model, loader)
    model.stop_at = None
    model.visits.clear()
    before = callback.to_frame()["visits"]
    trainer.fit(model, loader)
    gained = callback.to_frame()["visits"] - before
    assert gained.tolist() == [model.visits[i] for i in range(SAMPLES)]
    assert gained.sum() > 0


# -- together ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_methods_in_either_order_give_the_same_result(pair: tuple[str, str]):
    results = []
    for names in (pair, pair[::-1]):
        callbacks = {name: METHODS[name].make() for name in names}
        model = fit(list(callbacks.values()))
        results.append((model.state_dict(), {name: callbacks[name].state_dict() for name in sorted(names)}))
        frames = [callback.to_frame() for callback in callbacks.values()]
        assert frames[0]["visits"].equals(frames[1]["visits"])
    assert_same(*results)
    alone = [row_tensors(METHODS[name].make()) for name in pair]
    assert all(not state for state in alone)  # nothing leaked from one callback to the next


# -- bad input -----------------------------------------------------------------------------------------------------------


def assert_refused(callback: MethodCallback, kind: Any, match: str, loader: Any, model: Model | None = None, **options: Any) -> None:
    """A clear error, before the model or a row has moved."""
    model = Model() if model is None else model
    before, rows = snapshot(model.state_dict()), row_tensors(callback)
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.raises(kind, match=match):
        trainer.fit(model, loader, **options)
    assert_same(snapshot(model.state_dict()), before)
    assert trainer.global_step == 0
    assert not rows or rows.keys() == row_tensors(callback).keys()
    assert hooks(model) == 0


def given(method: Method, **options: Any) -> MethodCallback:
    """The method with options that all methods share."""
    callback = method.make()
    for name, value in options.items():
        assert hasattr(callback, name)
        setattr(callback, name, value)
    return callback


@every_method
def test_id_out_of_range_is_refused(method: Method):
    loader = make_loader(WithIds(shift=SAMPLES - 3))
    assert_refused(given(method, index_key=2), IndexError, rf"id {SAMPLES} is not a row number in \[0, {SAMPLES}\)", loader)


@every_method
def test_num_rows_smaller_than_the_data_set_is_refused(method: Method):
    assert_refused(given(method, num_rows=5), (IndexError, ValueError), "num_rows", make_loader(shuffle=False))


@every_method
def test_data_set_that_changed_length_since_the_checkpoint_is_refused(method: Method, tmp_path: Path):
    save = ModelCheckpoint(tmp_path, filename="last")
    fit([method.make(), save], max_epochs=1, enable_checkpointing=True)
    model, callback = Model(), method.make()
    trainer = make_trainer(callback)
    with pytest.raises(ValueError, match=rf"rows for {SAMPLES} samples.*has {SAMPLES - 1}"):
        trainer.fit(model, make_loader(Numbered(SAMPLES - 1)), ckpt_path=tmp_path / "last.ckpt")
    assert_same(model.state_dict(), torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])


class Reloading(L.LightningDataModule):
    """Train loaders of a new length from the second epoch on."""

    epoch = 0

    def train_dataloader(self) -> DataLoader:
        self.epoch += 1
        return make_loader(Numbered(SAMPLES if self.epoch == 1 else SAMPLES - 8))


@every_method
def test_data_set_that_changes_length_within_a_fit_is_refused(method: Method):
    callback, model = method.make(), Model()
    trainer = make_trainer(callback, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(ValueError, match=rf"had \[?{SAMPLES}\]? samples and has \[?{SAMPLES - 8}\]? after reloading"):
        trainer.fit(model, datamodule=Reloading())
    assert trainer.global_step == 3  # the first epoch
    assert callback.to_frame()["visits"].eq(1).all()


class Unreduced(nn.Module):
    """A loss of the user's that does not say how it reduces."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target).square()


@every_method
def test_criterion_with_an_unknown_reduction_is_refused(method: Method):
    own = given(method, criterion="criterion")
    assert_refused(own, ValueError, r"self\.criterion \(Unreduced\) has reduction=None", make_loader(), Model(Unreduced()))
    strange = nn.CrossEntropyLoss()
    strange.reduction = "batchmean"
    assert_refused(method.make(), ValueError, "reduction='batchmean'", make_loader(), Model(strange))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Numbered())


@every_method
def test_iterable_data_set_without_a_key_is_refused(method: Method):
    assert_refused(method.make(), ValueError, re.escape("index_key="), DataLoader(Stream(), batch_size=8))
