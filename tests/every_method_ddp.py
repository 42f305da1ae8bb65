"""One of two processes that train every method under DDP: ``python every_method_ddp.py FOLDER``, started by the suite."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from every_method_helpers import Method, Model, Numbered, make_loader, make_trainer
from lightning.pytorch.strategies import DDPStrategy
from test_every_method import METHODS


def train(method: Method) -> dict[str, Any]:
    callback, model = method.make(), Model()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer(callback, max_epochs=6, devices=2, strategy=strategy)
    trainer.fit(model, make_loader(Numbered(15), batch_size=8))
    return {"model": model.state_dict(), "callback": callback.state_dict()}


def main(folder: Path) -> None:
    results = {}
    for name, method in METHODS.items():
        try:
            results[name] = train(method)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
