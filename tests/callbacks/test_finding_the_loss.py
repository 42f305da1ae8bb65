"""The ways in: a loss module found or named, a loss called inline, and the explicit call; all give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    WithIds,
    assert_same,
    fit,
    make_loader,
    snapshot,
)
from torch import Tensor, nn

from dataparams import DataParameters, TrainingDynamics

pytestmark = [*QUIET, INERT]
Step = Callable[[Any, Any], Any]


def found(model: Any, batch: Any) -> Tensor:
    return model.any_name(model.logits(batch[0]), batch[1])


def named_arguments(model: Any, batch: Any) -> Tensor:
    return model.any_name(input=model.logits(batch[0]), target=batch[1])


def inline(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.logits(batch[0]), batch[1])


def inline_named_arguments(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(input=model.logits(batch[0]), target=batch[1])


def made_on_the_spot(model: Any, batch: Any) -> Tensor:
    return nn.CrossEntropyLoss()(model.logits(batch[0]), batch[1])


def run(step: Step, callback: Any = None, **losses: nn.Module) -> tuple[Any, Any, Any]:
    callback = DataParameters(lr=0.2) if callback is None else callback
    model = StepModel(step, **losses)
    fit(callback, make_loader(shuffle=False), model=model)
    return model.state_dict(), callback.state_dict(), callback


@pytest.mark.parametrize("step", [named_arguments, inline, inline_named_arguments, made_on_the_spot])
def test_every_way_in_gives_the_same_numbers(step: Step):
    losses = {"any_name": nn.CrossEntropyLoss()} if step is named_arguments else {}
    ours, theirs = run(step, **losses), run(found, any_name=nn.CrossEntropyLoss())
    assert_same(ours[:2], theirs[:2])


def test_explicit_call_gives_the_same_numbers():
    callback = DataParameters(lr=0.2, num_rows=SAMPLES)

    def explicit(model: Any, batch: Any) -> Tensor:
        return callback.loss(model.logits(batch[0]), batch[1], index=batch[0][:, -1].long())

    ours, theirs = run(explicit, callback), run(inline)
    assert_same(ours[:2], theirs[:2])
    with pytest.raises(RuntimeError, match=r"works inside trainer\.fit"):
        callback.loss(torch.zeros(2, CLASSES), torch.zeros(2, dtype=torch.long), index=[0, 1])


def test_explicit_call_beside_a_loss_module_counts_once():
    callback = TrainingDynamics()

    def explicit(model: Any, batch: Any) -> Tensor:
        return callback.loss(model.logits(batch[0]), batch[1], index=batch[0][:, -1].long())

    run(explicit, callback, any_name=nn.CrossEntropyLoss())
    assert callback.to_frame()["visits"].eq(2).all()


def test_nested_module_is_found_and_several_can_be_told_apart():
    def nested(model: Any, batch: Any) -> Tensor:
        return model.head.loss(model.logits(batch[0]), batch[1])

    head = nn.Module()
    head.loss = nn.CrossEntropyLoss()
    reference = run(inline)[:2]
    assert_same(run(nested, head=head)[:2], reference)
    assert_same(
        run(nested, DataParameters(lr=0.2, criterion="head.loss"), head=head, other=nn.NLLLoss())[:2], reference
    )
    assert_same(run(nested, DataParameters(lr=0.2, criterion=head.loss), head=head, other=nn.NLLLoss())[:2], reference)


def test_several_loss_modules_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"self\.any_name \(CrossEntropyLoss\), self\.aux \(NLLLoss\).*criterion="):
        run(found, any_name=nn.CrossEntropyLoss(), aux=nn.NLLLoss())


def test_a_regression_loss_beside_the_classification_loss_is_not_the_criterion():
    def auxiliary(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        return model.any_name(logits, batch[1]) + model.aux(logits, torch.zeros_like(logits))

    callback = run(auxiliary, TrainingDynamics(), any_name=nn.CrossEntropyLoss(), aux=nn.MSELoss())[2]
    assert callback.to_frame()["visits"].eq(2).all()


def test_a_loss_module_that_is_not_called_is_an_error_before_the_first_step():
    model = StepModel(inline, unused=nn.CrossEntropyLoss())
    before = snapshot(model.state_dict())
    with pytest.raises(RuntimeError, match=r"self\.unused was found but training_step did not call it"):
        fit(DataParameters(), model=model)
    assert_same(snapshot(model.state_dict()), before)
    assert_same(
        run(inline, DataParameters(lr=0.2, criterion=F.cross_entropy), unused=nn.CrossEntropyLoss())[:2],
        run(inline)[:2],
    )


def test_no_loss_at_all_names_the_ways_in():
    def own(model: Any, batch: Any) -> Tensor:
        return -model.logits(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    model = StepModel(own)
    before = snapshot(model.state_dict())
    with pytest.raises(RuntimeError, match=r"no loss was found.*three ways in.*callback\.loss"):
        fit(DataParameters(), model=model)
    assert_same(snapshot(model.state_dict()), before)


def manual_step(model: Any, batch: Any) -> None:
    optimizer = model.optimizers()
    optimizer.zero_grad()
    loss = -model.logits(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()
    model.manual_backward(loss)
    optimizer.step()


def test_no_loss_under_manual_optimization_is_an_error_too():
    model = StepModel(manual_step)
    model.automatic_optimization = False
    with pytest.raises(RuntimeError, match="no loss was found"):
        fit(TrainingDynamics(), model=model)


def test_two_inline_losses_must_be_told_apart():
    def both(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, torch.zeros_like(logits))

    with pytest.raises(ValueError, match=r"calls F\.cross_entropy and F\.mse_loss.*criterion="):
        run(both)
    callback = run(both, TrainingDynamics(criterion=F.cross_entropy))[2]
    assert callback.to_frame()["visits"].eq(2).all()


@pytest.mark.parametrize("wanted", ["no_such_attribute", "net", print])
def test_a_criterion_that_is_none_is_refused(wanted: Any):
    with pytest.raises(ValueError, match=r"criterion|reduction"):
        run(inline, DataParameters(criterion=wanted))


def test_a_step_that_takes_the_iterator_is_refused():
    class Iterating(Model):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return self.criterion(self.net(next(dataloader_iter)[0][:, :-1]), torch.zeros(8).long())

    with pytest.raises(ValueError, match="dataloader_iter"):
        fit(DataParameters(), model=Iterating())


# -- what the criterion may be ---------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.2, 1.0, 3.0])
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"weight": WEIGHT},
    "ignore": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.1},
    "everything": {"weight": WEIGHT, "ignore_index": 1, "label_smoothing": 0.1},
}


def plain(step: Step, **losses: nn.Module) -> Any:
    return fit([], model=StepModel(step, **losses)).state_dict()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("way", ["module", "inline"])
def test_initial_state_keeps_every_cross_entropy_bit_for_bit(options: dict[str, Any], way: str):
    def step(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        return model.loss(logits, batch[1]) if way == "module" else F.cross_entropy(logits, batch[1], **options)

    losses = {"loss": nn.CrossEntropyLoss(**options)} if way == "module" else {}
    model, _, callback = run(step, DataParameters(lr=0.0), **losses)
    assert_same(model, plain(step, **losses))
    visits = callback.to_frame()["visits"]
    ignored = Numbered().y.numpy() == options.get("ignore_index", -1)
    assert visits[ignored].eq(0).all()
    assert visits[~ignored].eq(2).all()


def log_probabilities(model: Any, batch: Any) -> Tensor:
    return F.nll_loss(F.log_softmax(model.logits(batch[0]), 1), batch[1])


def binary(model: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model.logits(batch[0]), F.one_hot(batch[1], CLASSES).float())


def single_binary(model: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model.logits(batch[0])[:, 0], (batch[1] == 0).float())


def soft_targets(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.logits(batch[0]), F.one_hot(batch[1], CLASSES).float() * 0.8 + 0.2 / CLASSES)


def squared(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model.logits(batch[0]), batch[0][:, :CLASSES])


def absolute(model: Any, batch: Any) -> Tensor:
    return F.smooth_l1_loss(model.logits(batch[0]), batch[0][:, :CLASSES])


@pytest.mark.parametrize("step", [log_probabilities, binary, single_binary, soft_targets, squared, absolute])
def test_initial_state_keeps_other_losses_bit_for_bit(step: Step):
    model, _, callback = run(step, DataParameters(lr=0.0))
    assert_same(model, plain(step))
    assert callback.to_frame()["visits"].eq(2).all()


def test_log_probabilities_give_the_numbers_of_cross_entropy():
    ours, theirs = run(log_probabilities), run(inline)
    assert_same(ours[:2], theirs[:2], rtol=1e-4, atol=1e-6)


def weighted_by_hand(model: Any, batch: Any) -> Tensor:
    return model.loss(model.logits(batch[0]), batch[1]).mean()


def five_times(model: Any, batch: Any) -> Tensor:
    return 5 * model.loss(model.logits(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("step", "reduction"),
    [(weighted_by_hand, "none"), (five_times, "mean"), (weighted_by_hand, "sum")],
    ids=["none", "times five", "sum"],
)
def test_rate_per_visit_does_not_depend_on_how_the_loss_is_reduced(step: Step, reduction: str):
    def first_step(step: Step, **losses: nn.Module) -> Any:
        callback = DataParameters(lr=0.2)
        fit(callback, model=StepModel(step, **losses), max_epochs=1, limit_train_batches=1)
        return callback.state_dict()["tables"]

    ours, theirs = first_step(step, loss=nn.CrossEntropyLoss(reduction=reduction)), first_step(inline)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-7)


class Focal(nn.Module):
    """A user's own loss that says how it reduces."""

    reduction = "mean"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_prob = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
        losses = -((1 - log_prob.exp()) ** 2) * log_prob
        return losses.mean() if self.reduction == "mean" else losses


