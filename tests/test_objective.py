"""The objective: the user's loss bit for bit at the start, a sample's own gradient afterwards."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BCE, CASES, CE, INDEX, NLL, WEIGHT, B, C, Case, N, grads, method, through_module
from torch import Tensor, nn

from dataparams import DataParameters
from dataparams.callbacks import GCE, LabelSmoothing, SuperLoss
from dataparams.criterion import Criterion
from dataparams.functional import generalized_cross_entropy, superloss
from dataparams.functional.dynamics import Observation
from dataparams.objective import LossCall, Objective

# -- the initial state ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_initial_state_is_the_users_loss_bit_for_bit(case: Case, reduction: str):
    input, target = case.data()
    input.requires_grad_()
    options = {**case.options, "reduction": reduction}
    plain = case.function(input, target, **options)
    plain_grad = grads(plain, input)
    levels = ["instance", "class"] if case.module in (CE, NLL, BCE) else ["instance"]
    for level in levels:
        objective = Objective(method(level).stages())
        by_function = objective(case.function, INDEX, input, target, **options)
        by_module = through_module(objective, case.module(**options), INDEX, input, target)
        for loss in (by_function, by_module):
            assert torch.equal(loss, plain), level
            assert torch.equal(grads(loss, input), plain_grad), level


def test_initial_state_is_bit_for_bit_in_half_precision():
    input = torch.randn(B, C).bfloat16().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    objective = Objective(method().stages())
    plain = F.cross_entropy(input, target)
    loss = objective(F.cross_entropy, INDEX, input, target)
    assert loss.dtype == plain.dtype
    assert torch.equal(loss, plain)
    assert torch.equal(grads(loss, input), grads(plain, input))


def test_a_loss_of_the_users_own():
    class Focal(nn.Module):
        reduction = "mean"

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            losses = F.cross_entropy(logits, target, reduction="none")
            losses = (1 - (-losses).exp()).square() * losses
            return losses.mean() if self.reduction == "mean" else losses

    input = torch.randn(B, C, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    made, seen = method(), []
    objective = Objective(made.stages())
    objective.inspector = lambda call, observation: seen.append(observation)
    loss = through_module(objective, Focal(), INDEX, input, target)
    assert torch.equal(loss, Focal()(input, target))
    loss.backward()
    assert made.tables["log_temperature"].visited()
    torch.testing.assert_close(seen[0].loss, F.cross_entropy(input, target, reduction="none"))


# -- away from it -----------------------------------------------------------------------------------


def test_temperatures_meet_their_own_samples():
    made = method()
    table = made.tables["log_temperature"]
    table.values.copy_(torch.linspace(-0.4, 2.9, N))
    input, target = torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = Objective(made.stages())(F.cross_entropy, INDEX, input, target)
    sigma = table.values[INDEX].exp()
    torch.testing.assert_close(loss, F.cross_entropy(input / sigma[:, None], target))


def test_joint_temperature_is_a_sum_and_both_tables_get_their_gradient():
    made = method("joint", bounds=(-3, 3), grad_scale="mean", class_lr=1.0)
    rows, classes = made.tables["log_temperature"], made.tables["class_log_temperature"]
    rows.values.copy_(torch.linspace(-1, 1, N))
    classes.values.copy_(torch.linspace(-1, 1, 8))
    t, s = rows.values.clone().requires_grad_(), classes.values.clone().requires_grad_()
    input, target = torch.randn(B, C), torch.tensor([0, 1, 1, 3, 0, 1])
    Objective(made.stages())(F.cross_entropy, INDEX, input, target).backward()
    for optimizer in made.optimizers:
        optimizer.step()
    F.cross_entropy(input / (t[INDEX].exp() + s[target].exp())[:, None], target).backward()
    torch.testing.assert_close(rows.values, t.detach() - t.grad)  # type: ignore[operator]
    torch.testing.assert_close(classes.values, s.detach() - s.grad)  # type: ignore[operator]


def test_class_temperatures_of_dense_predictions_follow_each_pixels_class():
    made = method("class")
    classes = made.tables["class_log_temperature"]
    classes.values.copy_(torch.linspace(-0.4, 1, 8))
    input, target = torch.randn(B, C, 3), torch.randint(0, C, (B, 3))
    loss = Objective(made.stages())(F.cross_entropy, INDEX, input, target)
    sigma = classes.values[target].exp()[:, None]
    torch.testing.assert_close(loss, F.cross_entropy(input / sigma, target))


def test_regression_rows_are_noise_scales():
    made = method()
    table = made.tables["log_temperature"]
    table.values.copy_(torch.linspace(-0.4, 2.9, N))
    t = table.values[INDEX]
    prediction, target = torch.randn(2, B, 3)
    square = (prediction - target).square()
    expected = square / (2 * t[:, None]).exp() + 2 * t[:, None]
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        objective = Objective(made.stages())
        loss = objective(F.mse_loss, INDEX, prediction, target, reduction=reduction)
        torch.testing.assert_close(loss, value)


def test_integer_regression_targets_are_not_truncated():
    made = method()
    made.tables["log_temperature"].values.fill_(1.0)
    prediction, target = torch.randn(B), torch.arange(B)
    loss = Objective(made.stages())(F.mse_loss, INDEX, prediction, target)
    expected = F.mse_loss(prediction, target.float()) / torch.tensor(2.0).exp() + 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_class_temperatures_of_one_binary_label_are_those_of_its_class(shape):
    made = method("class")
    classes = made.tables["class_log_temperature"]
    classes.values[:2] = torch.tensor([0.5, -0.25])
    label = torch.tensor([0.0, 1, 1, 0, 1, 0])
    input, target = torch.randn(B).reshape(shape), label.reshape(shape)
    loss = Objective(made.stages())(F.binary_cross_entropy_with_logits, INDEX, input, target)
    sigma = classes.values[label.long()].exp().reshape(shape)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(input / sigma, target))


def test_dynamics_are_observed_at_temperature_one():
    made, seen = method(), []
    made.tables["log_temperature"].values.fill_(2.0)
    objective = Objective(made.stages())
    objective.inspector = lambda call, observation: seen.append((call.index, observation))
    input, target = torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1])
    objective(F.cross_entropy, INDEX, input, target, label_smoothing=0.3)
    index, observation = seen[0]
    assert index is INDEX
    assert isinstance(observation, Observation)
    torch.testing.assert_close(observation.loss, F.cross_entropy(input, target, reduction="none"))


# -- stages after the criterion ----------------------------------------------------------------------


class PassThrough:
    """Replaces the losses by themselves, so that only the reduction is the library's."""

    position = 3

    def before(self, call: LossCall) -> None:
        pass

    def after(self, call: LossCall) -> None:
        call.losses = call.elementwise()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_reduction_is_torchs_own(case: Case, reduction: str):
    input, target = case.data()
    input.requires_grad_()
    options = {**case.options, "reduction": reduction}
    objective = Objective([PassThrough()])
    plain = case.function(input, target, **options)
    plain_grad = grads(plain, input)
    by_function = objective(case.function, INDEX, input, target, **options)
    by_module = through_module(objective, case.module(**options), INDEX, input, target)
    for loss in (by_function, by_module):
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(grads(loss, input), plain_grad)


