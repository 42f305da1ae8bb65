"""Several tasks in two real processes (gloo): both end alike, and like one process with the joint batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same
from task_weights_ddp import WEIGHTINGS, train

pytestmark = [*QUIET, INERT, pytest.mark.slow]
SCRIPT = Path(__file__).parents[1] / "task_weights_ddp.py"


def two_processes(folder: Path, *jobs: str, seconds: float = 120) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *jobs],
            env={**os.environ, **common, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=seconds)[0] for worker in workers]
    except subprocess.TimeoutExpired:
        pytest.fail(f"{jobs} did not end: the processes wait for each other")
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


JOBS = ("full", "missing", *WEIGHTINGS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(tmp_path_factory.mktemp("ddp"), *JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_agree(ranks, job):
    assert "error" not in ranks[0][job], ranks[0][job]["error"]
    assert_same(ranks[0][job], ranks[1][job])


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_equal_one_with_the_joint_batch(ranks, job):
    assert_same(ranks[0][job], train(job, 1), rtol=1e-4, atol=1e-5)


def test_a_loss_that_only_one_process_calls_does_not_stop_both(tmp_path):
    """The second one has no label for the task in the first batch, and its training step leaves the loss out."""
    first, second = two_processes(tmp_path, "sometimes", seconds=60)
    assert "error" not in first["sometimes"], first["sometimes"]["error"]
    assert_same(first, second)
    assert first["sometimes"]["callback"]["scales"]["value"] > 0
