"""Early-learning regularisation against python loops and its published gradient."""

import math

import torch

from dataparams.functional import elr_regularizer, elr_target
from dataparams.functional.elr import clamped_probabilities


def test_moving_average_against_a_loop():
    torch.manual_seed(0)
    target = torch.zeros(3, 4, dtype=torch.float64)
    expected = [[0.0] * 4 for _ in range(3)]
    for _ in range(5):
        p = torch.rand(3, 4, dtype=torch.float64)
        target = elr_target(target, p, beta=0.6)
        for i in range(3):
            total = float(p[i].sum())
            for k in range(4):
                expected[i][k] = 0.6 * expected[i][k] + 0.4 * float(p[i, k]) / total
    torch.testing.assert_close(target, torch.tensor(expected, dtype=torch.float64))
    # each update adds (1 - beta) of a distribution: the mass is 1 - beta^n
    torch.testing.assert_close(target.sum(1), torch.full((3,), 1 - 0.6**5, dtype=torch.float64))


def test_target_carries_no_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    assert not elr_target(torch.zeros(2, 3), logits.softmax(1)).requires_grad


def test_regulariser_and_its_gradient():
    """d/dz_c log(1 - <p, t>) = p_c (<p, t> - t_c) / (1 - <p, t>), Lemma 2 of the paper."""
    torch.manual_seed(1)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = 0.9 * torch.randn(6, 4, dtype=torch.float64).softmax(1)
    value = elr_regularizer(clamped_probabilities(logits), target)
    p = logits.detach().softmax(1)
    inner = (p * target).sum(1, keepdim=True)
    torch.testing.assert_close(value, (1 - inner).log().squeeze(1))
    value.sum().backward()
    expected = p * (inner - target) / (1 - inner)
    torch.testing.assert_close(logits.grad, expected)


def test_certain_predictions_stay_finite():
    p = clamped_probabilities(torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64))
    assert p.max() == 1 - 1e-4
    assert p.min() == 1e-4
    value = elr_regularizer(p, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    assert math.isclose(value.item(), math.log(1e-4), rel_tol=1e-9)
