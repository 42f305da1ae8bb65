"""Two processes against one with the joint batch: trace, weights and importances, in double precision."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from dataparams.functional import fisher_diagonal, mas_importance
from dataparams.nn import DHPSoftmax

STEPS, N, M, C = 4, 12, 5, 4


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body = nn.Linear(3, M, dtype=torch.float64)
        self.head = DHPSoftmax(M, C, eta=0.4, alpha_init=(0.0, 1.0), dtype=torch.float64, **options)

    def forward(self, x, y):
        return self.head(self.body(x).tanh(), y)


def batches():
    """The classes are shared out unevenly, and one is on one process alone."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        y = torch.cat([torch.tensor([0, 0, 0, 1, 3, 3]), torch.randint(1, 3, (N // 2,), generator=generator)])
        yield torch.randn(N, 3, dtype=torch.float64, generator=generator), y


def train(model, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x[part], y[part]), y[part]).backward()
        optimizer.step()


def importances(network, part, sync):
    forward = lambda model, x: model(x, None)  # noqa: E731
    parameters = ["body.weight", "body.bias", "head.theta"]
    options = {"parameters": parameters, "forward": forward, "sync": sync}
    data = [(x[part], y[part]) for x, y in batches()]
    fisher, mas = fisher_diagonal(network, data, **options), mas_importance(network, [x for x, _ in data], **options)
    return {**fisher, **{f"mas {name}": value for name, value in mas.items()}}


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, N // 2) if rank == 0 else slice(N // 2, None)
    for name, options in {"before": {}, "after": {"update": "after"}, "alone": {"sync": False}}.items():
        torch.manual_seed(0)
        network = Network(**options)
        train(network if name == "alone" else DistributedDataParallel(network), part)
        torch.save(network.state_dict(), f"{folder}/{name}{rank}")
        if name == "before":
            uneven = slice(0, 3) if rank == 0 else slice(3, None)
            torch.save(importances(network, uneven, sync=True), f"{folder}/importances{rank}")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    spawn(run, (str(tmp_path),), nprocs=2)
    for name, options in {"before": {}, "after": {"update": "after"}}.items():
        torch.manual_seed(0)
        network = Network(**options)
        train(network, slice(None))
        ranks = [torch.load(tmp_path / f"{name}{rank}") for rank in range(2)]
        for key, value in network.state_dict().items():
            assert torch.equal(ranks[0][key], ranks[1][key]), key
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-11, atol=1e-13, msg=lambda m, k=key: f"{k}: {m}")
        if name == "before":
            expected = importances(network, slice(None), sync=False)
            for rank in range(2):
                seen = torch.load(tmp_path / f"importances{rank}")
                for key, value in expected.items():
                    torch.testing.assert_close(seen[key], value, rtol=1e-9, atol=1e-13)
    alone = [torch.load(tmp_path / f"alone{rank}")["head.hebb"] for rank in range(2)]
    assert not alone[1][:, 0].any()  # a class that only the first process has met
    assert alone[0][:, 0].any()
