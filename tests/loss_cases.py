"""Losses with something to call them with, shared by the tests of the objective."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataparams import DataParameters
from dataparams.criterion import Criterion
from dataparams.objective import Objective

B, C, N = 6, 4, 10
INDEX = torch.tensor([7, 2, 9, 0, 4, 5])


class Case:
    """A loss, as a function with options and as a module, and something to call it with."""

    def __init__(self, function: Callable[..., Tensor], module: type[nn.Module], **options: Any):
        self.function, self.module = function, module
        self.targets: str = options.pop("targets", "")
        self.dims: tuple[int, ...] = options.pop("dims", ())
        self.options = options

    def __repr__(self) -> str:
        words = [self.module.__name__, self.targets, *self.options]
        return "-".join(w for w in words if w) + "".join(f"-{d}" for d in self.dims)

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.module in (nn.CrossEntropyLoss, nn.NLLLoss):
            logits = 2 * torch.randn(B, C, *self.dims, generator=generator)
            target = torch.randint(0, C, (B, *self.dims), generator=generator)
            if self.targets == "ignored":
                target.view(B, -1)[[1, 4]] = self.options.get("ignore_index", -100)
            if self.targets == "probabilities":
                target = torch.randn(B, C, *self.dims, generator=generator).softmax(1)
            return logits if self.module is nn.CrossEntropyLoss else logits.log_softmax(1), target
        prediction = 2 * torch.randn(B, *self.dims, generator=generator)
        target = torch.randn(B, *self.dims, generator=generator)
        return prediction, (target > 0).float() if self.module is nn.BCEWithLogitsLoss else target


CE, NLL, BCE = nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7])
CASES = [
    Case(F.cross_entropy, CE),
    Case(F.cross_entropy, CE, weight=WEIGHT),
    Case(F.cross_entropy, CE, targets="ignored"),
    Case(F.cross_entropy, CE, label_smoothing=0.2),
    Case(F.cross_entropy, CE, targets="ignored", ignore_index=3, weight=WEIGHT, label_smoothing=0.1),
    Case(F.cross_entropy, CE, targets="probabilities"),
    Case(F.cross_entropy, CE, targets="probabilities", weight=WEIGHT, label_smoothing=0.1),
    Case(F.cross_entropy, CE, dims=(3, 2)),
    Case(F.cross_entropy, CE, dims=(5,), targets="ignored", ignore_index=-1, weight=WEIGHT),
    Case(F.cross_entropy, CE, dims=(5,), targets="probabilities"),
    Case(F.nll_loss, NLL),
    Case(F.nll_loss, NLL, weight=WEIGHT, targets="ignored", ignore_index=2),
    Case(F.nll_loss, NLL, dims=(3,)),
    Case(F.binary_cross_entropy_with_logits, BCE),
    Case(F.binary_cross_entropy_with_logits, BCE, dims=(1,)),
    Case(F.binary_cross_entropy_with_logits, BCE, dims=(4,), pos_weight=WEIGHT),
    Case(F.binary_cross_entropy_with_logits, BCE, dims=(4,), weight=WEIGHT),
    Case(F.mse_loss, nn.MSELoss),
    Case(F.mse_loss, nn.MSELoss, dims=(3, 2)),
    Case(F.l1_loss, nn.L1Loss, dims=(3,)),
    Case(F.smooth_l1_loss, nn.SmoothL1Loss, dims=(3,), beta=0.5),
    Case(F.huber_loss, nn.HuberLoss, dims=(3,), delta=0.7),
]
SOFTMAX = [case for case in CASES if case.module in (CE, NLL)]


def method(level: Any = "instance", **options: Any) -> DataParameters:
    """Data parameters with rows for N samples, without a trainer."""
    made = DataParameters(num_classes=8, level=level, **{"momentum": 0.0, "lr": 1.0, **options})
    made.make_tables(N, torch.device("cpu"))
    return made


def through_module(objective: Objective, module: nn.Module, index: Tensor, *args: Tensor) -> Tensor:
    """What the hooks on the loss module do."""
    call = objective.begin(Criterion.of_module(module, "self.criterion"), args[0], args[1], index)
    return objective.end(call, module(call.input, call.target))


def grads(loss: Tensor, input: Tensor) -> Tensor:
    weight = torch.linspace(0.3, 1.7, loss.numel()).reshape(loss.shape)
    return torch.autograd.grad((loss * weight).sum(), input)[0]
