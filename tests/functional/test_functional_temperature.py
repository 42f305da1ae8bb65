"""Temperatures against the closed forms of the method page, in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataparams.functional import (
    data_parameter_loss,
    regression_loss,
    scale_log_probs,
    scale_logits,
    temperature,
)

B, C = 7, 5


def sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (B, C), targets with repeated classes, t (B,), s (C,)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 4, 1, 3, 0])
    t = 0.7 * torch.randn(B, generator=generator, dtype=torch.float64)
    s = 0.7 * torch.randn(C, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), target, t.requires_grad_(), s.requires_grad_()


def closed_form(logits: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(dL/dz, dL/dsigma) of the mean cross-entropy at temperature sigma."""
    p = (logits / sigma[:, None]).softmax(1)
    one_hot = F.one_hot(target, C)
    z_target = logits.gather(1, target[:, None]).squeeze(1)
    grad_sigma = (z_target - (p * logits).sum(1)) / sigma**2
    return (p - one_hot) / sigma[:, None] / B, grad_sigma / B


def test_instance_gradients_are_the_closed_form():
    logits, target, t, _ = sample()
    data_parameter_loss(logits, target, log_instance=t).backward()
    with torch.no_grad():
        grad_z, grad_sigma = closed_form(logits, target, t.exp())
    assert t.grad is not None
    torch.testing.assert_close(logits.grad, grad_z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(t.grad, t.detach().exp() * grad_sigma, rtol=1e-12, atol=1e-14)


def test_class_gradients_are_summed_over_the_members_of_a_class():
    logits, target, _, s = sample()
    data_parameter_loss(logits, target, log_class=s[target]).backward()
    with torch.no_grad():
        grad_z, grad_sigma = closed_form(logits, target, s.exp()[target])
        expected = torch.zeros(C, dtype=torch.float64)
        for i, y in enumerate(target.tolist()):
            expected[y] += s[y].exp() * grad_sigma[i]
    torch.testing.assert_close(logits.grad, grad_z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(s.grad, expected, rtol=1e-12, atol=1e-14)


def test_joint_is_a_sum_of_sigmas_and_not_of_logs():
    logits, target, t, s = sample()
    data_parameter_loss(logits, target, log_instance=t, log_class=s[target]).backward()
    with torch.no_grad():
        sigma = s.exp()[target] + t.exp()
        grad_z, grad_sigma = closed_form(logits, target, sigma)
        expected_s = torch.zeros(C, dtype=torch.float64)
        expected_s.index_add_(0, target, s.exp()[target] * grad_sigma)
    torch.testing.assert_close(logits.grad, grad_z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(t.grad, t.detach().exp() * grad_sigma, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(s.grad, expected_s, rtol=1e-12, atol=1e-14)


def test_sigma_rises_for_a_target_below_the_mean_logit_and_falls_above():
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    t = torch.zeros(2, requires_grad=True)
    data_parameter_loss(logits, torch.tensor([0, 1]), log_instance=t).backward()
    assert t.grad is not None
    fitted, wrong = (-t.grad).tolist()  # the direction of a descent step
    assert fitted < 0 < wrong


def test_loss_value_and_decay_against_python_loops():
    logits, target, t, s = sample()
    wd_instance, wd_class = 0.3, 0.2
    loss = data_parameter_loss(
        logits,
        target,
        t,
        s[target],
        weight_decay=wd_instance,
        class_weight_decay=wd_class,
    )
    cross_entropy, decay = 0.0, 0.0
    logits, t, s = logits.detach(), t.detach(), s.detach()
    for i in range(B):
        y = int(target[i])
        sigma = float(s[y].exp() + t[i].exp())
        cross_entropy -= float((logits[i] / sigma).log_softmax(0)[y]) / B
        # a sum over the batch, so that a class present n times decays n times
        decay += wd_instance / 2 * float(t[i]) ** 2 + wd_class / 2 * float(s[y]) ** 2
    assert loss.item() == pytest.approx(cross_entropy + decay, rel=1e-12)


def test_a_class_present_n_times_decays_n_times():
    logits, target, _, s = sample()
    grads = []
    for decay in (0.0, 0.5):
        (grad,) = torch.autograd.grad(
            data_parameter_loss(logits, target, log_class=s[target], class_weight_decay=decay), s
        )
        grads.append(grad)
    times = torch.bincount(target, minlength=C)
    torch.testing.assert_close(grads[1] - grads[0], 0.5 * times * s.detach())


def test_temperature_needs_something():
    with pytest.raises(ValueError, match="log_instance, log_class or both"):
        temperature()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unit_temperature_is_the_identity_bit_for_bit_in_the_logits_own_dtype(dtype):
    logits = torch.randn(16, 10).to(dtype)
    for scaled in (
        scale_logits(logits, torch.ones(16)),
        scale_log_probs(logits, torch.ones(16)),
    ):
        assert scaled.dtype == dtype
        assert torch.equal(scaled, logits)


def test_temperature_of_log_probabilities_equals_that_of_their_logits():
    logits, target, t, _ = sample()
    reference = F.cross_entropy(scale_logits(logits, t.exp()), target)
    expected = torch.autograd.grad(reference, (logits, t))
    loss = F.nll_loss(scale_log_probs(logits.log_softmax(1), t.exp()), target)
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    for grad, other in zip(torch.autograd.grad(loss, (logits, t)), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-14)


def test_scale_log_probs_gradcheck_with_dense_predictions():
    log_probs = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    sigma = torch.rand(2, 1, 4, dtype=torch.float64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(scale_log_probs, (log_probs, sigma))
    rows = torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(scale_log_probs, (log_probs, rows))


def test_classes_masked_with_minus_infinity_leave_the_row_gradient_finite():
    # models mask classes that a task does not have; p is 0 there and so is p * z
    logits = torch.tensor([[1.0, -1.0, 0.5, float("-inf")]], dtype=torch.float64)
    target = torch.tensor([1])
    masked, plain = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    data_parameter_loss(logits, target, log_instance=masked).backward()
    data_parameter_loss(logits[:, :3], target, log_instance=plain).backward()
    torch.testing.assert_close(masked.grad, plain.grad)


@pytest.mark.parametrize(("kind", "power"), [("mse", 2), ("l1", 1)])
def test_regression_fixed_point_of_the_noise_scale(kind, power):
    """sigma^2 = l for squared errors, sigma = l for absolute ones."""
    prediction = torch.tensor([1.3, -0.2, 4.0], dtype=torch.float64)
    target = torch.tensor([1.0, 0.5, 1.5], dtype=torch.float64)
    losses = {"mse": F.mse_loss, "l1": F.l1_loss}[kind](prediction, target, reduction="none")
    log_sigma = (losses.log() / power).requires_grad_()
    regression_loss(prediction, target, log_sigma, kind).sum().backward()
    assert log_sigma.grad is not None
    assert log_sigma.grad.abs().max() < 1e-12
    # and it is a minimum: the gradient points away from it on either side
    for shift, sign in ((0.1, 1), (-0.1, -1)):
        moved = (log_sigma.detach() + shift).requires_grad_()
        (grad,) = torch.autograd.grad(regression_loss(prediction, target, moved, kind).sum(), moved)
        assert (grad * sign > 0).all()


def test_regression_with_many_outputs_means_over_them_and_finds_their_mean():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    mean_square = (prediction - target).square().flatten(1).mean(1)
    log_sigma = (mean_square.log() / 2).requires_grad_()
    losses = regression_loss(prediction, target, log_sigma)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses, 1 + mean_square.log())
    losses.sum().backward()
    assert log_sigma.grad is not None
    assert log_sigma.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1", "huber"])
def test_regression_starts_at_the_plain_loss(kind):
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 6, 3)
    plain = getattr(F, {"mse": "mse_loss"}.get(kind, f"{kind}_loss"))
    losses = regression_loss(prediction, target, torch.zeros(6), kind)
    assert torch.equal(losses, plain(prediction, target, reduction="none").flatten(1).mean(1))
