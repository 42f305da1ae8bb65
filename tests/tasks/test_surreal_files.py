"""One clip on disk: the published conventions, and the reader against what the generator rendered."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from dataparams.tasks.surreal_body import PARENTS, body_solids, draw_motion, pose_body
from dataparams.tasks.surreal_files import (
    JOINT_NAMES,
    JOINTS,
    PART_NAMES,
    PARTS,
    PELVIS,
    Clip,
    ClipInfo,
    UnreadableClip,
    body_box,
    check_clip,
    depth_classes,
    project,
    read_depth,
    read_image,
    read_info,
    read_parts,
    to_camera,
)
from dataparams.tasks.surreal_mat import MatError, count_variables, load_variables
from dataparams.tasks.surreal_miniature import write_clip, write_video
from dataparams.tasks.surreal_render import Wardrobe, render_body

FRAMES = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip, its motion and its camera."""
    generator = np.random.default_rng(3)
    clip = Clip(tmp_path_factory.mktemp("clip") / "01_01_c0001")
    motion = draw_motion(FRAMES, generator)
    camera = motion.pelvis[0] + [7.0, 0.2, -0.3]
    write_clip(clip, motion, camera, generator)
    return clip, motion, camera


def test_the_published_example_of_the_camera():
    # datageneration/misc/3Dto2D/main.m of the SURREAL repository gives these numbers.
    joint, camera = np.array([-0.8645, -1.0915, -1.0260]), np.array([6.7456, -0.9839, -1.9293])
    assert np.round(project(to_camera(joint, camera))).tolist() == [89, 112]
    extrinsic = np.array([[0, 0, -1, -1.9293], [0, 1, 0, 0.9839], [-1, 0, 0, 6.7456]])
    assert to_camera(joint, camera) == pytest.approx(extrinsic @ [*joint, 1])


def test_the_published_choices_of_joints_and_parts():
    # `jointsIx` and the table of parts as training/ has them, counted from 1.
    assert [joint + 1 for joint in JOINTS] == [8, 5, 2, 3, 6, 9, 1, 7, 13, 16, 21, 19, 17, 18, 20, 22]
    assert PARTS[1:].tolist() == [2, 12, 9, 2, 13, 10, 2, 14, 11, 2, 14, 11, 2, 2, 2, 1, 6, 3, 7, 4, 8, 5, 8, 5]
    assert PELVIS == 6  # the 7th
    assert len(JOINT_NAMES) == 16
    assert len(PART_NAMES) == 15
    # Names agree between joints and parts: the label of a joint's own limb.
    limbs = {JOINT_NAMES[i]: PART_NAMES[PARTS[joint + 1]] for i, joint in enumerate(JOINTS)}
    assert {name: part for name, part in limbs.items() if name not in ("pelvis", "chest", "neck")} == {
        name: name for name in JOINT_NAMES if name not in ("pelvis", "chest", "neck")
    }


def test_depth_classes_by_hand():
    offsets = [-9.0, -0.405, -0.4049, -0.046, -0.045, -0.044, 0.0, 0.001, 0.045, 0.046, 0.404, 9.0]
    expected = [1, 1, 2, 9, 9, 10, 10, 11, 11, 12, 19, 19]
    depth = np.array([offsets, offsets])
    assert depth_classes(depth, 0.0).tolist() == [expected, expected]
    assert depth_classes(np.array([1e10, 7.02], np.float32), 7.0).tolist() == [0, 11]


def test_box_of_a_body_by_hand():
    corner, size = body_box(np.array([[100.0, 50.0], [119.0, 149.0]]))
    assert corner.tolist() == [100 - 0.25 * 20, 50 - 0.35 * 100]
    assert size.tolist() == [1.5 * 20, 1.6 * 100]


def test_joints_read_back_and_projected(made):
    clip, motion, camera = made
    joints, _ = pose_body(motion)
    info = read_info(clip)
    assert info.joints3d == pytest.approx(joints, abs=1e-5)
    assert info.camera == pytest.approx(camera, abs=1e-5)
    assert info.joints2d.shape == (FRAMES, 24, 2)
    assert np.array_equal(info.joints2d, np.round(info.joints2d))  # whole pixels, as published
    assert np.abs(info.joints2d - project(to_camera(joints, camera))).max() <= 0.501


