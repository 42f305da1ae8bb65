"""The trace against a loop over classes, and its derivatives against the page's closed forms, in double precision."""

import pytest
import torch

from dataparams.functional import class_sums, hebbian_update

M, C, N = 5, 4, 12
GENERATOR = torch.Generator().manual_seed(0)
H = torch.randn(N, M, dtype=torch.float64, generator=GENERATOR)
HEBB = torch.randn(M, C, dtype=torch.float64, generator=GENERATOR)
Y = torch.tensor([0, 1, 1, 3, 0, 1, 3, 3, 3, 0, 1, 0])  # class 2 is absent


def by_class(hebb, h, y, eta):
    result = hebb.clone()
    for c in range(hebb.shape[1]):
        if (y == c).any():
            result[:, c] = (1 - eta) * hebb[:, c] + eta * h[y == c].mean(0)
    return result


@pytest.mark.parametrize("eta", [0.0, 0.001, 0.7, 1.0])
def test_the_published_update(eta):
    new = hebbian_update(HEBB, H, Y, eta)
    torch.testing.assert_close(new, by_class(HEBB, H, Y, eta), rtol=1e-13, atol=1e-14)
    assert torch.equal(new[:, 2], HEBB[:, 2])  # an absent class, bit for bit
    if eta == 0:
        assert torch.equal(new, HEBB)


def test_labels_that_are_no_class_count_nowhere():
    y = Y.clone()
    y[[1, 3, 4]] = torch.tensor([-100, C, -1])
    kept = (y >= 0) & (y < C)
    torch.testing.assert_close(
        hebbian_update(HEBB, H, y, 0.3), by_class(HEBB, H[kept], y[kept], 0.3), rtol=1e-13, atol=0
    )
    assert torch.equal(hebbian_update(HEBB, H, torch.full_like(Y, -100), 0.3), HEBB)
    assert torch.equal(hebbian_update(HEBB, H[:0], Y[:0], 0.3), HEBB)


def test_leading_dimensions_are_all_samples():
    shaped = hebbian_update(HEBB, H.view(3, 4, M), Y.view(3, 4), 0.3)
    assert torch.equal(shaped, hebbian_update(HEBB, H, Y, 0.3))


def test_sums_and_counts_of_parts_add_up():
    """Averages of unequal parts would not."""
    whole, parts = class_sums(H, Y, C), [class_sums(H[part], Y[part], C) for part in (slice(2), slice(2, None))]
    for total, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(first + second, total, rtol=1e-13, atol=1e-14)
    assert whole[1].tolist() == [4, 4, 0, 4]


def test_derivatives():
    inputs = [HEBB.clone().requires_grad_(), H.clone().requires_grad_(), torch.tensor(0.3).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda hebb, h, eta: hebbian_update(hebb, h, Y, eta), inputs)
