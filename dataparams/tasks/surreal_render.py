"""Pictures of miniature SURREAL: solids intersected by one ray a pixel, over a random background.

Exact where it matters: depth and part labels follow from the nearest intersection, and nothing is blurred at edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dataparams.tasks.surreal_files import BACKGROUND, FOCAL, HEIGHT, WIDTH

# Direction of the ray through the centre of each pixel, one metre ahead: (240, 320, 3).
RAYS = np.stack(
    np.broadcast_arrays(
        ((np.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL)[None, :],
        ((np.arange(HEIGHT) + 0.5 - HEIGHT / 2) / FOCAL)[:, None],
        1.0,
    ),
    axis=-1,
)

SKIN, SHIRT, TROUSERS, SHOES = range(4)
# What each of the 24 solids wears.
CLOTHES = np.array([
    TROUSERS, TROUSERS, TROUSERS, SHIRT, TROUSERS, TROUSERS, SHIRT, SHOES, SHOES, SHIRT, SHOES, SHOES, SKIN, SHIRT,
    SHIRT, SKIN, SHIRT, SHIRT, SKIN, SKIN, SKIN, SKIN, SKIN, SKIN,
])  # fmt: skip
HEAD, CHEST = 15, [3, 6, 9]


@dataclass(frozen=True)
class Wardrobe:
    """How a body looks.

    Args:
        colours: RGB in [0, 1] of each solid, (24, 3).
        backs: the same of its back, which tells left from right; None: as in front.
        stripes: stripes a metre on each solid, (24,); 0 for none.
        light: unit vector to the light, in the camera's axes, (3,).
        ambient: share of the light that comes from everywhere.
    """

    colours: np.ndarray
    stripes: np.ndarray
    light: np.ndarray
    ambient: float
    backs: np.ndarray | None = None

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Wardrobe:
        """Random skin, clothes and light."""
        tone = generator.uniform(0.35, 0.95)
        skin = tone * np.array([1.0, generator.uniform(0.72, 0.85), generator.uniform(0.55, 0.7)])
        palette = np.array([skin, *generator.uniform(0.1, 1.0, (2, 3)), generator.uniform(0.05, 0.5, 3)])
        clothes = CLOTHES.copy()
        if generator.random() < 0.4:  # long sleeves
            clothes[[18, 19]] = SHIRT
        if generator.random() < 0.3:  # short trousers
            clothes[[4, 5]] = SKIN
        stripes = np.where(clothes == SHIRT, generator.choice([0, 0, 20, 40]), 0)
        light = generator.normal(size=3) * [1, 1, 0.3] - [0, 0.7, 1.0]  # from above and from the camera's side
        backs = palette[clothes]
        backs[HEAD] = generator.uniform(0.05, 0.35) * np.array([1.0, generator.uniform(0.6, 1.0), 0.5])  # hair
        colours = backs.copy()
        colours[HEAD], colours[CHEST] = skin, generator.uniform(0.1, 1.0, 3)  # a bib
        return cls(colours, stripes, light / np.linalg.norm(light), generator.uniform(0.4, 0.65), backs)


def render_body(
    joints: np.ndarray,
    turned: np.ndarray,
    solids: tuple[np.ndarray, np.ndarray, np.ndarray],
    wardrobe: Wardrobe,
    background: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One frame.

    Args:
        joints: in the camera's axes, (24, 3), metres.
        turned: from each joint's axes to the camera's, (24, 3, 3); orthogonal.
        solids: as `surreal_body.body_solids` returns them.
        wardrobe: how the body looks.
        background: uint8, (240, 320, 3).

    Returns:
        picture, uint8 (240, 320, 3); depth, float32 (240, 320), metres, 1e10 in the background; parts, uint8
        (240, 320), joint number + 1, 0 in the background.
    """
    depth = np.full((HEIGHT, WIDTH), BACKGROUND)
    parts = np.zeros((HEIGHT, WIDTH), np.uint8)
    picture = background.copy()
    all_ends, radii, stretches = solids
    reach = joints[:, None] + np.einsum("jab,jeb->jea", turned, all_ends * stretches[:, None])
    windows = _windows(reach, radii * stretches.max(1))
    for joint, (ends, radius, window) in enumerate(zip(all_ends, radii, windows, strict=True)):
        to_local = turned[joint].T / stretches[joint][:, None]
        rays = RAYS[window].reshape(-1, 3) @ to_local.T
        eye = -to_local @ joints[joint]
        distance = _capsule(eye, rays, ends, radius)
        nearest = depth[window]
        seen = np.flatnonzero(distance < nearest.ravel())
        place = np.unravel_index(seen, nearest.shape)
        nearest[place] = distance[seen]
        parts[window][place] = joint + 1
        normals, along = _surface(eye + distance[seen][:, None] * rays[seen], ends)
        colours = wardrobe.colours[joint]
        if wardrobe.backs is not None:  # z, in the joint's own axes, is to the front
            colours = np.where(normals[:, 2:] < 0, wardrobe.backs[joint], colours)
        normals = normals @ to_local
        lit = normals @ wardrobe.light / np.sqrt(np.einsum("md,md->m", normals, normals))
        shade = wardrobe.ambient + (1 - wardrobe.ambient) * np.maximum(lit, 0)
        if wardrobe.stripes[joint]:
            shade *= 1 + 0.3 * np.sign(np.sin(np.pi * wardrobe.stripes[joint] * along))
        picture[window][place] = np.minimum(colours * shade[:, None], 1) * 255
    return picture, depth.astype(np.float32), parts


