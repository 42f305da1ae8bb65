"""With ``grad_scale="instance"`` a row's step is a rate per visit, whatever becomes of the loss."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BCE, CE, INDEX, NLL, SOFTMAX, WEIGHT, B, C, Case, method
from torch import Tensor, nn

from dataparams.callbacks import GCE
from dataparams.objective import Objective


def own_gradients(case: Case, input: Tensor, target: Tensor) -> Tensor:
    """d l_i / d t_i of each sample's own mean loss, by automatic differentiation without the library."""
    t = torch.zeros(B, requires_grad=True)
    sigma = t.exp().reshape(B, *[1] * (input.dim() - 1))
    if case.module in (CE, BCE):
        losses = case.function(input / sigma, target, **case.options, reduction="none")
    elif case.module is NLL:
        losses = case.function((input / sigma).log_softmax(1), target, reduction="none")
    else:
        coefficient = 2 if case.module is nn.MSELoss else 1
        losses = case.function(input / sigma, target / sigma, **case.options, reduction="none")
        losses = losses + coefficient * t.reshape(B, *[1] * (losses.dim() - 1))
    return torch.autograd.grad(losses.reshape(B, -1).mean(1).sum(), t)[0]


PER_VISIT = [
    Case(F.cross_entropy, CE),
    Case(F.cross_entropy, CE, label_smoothing=0.2),
    Case(F.cross_entropy, CE, targets="probabilities"),
    Case(F.cross_entropy, CE, dims=(3, 2)),
    Case(F.nll_loss, NLL),
    Case(F.binary_cross_entropy_with_logits, BCE),
    Case(F.binary_cross_entropy_with_logits, BCE, dims=(4,), pos_weight=WEIGHT),
    Case(F.mse_loss, nn.MSELoss, dims=(3,)),
    Case(F.l1_loss, nn.L1Loss),
]
USES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "mean": ("mean", lambda loss: loss),
    "mean_times_7": ("mean", lambda loss: 7 * loss),
    "mean_over_5_batches": ("mean", lambda loss: loss / 5),
    "none_then_mean": ("none", lambda loss: loss.mean()),
    "none_then_weighted": ("none", lambda loss: (0.1 * loss.reshape(B, -1).mean(1)).sum()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", PER_VISIT, ids=repr)
def test_instance_scale_steps_on_each_samples_own_loss(case: Case, use: str):
    input, target = case.data()
    expected = own_gradients(case, input, target)
    made = method(bounds=(-50, 50))
    reduction, finish = USES[use]
    options = {**case.options, "reduction": reduction}
    loss = Objective(made.stages())(case.function, INDEX, input.requires_grad_(), target, **options)
    finish(loss).backward()
    made.optimizers[0].step()
    values = made.tables["log_temperature"].values
    torch.testing.assert_close(values[INDEX], -expected, rtol=1e-4, atol=1e-6)
    assert values.count_nonzero() == expected.count_nonzero()


def test_instance_scale_with_a_sum_is_each_samples_summed_loss():
    case = Case(F.cross_entropy, CE, dims=(5,))
    input, target = case.data()
    made = method(bounds=(-50, 50))
    objective = Objective(made.stages())
    loss = objective(F.cross_entropy, INDEX, input.requires_grad_(), target, reduction="sum")
    (3 * loss).backward()
    made.optimizers[0].step()
    expected = 5 * own_gradients(case, input.detach(), target)
    values = made.tables["log_temperature"].values[INDEX]
    torch.testing.assert_close(values, -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_instance_scale_does_not_depend_on_the_batch(size):
    input, target = torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1])
    results = []
    for batch in (slice(0, B), slice(0, size)):
        made = method()
        objective = Objective(made.stages())
        objective(F.cross_entropy, INDEX[batch], input[batch], target[batch]).backward()
        made.optimizers[0].step()
        results.append(made.tables["log_temperature"].values[INDEX[:size]])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_samples_keep_their_rows_and_do_not_dilute_the_others(reduction):
    input, target = torch.randn(B, C), torch.tensor([0, -100, 2, 3, -100, 1])
    made = method(weight_decay=0.5)
    table = made.tables["log_temperature"]
    table.values.fill_(0.25)
    counted = target != -100
    t = torch.full((int(counted.sum()),), 0.25, requires_grad=True)
    own = F.cross_entropy(input[counted] / t.exp()[:, None], target[counted], reduction="sum")
    own.backward()
    objective = Objective(made.stages())
    objective(F.cross_entropy, INDEX, input, target, reduction=reduction).backward()
    made.optimizers[0].step()
    assert table.values[INDEX[~counted]].tolist() == [0.25, 0.25]
    assert t.grad is not None
    expected = 0.25 - (t.grad + 0.5 * 0.25)
    torch.testing.assert_close(table.values[INDEX[counted]], expected.clamp(-0.5, 3))


def test_a_batch_without_any_label_moves_nothing():
    made = method(momentum=0.9)
    target = torch.full((B,), -100)
    loss = Objective(made.stages())(F.cross_entropy, INDEX, torch.randn(B, C), target)
    assert loss.isnan()  # as torch's own
    loss.backward()
    made.optimizers[0].step()
    assert not made.tables["log_temperature"].values.any()


def test_a_loss_that_the_user_multiplies_by_zero_moves_nothing():
    made = method()
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = Objective(made.stages())(F.cross_entropy, INDEX, torch.randn(B, C), target)
    (0 * loss).backward()
    made.optimizers[0].step()
    assert not made.tables["log_temperature"].values.any()


def test_grad_scaler_leaves_the_rate_per_visit_alone():
    input, target = torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1])
    results = []
    for scaled in (False, True):
        made = method()
        objective = Objective(made.stages())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        if scaled:
            objective.loss_scale = lambda scaler=scaler: scaler.scale(torch.ones(()))
        loss = objective(F.cross_entropy, INDEX, input, target)
        scaler.scale(loss / 3).backward()
        scaler.step(made.optimizers[0])
        scaler.update()
        results.append(made.tables["log_temperature"].values)
    torch.testing.assert_close(results[0], results[1])
    assert results[0].any()


def test_class_rate_is_a_mean_over_members():
    """Twice as many members of a class: the same step."""
    logits, label = torch.randn(1, C), torch.tensor([2])
    steps = []
    for times in (1, 5):
        made = method("class", class_lr=1.0)
        index = torch.arange(times)
        objective = Objective(made.stages())
        objective(F.cross_entropy, index, logits.repeat(times, 1), label.repeat(times)).backward()
        made.optimizers[0].step()
        steps.append(made.tables["class_log_temperature"].values)
    torch.testing.assert_close(steps[0], steps[1])
    assert steps[0].count_nonzero() == 1


@pytest.mark.parametrize("case", SOFTMAX, ids=repr)
def test_instance_scale_goes_through_a_later_stage(case: Case):
    if case.targets == "probabilities":
        return
    input, target = case.data()
    made = method(bounds=(-50, 50))
    Objective([*made.stages(), *GCE().stages()])(case.function, INDEX, input, target, **case.options).backward()
    made.optimizers[0].step()
    assert torch.isfinite(made.tables["log_temperature"].values).all()
    moved = made.tables["log_temperature"].values[INDEX] != 0
    ignore = case.options.get("ignore_index", -100)
    assert torch.equal(moved, (target != ignore).reshape(B, -1).any(1))
