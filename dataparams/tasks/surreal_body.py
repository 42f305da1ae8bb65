"""The bodies of miniature SURREAL: a kinematic tree of 24 joints, poses, shapes, and the solids that make up a figure.

The tree, the order of the joints and the meaning of `pose` and `zrot` are SMPL's as SURREAL uses them. The lengths,
the ten numbers of a shape and the ranges of the angles are ours: nothing is taken from SMPL's licensed model.

Rest pose: arms stretched out sideways (T-pose); x to the body's left, y up, z to the front; metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
LEFT_OF = {2: 1, 5: 4, 8: 7, 11: 10, 14: 13, 17: 16, 19: 18, 21: 20, 23: 22}  # right joint: its left twin

# Offset from the parent, for the left and the middle of the body.
OFFSETS = {
    0: (0.0, 0.0, 0.0), 1: (0.08, -0.09, 0.0), 3: (0.0, 0.11, -0.03), 4: (0.03, -0.39, 0.0), 6: (0.0, 0.13, 0.01),
    7: (-0.01, -0.41, -0.03), 9: (0.0, 0.06, 0.02), 10: (0.02, -0.06, 0.13), 12: (0.0, 0.21, -0.03),
    13: (0.07, 0.12, -0.02), 15: (0.0, 0.09, 0.04), 16: (0.12, 0.03, -0.02), 18: (0.27, -0.01, -0.02),
    20: (0.25, 0.01, 0.0), 22: (0.08, -0.01, 0.0),
}  # fmt: skip

# A solid for each joint of the left and the middle: ends of the axis from the joint (an integer: at that child joint),
# radius, and how much wider than its radius it is along x, y and z.
Point = tuple[float, float, float] | int
SOLIDS: dict[int, tuple[Point, Point, float, tuple[float, float, float]]] = {
    0: ((-0.05, -0.04, 0.0), (0.05, -0.04, 0.0), 0.11, (1.1, 1.0, 0.95)),
    1: ((0.0, 0.0, 0.0), 4, 0.075, (1.0, 1.0, 1.0)),
    3: ((0.0, -0.02, 0.01), 6, 0.112, (1.25, 1.0, 0.9)),
    4: ((0.0, 0.0, 0.0), 7, 0.052, (1.0, 1.0, 1.0)),
    6: ((0.0, 0.0, 0.0), 9, 0.115, (1.3, 1.0, 0.9)),
    7: ((0.0, -0.03, -0.04), 10, 0.038, (1.0, 1.0, 1.0)),
    9: ((-0.07, 0.06, 0.0), (0.07, 0.06, 0.0), 0.11, (1.1, 1.15, 0.9)),
    10: ((0.0, 0.0, 0.0), (0.0, -0.005, 0.06), 0.032, (1.2, 0.9, 1.0)),
    12: ((0.0, -0.02, 0.0), 15, 0.05, (1.0, 1.0, 1.0)),
    13: ((0.0, 0.0, 0.0), 16, 0.06, (1.0, 1.0, 1.0)),
    15: ((0.0, 0.04, 0.02), (0.0, 0.11, 0.01), 0.085, (0.9, 1.05, 1.1)),
    16: ((0.0, 0.0, 0.0), 18, 0.045, (1.0, 1.0, 1.0)),
    18: ((0.0, 0.0, 0.0), 20, 0.037, (1.0, 1.0, 1.0)),
    20: ((0.0, 0.0, 0.0), 22, 0.03, (1.0, 0.8, 1.2)),
    22: ((0.0, 0.0, 0.0), (0.08, -0.005, 0.0), 0.022, (1.0, 0.9, 1.4)),
}
TORSO, LEGS, ARMS = (0, 3, 6, 9), (1, 4, 7, 10), (13, 16, 18, 20, 22)

# Ranges of the angles, degrees, about (x, y, z), for the left and the middle; the right is drawn on its own and
# mirrored. Forward is a negative x for a thigh and a positive one for a knee or the spine.
ANGLES: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((-70, 20), (-10, 15), (-3, 22)), 4: ((0, 75), (0, 0), (0, 0)), 7: ((-15, 20), (-8, 8), (-5, 5)),
    3: ((-8, 14), (-8, 8), (-6, 6)), 6: ((-5, 12), (-8, 8), (-5, 5)), 9: ((-5, 8), (-8, 8), (-5, 5)),
    12: ((-12, 15), (-20, 20), (-8, 8)), 15: ((-10, 12), (-25, 25), (-8, 8)),
    13: ((0, 0), (-10, 10), (-8, 12)), 16: ((-30, 30), (-60, 20), (-80, 60)), 18: ((-20, 20), (-110, 0), (0, 0)),
    20: ((-15, 15), (-15, 15), (-20, 20)), 22: ((0, 0), (-10, 10), (-25, 10)),
}  # fmt: skip


@dataclass(frozen=True)
class Motion:
    """A body over T frames.

    Args:
        pose: axis-angle, (T, 72), as in the files: the root's rotation before `zrot`, with z up.
        shape: (10,), standard normal.
        zrot: turn about the vertical, radians.
        pelvis: (T, 3), the root joint in the world, metres.
    """

    pose: np.ndarray
    shape: np.ndarray
    zrot: float
    pelvis: np.ndarray


def draw_motion(frames: int, generator: np.random.Generator) -> Motion:
    """A random body in a random pose that sways smoothly about it."""
    from scipy.spatial.transform import Rotation

    pose = np.zeros((frames, 24, 3))
    time = np.arange(frames)[:, None] / 30  # seconds
    for joint in range(1, 24):
        ranges = np.array(ANGLES.get(LEFT_OF.get(joint, joint), ((0, 0),) * 3), dtype=float)
        low, high = ranges.T
        middle, sway = generator.uniform(low, high), generator.uniform(0.0, 0.15, 3) * (high - low)
        phase, rate = generator.uniform(0, 2 * np.pi, 3), generator.uniform(0.3, 1.2)
        angles = np.clip(middle + sway * np.sin(2 * np.pi * rate * time + phase), low, high)
        if joint in LEFT_OF:
            angles = angles * [1, -1, -1]  # a mirrored rotation turns the other way about the two axes in the mirror
        pose[:, joint] = Rotation.from_euler("zyx", angles[:, ::-1], degrees=True).as_rotvec()
    lean = generator.normal(0, 6, 3) * [1, 0, 1]
    upright = Rotation.from_euler("x", 90, degrees=True) * Rotation.from_euler("xyz", lean, degrees=True)
    pose[:, 0] = upright.as_rotvec()
    start, speed = generator.uniform(-1, 1, 3), generator.normal(0, 0.15, 3) * [1, 0, 1]
    shape = np.clip(generator.normal(size=10), -2, 2)
    return Motion(pose.reshape(frames, 72), shape, generator.uniform(0, 2 * np.pi), start + speed * time)


def pose_body(motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Joints of a body and how each is turned.

    Returns:
        joints in the world, (T, 24, 3), metres, and rotations from rest to world, (T, 24, 3, 3).
    """
    from scipy.spatial.transform import Rotation

    frames = len(motion.pose)
    local = Rotation.from_rotvec(motion.pose.reshape(-1, 3)).as_matrix().reshape(frames, 24, 3, 3)
    # SURREAL turns the body about its vertical, z, and lays that along the world's -y.
    stand = Rotation.from_euler("x", 90, degrees=True) * Rotation.from_euler("z", motion.zrot)
    offsets = bone_offsets(motion.shape)
    joints, turned = np.empty((frames, 24, 3)), np.empty((frames, 24, 3, 3))
    joints[:, 0], turned[:, 0] = motion.pelvis, stand.as_matrix() @ local[:, 0]
    for joint, parent in enumerate(PARENTS[1:], start=1):
        joints[:, joint] = joints[:, parent] + turned[:, parent] @ offsets[joint]
        turned[:, joint] = turned[:, parent] @ local[:, joint]
    return joints, turned