def draw_background(generator: np.random.Generator) -> np.ndarray:
    """A random picture to stand before, uint8 (240, 320, 3): soft clouds of colour, patches, and grain."""
    clouds = np.zeros((HEIGHT, WIDTH, 3))
    for cells, weight in [((2, 3), 1.0), ((5, 7), generator.uniform(0, 0.7)), ((24, 32), generator.uniform(0, 0.35))]:
        noise = Image.fromarray(generator.integers(0, 256, (*cells, 3), dtype=np.uint8))
        smooth = np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=float)
        clouds += weight * (smooth - 127.5)
    clouds = clouds * generator.uniform(0.3, 0.8) + generator.uniform(70, 190)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(generator.integers(2, 9)):
        middle = generator.uniform(0, 1, 2) * [HEIGHT, WIDTH]
        half = generator.uniform(8, 90, 2)
        row, column = np.abs(rows - middle[0]) / half[0], np.abs(columns - middle[1]) / half[1]
        inside = (np.maximum(row, column) if generator.random() < 0.7 else np.hypot(row, column)) < 1
        cover = generator.uniform(0.4, 1.0)
        clouds[inside] = (1 - cover) * clouds[inside] + cover * generator.uniform(0, 255, 3)
    return np.clip(clouds, 0, 255).astype(np.uint8)


def _windows(ends: np.ndarray, reach: np.ndarray) -> list[tuple[slice, slice]]:
    """Pixels that solids within this reach of segments may touch; nothing nearer than half a metre is drawn.

    Args:
        ends: of the segments, in the camera's axes, (J, 2, 3), metres.
        reach: (J,), metres.
    """
    near = ends[..., 2:] - reach[:, None, None]
    shown = near.min((1, 2)) >= 0.5
    near = np.maximum(near, 0.5)
    far = ends[..., 2:] + reach[:, None, None]
    # The largest and the smallest x / z and y / z of a box around each end.
    sides = [ends[..., :2] + sign * reach[:, None, None] for sign in (-1, 1)]
    corners = np.concatenate([side / z for side in sides for z in (near, far)], axis=1)
    middle, limit = np.array([WIDTH / 2, HEIGHT / 2]), np.array([WIDTH, HEIGHT])
    low = np.clip(np.floor(corners.min(1) * FOCAL + middle), 0, limit).astype(int)
    high = np.clip(np.ceil(corners.max(1) * FOCAL + middle) + 1, 0, limit).astype(int)
    high = np.where(shown[:, None], high, low)
    return [
        (slice(top, bottom), slice(left, right))
        for (left, top), (right, bottom) in zip(low.tolist(), high.tolist(), strict=True)
    ]


def _capsule(eye: np.ndarray, rays: np.ndarray, ends: np.ndarray, radius: float) -> np.ndarray:
    """Where rays first meet a capsule: distance in lengths of the ray, (M,), infinite for a miss.

    Args:
        eye: (3,), outside the capsule.
        rays: directions, (M, 3), of any length.
        ends: of the segment, (2, 3).
        radius: of the capsule.
    """
    axis = ends[1] - ends[0]
    length = np.linalg.norm(axis)
    axis = axis / length
    start = eye - ends[0]
    # The part of ray and start across the axis: a circle in the plane.
    ray_along, start_along = rays @ axis, start @ axis
    square = np.einsum("md,md->m", rays, rays)
    across = square - ray_along**2
    meeting = rays @ start - ray_along * start_along
    root = meeting**2 - across * (start @ start - start_along**2 - radius**2)
    distance = np.full(len(rays), np.inf)
    hit = np.flatnonzero((root >= 0) & (across > 1e-12))
    distance[hit] = (-meeting[hit] - np.sqrt(root[hit])) / across[hit]
    along = start_along + distance[hit] * ray_along[hit]
    for end, beyond in [(ends[0], along < 0), (ends[1], along > length)]:
        cap = hit[beyond]
        half, offset = rays[cap] @ (eye - end), eye - end
        root = half**2 - square[cap] * (offset @ offset - radius**2)
        distance[cap] = np.where(root >= 0, (-half - np.sqrt(np.maximum(root, 0))) / square[cap], np.inf)
    return distance


def _surface(points: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals of a capsule at points of its surface, (M, 3), and their places along its axis, (M,)."""
    axis = ends[1] - ends[0]
    length = np.linalg.norm(axis)
    axis = axis / length
    offset = points - ends[0]
    along = offset @ axis
    return offset - np.clip(along, 0, length)[:, None] * axis, along
