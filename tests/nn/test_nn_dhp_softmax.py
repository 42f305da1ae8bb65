"""The layer against the equations: logits, trace, and the gradients derived from them, in double precision."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dataparams.functional import fisher_diagonal, hebbian_update
from dataparams.nn import DHPSoftmax

M, C, N = 6, 4, 16


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(N, M, dtype=dtype, generator=generator)
    return h, torch.randint(0, C - 1, (N,), generator=generator)  # the last class is absent


def layer(seed=0, **options):
    torch.manual_seed(seed)
    result = DHPSoftmax(M, C, **{"eta": 0.3, "alpha_init": (0.0, 1.0), "dtype": torch.float64, **options})
    result.hebb.copy_(torch.randn(M, C, dtype=torch.float64))
    return result


def test_the_equations_over_several_batches():
    dhp = layer()
    expected = dhp.hebb.clone()
    for seed in range(3):
        h, y = batch(seed)
        expected = hebbian_update(expected, h, y, 0.3)
        logits = dhp(h, y)
        torch.testing.assert_close(logits, h @ (dhp.theta + dhp.alpha * expected), rtol=1e-12, atol=1e-12)
        assert torch.equal(dhp.hebb, expected)
        assert not dhp.hebb.requires_grad
    dhp.eval()
    torch.testing.assert_close(dhp(h), logits, rtol=1e-12, atol=1e-12)
    dhp(h, y)  # labels are welcome in evaluation, and without effect
    assert torch.equal(dhp.hebb, expected)


def test_the_derived_gradients():
    """dL/dalpha = Hebb' * P, dL/deta = sum over present c of G_ic (hbar_ic - Hebb_ic), and h's by both ways."""
    dhp, (h, y) = layer(), batch()
    before, h = dhp.hebb.clone(), h.requires_grad_()
    logits = dhp(h, y)
    logits.retain_grad()
    F.cross_entropy(logits, y).backward()
    with torch.no_grad():
        delta, after = logits.grad, dhp.hebb
        products = h.T @ delta
        through_trace = dhp.alpha * products
        eta, to_h = torch.zeros(()).double(), delta @ (dhp.theta + dhp.alpha * after).T
        for c in y.unique():
            eta += (through_trace[:, c] * (h[y == c].mean(0) - before[:, c])).sum()
            to_h[y == c] += 0.3 / int((y == c).sum()) * through_trace[:, c]
    for gradient, expected in (
        (dhp.theta.grad, products), (dhp.alpha.grad, after * products), (dhp.eta.grad, eta), (h.grad, to_h)
    ):  # fmt: skip
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_the_trace_is_a_constant_for_the_next_batch():
    """Two batches in one graph: the second has the gradients it has alone."""
    dhp = layer()
    h = batch()[0].requires_grad_()
    dhp(h, batch()[1])
    second = dhp(*batch(1))
    assert torch.autograd.grad(second.sum(), h, allow_unused=True) == (None,)


def test_alpha_zero_is_linear_bit_for_bit():
    """Float32, several steps, the trace filled: logits, and what the steps make of the weights."""
    torch.manual_seed(3)
    linear = nn.Linear(M, C, bias=True)
    torch.manual_seed(3)
    dhp = DHPSoftmax(M, C, alpha_init=0.0, eta=0.5, bias=True)
    assert torch.equal(dhp.theta, linear.weight.T)  # the same numbers under the same seed
    assert torch.equal(dhp.bias, linear.bias)
    dhp.alpha.requires_grad_(False)
    optimizers = [torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in ([dhp.theta, dhp.bias], linear.parameters())]
    for seed in range(5):
        h, y = batch(seed, torch.float32)
        inputs = [h.clone().requires_grad_() for _ in range(2)]
        outputs = dhp(inputs[0], y), linear(inputs[1])
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(output, y).backward()
            optimizer.step()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert torch.equal(dhp.theta, linear.weight.T)
    assert dhp.hebb.abs().max() > 0.1


def test_initial_values():
    torch.manual_seed(0)
    wide = DHPSoftmax(400, 9)
    assert 0.99 / 20 < wide.theta.abs().max() <= 1 / 20
    assert 0 <= wide.alpha.min() < 0.0001
    assert 0.0099 < wide.alpha.max() < 0.01
    assert wide.eta == torch.tensor(0.001)
    assert not wide.hebb.any()
    authors = DHPSoftmax(400, 9, theta_init="kaiming", alpha_init=0.5)
    assert 0.99 / 3 < authors.theta.abs().max() <= 1 / 3
    assert (authors.alpha == 0.5).all()
    assert "theta_init='kaiming'" in repr(authors)
    assert [name for name, _ in authors.named_parameters()] == ["theta", "alpha", "eta"]
    assert authors.no_decay_parameters() == [authors.alpha, authors.eta]


@pytest.mark.parametrize(("outside", "bound"), [(-0.2, 0.0), (1.7, 1.0)])
def test_eta_stays_in_its_range_and_comes_back(outside, bound):
    dhp = layer()
    h, y = batch()
    with torch.no_grad():
        dhp.eta.fill_(outside)  # as an optimizer leaves it
    before = dhp.hebb.clone()
    logits = dhp(h, y)
    assert dhp.eta == bound
    assert torch.equal(dhp.hebb, hebbian_update(before, h, y, bound))
    logits.square().sum().backward()
    assert dhp.eta.grad.abs() > 0.1  # no dead gradient at the bound
    with torch.no_grad():
        dhp.eta.fill_(outside)
    dhp.project()
    assert dhp.eta == bound


def test_update_after_hides_the_labels_from_their_logits():
    dhp, (h, y) = layer(update="after"), batch()
    before = dhp.hebb.clone()
    logits = dhp(h, y)
    torch.testing.assert_close(logits, h @ (dhp.theta + dhp.alpha * before), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dhp.hebb, hebbian_update(before, h, y, 0.3), rtol=1e-14, atol=0)
    logits.sum().backward()
    torch.testing.assert_close(dhp.alpha.grad, before * h.sum(0)[:, None].expand(M, C), rtol=1e-11, atol=1e-12)
    assert not dhp.eta.requires_grad  # nothing would ever reach it


def test_update_never_needs_no_labels():
    dhp, (h, _) = layer(update="never"), batch()
    before = dhp.hebb.clone()
    torch.testing.assert_close(dhp(h), h @ (dhp.theta + dhp.alpha * before), rtol=1e-12, atol=1e-12)
    assert torch.equal(dhp.hebb, before)


def test_labels_from_elsewhere():
    dhp, (h, y) = layer(), batch()
    explicit, announced = copy.deepcopy(dhp), copy.deepcopy(dhp)
    with dhp.expect(y):
        logits = dhp(h)
    assert torch.equal(logits, explicit(h, y))
    announced.expect(y)
    assert torch.equal(announced(h), logits)
    for module in (dhp, announced):
        module.expect(None)
        with pytest.raises(ValueError, match="needs the labels while it trains"):
            module(h)
    assert torch.equal(dhp.hebb, explicit.hebb)


def test_sequences_and_ignored_labels():
    dhp, (h, y) = layer(), batch()
    y[::3] = -100
    flat, before = copy.deepcopy(dhp), dhp.hebb.clone()
    logits = dhp(h.view(2, 8, M), y.view(2, 8))
    torch.testing.assert_close(logits.view(N, C), flat(h, y), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(dhp.hebb, hebbian_update(before, h[y >= 0], y[y >= 0], 0.3), rtol=1e-13, atol=1e-14)


def test_two_passes_before_one_backward_pass():
    """The second changes trace and eta in place; the first one's gradients are its own."""
    dhp = layer()
    alone = copy.deepcopy(dhp)
    alone(*batch()).sum().backward()
    first = dhp(*batch())
    dhp(*batch(1))
    first.sum().backward()
    for name, parameter in dhp.named_parameters():
        torch.testing.assert_close(parameter.grad, alone.get_parameter(name).grad)


