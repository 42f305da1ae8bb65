"""The bodies and the renderer of the miniature, against geometry."""

import numpy as np
import pytest

from dataparams.tasks.surreal_body import LEFT_OF, PARENTS, Motion, body_solids, bone_offsets, draw_motion, pose_body
from dataparams.tasks.surreal_files import project, to_camera
from dataparams.tasks.surreal_render import RAYS, Wardrobe, _capsule, _surface, draw_background, render_body

TO_VIEW = to_camera(np.eye(3), np.zeros(3)).T
CAMERA = np.array([7.0, 0.0, 0.0])


def still(zrot=0.0, frames=1, **rotations):
    """A T-pose that stands upright: x of the root turns SMPL's y up into z up."""
    pose = np.zeros((frames, 24, 3))
    pose[:, 0] = [np.pi / 2, 0, 0]
    for joint, rotation in rotations.items():
        pose[:, int(joint.removeprefix("joint"))] = rotation
    return Motion(pose.reshape(frames, 72), np.zeros(10), zrot, np.zeros((frames, 3)))


def test_a_body_stands_upright_and_pictures_are_mirrored():
    left_wrist, right_wrist, head, foot = 20, 21, 15, 7
    seen = {zrot: project(to_camera(pose_body(still(zrot))[0][0], CAMERA)) for zrot in (0, np.pi / 2, np.pi)}
    for places in seen.values():
        assert places[head, 1] < places[0, 1] < places[foot, 1]  # rows count downwards
        assert places[head, 0] == pytest.approx(160, abs=2)
    # zrot=0 faces along the world's -z, which is the picture's right; a quarter turn on it faces the camera.
    assert np.ptp(seen[0][[left_wrist, right_wrist], 0]) < 2
    front = seen[np.pi / 2]
    toes = to_camera(pose_body(still(np.pi / 2))[0][0], CAMERA)[[10, 11], 2]
    ankles = to_camera(pose_body(still(np.pi / 2))[0][0], CAMERA)[[7, 8], 2]
    assert (toes < ankles).all()  # towards the camera
    # Who faces a camera has his left hand at its picture's right; SURREAL's camera mirrors.
    assert front[left_wrist, 0] < 160 - 40
    assert front[right_wrist, 0] > 160 + 40


def test_a_turned_joint_moves_its_limb_and_nothing_else():
    straight, bent = pose_body(still())[0][0], pose_body(still(joint18=[0, -np.pi / 2, 0]))[0][0]
    moved = np.abs(straight - bent).max(1) > 1e-9
    assert np.flatnonzero(moved).tolist() == [20, 22]  # the left elbow bends the left hand
    upper, lower = bent[18] - bent[16], bent[20] - bent[18]
    assert abs(upper @ lower) / np.linalg.norm(upper) / np.linalg.norm(lower) < 0.15


def test_bones_keep_their_length_and_sides_are_alike():
    generator = np.random.default_rng(0)
    for _ in range(5):
        motion = draw_motion(9, generator)
        joints, turned = pose_body(motion)
        lengths = np.linalg.norm(joints[:, 1:] - joints[:, PARENTS[1:]], axis=-1)
        assert np.ptp(lengths, axis=0).max() < 1e-9
        assert lengths[0] == pytest.approx(np.linalg.norm(bone_offsets(motion.shape)[1:], axis=1))
        for right, left in LEFT_OF.items():
            assert lengths[0, right - 1] == pytest.approx(lengths[0, left - 1])
        assert np.abs(np.einsum("tjab,tjcb->tjac", turned, turned) - np.eye(3)).max() < 1e-9
        assert 1.3 < np.ptp(pose_body(still())[0][0, :, 1]) < 1.7
        speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * 30
        assert 0.005 < speed.max() < 5  # moves, smoothly: metres a second


