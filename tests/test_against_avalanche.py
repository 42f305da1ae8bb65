"""Against Avalanche's plugins, where the definitions agree: `pip install dataparams[avalanche]`, else skipped.

Avalanche squares (EWC) or takes the absolute value (MAS) of a batch's mean gradient: the same for batches of a sample.
Its MAS averages tasks instead of adding them up. Its SI has a factor 1/2 in the penalty, keeps negative paths until the
end and cuts importances at 0.001, so that only the path is compared; and on the CPU Avalanche 0.6 remembers a view of
the live weights, with which every path is zero, so that the test makes the copy.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams.functional import fisher_diagonal, mas_importance, quadratic_penalty, si_path_

plugins = pytest.importorskip("avalanche.training.plugins")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,)), torch.zeros(20))


def strategy(model, data):
    return SimpleNamespace(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        experience=SimpleNamespace(dataset=data),
        train_mb_size=1,
        device="cpu",
        clock=SimpleNamespace(train_exp_counter=1),
        loss=torch.zeros((), dtype=torch.float64),
    )


def assert_agree(theirs, ours):
    assert set(theirs) == set(ours)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name].data.to(value.dtype).view_as(value), value, rtol=1e-5, atol=1e-8)


def moved(model):
    """Anchors beside the weights."""
    return {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}


def as_their_parameters(values):
    from avalanche.training.utils import ParamData  # pyright: ignore[reportMissingImports]

    return {name: ParamData(name, value.shape, init_tensor=value, device="cpu") for name, value in values.items()}


def test_importances_of_ewc(model, data):
    plugin = plugins.EWCPlugin(1.0, mode="online", decay_factor=1.0)
    found = plugin.compute_importances(model, F.cross_entropy, strategy(model, data).optimizer, data, "cpu", 1)
    assert_agree(found, fisher_diagonal(model, [(data.tensors[0], data.tensors[1])]))


def test_importances_of_mas(model, data):
    found = plugins.MASPlugin(1.0)._get_importance(strategy(model, data))
    assert_agree(found, mas_importance(model, [data.tensors[0]]))


def test_penalties_of_ewc_and_mas_have_no_factor(model, data):
    anchors = moved(model)
    importances = {name: torch.rand_like(value) for name, value in anchors.items()}
    ours = quadratic_penalty(dict(model.named_parameters()), anchors, importances, 3.0)
    ewc, mas = plugins.EWCPlugin(3.0, mode="online", decay_factor=1.0), plugins.MASPlugin(3.0)
    ewc.saved_params[0], ewc.importances[0] = as_their_parameters(anchors), as_their_parameters(importances)
    mas.params, mas.importance = as_their_parameters(anchors), as_their_parameters(importances)
    for plugin in (ewc, mas):
        run = strategy(model, data)
        run.loss = torch.ones((), dtype=torch.float64)
        plugin.before_backward(run)
        torch.testing.assert_close(run.loss - 1, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_path_and_half_penalty_of_si(model, data, monkeypatch):
    def extract(model, target, excluded):
        for name, value in plugins.SynapticIntelligencePlugin.allowed_parameters(model, excluded):
            target[name].data = value.detach().flatten().clone()

    monkeypatch.setattr(plugins.SynapticIntelligencePlugin, "extract_weights", staticmethod(extract))
    model.float()  # it keeps no other
    plugin, run = plugins.SynapticIntelligencePlugin(3.0), strategy(model, data)
    plugin.before_training_exp(run)
    path = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y, _ in DataLoader(data, 5):
        plugin.before_training_iteration(run)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run.optimizer.zero_grad()
        F.cross_entropy(model(x.float()), y).backward()
        run.optimizer.step()
        plugin.after_training_iteration(run)
        si_path_(path, {n: p.grad for n, p in model.named_parameters()}, before, dict(model.named_parameters()))
    assert_agree({n: SimpleNamespace(data=-t.data) for n, t in plugin.syn_data["trajectory"].items()}, path)
    plugin.after_training_exp(run)
    anchors, importances = (
        {name: kept.data.view_as(path[name]) for name, kept in part.items()} for part in plugin.ewc_data
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plugin.before_backward(run)
    ours = quadratic_penalty(dict(model.named_parameters()), anchors, importances, 3.0)
    torch.testing.assert_close(run.loss, ours / 2, check_dtype=False, rtol=1e-5, atol=1e-8)
