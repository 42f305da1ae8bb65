"""Calibration: a known temperature is found again, and scores agree with their definitions."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataparams.tasks import SmallCNN, calibrated_scores, evaluate, fit_temperature


def drawn(temperature, size=20_000, classes=5, seed=0):
    """Logits whose labels were drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, classes, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_has_a_lower_loss():
    logits, labels = drawn(2.5, size=2_000)
    best = fit_temperature(logits, labels)

    def loss(temperature):
        return float(F.cross_entropy(logits.double() / temperature, labels))

    grid = np.geomspace(0.1, 100, 2_000)
    assert loss(best) <= min(loss(temperature) for temperature in grid)


def test_extremes_end_at_the_ends_of_the_range():
    logits = 5 * torch.eye(4)
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(1e-3)
    assert fit_temperature(logits, (torch.arange(4) + 1) % 4) == pytest.approx(1e3)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least one sample"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def expected_calibration_error(logits, labels, bins=15):
    confidence, predicted = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long() - 1
    error = 0.0
    for number in range(bins):
        inside = bin_of == number
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean()
            error += float(inside.double().mean() * (accuracy - confidence[inside].mean()).abs())
    return error


def test_calibrated_scores_follow_their_definitions():
    val, test = drawn(3.0, seed=1), drawn(3.0, seed=2)
    scores = calibrated_scores(*val, *test)
    temperature = scores["calibration_temperature"]
    assert temperature == pytest.approx(3.0, rel=0.05)
    logits, labels = test
    assert scores["test_nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert scores["test_nll_calibrated"] == pytest.approx(
        float(F.cross_entropy(logits / temperature, labels)), rel=1e-5
    )
    assert scores["test_ece"] == pytest.approx(expected_calibration_error(logits, labels), abs=1e-4)
    assert scores["test_ece_calibrated"] < 0.02 < 0.2 < scores["test_ece"]


def test_evaluate_keeps_order_and_mode():
    model = SmallCNN()
    images, labels = torch.randn(25, 1, 8, 8), torch.arange(25) % 10
    loader = list(zip(images.split(10), labels.split(10), strict=True))
    model.train()
    model.head.eval()  # as a frozen part would be
    logits, seen = evaluate(model, loader)
    assert model.training
    assert not model.head.training
    assert torch.equal(seen, labels)
    assert not logits.requires_grad
    assert torch.allclose(logits, model(images), atol=1e-6)


def test_a_diverged_model_has_no_scores_and_raises_nothing():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    scores = calibrated_scores(logits * float("nan"), labels, logits, labels)
    assert set(scores) == set(calibrated_scores(logits, labels, logits, labels))
    assert all(math.isnan(value) for value in scores.values())