def test_reduction_of_nothing_is_nan_as_torchs():
    target = torch.full((B,), -100)
    objective = Objective([PassThrough()])
    assert objective(F.cross_entropy, INDEX, torch.randn(B, C), target).isnan()
    assert objective(F.cross_entropy, INDEX, torch.randn(B, C), target, reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_stage_is_torchs_label_smoothing(reduction):
    for case in (c for c in CASES if c.module is CE and set(c.options) <= {"ignore_index"}):
        if case.targets == "probabilities":
            continue
        input, target = case.data()
        options = {**case.options, "reduction": reduction}
        loss = Objective(LabelSmoothing(0.3).stages())(F.cross_entropy, INDEX, input, target, **options)
        plain = F.cross_entropy(input, target, **options, label_smoothing=0.3)
        torch.testing.assert_close(loss, plain)


def test_gce_and_superloss_stages_ignore_what_the_user_ignores():
    target = torch.tensor([0, -100, 2, 3, -100, 1])
    input, counted = torch.randn(B, C), target != -100
    gce = Objective(GCE(q=0.5).stages())(F.cross_entropy, INDEX, input, target)
    expected = generalized_cross_entropy(input[counted], target[counted], 0.5).mean()
    torch.testing.assert_close(gce, expected)
    curriculum = Objective(SuperLoss().stages())(F.cross_entropy, INDEX, input, target)
    losses = F.cross_entropy(input[counted], target[counted], reduction="none")
    torch.testing.assert_close(curriculum, superloss(losses, torch.tensor(4.0).log()).mean())


def test_class_weights_weigh_gce_as_they_weigh_cross_entropy():
    input, target = torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = Objective(GCE().stages())(F.cross_entropy, INDEX, input, target, weight=WEIGHT)
    weight = WEIGHT[target]
    expected = (weight * generalized_cross_entropy(input, target)).sum() / weight.sum()
    torch.testing.assert_close(loss, expected)


def test_stages_run_in_their_order_whatever_the_callbacks_order():
    """Temperatures scale the logits that the robust loss sees."""
    input, target = torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1])
    losses = []
    for order in (1, -1):
        made = method()
        made.tables["log_temperature"].values.copy_(torch.linspace(-0.4, 2.9, N))
        objective = Objective([*made.stages(), *GCE().stages()][::order])
        losses.append(objective(F.cross_entropy, INDEX, input, target))
    assert torch.equal(losses[0], losses[1])
    sigma = torch.linspace(-0.4, 2.9, N)[INDEX].exp()[:, None]
    torch.testing.assert_close(losses[0], generalized_cross_entropy(input / sigma, target).mean())