def test_activation_checkpointing_is_an_error_not_a_second_update():
    dhp, (h, y) = layer(), batch()
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        checkpoint(dhp, h.requires_grad_(), y, use_reentrant=False).sum().backward()


def test_state_dict_holds_the_trace():
    dhp = layer()
    dhp(*batch())
    other = layer(1)
    other.load_state_dict(dhp.state_dict())
    assert set(dhp.state_dict()) == {"theta", "alpha", "eta", "hebb"}
    assert torch.equal(other.eval()(batch(2)[0]), dhp.eval()(batch(2)[0]))


@pytest.mark.parametrize("given", ["call", "expect"])
def test_compiled(given):
    """Trace, logits and gradients, over several batches, without a break in the graph and without recompiling."""
    dhp = layer()
    plain = copy.deepcopy(dhp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        compiled = torch.compile(dhp, backend="aot_eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                h, y = batch(seed)
                if given == "call":
                    logits = compiled(h, y)
                else:
                    dhp.expect(y)
                    logits = compiled(h)
                expected = plain(h, y)
                torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-13)
                for output, module in ((logits, dhp), (expected, plain)):
                    module.zero_grad()
                    output.square().sum().backward()
                    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert torch.equal(dhp.hebb, plain.hebb)
    for name, parameter in dhp.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-11, atol=1e-12)


def test_the_trace_is_exact_under_bfloat16_autocast():
    h, y = batch(dtype=torch.float32)
    dhp = layer(dtype=torch.float32)
    before = dhp.hebb.clone()
    with torch.autocast("cpu", torch.bfloat16):
        logits = dhp(h, y)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(dhp.hebb, hebbian_update(before, h, y, 0.3))
    logits.float().sum().backward()
    assert dhp.alpha.grad.dtype == torch.float32


def test_importance_of_theta_without_vmap():
    """In evaluation: theta's per-sample gradients are outer products, and alpha's and eta's are left out by name."""
    dhp, (h, y) = layer(bias=True), batch()
    fisher = fisher_diagonal(dhp, [(h, y)], parameters=["theta", "bias"])
    dhp.eval()
    expected = torch.zeros_like(dhp.theta)
    for i in range(N):
        (gradient,) = torch.autograd.grad(F.cross_entropy(dhp(h[i]), y[i]), dhp.theta)
        expected += gradient.square() / N
    torch.testing.assert_close(fisher["theta"], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("h", "y", "message"),
    [
        (torch.zeros(N, M), torch.zeros(N - 1, dtype=torch.int64), "labels of shape"),
        (torch.zeros(N, M), torch.zeros(N), "class indices"),
        (torch.zeros(N, M), None, "needs the labels"),
    ],
)
def test_bad_labels(h, y, message):
    with pytest.raises(ValueError, match=message):
        DHPSoftmax(M, C)(h, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta in"),
        ({"alpha_init": (1.0, 0.0)}, "alpha_init"),
        ({"theta_init": "zeros"}, "theta_init"),
        ({"update": "during"}, "update"),
        ({"num_classes": 0}, "at least 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DHPSoftmax(**{"in_features": M, "num_classes": C, **options})
