"""Frame-level loss: padding, and gradients of rows and weights against a loop over frames."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dataparams import DataParameters
from dataparams.criterion import Criterion
from dataparams.nn import FrameCrossEntropy, mask_frames
from dataparams.objective import Objective

B, T, C = 4, 7, 5
LENGTH = torch.tensor([7, 3, 1, 5])


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, C, dtype=torch.float64, generator=generator)
    target = torch.randint(0, C, (B, T), generator=generator)
    return logits, target, torch.arange(T) < LENGTH[:, None]


def test_lengths_and_masks_are_the_same_and_the_mean_is_over_frames_that_count():
    logits, target, mask = case()
    wanted = F.cross_entropy(logits[mask], target[mask])
    loss = FrameCrossEntropy()
    torch.testing.assert_close(loss(logits, target, mask), wanted)
    torch.testing.assert_close(loss(logits, target, LENGTH), wanted)
    torch.testing.assert_close(loss(logits, target.masked_fill(~mask, -100)), wanted)
    each = FrameCrossEntropy("none")(logits, target, mask)
    assert each.shape == (B, T)
    assert not each[~mask].any()
    torch.testing.assert_close(FrameCrossEntropy("sum")(logits, target, LENGTH), each.sum())
    torch.testing.assert_close(loss(logits[:, 0], target[:, 0]), F.cross_entropy(logits[:, 0], target[:, 0]))


def test_shapes_that_do_not_fit_are_named():
    logits, target, mask = case()
    with pytest.raises(ValueError, match="class is the last dimension"):
        FrameCrossEntropy()(logits.transpose(1, 2), target)
    for valid in (mask[:, 1:], LENGTH[1:], LENGTH.double()):
        with pytest.raises(ValueError, match="need a bool mask of that shape or integer lengths"):
            mask_frames(target, valid)


@pytest.mark.parametrize("level", ["instance", "class", "joint"])
@pytest.mark.parametrize("grad_scale", ["mean", "instance"])
def test_gradients_are_those_of_a_loop_over_frames(level, grad_scale):
    """sigma*_{i,t} = sigma_class[y_{i,t}] + sigma_inst[i]; the loss is a mean over all frames; a row of an utterance
    gets the sum over its frames, a class that of its frames, and padding nothing."""
    logits, target, mask = case()
    logits.requires_grad_()
    index = torch.tensor([8, 2, 5, 0])
    method = DataParameters(num_classes=C, level=level, grad_scale=grad_scale)
    method._make_tables(9, torch.device("cpu"), {"device": torch.device("cpu"), "dtype": torch.float64})
    generator = torch.Generator().manual_seed(1)
    for table in method.tables.values():
        table.values = torch.rand(table.num_rows, dtype=torch.float64, generator=generator) - 0.4
    own: Any = {name: table.values.clone().requires_grad_() for name, table in method.tables.items()}
    visits: Any = {name: table.pending for name, table in method.tables.items()}

    frames = []
    loop_logits = logits.detach().clone().requires_grad_()
    for i in range(B):
        for t in range(int(LENGTH[i])):
            y = int(target[i, t])
            sigma = torch.zeros((), dtype=torch.float64)
            if level != "class":
                sigma = sigma + own["log_temperature"][index[i]].exp()
            if level != "instance":
                sigma = sigma + own["class_log_temperature"][y].exp()
            frames.append(-torch.log_softmax(loop_logits[i, t] / sigma, 0)[y])
    wanted = torch.stack(frames).sum() / mask.sum()
    wanted.backward()

    loss = FrameCrossEntropy()
    objective = Objective(method.stages())
    criterion = Criterion.of_module(loss.cross_entropy, "self.criterion.cross_entropy")
    call = objective.begin(criterion, logits.movedim(-1, 1), mask_frames(target, mask), index)
    found = objective.end(call, loss.cross_entropy(call.input, call.target))
    found.backward()

    assert float((found - wanted).detach().abs()) < 1e-10
    gradients: Any = logits.grad, loop_logits.grad
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-10
    assert not gradients[0][~mask].any()
    for name, table in method.tables.items():
        gradient = torch.zeros(table.num_rows, dtype=torch.float64)
        for visit in visits[name]:
            gradient.index_put_((visit.index.flatten(),), visit.leaf.grad.flatten(), accumulate=True)
            if visit.valid is not None and visit.index.dim() > 1:
                assert not visit.leaf.grad[~visit.valid].any()
        assert float((gradient - own[name].grad).abs().max()) < 1e-10


def test_a_row_steps_once_with_the_sum_over_its_frames():
    """Two steps of the row optimizer against the closed form, with momentum: a step a frame would differ."""
    logits, target, mask = case()
    index = torch.tensor([3, 1, 0, 2])
    method = DataParameters(num_classes=C, lr=0.5, momentum=0.9, grad_scale="mean", bounds=(-20.0, 20.0))
    method.make_tables(4, torch.device("cpu"))
    objective, loss = Objective(method.stages()), FrameCrossEntropy()
    criterion = Criterion.of_module(loss.cross_entropy, "self.criterion")
    rows, velocity = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(2):
        leaf = rows.clone().requires_grad_()
        scaled = logits / leaf[index].exp()[:, None, None]
        F.cross_entropy(scaled[mask], target[mask]).backward()
        assert leaf.grad is not None
        velocity = 0.9 * velocity + leaf.grad
        rows = rows - 0.5 * velocity
        call = objective.begin(
            criterion, logits.float().requires_grad_().movedim(-1, 1), mask_frames(target, mask), index
        )
        objective.end(call, loss.cross_entropy(call.input, call.target)).backward()
        for optimizer in method.optimizers:
            optimizer.step()
    assert rows.abs().min() > 1e-3
    torch.testing.assert_close(method.tables["log_temperature"].values.double(), rows, atol=1e-6, rtol=1e-5)


def test_an_utterance_of_padding_alone_leaves_its_row_alone():
    logits, target, mask = case()
    mask[1] = False
    method = DataParameters(num_classes=C, lr=0.5)
    method.make_tables(B, torch.device("cpu"))
    objective, loss = Objective(method.stages()), FrameCrossEntropy()
    criterion = Criterion.of_module(loss.cross_entropy, "self.criterion")
    call = objective.begin(
        criterion, logits.float().requires_grad_().movedim(-1, 1), mask_frames(target, mask), torch.arange(B)
    )
    objective.end(call, loss.cross_entropy(call.input, call.target)).backward()
    method.optimizers[0].step()
    moved = method.tables["log_temperature"].values != 0
    assert moved.tolist() == [True, False, True, True]
