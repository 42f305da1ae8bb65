"""The network, losses and scores of SURREAL's four tasks, against values worked out by hand."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from dataparams.tasks import DepthError, KnownL1Loss, PartsIoU, SurrealClips, SurrealModel, SurrealNet, surreal_tasks
from dataparams.tasks.multitask import TaskScores
from dataparams.tasks.surreal_miniature import write_miniature

NAN = float("nan")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("surreal") / "mini", {"train": 4}, frames=1, progress=False)


def model_of(net=None, depth="bins"):
    return SurrealModel(net or SurrealNet(32, 16, 4, depth), surreal_tasks(depth, 32), torch.optim.Adam)


@pytest.mark.parametrize("depth", ["bins", "metric"])
def test_targets_are_the_labels_and_those_not_known_are_marked(root, depth):
    clips = SurrealClips(root, image_size=32, label_size=16, depth=depth)
    batch = default_collate([clips[index] for index in range(4)])
    for task, position in [("pose2d", 0), ("pose3d", 1), ("depth", 2), ("parts", 3)]:
        batch["labelled"][task][position] = False
    images, targets = model_of(depth=depth).unpack(batch)
    assert images is batch["image"]
    assert torch.allclose(targets["pose2d"][1:], batch["joints2d"][1:] / 3.2)
    assert torch.equal(targets["pose3d"][0], batch["joints3d"][0] * 10)
    assert torch.equal(targets["parts"][:3], batch["parts"][:3])
    assert targets["pose2d"][0].isnan().all()
    assert targets["pose3d"][1].isnan().all()
    assert (targets["parts"][3] == -100).all()
    if depth == "bins":
        assert (targets["depth"][2] == -100).all()
        assert torch.equal(targets["depth"][[0, 1, 3]], batch["depth"][[0, 1, 3]])
    else:
        known = batch["depth_valid"] & (torch.arange(4) != 2)[:, None, None]
        assert torch.equal(targets["depth"].isnan(), ~known)
        assert torch.equal(targets["depth"][known], 10 * batch["depth"][known])


@pytest.mark.parametrize("depth", ["bins", "metric"])
def test_a_step_with_unknown_labels_is_finite_without_any_method(root, depth):
    clips = SurrealClips(root, image_size=32, label_size=16, depth=depth)
    batch = default_collate([clips[index] for index in range(4)])
    for task in batch["labelled"]:
        batch["labelled"][task][1:3] = False
    model = model_of(depth=depth)
    model.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    loss = model.training_step(batch, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.parameters())


def test_the_net_finds_places_in_the_targets_units():
    net = SurrealNet(64, 32, 4)
    with torch.no_grad():
        made = net(torch.rand(2, 3, 64, 64))
        assert {task: tuple(y.shape) for task, y in made.items()} == {
            "pose2d": (2, 16, 2),
            "pose3d": (2, 16, 3),
            "depth": (2, 20, 32, 32),
            "parts": (2, 15, 32, 32),
        }
        # A map without a peak: the middle of the picture. One with a sharp peak in a cell: its centre.
        for parameter in net.heads["pose2d"].parameters():
            parameter.zero_()
        assert net(torch.rand(1, 3, 64, 64))["pose2d"].flatten().tolist() == pytest.approx([5.0] * 32, abs=1e-4)
        place = torch.full((1, 32 * 32), -50.0)
        place[0, 4 * 32 + 21] = 50.0  # row 4, column 21
        x, y = (10 * place.softmax(-1) @ net.grid)[0].tolist()
        assert (x, y) == pytest.approx((10 * 21.5 / 32, 10 * 4.5 / 32))
    assert SurrealNet(256, 64, 4, "metric")(torch.rand(2, 3, 256, 256))["depth"].shape == (2, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 60}, "image_size must be 8 times a power of two, not 60"),
        ({"label_size": 4}, "label_size must be 8 times a power of two, not 4"),
        ({"label_size": 64}, "label_size=64 must be at most half of image_size=64"),
        ({"depth": "log"}, "depth is 'bins' or 'metric', not 'log'"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        SurrealNet(**arguments)


def test_known_l1_is_l1_over_known_elements():
    made = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    target = torch.tensor([[0.0, NAN], [5.0, 4.5]])
    loss = KnownL1Loss()(made, target)
    assert loss.item() == pytest.approx((1 + 2 + 0.5) / 3)
    loss.backward()
    assert made.grad is not None
    assert made.grad.tolist() == [[pytest.approx(1 / 3), 0.0], [pytest.approx(-1 / 3), pytest.approx(-1 / 3)]]
    assert KnownL1Loss(reduction="none")(made, target).tolist() == [[1.0, 0.0], [2.0, 0.5]]
    assert KnownL1Loss()(made, torch.full((2, 2), NAN)).item() == 0
    whole = target.nan_to_num(7.0)
    assert torch.equal(KnownL1Loss()(made, whole), torch.nn.L1Loss()(made, whole))


def test_depth_error_of_bins_by_hand():
    logits = torch.full((1, 20, 1, 3), -99.0)
    logits[0, 0] = 5.0  # background is the likeliest everywhere, and does not count as a depth
    logits[0, [12, 3, 7], 0, [0, 1, 2]] = 1.0
    logits[0, 4, 0, 1] = 1.0 + np.log(3)  # bins 3 and 4 with probabilities 1/4 and 3/4
    metric = DepthError()
    metric.update(logits, torch.tensor([[[10, 4, 0]]]))  # the third pixel is background
    metric.update(logits, torch.full((1, 1, 3), -100))  # no label
    assert metric.compute().item() == pytest.approx((2 + 0.25) / 2 * 45)


def test_depth_error_of_metres_by_hand():
    metric = DepthError()
    metric.update(torch.tensor([[[1.0, -2.0, 9.0]]]), torch.tensor([[[0.5, -1.0, NAN]]]))
    assert metric.compute().item() == pytest.approx((50 + 100) / 2)


def test_parts_iou_leaves_the_background_out_of_the_mean():
    generator = np.random.default_rng(0)
    made, given = generator.integers(0, 15, (2, 4, 9, 9))
    given[0, 0] = -100
    logits = torch.nn.functional.one_hot(torch.as_tensor(made), 15).permute(0, 3, 1, 2).float()
    metric = PartsIoU()
    metric.update(logits, torch.as_tensor(given))
    known = given >= 0
    overlaps = [
        ((made == part) & (given == part))[known].sum() / ((made == part) | (given == part))[known].sum()
        for part in range(1, 15)
    ]
    assert metric.compute().item() == pytest.approx(np.mean(overlaps), abs=1e-6)


def test_the_score_of_having_learned_nothing_is_near_zero_for_errors(root):
    clips = SurrealClips(root, image_size=32, label_size=16)
    _, targets = model_of().unpack(default_collate([clips[index] for index in range(4)]))
    tasks = {task: of for task, of in surreal_tasks("bins", 32).items() if task != "parts"}
    scores = TaskScores(tasks)
    mean = {task: targets[task].mean(0, keepdim=True).expand_as(targets[task]) for task in ("pose2d", "pose3d")}
    mean["depth"] = DepthError.mean_target(targets["depth"]).expand_as(targets["depth"])
    scores.update(mean, targets)
    assert scores.compute()["score"].item() == pytest.approx(0, abs=1e-6)
    assert DepthError.mean_target(torch.tensor([[[4, 0]], [[0, 0]], [[7, -100]]]))[0, 0, 0] == 5.5
