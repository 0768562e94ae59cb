"""Draws the pictures of the demo set: five kinds of shapes among clutter, with their boxes.

Every number here is an integer and every random draw comes from the raw stream of PCG64. NumPy
keeps that stream fixed for good, while it may change what ``Generator`` makes of it; sines, ellipse
drawing and the like differ in the last bit between machines and versions. So the same seed gives
the same pixels everywhere.

Shape letters: H, W: height and width of a picture or of a window of it, in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

CLASS_NAMES = ("disc", "block", "triangle", "ring", "star")
# Look-alikes that belong to no class: a detector has to look at the whole outline.
DISTRACTORS = ("half_disc", "open_ring", "corner", "plus", "crescent")

UNIT = 1024  # half-axis of a shape in its own coordinates
SUB = 3  # sub-samples per pixel and axis, for smooth edges
ANGLES = 72
# cos and sin of the multiples of 5 degrees; far enough from a half to round the same everywhere
_TURN = [
    (
        round(UNIT * math.cos(2 * math.pi * k / ANGLES)),
        round(UNIT * math.sin(2 * math.pi * k / ANGLES)),
    )
    for k in range(ANGLES)
]

_POLYGONS = {
    "block": [(-900, -900), (900, -900), (900, 900), (-900, 900)],
    "triangle": [(0, -1024), (1000, 760), (-1000, 760)],
    "star": [
        (0, -1024), (247, -340), (974, -316), (400, 130), (602, 828),
        (0, 421), (-602, 828), (-400, 130), (-974, -316), (-247, -340),
    ],
    "corner": [(-900, -900), (-200, -900), (-200, 200), (900, 200), (900, 900), (-900, 900)],
    "plus": [
        (-330, -1000), (330, -1000), (330, -330), (1000, -330), (1000, 330), (330, 330),
        (330, 1000), (-330, 1000), (-330, 330), (-1000, 330), (-1000, -330), (-330, -330),
    ],
}  # fmt: skip

_INKS = (
    (214, 69, 65), (235, 130, 60), (244, 190, 79), (154, 190, 80), (64, 145, 108),
    (42, 157, 143), (69, 123, 196), (38, 70, 120), (120, 94, 176), (196, 94, 150),
    (240, 234, 220), (44, 46, 58), (140, 90, 60), (150, 205, 225),
)  # fmt: skip
_GROUNDS = (
    (222, 214, 198), (196, 204, 196), (176, 190, 204), (206, 188, 180), (120, 132, 128),
    (96, 108, 126), (138, 120, 110), (74, 84, 84), (60, 62, 80), (168, 164, 130),
)  # fmt: skip


class Dice:
    """Random integers that stay the same across machines and NumPy versions.

    Args:
        key: non-negative integers; equal keys give equal draws, different keys independent ones.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + (int(self._bits.random_raw()) * (high - low + 1) >> 64)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """An int64 array of the given shape, its entries from low to high, both included."""
        raw = self._bits.random_raw(math.prod(shape)) >> np.uint64(32)
        span = np.uint64(high - low + 1)
        return low + (raw * span >> np.uint64(32)).astype(np.int64).reshape(shape)

    def chance(self, percent: int) -> bool:
        """True in the given percentage of calls."""
        return self.integer(0, 99) < percent

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items, each equally likely."""
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """A new list with the items in random order."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.integer(0, i)
            out[i], out[j] = out[j], out[i]
        return out


@dataclass(frozen=True)
class DrawnObject:
    """One labelled object: its class (an index into CLASS_NAMES), its tight box as
    (x, y, width, height) in pixels, and its area in pixels."""

    class_index: int
    box: tuple[int, int, int, int]
    area: int


@dataclass
class Picture:
    """A picture, (H, W, 3) uint8 RGB, and the objects to find in it."""

    pixels: np.ndarray
    objects: list[DrawnObject] = field(default_factory=list)