# -- odd shapes and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "input", "target"),
    [
        (F.cross_entropy, torch.randn(C), torch.tensor(1)),
        (F.mse_loss, torch.tensor(1.5), torch.tensor(1.0)),
        (F.binary_cross_entropy_with_logits, torch.tensor(1.5), torch.tensor(1.0)),
    ],
    ids=["cross_entropy", "mse", "bce"],
)
def test_one_unbatched_sample(function, input, target):
    """As ``squeeze()`` makes of a last batch of one."""
    made = method()
    loss = Objective(made.stages())(function, torch.tensor([3]), input, target)
    assert torch.equal(loss, function(input, target))
    loss.backward()
    made.optimizers[0].step()
    assert made.tables["log_temperature"].values.nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    ("function", "input", "target"),
    [
        (F.cross_entropy, torch.zeros(0, C), torch.zeros(0, dtype=torch.int64)),
        (F.mse_loss, torch.zeros(0, 3), torch.zeros(0, 3)),
        (F.binary_cross_entropy_with_logits, torch.zeros(0), torch.zeros(0)),
    ],
    ids=["cross_entropy", "mse", "bce"],
)
def test_an_empty_batch_is_torchs_business(function, input, target):
    made = method()
    none = torch.zeros(0, dtype=torch.int64)
    loss = Objective(made.stages())(function, none, input, target, reduction="sum")
    assert loss == 0


def test_more_samples_than_rows_says_what_to_do():
    objective = Objective(method().stages())
    message = r"F.cross_entropy was called with 6 samples, but the batch has 5\..*callback\.loss"
    with pytest.raises(ValueError, match=message):
        objective(F.cross_entropy, INDEX[:5], torch.randn(B, C), torch.zeros(B, dtype=torch.int64))


def test_row_out_of_range():
    objective = Objective(method().stages())
    with pytest.raises(IndexError, match="row 10 is out of range for a table of 10 rows"):
        objective(F.mse_loss, torch.tensor([0, 10]), torch.zeros(2), torch.zeros(2))


def test_label_that_does_not_fit_num_classes():
    made = DataParameters(num_classes=3)
    made.make_tables(N, torch.device("cpu"))
    objective = Objective(made.stages())
    with pytest.raises(ValueError, match=r"label 3 does not fit num_classes=3 \(labels 0 to 2\)"):
        objective(F.cross_entropy, INDEX, torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1]))
    ignored = torch.tensor([0, 1, 2, 255, 0, 1])  # an ignored value is not a label
    objective(F.cross_entropy, INDEX, torch.randn(B, C), ignored, ignore_index=255)


def test_class_temperatures_need_classes():
    objective = Objective(method("class").stages())
    with pytest.raises(ValueError, match=r"F\.mse_loss is a regression loss; use level='instance'"):
        objective(F.mse_loss, INDEX, torch.zeros(B), torch.zeros(B))


@pytest.mark.parametrize("stage", [GCE(), LabelSmoothing(), SuperLoss()])
def test_robust_losses_name_the_criterion_that_they_cannot_replace(stage):
    objective = Objective(stage.stages())
    with pytest.raises(ValueError, match=r"F\.binary_cross_entropy_with_logits"):
        objective(F.binary_cross_entropy_with_logits, INDEX, torch.zeros(B), torch.zeros(B))


@pytest.mark.parametrize("reduction", [None, "batchmean"])
def test_a_reduction_that_cannot_be_undone_is_refused(reduction):
    module = nn.Identity() if reduction is None else nn.KLDivLoss(reduction=reduction)
    message = rf"self\.criterion .*reduction={reduction!r}; it must be 'mean', 'sum' or 'none'"
    with pytest.raises(ValueError, match=message):
        Criterion.of_module(module, "self.criterion")


def test_deprecated_reductions_are_refused():
    objective = Objective()
    with pytest.raises(ValueError, match="deprecated size_average/reduce; use reduction="):
        objective(F.mse_loss, INDEX, torch.zeros(B), torch.zeros(B), size_average=False)


def test_no_gradient_no_visit():
    made = method()
    with torch.no_grad():
        Objective(made.stages())(F.mse_loss, INDEX, torch.zeros(B), torch.zeros(B))
    assert made.tables["log_temperature"].pending == []


def test_describing_a_module_does_not_change_it():
    module = nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum")
    criterion = Criterion.of_module(module, "self.criterion")
    losses = criterion.elementwise(torch.randn(B, C), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert losses.shape == (B,)
    assert module.reduction == "sum"