def test_the_other_variables_are_in_their_places(made):
    clip, motion, _ = made
    info = loadmat(clip.file("info"))
    assert info["pose"].shape == (72, FRAMES)
    assert info["shape"].shape == (10, FRAMES)
    assert info["zrot"].shape == (FRAMES, 1)
    assert info["camLoc"].shape == (3, 1)
    assert np.abs(info["pose"].T - motion.pose).max() < 1e-6
    for name, kind in [("depth", np.float32), ("segm", np.uint8)]:
        maps = {key: value for key, value in loadmat(clip.file(name)).items() if not key.startswith("__")}
        assert set(maps) == {f"{name}_{frame}" for frame in range(1, FRAMES + 1)}
        assert {(value.shape, value.dtype) for value in maps.values()} == {((240, 320), np.dtype(kind))}
    assert loadmat(clip.file("depth"))["depth_1"].max() == np.float32(1e10)


def test_depth_and_parts_fit_the_joints(made):
    clip, motion, camera = made
    seen = to_camera(pose_body(motion)[0], camera)
    compared = 0
    for frame in range(FRAMES):
        depth, parts = read_depth(clip, frame), read_parts(clip, frame)
        assert np.array_equal(depth < 1e3, parts > 0)
        for joint, (column, row) in enumerate(project(seen[frame]).astype(int)):
            assert depth[row, column] < seen[frame, joint, 2] + 0.03  # a joint lies inside the body, or at its skin
            if parts[row, column] in (joint + 1, PARENTS[joint] + 1):  # where two parts meet
                compared += 1
                assert depth[row, column] == pytest.approx(seen[frame, joint, 2], abs=0.2)
    assert compared > 10 * FRAMES
    assert set(np.unique(read_parts(clip, 0))) - {0} <= set(range(1, 25))


def test_the_video_shows_what_was_rendered(made):
    clip, motion, camera = made
    parts = read_parts(clip, 2) > 0
    picture = read_image(clip, 2).astype(float)
    # The same body in one colour before another: where video and labels differ in place, so do their averages.
    background = np.zeros((240, 320, 3), np.uint8)
    joints, turned = pose_body(motion)
    to_view = to_camera(np.eye(3), np.zeros(3)).T
    grey = Wardrobe(np.full((24, 3), 0.5), np.zeros(24), np.array([0.0, 0.0, -1.0]), ambient=1.0)

    shown, depth, labels = render_body(
        to_camera(joints[2], camera), to_view @ turned[2], body_solids(motion.shape), grey, background
    )
    assert np.array_equal(labels > 0, parts)
    assert np.array_equal(shown[..., 0] == 127, parts)
    assert np.array_equal(depth, read_depth(clip, 2))
    # Of one frame to the next, the video changes at the moving body, and hardly elsewhere.
    change = np.abs(read_image(clip, 5) - picture).mean(-1)
    still = ~(parts | (read_parts(clip, 5) > 0))
    assert change[~still].mean() > 5 * change[still].mean()


def test_axes_of_an_asymmetric_picture(tmp_path):
    clip = Clip(tmp_path / "01_01_c0001")
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[:60, 240:, 0] = 230  # a red patch at the upper right
    picture[180:, :80, 2] = 230  # a blue one at the lower left
    write_video(clip.file("video"), np.stack([picture] * 3))
    read = read_image(clip, 1).astype(int)
    assert read.shape == (240, 320, 3)
    assert np.abs(read - picture).mean() < 5
    assert read[20, 300].argmax() == 0
    assert read[220, 20].argmax() == 2
    parts, depth = np.zeros((240, 320), np.uint8), np.full((240, 320), 1e10, np.float32)
    parts[10, 300], depth[10, 300] = 16, 5.5
    savemat(clip.file("segm"), {"segm_1": parts})
    savemat(clip.file("depth"), {"depth_1": depth}, do_compression=True)
    assert np.argwhere(read_parts(clip, 0)).tolist() == [[10, 300]]
    assert read_depth(clip, 0)[10, 300] == 5.5


