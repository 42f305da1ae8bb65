"""Pictures of miniature SURREAL: solids intersected by one ray a pixel, over a random background.

Exact where it matters: depth and part labels follow from the nearest intersection, and nothing is blurred at edges.
"""

from __future__ import annotations

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

SKIN, SHIRT, TROUSERS, SHOES, HAIR = range(5)
# What each of the 24 solids wears.
CLOTHES = np.array([
    TROUSERS, TROUSERS, TROUSERS, SHIRT, TROUSERS, TROUSERS, SHIRT, SHOES, SHOES, SHIRT, SHOES, SHOES, SKIN, SHIRT,
    SHIRT, SKIN, SHIRT, SHIRT, SKIN, SKIN, SKIN, SKIN, SKIN, SKIN,
])  # fmt: skip


class Wardrobe:
    """Colours, stripes and light, drawn once for a clip.

    Attributes:
        colours: RGB in [0, 1] of each solid, (24, 3).
        stripes: stripes a metre on each solid, (24,); 0 for none.
        light: unit vector to the light, in the camera's axes.
        ambient: share of the light that comes from everywhere.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        tone = generator.uniform(0.35, 0.95)
        skin = tone * np.array([1.0, generator.uniform(0.72, 0.85), generator.uniform(0.55, 0.7)])
        palette = np.array([skin, *generator.uniform(0.1, 1.0, (2, 3)), *generator.uniform(0.05, 0.5, (2, 3))])
        clothes = CLOTHES.copy()
        if generator.random() < 0.4:  # long sleeves
            clothes[[18, 19]] = SHIRT
        if generator.random() < 0.3:  # short trousers
            clothes[[4, 5]] = SKIN
        self.colours = palette[clothes]
        self.stripes = np.where(clothes == SHIRT, generator.choice([0, 0, 20, 40]), 0)
        light = generator.normal(size=3) * [1, 1, 0.3] - [0, 0.7, 1.0]  # from above and from the camera's side
        self.light = light / np.linalg.norm(light)
        self.ambient = generator.uniform(0.4, 0.65)


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
    for joint, (ends, radius, stretch) in enumerate(zip(*solids, strict=True)):
        to_local = turned[joint].T / stretch[:, None]
        reach = joints[joint] + (ends * stretch) @ turned[joint].T
        window = _window(reach, radius * stretch.max())
        rays = RAYS[window] @ to_local.T
        eye = -to_local @ joints[joint]
        distance, inward, along = _capsule(eye, rays.reshape(-1, 3), ends, radius)
        distance, along = distance.reshape(rays.shape[:2]), along.reshape(rays.shape[:2])
        nearer = distance < depth[window]
        depth[window][nearer] = distance[nearer]
        parts[window][nearer] = joint + 1
        normals = inward.reshape(rays.shape)[nearer] @ to_local
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        shade = wardrobe.ambient + (1 - wardrobe.ambient) * np.clip(normals @ wardrobe.light, 0, 1)
        if wardrobe.stripes[joint]:
            shade = shade * (1 + 0.3 * np.sign(np.sin(np.pi * wardrobe.stripes[joint] * along[nearer])))
        colours = np.clip(wardrobe.colours[joint] * shade[:, None], 0, 1) * 255
        picture[window][nearer] = colours.astype(np.uint8)
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


def _window(ends: np.ndarray, reach: float) -> tuple[slice, slice]:
    """Pixels that a body of this reach about a segment may touch; nothing nearer than half a metre is drawn."""
    near = ends[:, 2] - reach
    if near.min() < 0.5:
        return slice(0, 0), slice(0, 0)
    # The largest and the smallest of x / z over a box around each end.
    corners = np.concatenate([(ends[:, :2] + sign * reach) / z[:, None] for sign in (-1, 1) for z in (near, near + 2 * reach)])
    low = np.floor(corners.min(0) * FOCAL + [WIDTH / 2, HEIGHT / 2]).astype(int)
    high = np.ceil(corners.max(0) * FOCAL + [WIDTH / 2, HEIGHT / 2]).astype(int) + 1
    (left, top), (right, bottom) = np.clip(low, 0, [WIDTH, HEIGHT]), np.clip(high, 0, [WIDTH, HEIGHT])
    return slice(top, bottom), slice(left, right)


def _capsule(
    eye: np.ndarray, rays: np.ndarray, ends: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays first meet a capsule.

    Args:
        eye: (3,), outside the capsule.
        rays: directions, (M, 3), of any length.
        ends: of the segment, (2, 3).
        radius: of the capsule.

    Returns:
        distance in lengths of the ray, (M,), infinite for a miss; outward normal, (M, 3); place along the axis, (M,).
    """
    axis = ends[1] - ends[0]
    length = np.linalg.norm(axis)
    axis = axis / length
    start = eye - ends[0]
    # The part of ray and start across the axis: a circle in the plane.
    ray_along, start_along = rays @ axis, start @ axis
    across = np.einsum("md,md->m", rays, rays) - ray_along**2
    meeting = rays @ start - ray_along * start_along
    rest = start @ start - start_along**2 - radius**2
    root = meeting**2 - across * rest
    hit = (root >= 0) & (across > 1e-12)
    distance = np.full(len(rays), np.inf)
    distance[hit] = (-meeting[hit] - np.sqrt(root[hit])) / across[hit]
    along = np.where(hit, start_along + np.where(hit, distance, 0) * ray_along, 0.0)
    for end, beyond in [(ends[0], along < 0), (ends[1], along > length)]:
        cap = np.flatnonzero(hit & beyond)
        ray, offset = rays[cap], eye - end
        square, half = np.einsum("md,md->m", ray, ray), ray @ offset
        root = half**2 - square * (offset @ offset - radius**2)
        distance[cap] = np.where(root >= 0, (-half - np.sqrt(np.maximum(root, 0))) / square, np.inf)
    found = np.isfinite(distance)
    point = start + np.where(found, distance, 0)[:, None] * rays
    along = point @ axis
    normal = point - np.clip(along, 0, length)[:, None] * axis
    return distance, normal, along