def bone_offsets(shape: np.ndarray) -> np.ndarray:
    """Offset of each joint from its parent in the rest pose of a body of this shape, (24, 3), metres."""
    size = 1 + 0.05 * shape[0]
    length = np.ones((24, 3))
    for joints, factor in [(LEGS, 1 + 0.05 * shape[2]), (ARMS, 1 + 0.05 * shape[3]), (TORSO, 1 + 0.05 * shape[4])]:
        length[list(joints)] *= factor
    length[[1, 13], 0] *= 1 + 0.08 * shape[[5, 6]]
    offsets = np.array([OFFSETS[LEFT_OF.get(joint, joint)] for joint in range(24)])
    offsets *= size * length[[LEFT_OF.get(joint, joint) for joint in range(24)]]
    offsets[list(LEFT_OF), 0] *= -1
    return offsets


def body_solids(shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The solid around each joint's bone, in the joint's own axes.

    It is the image, under a stretching along the axes, of a capsule: all points within a radius of a segment.

    Returns:
        the segments' ends before the stretching, (24, 2, 3); radii, (24,); stretchings, (24, 3).
    """
    offsets = bone_offsets(shape)
    size = 1 + 0.05 * shape[0]
    girth = size * (1 + 0.1 * shape[1])
    ends, radii, stretches = np.empty((24, 2, 3)), np.empty(24), np.empty((24, 3))
    for joint in range(24):
        twin = LEFT_OF.get(joint, joint)
        *points, radius, stretches[joint] = SOLIDS[twin]
        for side, end in enumerate(points):
            if isinstance(end, int):
                ends[joint, side] = offsets[end + joint - twin]
            else:
                ends[joint, side] = np.array(end) * size * (-1 if joint != twin else 1, 1, 1)
        radii[joint] = radius * (size * (1 + 0.04 * shape[7]) if joint == 15 else girth)
        if twin in LEGS or twin in ARMS:
            radii[joint] *= 1 + 0.08 * shape[9]
        if joint in (3, 6):
            stretches[joint, 2] *= 1 + 0.1 * shape[8]
    return ends / stretches[:, None], radii, stretches
