"""Importances against vmap and against a loop over samples, in double precision, for every layer with a rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dataparams.functional import SampleGradients, fisher_diagonal, mas_importance
from dataparams.functional.sample_gradients import CHUNK

N, K = 7, 3


class Twice(nn.Module):
    """A layer called twice, with an operation in place after it, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, K)

    def forward(self, x):
        return self.head(self.shared(self.shared(x).relu_()).tanh_())


class Tied(nn.Module):
    """One weight in an embedding and, without its layer, in the output: repeated tokens, a sequence."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.mix(self.embedding(x)).tanh().mean(1), self.embedding.weight)[:, :K]


class SharedWeight(nn.Module):
    """Two layers with one weight and biases of their own, one on a sequence."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, K)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).sin().mean(1)))


class Folded(nn.Module):
    """The sample is not the first dimension of a layer's input: no rule holds."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, K)

    def forward(self, x):
        return self.head(self.inner(x.flatten(0, 1)).view_as(x).tanh().sum(1))


class Attention(nn.Module):
    """Weights that are used without their layers being called."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, K)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input):
        return 2 * super().forward(input) + self.bias.square()


def flat(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(K))


def normal(*shape):
    return torch.randn(N, *shape)


# name: model, input, which parameters take vmap
CASES = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, K)), lambda: normal(4), set()
    ),
    "sequence": (
        lambda: flat(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2, bias=False)),
        lambda: normal(3, 2, 4), set(),
    ),
    "conv": (
        lambda: flat(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2)
        ),
        lambda: normal(2, 6, 5), set(),
    ),
    "conv dilated, depthwise": (
        lambda: flat(nn.Conv2d(2, 4, 3, padding="same", dilation=(2, 1)), nn.Conv2d(4, 4, 2, groups=4, dilation=2)),
        lambda: normal(2, 6, 5), set(),
    ),
    "conv padded otherwise": (
        lambda: flat(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), nn.Conv2d(3, 2, 2, padding="valid")),
        lambda: normal(2, 4, 5), set(),
    ),
    "conv 1d, 3d": (
        lambda: flat(
            nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular"), nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(4, 2, 2)
        ),
        lambda: normal(2, 8), set(),
    ),
    "one position": (lambda: flat(nn.Conv2d(4, 6, 3, groups=2)), lambda: normal(4, 3, 3), set()),
    "norms": (
        lambda: flat(
            nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([3, 3]), nn.LayerNorm(3, bias=False)
        ),
        lambda: normal(2, 3, 3), set(),
    ),
    "vector norms": (lambda: flat(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)), lambda: normal(4), set()),
    "embedding": (
        lambda: flat(nn.Embedding(6, 4, padding_idx=1), nn.Tanh()), lambda: torch.randint(0, 6, (N, 5)), set()
    ),
    "one token": (lambda: flat(nn.Embedding(3, 4)), lambda: torch.randint(0, 3, (N,)), set()),
    "twice": (Twice, lambda: normal(4), set()),
    "shared weight": (SharedWeight, lambda: normal(3, 4), set()),
    "tied": (Tied, lambda: torch.randint(0, 5, (N, 4)), {"embedding.weight"}),
    "folded": (Folded, lambda: normal(3, 4), {"inner.weight", "inner.bias"}),
    "attention": (
        Attention, lambda: normal(3, 4),
        {f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
    ),
    "subclass": (lambda: flat(Scaled(4, 4)), lambda: normal(4), {"0.weight", "0.bias"}),
    "no rule": (
        lambda: flat(nn.ConvTranspose2d(2, 3, 2), nn.PReLU()), lambda: normal(2, 3, 3),
        {"0.weight", "0.bias", "1.weight"},
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    build, draw, slow = CASES[name]
    model, x = build(), draw()
    model(x)  # sizes of lazy layers, and running statistics that are not 0 and 1
    x = x.double() if x.is_floating_point() else x
    return model.double().eval(), x, torch.randint(0, K, (N,)), slow


def likelihood(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def norm(output):
    return output.square().sum(1)


def by_vmap(model, x, extras, value):
    """Per-sample gradients by name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, x, *extras):
        output = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
        return value(output, *(e.unsqueeze(0) for e in extras)).sum()

    return torch.func.vmap(torch.func.grad(one), in_dims=(None, *(0,) * (1 + len(extras))))(parameters, x, *extras)


def same(seen, expected):
    assert set(seen) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of attention, in the reference too
@pytest.mark.parametrize("name", CASES)
def test_against_vmap(name):
    model, x, y, slow = make(name)
    squares = {n: g.square().mean(0) for n, g in by_vmap(model, x, (y,), likelihood).items()}
    same(fisher_diagonal(model, [(x, y)]), squares)
    same(fisher_diagonal(model, [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]), squares)
    same(mas_importance(model, [x]), {n: g.abs().mean(0) for n, g in by_vmap(model, x, (), norm).items()})
    with SampleGradients(model, "square") as gradients:
        gradients.add(x, likelihood, lambda output: [(y,)])
    assert gradients.slow == slow
    if name == "twice":
        assert not squares["unused.weight"].any()


def test_against_a_loop_over_samples(monkeypatch):
    """Without functorch, and in chunks smaller than a batch."""
    model, x, y, _ = make("conv")
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(N):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient.square() / N
    same(fisher_diagonal(model, [(x, y)]), expected)
    monkeypatch.setitem(CHUNK, "cpu", 400)
    same(fisher_diagonal(model, [(x, y)]), expected)


def test_expected_and_sampled_labels():
    """Expected: sum over classes of p_c (d log p_c)^2. Sampled: the same on average over draws."""
    model, x, _, _ = make("linear")
    probabilities = model(x).softmax(1).detach()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for label in range(K):
        gradients = by_vmap(model, x, (torch.full((N,), label),), likelihood)
        for name, gradient in gradients.items():
            weight = probabilities[:, label].view(-1, *(1,) * (gradient.dim() - 1))
            expected[name] += (weight * gradient.square()).mean(0)
    same(fisher_diagonal(model, [(x, None)], labels="expected"), expected)
    generator = torch.Generator().manual_seed(0)
    many = fisher_diagonal(model, [(x, None)] * 4000, labels="sampled", generator=generator)
    for name, value in expected.items():
        torch.testing.assert_close(many[name], value, rtol=0.1, atol=2e-3)


def test_ignored_labels_do_not_count():
    model, x, y, _ = make("linear")
    kept = y.clone()
    kept[[0, 2]] = -100
    same(fisher_diagonal(model, [(x, kept)]), fisher_diagonal(model, [(x[kept >= 0], y[kept >= 0])]))


def test_labels_at_every_place():
    """Logits (N, K, T): a sample's log probabilities add up before they are squared."""
    torch.manual_seed(0)
    model, x, y = nn.Conv1d(2, K, 3).double(), torch.randn(N, 2, 6).double(), torch.randint(0, K, (N, 4))
    expected = by_vmap(model, x, (y,), lambda output, y: F.cross_entropy(output, y, reduction="none").sum(1))
    same(fisher_diagonal(model, [(x, y)]), {name: g.square().mean(0) for name, g in expected.items()})


def test_another_likelihood():
    model, x, _, _ = make("linear")
    target = torch.randn(N, K).double()

    def gaussian(output, target):
        return (output - target).square().sum(1) / 2

    expected = by_vmap(model, x, (target,), gaussian)
    seen = fisher_diagonal(model, [(x, target)], loss=gaussian)
    same(seen, {name: g.square().mean(0) for name, g in expected.items()})


def test_a_forward_of_ones_own():
    """Heads by task and a dictionary as a batch, with a layer that takes vmap."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Sequential(nn.PReLU(), nn.Linear(4, K)) for _ in range(2)]).double()
    x, y = torch.randn(N, 4).double(), torch.randint(0, K, (N,))
    seen = fisher_diagonal(model, [({"x": x}, y)], forward=lambda model, batch: model.get_submodule("1")(batch["x"]))
    expected = {f"1.{n}": g.square().mean(0) for n, g in by_vmap(model[1], x, (y,), likelihood).items()}
    same({name: value for name, value in seen.items() if name.startswith("1.")}, expected)
    assert not any(value.any() for name, value in seen.items() if name.startswith("0."))


def test_the_model_is_left_as_it_was():
    model, x, y, _ = make("norms")
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for batches in ([(x, y)], [(x, y[:2])]):
        try:
            fisher_diagonal(model, batches)
        except ValueError:
            assert len(batches[0][1]) == 2
    assert [module.training for module in model] == [True, False, True, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_parameters_and_names():
    model, x, y, _ = make("linear")
    whole = fisher_diagonal(model, [(x, y)])
    same(fisher_diagonal(model, [(x, y)], parameters=["2.weight"]), {"2.weight": whole["2.weight"]})
    model[0].requires_grad_(False)
    same(fisher_diagonal(model, [(x, y)]), {name: whole[name] for name in ("2.weight", "2.bias")})
    with pytest.raises(ValueError, match=r"0\.weight require no gradient"):
        fisher_diagonal(model, [(x, y)], parameters=["0.weight"])
    with pytest.raises(ValueError, match="no parameter weigth"):
        mas_importance(model, [x], parameters=["weigth"])


def test_under_bfloat16_autocast_and_compiled():
    model, x, y, _ = make("conv")
    model, x = model.float(), x.float()
    expected = fisher_diagonal(model, [(x, y)])
    compiled = torch.compile(model, backend="aot_eager")
    seen = fisher_diagonal(model, [(x, y)], forward=lambda _, x: compiled(x))
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value)
    with torch.autocast("cpu", torch.bfloat16):
        seen = fisher_diagonal(model, [(x, y)])
    for name, value in expected.items():
        assert seen[name].dtype == torch.float32
        torch.testing.assert_close(seen[name], value, rtol=0.1, atol=0.05 * float(value.max()))


def test_what_cannot_be():
    model, x, y, _ = make("linear")
    with pytest.raises(ValueError, match="unknown labels"):
        fisher_diagonal(model, [(x, y)], labels="true")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no data"):
        fisher_diagonal(model, [])
    with pytest.raises(ValueError, match="labels given"):
        fisher_diagonal(model, [(x, y)], labels="sampled", loss=likelihood)
    with pytest.raises(ValueError, match=r"needs logits \(N, C\)"):
        fisher_diagonal(model, [(x.view(N, 1, 4), y)], labels="expected")
    with pytest.raises(ValueError, match="1: batch normalisation without running statistics"):
        mas_importance(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), [x.float()])
    with pytest.raises(TypeError, match="gradients sample by sample need a tensor"):
        mas_importance(nn.PReLU(), [3], forward=lambda model, x: model(torch.ones(N, x)))