@dataclass(frozen=True)
class _Pose:
    """Where and how a shape lies: centre and half-axes in pixels, turn in steps of 5 degrees."""

    x: int
    y: int
    half_u: int
    half_v: int
    turn: int

    def window(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of the picture that the shape can reach."""
        reach = math.isqrt(self.half_u**2 + self.half_v**2) + 4  # and a shadow
        return (
            slice(max(self.y - reach, 0), min(self.y + reach, height)),
            slice(max(self.x - reach, 0), min(self.x + reach, width)),
        )

    def local(self, rows: slice, cols: slice, sub: int) -> tuple[np.ndarray, np.ndarray]:
        """Offsets from the centre along the shape's own axes at ``sub`` x ``sub`` points of each
        pixel, in units of 1 / (2 * sub * UNIT) pixel: two int32 arrays of (H * sub, W * sub)."""
        # int32 is enough for pictures of a few hundred pixels, and faster
        y = np.arange(rows.start * sub, rows.stop * sub, dtype=np.int32)
        x = np.arange(cols.start * sub, cols.stop * sub, dtype=np.int32)
        dy, dx = 2 * y + 1 - 2 * sub * self.y, 2 * x + 1 - 2 * sub * self.x
        cos, sin = _TURN[self.turn]
        return (
            dx[None, :] * cos + dy[:, None] * sin,
            dy[:, None] * cos - dx[None, :] * sin,
        )


def _in_polygon(u: np.ndarray, v: np.ndarray, corners: list[tuple[int, int]]) -> np.ndarray:
    """Even-odd rule: which points (u, v) lie inside the polygon."""
    inside = np.zeros(u.shape, dtype=bool)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if v0 == v1:
            continue
        crosses = (v0 > v) != (v1 > v)
        side = (u - u0) * (v1 - v0) < (u1 - u0) * (v - v0)
        inside ^= crosses & (side == (v1 > v0))
    return inside


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points, in units of 1 / UNIT half-axis, belong to a shape of this kind."""
    if kind in _POLYGONS:
        return _in_polygon(u, v, _POLYGONS[kind])
    square = u * u + v * v
    disc = square <= UNIT * UNIT
    if kind == "disc":
        return disc
    if kind == "half_disc":
        return disc & (v >= 0)
    if kind == "crescent":
        return disc & ((u - 520) ** 2 + v * v > 800 * 800)
    ring = disc & (square >= 580 * 580)
    return ring if kind == "ring" else ring & ~((u > 0) & (abs(v) * 4 < u * 3))


def _coverage(kind: str, pose: _Pose, rows: slice, cols: slice) -> np.ndarray:
    """How many of the SUB * SUB points of each pixel the shape covers: (H, W) int64."""
    u, v = pose.local(rows, cols, SUB)
    inside = _inside(kind, u // (2 * SUB * pose.half_u), v // (2 * SUB * pose.half_v))
    height, width = rows.stop - rows.start, cols.stop - cols.start
    return inside.reshape(height, SUB, width, SUB).sum(axis=(1, 3), dtype=np.int64)


def _smooth_noise(dice: Dice, height: int, width: int, cell: int) -> np.ndarray:
    """Soft blotches about ``cell`` pixels wide: (H, W) int64 from 0 to 255."""
    grid = dice.integers(0, 255, (height // cell + 2, width // cell + 2))
    y, x = np.arange(height), np.arange(width)
    fy, fx = (y % cell)[:, None], (x % cell)[None, :]
    top, left = y // cell, x // cell
    upper = grid[top][:, left] * (cell - fx) + grid[top][:, left + 1] * fx
    lower = grid[top + 1][:, left] * (cell - fx) + grid[top + 1][:, left + 1] * fx
    return (upper * (cell - fy) + lower * fy) // (cell * cell)


def _texture(dice: Dice, pose: _Pose, rows: slice, cols: slice) -> np.ndarray:
    """The share of the second colour at each pixel: (H, W) int64 from 0 to 256."""
    u, v = (axis // (2 * UNIT) for axis in pose.local(rows, cols, 1))
    kind = dice.choice(("flat", "flat", "flat", "stripes", "dots", "gradient", "noise"))
    if kind == "flat":
        return np.zeros_like(u)
    if kind == "gradient":
        return np.clip((u + pose.half_u) * 256 // (2 * pose.half_u), 0, 256)
    if kind == "noise":
        return _smooth_noise(dice, *u.shape, cell=dice.integer(3, 6))
    period = dice.integer(3, 6)
    if kind == "stripes":
        return v // period % 2 * 256
    return ((u % (2 * period) - period) ** 2 + (v % (2 * period) - period) ** 2 < period**2) * 200


def _ink(dice: Dice, ground: np.ndarray) -> np.ndarray:
    """A colour that stands out a little from the ``ground`` colour: (3,) int64."""
    while True:
        ink = np.clip(np.array(dice.choice(_INKS)) + dice.integers(-22, 22, (3,)), 0, 255)
        if abs(ink - ground).sum() >= 140:
            return ink


def _background(dice: Dice, height: int, width: int) -> np.ndarray:
    """An uneven ground with blobs and faint stripes: (H, W, 3) int64."""
    canvas = np.broadcast_to(dice.choice(_GROUNDS), (height, width, 3)).astype(np.int64)
    canvas += dice.integers(-14, 14, (3,))
    canvas += (_smooth_noise(dice, height, width, dice.integer(24, 60)) - 128)[..., None] // 4
    if dice.chance(60):
        blobs = _smooth_noise(dice, height, width, dice.integer(12, 30)) > dice.integer(150, 190)
        canvas[blobs] = (canvas[blobs] * 3 + np.array(dice.choice(_INKS))) // 4
    if dice.chance(40):
        y, x = np.arange(height)[:, None], np.arange(width)[None, :]
        slope, period = dice.integer(-3, 3), dice.integer(4, 14)
        canvas[(3 * y + slope * x) // (3 * period) % 2 == 0] -= dice.integer(6, 18)
    return np.clip(canvas, 0, 255)


def _paint(dice: Dice, canvas: np.ndarray, kind: str, pose: _Pose) -> None:
    """Draws one textured shape onto the canvas, in place."""
    rows, cols = pose.window(*canvas.shape[:2])
    cover = _coverage(kind, pose, rows, cols)[..., None]
    patch = canvas[rows, cols]
    if dice.chance(50):  # a shadow, on look-alikes as well, so that it tells nothing
        shadow = np.zeros_like(cover)
        shadow[2:, 2:] = cover[:-2, :-2]
        patch -= patch * shadow // (3 * SUB * SUB)
    first = _ink(dice, patch.sum(axis=(0, 1)) // (patch.shape[0] * patch.shape[1]))
    second = first + dice.choice((-60, 60)) if dice.chance(60) else np.array(dice.choice(_INKS))
    mix = _texture(dice, pose, rows, cols)[..., None]
    colour = np.clip((first * (256 - mix) + second * mix) // 256, 0, 255)
    patch[:] = (patch * (SUB * SUB - cover) + colour * cover) // (SUB * SUB)


def _pose(dice: Dice, height: int, width: int) -> _Pose:
    """A random pose whose shape is 12 to 90 pixels long and mostly inside the picture.

    It lies or stands, up to 35 degrees off: with every angle, a small detector would need
    thousands of iterations to tell the classes apart.
    """
    low, high = dice.choice(((12, 24), (18, 36), (24, 44), (40, 90)))
    half_u = dice.integer(low, high) // 2
    half_v = max(half_u * 10 // dice.integer(10, 14), 5)
    margin = half_u * 2 // 3
    return _Pose(
        x=dice.integer(margin, width - 1 - margin),
        y=dice.integer(margin, height - 1 - margin),
        half_u=half_u,
        half_v=half_v,
        turn=dice.integer(-7, 7) + (ANGLES // 4) * dice.integer(0, 1),
    )


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the smallest box around the True pixels of an (H, W) mask."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        int(cols[0]),
        int(rows[0]),
        int(cols[-1] - cols[0] + 1),
        int(rows[-1] - rows[0] + 1),
    )


def draw_picture(dice: Dice) -> Picture:
    """Draws one picture of about 160 x 160 to 192 x 160 pixels with up to seven objects.

    Shapes may cover each other; one that would leave less than half of an earlier one to see is
    put somewhere else, or left out. Boxes are tight around the part of a shape that lies in the
    picture, covered or not.

    Args:
        dice: the source of every decision.

    Returns:
        The picture and its objects, in the order they were drawn.
    """
    height, width = dice.integer(150, 160), dice.integer(160, 192)
    if dice.chance(30):
        height, width = width, height
    canvas = _background(dice, height, width)
    wanted = 0 if dice.chance(4) else dice.integer(2, 7)
    kinds = [dice.choice(CLASS_NAMES) for _ in range(wanted)]
    others = dice.integer(0, 2) if wanted else 2
    kinds += [dice.choice(DISTRACTORS) for _ in range(others)]

    objects: list[DrawnObject] = []
    shapes: list[tuple[np.ndarray, int]] = []  # what is still to be seen of each, and its area
    for kind in dice.shuffled(kinds):
        for _ in range(10):
            pose = _pose(dice, height, width)
            rows, cols = pose.window(height, width)
            mask = np.zeros((height, width), dtype=bool)
            mask[rows, cols] = _coverage(kind, pose, rows, cols) * 2 > SUB * SUB
            if all(2 * (seen & ~mask).sum() >= area for seen, area in shapes):
                break
        else:
            continue
        _paint(dice, canvas, kind, pose)
        shapes = [(seen & ~mask, area) for seen, area in shapes] + [(mask, int(mask.sum()))]
        if kind in CLASS_NAMES:
            index = CLASS_NAMES.index(kind)
            objects.append(DrawnObject(index, _tight_box(mask), int(mask.sum())))

    for _ in range(dice.integer(0, 1)):  # thin lines across everything
        x, y = dice.integer(0, width - 1), dice.integer(0, height - 1)
        line = _Pose(x, y, dice.integer(20, 90), 1, dice.integer(0, ANGLES - 1))
        _paint(dice, canvas, "block", line)
    grain = dice.integer(2, 9)
    canvas += dice.integers(-grain, grain, (height, width, 1))
    return Picture(np.clip(canvas, 0, 255).astype(np.uint8), objects)
