"""One of two processes that train several tasks under DDP: ``python THIS FOLDER JOB...``."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from every_method_helpers import make_trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))
from test_task_weights import TASKS, TwoTasks, data  # type: ignore[import-not-found]

from dataparams import InstanceTaskWeights
from dataparams.callbacks import TaskWeighting

WEIGHTINGS = ("uncertainty", "dwa", "gradnorm", "random")


class Sometimes(TwoTasks):
    """Calls a task's loss only where the batch has a label for it, as many training steps do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label, value = batch
        h = self.trunk(x)
        seen = ~value.isnan().any(1)
        loss = self.label_loss(self.label_head(h), label)
        predicted = self.value_head(h)
        return loss + (self.value_loss(predicted, value) if bool(seen.any()) else 0 * predicted.sum())


def uneven() -> TensorDataset:
    """The second process (odd positions) has hardly a value, and none in the first batch."""
    x, label, value = data().tensors
    value[1:16:2] = torch.nan
    value[20, 0] = torch.nan
    label[::4] = -100
    return TensorDataset(x, label, value)


def callback_of(job: str) -> Any:
    if job in WEIGHTINGS:
        return TaskWeighting(job, TASKS, lr=0.1)
    return InstanceTaskWeights(TASKS, lr=0.1, regression_lr=0.1)


def train(job: str, processes: int) -> dict[str, Any]:
    """A job by one process with the joint batch, or by two."""
    dataset = uneven() if job in ("missing", "sometimes") else data()
    model = Sometimes() if job == "sometimes" else TwoTasks()
    if job == "missing":  # a mean over what a process has is not the mean over all: only rows are compared
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)  # type: ignore[method-assign]
    callback = callback_of(job)
    two: dict[str, Any] = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = make_trainer(callback, max_epochs=3, use_distributed_sampler=False, **(two if processes == 2 else {}))
    mine = range(int(os.environ["LOCAL_RANK"]), len(dataset), 2) if processes == 2 else None  # odd or even positions
    trainer.fit(model, DataLoader(dataset, batch_size=8 // processes, sampler=mine))
    state = callback.state_dict()
    own = {name: state[name] for name in ("tables", "tasks", "scales", "weighting") if name in state}
    return {"model": {n: v.clone() for n, v in model.state_dict().items()}, "callback": own}


def main(folder: Path, jobs: list[str]) -> None:
    results = {}
    for job in jobs:
        try:
            results[job] = train(job, 2)
        except Exception:
            results[job] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    os._exit(0)  # at the interpreter's own end a thread of gloo sometimes aborts the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
