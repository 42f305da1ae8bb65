"""What a batch says about its labels, against loops over its elements."""

import math

import torch
import torch.nn.functional as F

from dataparams.functional.dynamics import binary_classification, classification, regression


def test_classification_against_a_loop():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, -100])
    seen = classification(logits, target)
    for i, y in enumerate(target.tolist()[:5]):
        z = logits[i].tolist()
        p = math.exp(z[y]) / sum(map(math.exp, z))
        margin = z[y] - max(z[:y] + z[y + 1 :])
        assert math.isclose(seen.loss[i], -math.log(p), rel_tol=1e-5)
        assert math.isclose(seen.margin[i], margin, rel_tol=1e-5)
        assert math.isclose(seen.confidence[i], p, rel_tol=1e-5)
        assert bool(seen.correct[i]) == (max(range(4), key=z.__getitem__) == y)
    assert seen.label.tolist()[:5] == target.tolist()[:5]
    assert seen.valid.tolist() == [True] * 5 + [False]


def test_classification_accepts_log_probabilities_and_probability_targets():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    seen = classification(logits, target)
    from_log_probs = classification(logits.log_softmax(1), target)
    from_soft = classification(logits, 0.7 * F.one_hot(target, 4) + 0.075)
    for other in (from_log_probs, from_soft):
        for a, b in zip(seen, other, strict=True):
            torch.testing.assert_close(a, b)


def test_dense_classification_means_over_counted_elements():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 2, 5), torch.randint(0, 4, (3, 2, 5))
    target[0, 0] = 255
    target[2] = 255
    seen = classification(logits, target, ignore_index=255)
    elementwise = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    counted = target != 255
    for i in (0, 1):
        torch.testing.assert_close(seen.loss[i], elementwise[i][counted[i]].mean())
        right = logits[i].argmax(0) == target[i]
        assert bool(seen.correct[i]) == bool(right[counted[i]].all())
    assert seen.valid.tolist() == [True, True, False]
    assert seen.label.tolist() == [-1, -1, -1]


def test_binary_classification_of_one_and_of_many_labels():
    logits, target = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    seen = binary_classification(logits, target)
    torch.testing.assert_close(seen.margin, torch.tensor([2.0, -1.0, -0.5]))
    torch.testing.assert_close(seen.confidence, torch.tensor([2.0, -1.0, -0.5]).sigmoid())
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(seen.loss, plain)
    assert seen.correct.tolist() == [True, False, False]
    assert seen.label.tolist() == [1, 1, 0]
    column = binary_classification(logits[:, None], target[:, None])
    for a, b in zip(seen, column, strict=True):
        torch.testing.assert_close(a, b)
    many = binary_classification(logits.expand(2, 3), target.expand(2, 3))
    torch.testing.assert_close(many.loss, plain.mean().expand(2))
    assert many.label.tolist() == [-1, -1]
    assert many.correct.tolist() == [False, False]


def test_regression_has_a_loss_and_nothing_else():
    losses = torch.rand(4, 3)
    seen = regression(losses)
    torch.testing.assert_close(seen.loss, losses.mean(1))
    assert seen.margin.isnan().all()
    assert seen.confidence.isnan().all()
    assert seen.label.tolist() == [-1] * 4
    assert seen.valid.all()


def test_an_empty_batch_observes_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    assert classification(torch.zeros(0, 4), none).loss.shape == (0,)
    assert binary_classification(torch.zeros(0), torch.zeros(0)).loss.shape == (0,)
    assert regression(torch.zeros(0, 3)).loss.shape == (0,)
