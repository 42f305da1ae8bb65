"""The data module: corruption of one task's labels, the miniature on first use, a resumed run."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from dataparams.tasks import SurrealClips, SurrealData
from dataparams.tasks.surreal import TASKS
from dataparams.tasks.surreal_data import exchange
from dataparams.tasks.surreal_miniature import write_miniature

CLIPS = {"train": 10, "val": 2, "test": 2}
FRAMES = 3
SMALL: dict[str, Any] = {"image_size": 8, "label_size": 8, "batch_size": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def ready(cache, **arguments):
    data = SurrealData(cache_dir=cache, miniature=CLIPS, frames=FRAMES, **SMALL, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_miniature_is_made_once(cache):
    data = ready(cache)
    folder = data.data_folder()
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert len(before) > 4 * sum(CLIPS.values())
    again = ready(cache, seed=3)  # a miniature does not depend on the seed of the run
    assert again.data_folder() == folder
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [10, 2, 2]
    assert len(set(data.ids)) == 10
    assert [child.name for child in cache.iterdir()] == [folder.name]
    assert SurrealData(cache_dir=cache, miniature=CLIPS, frames=2).setup() is None
    assert len(list(cache.iterdir())) == 2


def test_the_cache_has_a_usual_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = SurrealData(miniature={"train": 1, "val": 1, "test": 1}, frames=1).data_folder()
    assert folder.parent == tmp_path / "dataparams"


def test_a_share_of_one_tasks_labels_is_wrong(cache):
    data, clean = ready(cache, corrupt={"depth": 0.3, "pose3d": 0.5}), ready(cache)
    assert set(data.is_corrupt) == set(TASKS)
    assert {task: int(wrong.sum()) for task, wrong in data.is_corrupt.items()} == {
        "pose2d": 0,
        "pose3d": 5,
        "depth": 3,
        "parts": 0,
    }
    assert not any(wrong.any() for wrong in clean.is_corrupt.values())
    fields = {"pose2d": "joints2d", "pose3d": "joints3d", "depth": "depth", "parts": "parts"}
    for index in range(10):
        given, right = data.train_set[index], clean.train_set[index]
        assert torch.equal(given["image"], right["image"])
        for task, name in fields.items():
            assert torch.equal(given[name], right[name]) == (not data.is_corrupt[task][index])
    for part in ("val_set", "test_set"):
        assert not getattr(data, part).donors
    assert data.describe() == {
        "data": "SURREAL miniature",
        "train_size": 10,
        "val_size": 2,
        "test_size": 2,
        "corrupt_pose2d": 0.0,
        "corrupt_pose3d": 0.5,
        "corrupt_depth": 0.3,
        "corrupt_parts": 0.0,
    }


def test_labels_are_passed_round():
    donors = exchange(1000, 0.3, 0)
    wrong = donors != np.arange(1000)
    assert wrong.sum() == 300
    assert np.array_equal(np.sort(donors), np.arange(1000))
    assert np.array_equal(np.sort(donors[wrong]), np.flatnonzero(wrong))
    assert np.array_equal(donors, exchange(1000, 0.3, 0))
    assert not np.array_equal(donors, exchange(1000, 0.3, 1))
    assert np.array_equal(exchange(5, 0.0, 0), np.arange(5))
    assert (exchange(2, 1.0, 0) == [1, 0]).all()
    with pytest.raises(ValueError, match=r"0\.1 of 10 clips is 1: exchanging labels takes two"):
        exchange(10, 0.1, 0)
    with pytest.raises(ValueError, match=r"0\.01 of 10 clips is 0"):
        exchange(10, 0.01, 0)


def test_the_seed_decides_who_is_corrupt_and_tasks_are_drawn_apart(cache):
    shares = dict.fromkeys(TASKS, 0.5)
    first, again, other = (ready(cache, corrupt=shares, seed=seed).is_corrupt for seed in (0, 0, 1))
    for task in TASKS:
        assert np.array_equal(first[task], again[task])
    assert any(not np.array_equal(first[task], other[task]) for task in TASKS)
    assert len({tuple(first[task]) for task in TASKS}) > 1


def test_sizes_and_a_folder_of_ones_own(cache):
    folder = ready(cache).data_folder()
    data = SurrealData(folder, train_size=4, test_size=1, image_size=8, label_size=8)
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [4, 2, 1]
    assert data.describe()["data"] == "SURREAL"
    before = data.train_set
    data.setup("test")
    assert data.train_set is before
    with pytest.raises(FileNotFoundError, match="no folder"):
        SurrealData(folder / "absent").setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corrupt": {"pose": 0.3}}, "corrupt names a task 'pose': choose among pose2d, pose3d, depth, parts"),
        ({"corrupt": {"depth": 30}}, r"share of corrupt depth labels is in \[0, 1\], not 30"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SurrealData(**arguments)


class Watcher(L.LightningModule):
    """Remembers which clips and frames it has seen."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["index"].tolist(), batch["frame"].tolist()))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_sees_the_same_frames(cache, tmp_path):
    def fit(epochs, checkpoint=None):
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        model = Watcher()
        trainer.fit(model, datamodule=ready(cache, seed=1), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model.seen

    whole = fit(3)
    fit(1)
    assert fit(3, tmp_path / "1.ckpt") == [entry for entry in whole if entry[0] > 0]
    frames = [dict(zip(index, frame, strict=True)) for _, index, frame in whole]
    epochs = [{**frames[3 * e], **frames[3 * e + 1], **frames[3 * e + 2]} for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_interrupted_miniature_leaves_nothing(tmp_path, monkeypatch):
    from dataparams.tasks import surreal_miniature

    written, write = [], surreal_miniature.write_clip

    def stop_at_the_third(*arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*arguments, **options))

    with monkeypatch.context() as patch:
        patch.setattr(surreal_miniature, "write_clip", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            write_miniature(tmp_path / "mini", {"train": 4}, frames=1, progress=False)
    assert list(tmp_path.iterdir()) == []
    write_miniature(tmp_path / "mini", {"train": 4}, frames=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert len(SurrealClips(tmp_path / "mini")) == 4


def test_a_miniature_with_other_settings_is_not_overwritten(tmp_path):
    folder = write_miniature(tmp_path / "mini", {"train": 1}, frames=1, seed=2, progress=False)
    with pytest.raises(FileExistsError, match=r"holds a miniature with .*'seed': 2.*name another folder"):
        write_miniature(folder, {"train": 1}, frames=1, seed=3, progress=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    with pytest.raises(FileExistsError, match="no miniature of SURREAL"):
        write_miniature(tmp_path / "photos", {"train": 1}, frames=1, progress=False)
    for clips, frames, seed in [
        ({"train": 0}, 1, 0),
        ({"all": 3}, 1, 0),
        ({}, 1, 0),
        ({"val": 1}, 0, 0),
        (None, 1, -1),
    ]:
        with pytest.raises(ValueError, match=r"clips gives|frames must"):
            write_miniature(tmp_path / "none", clips, frames, seed)


def test_clips_follow_from_seed_split_and_number(tmp_path):
    few = write_miniature(tmp_path / "few", {"train": 2}, frames=2, progress=False)
    more = write_miniature(tmp_path / "more", {"train": 3, "val": 2}, frames=2, progress=False)
    other = write_miniature(tmp_path / "other", {"train": 2}, frames=2, seed=1, progress=False)

    def samples(folder, split="train"):
        clips = SurrealClips(folder, split, random_frame=False, image_size=32)
        return [clips[index]["image"] for index in range(2)]

    for first, second in zip(samples(few), samples(more), strict=True):
        assert torch.equal(first, second)
    for different in (samples(other), samples(more, "val"), samples(few)[::-1]):
        assert not torch.equal(samples(few)[0], different[0])
