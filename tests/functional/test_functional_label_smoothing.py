"""Label smoothing against the smoothed target distribution."""

import torch
import torch.nn.functional as F

from dataparams.functional import smoothed_cross_entropy


def test_value_and_gradient():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target, smoothing = torch.tensor([0, 1, 2, 3, 1]), 0.2
    soft = (1 - smoothing) * F.one_hot(target, 4) + smoothing / 4
    losses = smoothed_cross_entropy(logits, target, smoothing)
    torch.testing.assert_close(losses, -(soft * logits.detach().log_softmax(1)).sum(1))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - soft)


def test_without_smoothing_it_is_cross_entropy():
    logits, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    plain = F.cross_entropy(logits, target, reduction="none")
    assert torch.equal(smoothed_cross_entropy(logits, target, 0.0), plain)