def test_own_loss_module_works_when_it_is_named():
    callback = run(found, DataParameters(lr=0.2, criterion="any_name"), any_name=Focal())[2]
    assert (callback.tables["log_temperature"].values.abs() > 0).all()
    neutral = run(found, DataParameters(lr=0.0, criterion="any_name"), any_name=Focal())
    assert_same(neutral[0], plain(found, any_name=Focal()))


def test_compiled_loss_module_is_found():
    torch._dynamo.reset()
    compiled = torch.compile(nn.CrossEntropyLoss(), backend="aot_eager")
    ours, theirs = run(found, any_name=compiled), run(inline)  # type: ignore[arg-type]
    assert_same(ours[:2], theirs[:2], rtol=1e-4, atol=1e-6)


# -- calls that are not the training loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["module", "inline"])
def test_calls_without_gradients_are_the_users_own(way: str):
    seen = []

    def step(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        loss = model.loss if way == "module" else F.cross_entropy
        with torch.no_grad():
            seen.append(loss(logits[:3], batch[1][:3]) - F.nll_loss(logits[:3].log_softmax(1), batch[1][:3]))
        return loss(logits, batch[1])

    losses = {"loss": nn.CrossEntropyLoss()} if way == "module" else {}
    ours = run(step, DataParameters(lr=0.5), **losses)
    assert max(map(abs, seen)) < 1e-6  # the plain loss, although temperatures have moved
    assert_same(ours[1], run(inline, DataParameters(lr=0.5))[1])


def test_a_detached_inline_call_is_the_users_own():
    def step(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        F.cross_entropy(logits.detach()[:3], batch[1][:3])
        return F.cross_entropy(logits, batch[1])

    assert_same(run(step)[:2], run(inline)[:2])


@pytest.mark.filterwarnings("ignore:the loss is computed several times a step")
def test_two_views_of_the_batch_add_up():
    def views(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        return model.loss(logits, batch[1]) + model.loss(logits, batch[1])

    def once(model: Any, batch: Any) -> Tensor:
        return 2 * model.loss(model.logits(batch[0]), batch[1])

    two, one = DataParameters(lr=0.1), DataParameters(lr=0.2)
    ours = fit(two, model=StepModel(views, loss=nn.CrossEntropyLoss()))
    theirs = fit(one, model=StepModel(once, loss=nn.CrossEntropyLoss()))
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two.tables["log_temperature"].values, one.tables["log_temperature"].values)
    assert two.to_frame()["visits"].tolist() == SAMPLES * [2]  # a visit a step


def test_a_batch_that_changed_its_size_on_the_way_is_refused():
    def halves(model: Any, batch: Any) -> Tensor:
        return model.loss(model.logits(batch[0])[::2], batch[1][::2])

    with pytest.raises(ValueError, match=r"with 4 samples, but the batch has 8.*callback\.loss"):
        run(halves, loss=nn.CrossEntropyLoss())


def test_flattened_logits_work_through_the_explicit_call():
    """Two predictions a sample: the gradient of a row is that of both."""
    callback = DataParameters(lr=0.2, index_key=2)

    def flattened(model: Any, batch: Any) -> Tensor:
        x, y, index = batch
        return callback.loss(model.logits(x.repeat(2, 1)), y.repeat(2), index=index.repeat(2))

    fit(callback, make_loader(WithIds()), model=StepModel(flattened))
    assert callback.to_frame()["visits"].eq(4).all()