@pytest.mark.parametrize("keyframes", ["250", "10"])
def test_every_frame_is_found_bit_for_bit(tmp_path, keyframes):
    import av

    clip = Clip(tmp_path / "01_01_c0001")
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 256, (280, 380, 3), dtype=np.uint8)
    with av.open(str(clip.file("video")), "w") as container:  # B-frames and a pyramid of them, as ffmpeg does
        stream = container.add_stream("libx264", rate=30, options={"g": keyframes, "crf": "30", "bf": "3"})
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        for t in range(40):  # a pan over a picture
            frame = np.ascontiguousarray(scene[t : t + 240, t : t + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(clip.file("video"))) as container:
        scanned = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(scanned) == 40
    for t in range(40):
        assert np.array_equal(read_image(clip, t), scanned[t]), t
    with pytest.raises(UnreadableClip, match=r"cannot be decoded.*frame 40"):
        read_image(clip, 40)


def test_variables_of_a_mat_file(tmp_path):
    generator = np.random.default_rng(0)
    content = {
        "a": generator.normal(size=(2, 3)),
        "four": generator.integers(0, 9, (4, 5)),
        "text": "words",
        "cell": np.array(["one", "another"], dtype=object),
        "depth_1": generator.normal(size=(240, 320)).astype(np.float32),
        "depth_11": generator.normal(size=(240, 320)).astype(np.float32),
        "joints2D": generator.normal(size=(2, 24, 7)),
    }
    for compress in (False, True):
        path = tmp_path / f"{compress}.mat"
        savemat(path, content, do_compression=compress)
        assert count_variables(path) == len(content)
        for name in ("a", "four", "depth_1", "depth_11", "joints2D"):
            read = load_variables(path, [name])
            assert list(read) == [name]
            assert np.array_equal(read[name], content[name])
        assert list(load_variables(path, ["absent", "joints2D", "a"])) == ["joints2D", "a"]


def test_names_are_found_behind_a_long_code_table(tmp_path):
    # Deflated, a variable begins with a table of its codes, the longer the more kinds of bytes it holds: of 160 bytes
    # of a clip of 100 frames nothing was left for the name.
    generator = np.random.default_rng(0)
    for number in range(20):
        joints = np.round(generator.normal(160, 40, (2, 24, 100))).astype(np.float32)
        noise = generator.normal(size=(3, 24, 100)).astype(np.float32)
        path = tmp_path / f"{number}.mat"
        savemat(path, {"joints2D": joints, "joints3D": noise}, do_compression=True)
        read = load_variables(path, ["joints2D", "joints3D"])
        assert np.array_equal(read["joints2D"], joints)
        assert np.array_equal(read["joints3D"], noise)


def test_damaged_mat_files_are_told(tmp_path):
    whole = tmp_path / "whole.mat"
    savemat(whole, {"a": np.arange(1000.0), "b": np.random.default_rng(0).normal(size=500)}, do_compression=True)
    data = whole.read_bytes()
    for name, damaged in {
        "short": data[:-10],
        "in a tag": data + b"\x0f\x00",
        "empty": b"",
        "only a header": data[:100],
        "hdf5": b"\x89HDF" + data[4:124] + b"\x00\x02IM" + data[128:],
    }.items():
        path = tmp_path / f"{name}.mat"
        path.write_bytes(damaged)
        with pytest.raises(MatError):
            count_variables(path)
    flipped = bytearray(data)
    flipped[-200:-100] = bytes(100)
    path = tmp_path / "inside.mat"
    path.write_bytes(flipped)
    assert count_variables(path) == 2  # the lengths say nothing of this
    with pytest.raises(MatError):
        load_variables(path, ["b"])


def test_a_clip_of_one_frame(tmp_path):
    generator = np.random.default_rng(0)
    clip = Clip(tmp_path / "01_01_c0001")
    motion = draw_motion(1, generator)
    write_clip(clip, motion, motion.pelvis[0] + [8.0, 0, 0], generator)
    assert check_clip(clip).usable().tolist() == [True]
    assert read_image(clip, 0).shape == (240, 320, 3)
    # MATLAB drops the last axis where its length is 1.
    info = {name: value for name, value in loadmat(clip.file("info")).items() if not name.startswith("__")}
    before = read_info(clip)
    savemat(clip.file("info"), {**info, "joints2D": info["joints2D"][..., 0], "joints3D": info["joints3D"][..., 0]})
    assert np.array_equal(read_info(clip).joints2d, before.joints2d)
    assert np.array_equal(read_info(clip).joints3d, before.joints3d)


def test_usable_frames(made):
    clip, *_ = made
    info = read_info(clip)
    assert info.usable().all()
    joints = info.joints2d.copy()
    joints[1] += [400, 0]  # beside the picture
    joints[2] = joints[2, :1]  # every joint at one point
    joints[3, 5] = np.nan
    assert ClipInfo(joints, info.joints3d, info.camera).usable().tolist() == [True, False, False, False, True, True]
    assert not ClipInfo(info.joints2d, info.joints3d, info.camera - [20, 0, 0]).usable().any()  # behind the camera


def test_the_install_is_named_where_a_library_is_missing(made, monkeypatch):
    import sys

    clip, *_ = made
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"PyAV: pip install 'dataparams\[surreal\]'"):
        read_image(clip, 0)
    with pytest.raises(ImportError, match="PyAV"):
        write_video(Path("unused.mp4"), np.zeros((1, 240, 320, 3), np.uint8))