def test_a_girthier_shape_is_thicker():
    shape = np.zeros(10)
    _, slim, _ = body_solids(shape)
    shape[1] = 2
    ends, wide, _ = body_solids(shape)
    assert np.delete(wide / slim, 15) == pytest.approx(1.2)
    assert wide[15] == slim[15]  # the head
    assert ends[18, 1, 0] > 0 > ends[19, 1, 0]  # the left arm goes to +x, the right one to -x


def test_where_a_ray_meets_a_capsule():
    generator = np.random.default_rng(0)
    for _ in range(8):
        eye, ends = generator.normal([0, 0, -6], 1.0), generator.normal(size=(2, 3))
        radius = generator.uniform(0.2, 0.6)
        aims = (
            ends[0]
            + generator.uniform(-0.3, 1.3, (200, 1)) * (ends[1] - ends[0])
            + generator.normal(size=(200, 3)) * 0.4
        )
        rays = (aims - eye) * generator.uniform(0.2, 2, (200, 1))
        distance = _capsule(eye, rays, ends, radius)
        # Brute force: the least t at which a point of the ray is within the radius of the segment.
        times = np.linspace(0, 12, 3001) / np.linalg.norm(rays, axis=1)[:, None]
        points = eye + times[..., None] * rays[:, None]
        axis = ends[1] - ends[0]
        along = np.clip((points - ends[0]) @ axis / (axis @ axis), 0, 1)
        gap = np.linalg.norm(points - ends[0] - along[..., None] * axis, axis=-1) - radius
        hit = gap.min(1) < 0
        assert 20 < hit.sum() < 200
        assert np.isfinite(distance[hit]).all()
        assert np.isinf(distance[gap.min(1) > 0.01]).all()
        first = times[np.arange(200), (gap < 0).argmax(1)]
        assert (np.abs(distance - first) * np.linalg.norm(rays, axis=1))[hit].max() < 0.0041  # a step
        normals, _ = _surface(eye + distance[hit, None] * rays[hit], ends)
        assert np.linalg.norm(normals, axis=1) == pytest.approx(radius, abs=1e-6)
        assert (np.einsum("md,md->m", normals, rays[hit]) <= 1e-6).all()  # seen from outside


def test_rays_pass_through_the_centres_of_pixels():
    assert project(RAYS[10, 300] * 5.0).tolist() == pytest.approx([300.5, 10.5])


def test_rendered_depth_is_the_surface_of_the_solids():
    generator = np.random.default_rng(5)
    motion = draw_motion(1, generator)
    joints, turned = pose_body(motion)
    seen = to_camera(joints[0], motion.pelvis[0] + CAMERA)
    ends, radii, stretches = body_solids(motion.shape)
    background = draw_background(generator)
    picture, depth, parts = render_body(
        seen, TO_VIEW @ turned[0], (ends, radii, stretches), Wardrobe.draw(generator), background
    )
    assert background.std() > 5
    assert np.array_equal(picture[parts == 0], background[parts == 0])
    shown = np.argwhere(parts > 0)
    assert len(shown) > 1500
    points = RAYS[parts > 0] * depth[parts > 0][:, None].astype(float)
    gaps = np.stack(
        [gap_to(points, seen[j], TO_VIEW @ turned[0, j], ends[j], radii[j], stretches[j]) for j in range(24)]
    )
    own = parts[parts > 0] - 1
    assert np.abs(gaps[own, np.arange(len(own))]).max() < 1e-4  # on the surface of the part that the label names
    nearer = np.stack(
        [gap_to(points * 0.9995, seen[j], TO_VIEW @ turned[0, j], ends[j], radii[j], stretches[j]) for j in range(24)]
    )
    assert nearer.min() > 0  # and nothing before it


def gap_to(points, joint, turned, ends, radius, stretch):
    """How far points are outside of a solid, in its stretched space."""
    local = (points - joint) @ turned / stretch
    axis = ends[1] - ends[0]
    along = np.clip((local - ends[0]) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(local - ends[0] - along[:, None] * axis, axis=1) - radius
