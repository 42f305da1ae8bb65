"""The data set: what a sample holds, which frame it is, and clips that cannot be read."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from torch.utils.data import DataLoader

from dataparams.tasks import SurrealClips
from dataparams.tasks.surreal import IGNORED, TASKS, ClipSampler
from dataparams.tasks.surreal_files import (
    JOINTS,
    PARTS,
    PELVIS,
    depth_classes,
    project,
    read_depth,
    read_image,
    read_info,
    read_parts,
    to_camera,
)
from dataparams.tasks.surreal_miniature import write_miniature

FRAMES, TRAIN = 5, 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surreal") / "mini"
    return write_miniature(folder, {"train": TRAIN, "test": 2}, frames=FRAMES, seed=1, progress=False)


@pytest.fixture
def copied(root, tmp_path):
    """A copy to break, and its training clips."""
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy", SurrealClips(tmp_path / "copy").clips


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


def resave(path, drop=(), **changes):
    content = {name: value for name, value in loadmat(path).items() if not name.startswith("__") and name not in drop}
    savemat(path, {**content, **changes}, do_compression=True)


def blank(path: Path, name: str):
    """Damage one variable of a mat file in place; lengths and all other variables stay."""
    from dataparams.tasks.surreal_mat import variable_name, variables

    data = bytearray(path.read_bytes())
    with path.open("rb") as stream:
        for start, stop in variables(stream, "<", len(data)):
            stream.seek(start)
            if variable_name(stream.read(160), "<") == name:
                data[(start + 3 * stop) // 4 : stop] = bytes(stop - (start + 3 * stop) // 4)
    path.write_bytes(data)


def test_a_sample(root):
    clips = SurrealClips(root, "test", image_size=96, label_size=48)
    sample = clips[1]
    shapes = {
        "image": (3, 96, 96),
        "joints2d": (16, 2),
        "joints3d": (16, 3),
        "depth": (48, 48),
        "parts": (48, 48),
    }
    assert {name: tuple(sample[name].shape) for name in shapes} == shapes
    assert {name: sample[name].dtype for name in shapes} == {
        **dict.fromkeys(("image", "joints2d", "joints3d"), torch.float32),
        **dict.fromkeys(("depth", "parts"), torch.int64),
    }
    assert 0 <= sample["image"].min() < 0.5 < sample["image"].max() <= 1
    assert sample["joints3d"][PELVIS].tolist() == [0, 0, 0]
    assert torch.equal(sample["depth"] > 0, sample["parts"] > 0)
    assert sample["labelled"] == dict.fromkeys(TASKS, True)
    assert sample["index"] == 1
    assert clips.ids == [f"test/run0/01_01/01_01_c000{number}" for number in (1, 2)]


@pytest.mark.parametrize("crop", [True, False])
def test_picture_and_labels_agree_in_place(root, crop):
    clips = SurrealClips(root, "test", image_size=160, label_size=160, crop=crop)
    for index, clip in enumerate(clips.clips):
        sample, frame = clips[index], 2
        info = read_info(clip)
        camera = to_camera(info.joints3d[frame], info.camera)
        pixels = project(camera)[list(JOINTS)]
        assert sample["joints3d"].numpy() == pytest.approx(camera[list(JOINTS)] - camera[0], abs=1e-5)
        if crop:
            # One scale and one shift from the picture to the sample, the same for x and y.
            shown = sample["joints2d"].numpy()
            scale = np.ptp(shown, axis=0).max() / np.ptp(info.joints2d[frame, JOINTS], axis=0).max()
            assert 0.6 < np.ptp(shown, axis=0).max() / 160 < 0.85  # the body fills the picture
        else:
            scale = 160 / 320
            assert sample["joints2d"].numpy() == pytest.approx((pixels + np.array([0, 40])) * scale, abs=0.3)
        shift = sample["joints2d"].numpy() - pixels * scale
        assert np.ptp(shift, axis=0).max() < 1.1 * scale
        # Labels and picture, at the place of each pixel by the same scale and shift.
        shift = shift.mean(0) if crop else np.array([0, 20])
        rows, columns = np.nonzero(sample["parts"].numpy())
        x = ((columns + 0.5 - shift[0]) / scale).astype(int)
        y = ((rows + 0.5 - shift[1]) / scale).astype(int)
        expected = PARTS[read_parts(clip, frame)[y, x]]
        assert (sample["parts"].numpy()[rows, columns] == expected).mean() > 0.9
        bins = depth_classes(read_depth(clip, frame)[y, x], camera[0, 2])
        assert (np.abs(sample["depth"].numpy()[rows, columns] - bins) <= 1).mean() > 0.9
        picture = covered(read_image(clip, frame) / 255, rows, columns, shift, scale)
        assert np.abs(sample["image"].numpy()[:, rows, columns].T - picture).mean() < 0.04


def covered(picture, rows, columns, shift, scale):
    """What these pixels of a sample cover in the picture, by four points in each."""
    total = 0
    for down in (0.25, 0.75):
        for right in (0.25, 0.75):
            x = ((columns + right - shift[0]) / scale).astype(int).clip(0, picture.shape[1] - 1)
            y = ((rows + down - shift[1]) / scale).astype(int).clip(0, picture.shape[0] - 1)
            total = total + picture[y, x] / 4
    return total


def test_beyond_the_picture_is_background(root):
    sample = SurrealClips(root, "test", image_size=64, label_size=64, crop=False)[0]
    for name, margin in [("image", 7), ("depth", 8), ("parts", 8)]:  # shrinking the image mixes neighbours
        assert not sample[name][..., :margin, :].any()
        assert not sample[name][..., -margin:, :].any()
    assert sample["image"][:, 9, :].any()


def test_metric_depth_and_bins_say_the_same(root):
    bins, metric = (SurrealClips(root, "test", label_size=60, depth=depth) for depth in ("bins", "metric"))
    for index in range(2):
        metres, valid = metric[index]["depth"].double().numpy(), metric[index]["depth_valid"].numpy()
        assert metric[index]["depth"].dtype == torch.float32
        assert not metres[~valid].any()
        expected = np.where(valid, depth_classes(metres, 0.0), 0)
        assert np.array_equal(bins[index]["depth"].numpy(), expected)
        assert np.abs(metres).max() < 1.2


def test_testing_takes_the_middle_frame(root):
    clips = SurrealClips(root, "test")
    assert [clips[index]["frame"] for index in range(2)] == [2, 2]  # the third of five
    clips._usable[0] = np.array([True, True, False, False, True])
    assert clips.frames(0) == [1, 0, 4]  # the nearest first, of two the earlier


@pytest.mark.parametrize(("frames", "middle"), [(1, 0), (2, 0), (3, 1), (100, 49)])
def test_the_published_middle(root, frames, middle):
    clips = SurrealClips(root, "test")
    clips._usable[0] = np.ones(frames, bool)
    assert clips.frames(0)[0] == middle


def test_training_draws_frames_by_seed_epoch_and_clip(root):
    clips, other = SurrealClips(root), SurrealClips(root, seed=1)
    drawn = {}
    for epoch in range(200):
        clips.set_epoch(epoch)
        drawn[epoch] = [clips.frames(index)[0] for index in range(TRAIN)]
    counts = np.bincount(np.ravel(list(drawn.values())), minlength=FRAMES)
    assert np.abs(counts - 200 * TRAIN / FRAMES).max() < 5 * np.sqrt(200 * TRAIN / FRAMES)
    assert len({tuple(frames) for frames in drawn.values()}) > 150  # neither epochs nor clips move together
    clips.set_epoch(17)
    again = clips[3]
    assert again["frame"] == drawn[17][3]
    clips[5]  # what else is read plays no part
    same(clips[3], again)
    other.set_epoch(17)
    assert [other.frames(index)[0] for index in range(TRAIN)] != drawn[17]


def test_workers_see_the_same_frames(root):
    def epochs(workers):
        clips = SurrealClips(root, image_size=32, label_size=16, seed=2)
        sampler = ClipSampler(clips, seed=2)
        loader = DataLoader(clips, 3, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        for epoch in (4, 5):
            sampler.set_epoch(epoch)
            yield from loader

    for alone, together in zip(epochs(0), epochs(2), strict=True):
        labelled = alone.pop("labelled"), together.pop("labelled")
        same(*labelled)
        assert all(value.dtype == torch.bool and value.all() for value in labelled[0].values())
        same(alone, together)


BREAK = {
    "a truncated video": lambda clip: clip.file("video").write_bytes(clip.file("video").read_bytes()[:-500]),
    "half a video": lambda clip: clip.file("video").write_bytes(clip.file("video").read_bytes()[:1500]),
    "an empty video": lambda clip: clip.file("video").write_bytes(b""),
    "no video": lambda clip: clip.file("video").unlink(),
    "no parts": lambda clip: clip.file("segm").unlink(),
    "no 3D joints": lambda clip: resave(clip.file("info"), drop=["joints3D"]),
    "no depth of one frame": lambda clip: resave(clip.file("depth"), drop=["depth_3"]),
    "a truncated mat file": lambda clip: clip.file("depth").write_bytes(clip.file("depth").read_bytes()[:-9]),
    "half the joints": lambda clip: resave(clip.file("info"), joints2D=np.ones((2, 12, FRAMES))),
    "out of the picture": lambda clip: resave(
        clip.file("info"), joints2D=np.float32(np.mgrid[:2, 500:524, :FRAMES][1])
    ),
}


@pytest.mark.parametrize("damage", BREAK.values(), ids=BREAK.keys())
def test_a_broken_clip_is_left_out(copied, damage):
    root, clips = copied
    damage(clips[2])
    with pytest.warns(UserWarning, match=rf"1 of {TRAIN} clips .* cannot be used \(.*: 1\) and are left out") as told:
        left = SurrealClips(root)
    assert len(told) == 1
    assert clips[2].stem.name in str(told[0].message)
    assert [clip.stem for clip in left.clips] == [clip.stem for clip in clips if clip is not clips[2]]
    assert [left[index]["index"] for index in range(len(left))] == list(range(TRAIN - 1))


def test_one_warning_counts_all(copied):
    root, clips = copied
    for clip, damage in zip(clips, ["no video", "no parts", "half a video", "out of the picture"], strict=False):
        BREAK[damage](clip)
    counted = "a file is missing: 2, a truncated file: 1, no frame with the body in the picture: 1"
    with pytest.warns(UserWarning, match=rf"4 of {TRAIN} clips .* \({counted}\)") as told:
        assert len(SurrealClips(root)) == TRAIN - 4
    assert len(told) == 1
    for clip in clips[4:]:
        BREAK["no video"](clip)
    with pytest.raises(ValueError, match=rf"{TRAIN} of {TRAIN} clips .*, and none is left. The first is .*mp4"):
        SurrealClips(root)


def test_frames_out_of_the_picture_are_not_drawn(copied):
    root, clips = copied
    joints = loadmat(clips[0].file("info"))["joints2D"]
    joints[..., [0, 2, 3]] -= 600
    resave(clips[0].file("info"), joints2D=joints)
    left = SurrealClips(root)
    seen = set()
    for epoch in range(30):
        left.set_epoch(epoch)
        seen.add(left.frames(0)[0])
    assert seen == {1, 4}


def test_damage_inside_makes_another_frame_stand_in(copied):
    root, clips = copied
    for number in (2, 3):
        blank(clips[1].file("depth"), f"depth_{number}")
    left = SurrealClips(root, label_size=20)
    assert len(left) == TRAIN  # lengths do not tell
    whole = next(epoch for epoch in range(50) if set_epoch(left, epoch).frames(1)[0] == 0)
    same(set_epoch(left, whole)[1], fresh(root, whole)[1])
    broken = next(epoch for epoch in range(50) if set_epoch(left, epoch).frames(1)[:2] == [2, 4])
    with pytest.warns(UserWarning, match=r"frame 2 of train/run0/01_01/01_01_c0002 cannot be read.*stands in"):
        sample = set_epoch(left, broken)[1]
    assert (sample["frame"], sample["index"]) == (4, 1)
    assert all(sample["labelled"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a process warns once
        same(left[1], sample)


def test_a_clip_of_which_nothing_can_be_read_goes_without_labels(copied):
    root, clips = copied
    data = bytearray(clips[3].file("video").read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 4000] = bytes(len(data[start : start + 4000]))
    clips[3].file("video").write_bytes(data)
    for depth in ("bins", "metric"):
        left = SurrealClips(root, label_size=8, image_size=16, depth=depth)
        with pytest.warns(UserWarning, match="cannot be read"):
            sample = left[3]
        assert sample["labelled"] == dict.fromkeys(TASKS, False)
        assert (sample["index"], sample["frame"]) == (3, -1)
        assert (sample["parts"] == IGNORED).all()
        if depth == "bins":
            assert (sample["depth"] == IGNORED).all()
        else:
            assert not sample["depth_valid"].any()
        batch = next(iter(DataLoader(left, TRAIN)))  # one batch with the others
        assert batch["labelled"]["depth"].tolist() == [index != 3 for index in range(TRAIN)]


def test_labels_of_another_clip(root):
    clips, plain = SurrealClips(root, label_size=24), SurrealClips(root, label_size=24)
    donors = np.arange(TRAIN)
    donors[[1, 4]] = [4, 1]
    clips.donors["depth"] = donors
    for epoch in (0, 1):
        for index in range(TRAIN):
            lent, own = set_epoch(clips, epoch)[index], set_epoch(plain, epoch)[index]
            other = plain[int(donors[index])]
            assert torch.equal(lent["depth"], other["depth"])
            same({**lent, "depth": 0}, {**own, "depth": 0})
            assert torch.equal(lent["depth"], own["depth"]) == (index not in (1, 4))


def test_frames_kept_in_memory_are_those_read(root, monkeypatch):
    read, kept = SurrealClips(root, label_size=20), SurrealClips(root, label_size=20, in_memory=True)
    for clips in (read, kept):
        clips.donors["depth"] = np.roll(np.arange(TRAIN), 1)
    for epoch in (0, 1):
        for index in range(TRAIN):
            same(set_epoch(kept, epoch)[index], set_epoch(read, epoch)[index])
    monkeypatch.setattr("dataparams.tasks.surreal.read_image", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("dataparams.tasks.surreal.read_depth", lambda *_: pytest.fail("read again"))
    first = set_epoch(kept, 0)[2]
    first["labelled"]["parts"] = False  # what a caller does to a sample stays with it
    assert kept[2]["labelled"]["parts"]


def test_places_of_the_data(root, tmp_path):
    (tmp_path / "SURREAL" / "data").mkdir(parents=True)
    (tmp_path / "SURREAL" / "data" / "cmu").symlink_to(root / "cmu")
    for place in (tmp_path, tmp_path / "SURREAL", tmp_path / "SURREAL" / "data"):
        assert len(SurrealClips(place, "test")) == 2
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        SurrealClips(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"does not look like SURREAL: it has none of cmu, data/cmu"):
        SurrealClips(root / "cmu" / "train")
    with pytest.raises(FileNotFoundError, match="split val is missing"):
        SurrealClips(root, "val")
    (tmp_path / "other" / "cmu" / "train" / "run0" / "01_01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no file run\*/<sequence>"):
        SurrealClips(tmp_path / "other")


def test_a_part_of_the_clips(root):
    everything, some = SurrealClips(root), SurrealClips(root, size=3)
    assert [clip.stem for clip in some.clips] == [everything.clips[place].stem for place in (0, 2, 4)]
    with pytest.raises(ValueError, match=f"has {TRAIN} clips, fewer than the 9"):
        SurrealClips(root, size=9)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"split": "training"}, "train, val and test, not 'training'"),
        ({"depth": "log"}, "'bins' or 'metric', not 'log'"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"size": 0}, "size must be at least 1"),
    ],
)
def test_arguments_out_of_range(root, argument, message):
    with pytest.raises(ValueError, match=message):
        SurrealClips(root, **argument)


def set_epoch(clips, epoch):
    clips.set_epoch(epoch)
    return clips


def fresh(root, epoch):
    return set_epoch(SurrealClips(root, label_size=20), epoch)
