"""One of two processes that train every method under DDP, as the suite starts them: ``python THIS FOLDER``."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from every_method_helpers import CLASSES, Model, Numbered, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from test_every_method import METHODS, WIDE

from dataparams import DataParameters
from dataparams.callbacks import MethodCallback

NAMES = [f"sample {i}" for i in range(15)]


def trainer_of_two(callbacks: Any, max_epochs: int = 6, **options: Any) -> L.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo")
    return make_trainer(callbacks, max_epochs, devices=2, strategy=strategy, **options)


def train(
    callback: MethodCallback, batch_size: int = 8, ckpt_path: Path | None = None, **options: Any
) -> dict[str, Any]:
    model = Model()
    trainer_of_two(callback, **options).fit(model, make_loader(Numbered(15), batch_size), ckpt_path=ckpt_path)
    return {"model": model.state_dict(), "callback": callback.state_dict()}


def accumulated(folder: Path) -> dict[str, Any]:
    return train(METHODS["joint"].make(), batch_size=4, accumulate_grad_batches=2)


def resumed(folder: Path) -> dict[str, Any]:
    save = ModelCheckpoint(folder, filename="half")
    half = trainer_of_two([METHODS["joint"].make(), save], max_epochs=3, enable_checkpointing=True)
    half.fit(Model(), make_loader(Numbered(15)))
    return train(METHODS["joint"].make(), ckpt_path=folder / "half.ckpt")


def with_options(**options: Any) -> dict[str, Any]:
    return train(DataParameters(CLASSES, "joint", lr=0.2, class_lr=0.2, bounds=WIDE, **options))


def named(folder: Path) -> dict[str, Any]:
    def names(batch: Any) -> list[str]:
        return [NAMES[i] for i in batch[0][:, -1].int().tolist()]

    return with_options(index_key=names, ids=NAMES)


def memory_mapped(folder: Path) -> dict[str, Any]:
    return with_options(storage="mmap", storage_dir=folder / "rows")


VARIATIONS: list[Callable[[Path], dict[str, Any]]] = [accumulated, resumed, named, memory_mapped]


def main(folder: Path) -> None:
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda method=method: train(method.make()) for name, method in METHODS.items()
    }
    jobs |= {variation.__name__: lambda variation=variation: variation(folder) for variation in VARIATIONS}
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = job()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    os._exit(0)  # at the interpreter's own end a thread of gloo sometimes aborts the process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
