# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Generated street scenes with exact labels: the data set of the quickstart and of the tests.

Each scene is a small three-dimensional street seen by a pinhole camera: ground, walls, vehicles and billboards are drawn
from far to near into one raster of surface numbers, from which picture and label are both looked up. Colours come from a
palette drawn anew for every scene and handed out without regard to class, so that only shape and context tell the
classes apart.
"""

import io
import math
import operator
from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets import Sequence as ListOf
from datasets.utils import tqdm
from numpy.typing import ArrayLike
from PIL import Image as PILImage
from PIL import ImageDraw

CLASS_NAMES = ("sky", "building", "road", "pavement", "tree", "car", "person", "traffic sign", "fence")
ID2LABEL = dict(enumerate(CLASS_NAMES))
# Okabe's and Ito's colours, and two greys: distinct with colour-blindness, too.
PALETTE = (
    (86, 180, 233),
    (230, 159, 0),
    (80, 80, 80),
    (200, 200, 200),
    (0, 158, 115),
    (0, 114, 178),
    (213, 94, 0),
    (240, 228, 66),
    (204, 121, 167),
)
VOID = 255

_SKY, _BUILDING, _ROAD, _PAVEMENT, _TREE, _CAR, _PERSON, _SIGN, _FENCE = range(len(CLASS_NAMES))

_MIN_SIZE, _MAX_SIZE = 32, 2048
_SPLITS = {"train": 0, "validation": 1, "test": 2}
_SUPERSAMPLING = 2
_NEARBY = 16.0  # metres: anything but houses is nearer, so that nothing is too small to be told
_FAR = 70.0  # metres: where the modelled street ends and the skyline stands
_SQUARE = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
_FRONT, _RIGHT, _BACK, _LEFT, _TOP = range(5)  # a solid's faces; the front one is towards the camera
# Corners of a sign's board and the angle of the first.
_BOARDS = ((16, 0), (3, math.pi / 2), (3, -math.pi / 2), (4, 0), (8, math.pi / 8), (4, math.pi / 4))
_CIRCLE = np.stack([np.cos(np.arange(16) * np.pi / 8), np.sin(np.arange(16) * np.pi / 8)], axis=1)

# sRGB by day, for `draw_scene(daylight=True)`.
_DAYLIGHT = {
    "facade": np.array([(158, 130, 110), (186, 174, 156), (124, 104, 96)]),
    "leaf": np.array([(62, 84, 44), (84, 100, 52)]),
    "other": np.array([(28, 30, 34), (120, 24, 28), (32, 48, 96), (168, 170, 174), (214, 210, 200), (92, 70, 52)]),
}
_DAYLIGHT_OF_ONE = {
    "sky": np.array((206, 220, 238)),
    "haze": np.array((228, 232, 236)),
    "road": np.array((98, 98, 102)),
    "pavement": np.array((150, 144, 138)),
    "lamp": np.array((240, 236, 210)),
    "glass": np.array((48, 56, 64)),
    "tyre": np.array((26, 26, 28)),
}


def load_scenes(
    num_train: int = 1200,
    num_validation: int = 100,
    num_test: int = 100,
    size: tuple[int, int] = (128, 192),
    seed: int = 0,
) -> DatasetDict:
    """Draws a data set of street scenes, held in memory.

    Args:
        num_train, num_validation, num_test: Scenes in each split; a split of 0 is left out.
        size: `(height, width)` in pixels, each from 32 to 2048.
        seed: Any non-negative integer. Every scene has a random stream of its own, made from seed, split and index: no
            two scenes share one, and a smaller data set is the beginning of a larger one. The same arguments give the
            same pixels in every process (with the same releases of numpy and Pillow).

    Returns:
        The splits "train", "validation" and "test" with the columns `image` (RGB, PNG), `label` (one byte a pixel, PNG:
        a class number, or 255 in the thin band along contours) and `classes` (the class numbers present; its feature
        carries the class names: `features["classes"].feature.names`).

    Raises:
        ValueError: A count or the seed is negative or no integer, all counts are 0, or the size is out of range.
    """
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    counts = {split: _non_negative_integer(count, f"num_{split}") for split, count in counts.items()}
    if not any(counts.values()):
        raise ValueError("num_train, num_validation and num_test are all 0: ask for at least one scene.")
    size, seed = _check_size(size), _non_negative_integer(seed, "seed")
    return DatasetDict({split: _draw_split(split, count, size, seed) for split, count in counts.items() if count})


def draw_scene(
    seed: int | np.random.Generator, size: tuple[int, int] = (128, 192), daylight: bool = False
) -> tuple[PILImage.Image, PILImage.Image]:
    """Draws one street scene.

    Args:
        seed: A non-negative integer, or a numpy generator (which is advanced).
        size: `(height, width)` in pixels, each from 32 to 2048.
        daylight: Give things the colours that they have by day (grey road, green trees), so that networks trained on
            photographs recognize them. The data set never does: there a colour tells no class.

    Returns:
        The picture (mode RGB) and its label map (mode L: class numbers, 255 along contours), both of `size`.

    Raises:
        ValueError: The seed is negative or no integer, or the size is out of range.
    """
    size = _check_size(size)
    if not isinstance(seed, np.random.Generator):
        seed = np.random.default_rng(_non_negative_integer(seed, "seed"))
    return _Street(seed, size, daylight).render()


def _draw_split(split: str, count: int, size: tuple[int, int], seed: int) -> Dataset:
    features = Features({"image": Image(), "label": Image(), "classes": ListOf(ClassLabel(names=list(CLASS_NAMES)))})
    columns: dict[str, list] = {name: [] for name in features}
    for index in tqdm(range(count), desc=f"Drawing {split} scenes"):
        stream = np.random.SeedSequence(seed, spawn_key=(_SPLITS[split], index))
        image, label = draw_scene(np.random.default_rng(stream), size)
        columns["image"].append({"bytes": _png(image), "path": None})
        columns["label"].append({"bytes": _png(label), "path": None})
        columns["classes"].append([value for value in np.unique(np.asarray(label)).tolist() if value != VOID])
    return Dataset.from_dict(columns, features=features)


def _png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # noise barely compresses: the higher levels only cost time
    return buffer.getvalue()


def _non_negative_integer(value: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a non-negative integer, not {value!r}.") from None
    if isinstance(value, bool) or number < 0:
        raise ValueError(f"{name} must be a non-negative integer, not {value!r}.")
    return number


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size must be two integers, (height, width), not {size!r}.") from None
    if not all(_MIN_SIZE <= side <= _MAX_SIZE for side in (height, width)):
        raise ValueError(f"size is (height, width), each from {_MIN_SIZE} to {_MAX_SIZE} pixels, not {size!r}.")
    return height, width


class _Street:
    """One random street: `render` draws it.

    World coordinates are metres: X to the right of the camera, Y up from the ground, Z ahead. A *face* is a (4, 3) array
    of corners: bottom left, bottom right, top right, top left, as seen from outside.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], daylight: bool = False):
        self.rng = rng
        self.height, self.width = size
        self.raster = PILImage.new("I", (self.width * _SUPERSAMPLING, self.height * _SUPERSAMPLING))
        self.draw = ImageDraw.Draw(self.raster)
        self.shadows = PILImage.new("L", (self.width, self.height))
        self.surfaces: list[tuple[int, np.ndarray, float, float]] = []
        self.taken_columns: list[float] = []
        self._choose_camera()
        self._choose_colours()
        if daylight:
            self._use_daylight_colours()
        self._choose_layout()

    # --- what varies from scene to scene ---------------------------------------------------------------------------

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _choose_camera(self) -> None:
        self.focal = self.uniform(0.8, 1.1) * _SUPERSAMPLING * min(self.height, 0.8 * self.width)
        self.eye = self.uniform(1.5, 2.6)
        self.vanishing = np.array([self.uniform(0.28, 0.72) * self.width, self.uniform(0.36, 0.52) * self.height])
        self.vanishing *= _SUPERSAMPLING
        roll = np.deg2rad(self.uniform(-3, 3))
        self.rotation = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])

    def _choose_colours(self) -> None:
        """A palette of few hues and all lightnesses (OKLCH, Ottosson 2020), handed out around a circle.

        The lightnesses form a circle of 14 places, entered anywhere and walked either way: each class is as likely to have
        any of them, while those that meet in the picture (walls, sky and leaves; road and pavement) lie places apart.
        """
        count = 14
        lightness = np.linspace(0.32, 0.95, count) + self.rng.uniform(-0.02, 0.02, count)
        chroma = self.rng.uniform(0.02, 0.15, count)
        hue = self.uniform(0, 2 * np.pi) + self.uniform(0.3, 1.2) * self.rng.normal(size=count)
        hue += np.pi * (self.rng.random(count) < 0.25)
        circle = np.roll(_oklch_to_rgb(lightness, chroma, hue), self.rng.integers(count), axis=0)
        if self.chance(0.5):
            circle = circle[::-1]
        self.facade_colours, self.leaf_colours = circle[:3], circle[6:8]
        self.sky_colour, self.haze_colour, self.road_colour, self.pavement_colour = circle[[10, 11, 4, 9]]
        self.other_colours = circle[[3, 4, 5, 8, 9, 10, 11, 12, 13]]
        self.lamp_colour, self.glass_colour, self.tyre_colour = self.rng.permutation(circle[[3, 5, 8, 12, 13]])[:3]
        self.haze_distance = self.uniform(40, 200)
        azimuth, elevation = self.uniform(0, 2 * np.pi), self.uniform(0.3, 1.0)
        level = math.cos(elevation)
        self.light = (math.cos(azimuth) * level, math.sin(elevation), math.sin(azimuth) * level)
        self.light_strength = self.uniform(0.12, 0.4)

    def _use_daylight_colours(self) -> None:
        for name, colours in _DAYLIGHT.items():
            setattr(self, f"{name}_colours", colours / 255)
        for name, colour in _DAYLIGHT_OF_ONE.items():
            setattr(self, f"{name}_colour", colour / 255)

    def _choose_layout(self) -> None:
        lane = self.uniform(2.6, 3.6)
        self.road = (-lane * self.rng.choice([0.5, 0.7, 1.5]), lane * self.rng.choice([0.5, 0.7, 1.5]))
        self.walls = (self.road[0] - self.uniform(1.8, 4.0), self.road[1] + self.uniform(1.8, 4.0))
        start = self.uniform(9, 30)
        self.junction = (start, start + self.uniform(5, 9)) if self.chance(0.4) else None
        self.end = self.uniform(25, 60) if self.chance(0.4) else None

    def other_colour(self, *avoided: np.ndarray) -> np.ndarray:
        """A colour far from `avoided` that no wall or tree has: the best of six draws, so that none is sure to win."""
        candidates = self.other_colours[self.rng.integers(len(self.other_colours), size=6)]
        distances = [np.abs(candidates - colour).sum(axis=1) for colour in avoided]
        return candidates[np.minimum.reduce(distances).argmax()]

    # --- drawing ---------------------------------------------------------------------------------------------------

    def surface(self, class_id: int, colour: np.ndarray, distance: float = 0.0, shade: float = 1.0) -> int:
        """Registers a surface of one colour, dimmed by `shade` and hazed by its distance in metres; returns its number."""
        self.surfaces.append((class_id, colour, distance, shade))
        return len(self.surfaces) - 1

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points `(..., 3)` to whole pixels `(..., 2)` of the raster."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        scale = self.focal / np.maximum(z, 0.5)
        offsets = np.empty((*x.shape, 2))
        offsets[..., 0] = x * scale
        offsets[..., 1] = (self.eye - y) * scale
        return np.rint(offsets @ self.rotation + self.vanishing).astype(int)

    def fill(self, points: np.ndarray, surface: int) -> None:
        """Fills one polygon `(n, 3)`, or several `(m, n, 3)`, given in world coordinates."""
        pixels = self.project(points)
        if pixels.ndim == 3:
            outside = (pixels.max(axis=1) < 0).any(axis=1) | (pixels.min(axis=1) >= self.raster.size).any(axis=1)
            pixels = pixels[~outside]
        for polygon in pixels.reshape(-1, 2 * points.shape[-2]).tolist():
            self.draw.polygon(polygon, fill=surface)

    def cast_shadow(self, points: np.ndarray) -> None:
        polygon = self.project(points) / _SUPERSAMPLING
        ImageDraw.Draw(self.shadows).polygon(polygon.ravel().tolist(), fill=255)

    def solid(self, faces: np.ndarray, class_id: int, colour: np.ndarray) -> list[tuple[int, np.ndarray, float]]:
        """Draws the faces `(n, 4, 3)` of a convex solid that the camera sees; returns their number, corners, shade."""
        pixels = self.project(faces)
        along, up = pixels[:, 2] - pixels[:, 0], pixels[:, 3] - pixels[:, 1]
        facing = along[:, 0] * up[:, 1] < along[:, 1] * up[:, 0]  # corners run anticlockwise
        facing &= (pixels.max(axis=1) > 0).all(axis=1) & (pixels.min(axis=1) < self.raster.size).all(axis=1)
        visible = []
        for number in np.flatnonzero(facing).tolist():
            face = faces[number]
            (ax, ay, az), (bx, by, bz) = (face[1] - face[0]).tolist(), (face[3] - face[0]).tolist()
            normal = (ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx)
            cosine = sum(map(operator.mul, normal, self.light)) / (math.hypot(*normal) + 1e-9)
            shade = 1 + self.light_strength * (cosine - 1)
            surface = self.surface(class_id, colour, face[:, 2].min(), shade)
            self.draw.polygon(pixels[number].ravel().tolist(), fill=surface)
            visible.append((number, face, shade))
        return visible

    # --- the street ------------------------------------------------------------------------------------------------

    def render(self) -> tuple[PILImage.Image, PILImage.Image]:
        self._sky()
        self._ground()
        self._skyline()
        for side in self.rng.permutation(2):
            self._street_side(int(side))
        self._furniture()
        surfaces = np.asarray(self.raster)
        return self._develop(surfaces), self._label(surfaces)

    def _sky(self) -> None:
        top, bottom = self.sky_colour, self.haze_colour
        self.draw.rectangle((0, 0, *self.raster.size), fill=self.surface(_SKY, top))
        width, height = self.raster.size
        if self.chance(0.5):
            radius = self.uniform(0.04, 0.1) * height
            centre = (self.uniform(0, width), self.uniform(0, self.vanishing[1] * 0.8))
            self._ellipse(centre, radius, radius, self.surface(_SKY, self.other_colour(top)))
        cloud = self.surface(_SKY, 0.5 * bottom + 0.5 * self.other_colour(top))
        for _ in range(self.rng.integers(0, 5)):
            x, y = self.uniform(0, width), self.uniform(0, self.vanishing[1])
            extent = self.uniform(0.05, 0.14) * height
            for _ in range(5):
                offset = (x + self.uniform(-1.6, 1.6) * extent, y + self.uniform(-0.25, 0.1) * extent)
                self._ellipse(offset, extent * self.uniform(0.5, 1.2), extent * self.uniform(0.2, 0.45), cloud)

    def _ellipse(self, centre: Sequence[float], radius_x: float, radius_y: float, surface: int) -> None:
        x, y = centre
        box = [round(value) for value in (x - radius_x, y - radius_y, x + radius_x, y + radius_y)]
        self.draw.ellipse(box, fill=surface)

    def _ground(self) -> None:
        marking, joint = self.other_colour(self.road_colour), self.other_colour(self.pavement_colour)
        pavement = self.surface(_PAVEMENT, self.pavement_colour)
        road = self.surface(_ROAD, self.road_colour)
        self.fill(_flat(-400, 400, 0.5, 400), pavement)
        seams = self.surface(_PAVEMENT, 0.4 * self.pavement_colour + 0.6 * joint)
        rows = np.arange(1.5, 16, self.uniform(1.0, 2.0))
        self.fill(_flat(-25, 25, rows, rows + 0.08), seams)
        middles = (np.array(self.walls) + self.road) / 2
        self.fill(_flat(middles - 0.04, middles + 0.04, 0.5, 30), seams)
        kerb = self.surface(_PAVEMENT, 0.5 * self.pavement_colour + 0.5 * joint)
        self.fill(_flat(self.road[0] - 0.25, self.road[1] + 0.25, 0.5, 400), kerb)
        if self.junction:
            self.fill(_flat(-400, 400, self.junction[0] - 0.3, self.junction[1] + 0.3), kerb)
            self.fill(_flat(-400, 400, *self.junction), road)
        self.fill(_flat(*self.road, 0.5, 400), road)
        self._markings(self.surface(_ROAD, 0.3 * self.road_colour + 0.7 * marking))

    def _markings(self, surface: int) -> None:
        left, right = self.road
        middle, gap = (left + right) / 2, self.uniform(2.5, 5)
        if self.chance(0.85):
            dashes = np.arange(self.uniform(1, 4), 60, gap)
            self.fill(_flat(middle - 0.09, middle + 0.09, dashes, dashes + 0.5 * gap), surface)
        if self.chance(0.4):
            edges = np.array([left + 0.25, right - 0.4])
            self.fill(_flat(edges, edges + 0.14, 0.5, 400), surface)
        if self.chance(0.45):
            z = self.junction[0] - 3.5 if self.junction else self.uniform(4, 12)
            bars = np.arange(left + 0.3, right - 0.4, 1.0)
            self.fill(_flat(bars, bars + 0.5, z, z + 2.6), surface)

    def _skyline(self) -> None:
        """What stands behind the street: a row of distant houses, or a building that closes it."""
        for x in np.arange(-110, 110, self.uniform(14, 24)):
            if self.chance(0.6):
                self._house(x, x + self.uniform(8, 16), _FAR, _FAR + 5, self.uniform(3, 14))
        if self.end:
            left, right = self.walls[0] - self.uniform(2, 12), self.walls[1] + self.uniform(2, 12)
            self._house(left, right, self.end, self.end + 10, self.uniform(4, 14))

    def _street_side(self, side: int) -> None:
        """The houses of one side, far to near, with gaps that a fence or trees may fill."""
        wall, outward = self.walls[side], (-1, 1)[side]
        storeys = self.uniform(4, 9)
        z, far = self.uniform(0.8, 3.0), (self.end or _FAR) - 1
        plots = []
        while z < far:
            depth = self.uniform(5, 13)
            if self.junction and z < self.junction[1] and z + depth > self.junction[0]:
                if self.junction[0] - z > 4:
                    plots.append((z, self.junction[0] - 0.8))
                z = self.junction[1] + 0.8
                continue
            plots.append((z, z + depth))
            z += depth + (self.uniform(1, 4) if self.chance(0.2) else 0)
        density = self.uniform(0.35, 1.0)
        for near, far in reversed(plots):
            if self.chance(density):
                inner, outer = wall, wall + outward * self.uniform(6, 10)
                self._house(min(inner, outer), max(inner, outer), near, far, storeys * self.uniform(0.7, 1.5))
            elif near < _NEARBY:
                for _ in range(self.rng.integers(0, 3)):
                    x, z = wall + outward * self.uniform(1.2, 5), self.uniform(max(near, 5), max(far, 6))
                    self._tree(x, z, self.uniform(4, 8))
                if self.chance(0.8):
                    self._fence(wall, near, min(far, _NEARBY))

    def _house(self, left: float, right: float, near: float, far: float, height: float) -> None:
        colour = self.facade_colours[self.rng.integers(3)]
        glass, trim = self.other_colour(colour), self.other_colour(colour)
        faces = _frustum((left, right, near, far), 0, (left, right, near, far), height)
        storey, pitch = self.uniform(2.3, 3.0), self.uniform(1.5, 2.5)
        fill_u, fill_v, door = self.uniform(0.4, 0.75), self.uniform(0.4, 0.7), self.uniform(0.1, 0.8)
        if self.chance(0.15):
            fill_u = 1.0  # bands of windows
        for number, face, shade in self.solid(faces, _BUILDING, colour):
            if number == _TOP or np.ptp(self.project(face), axis=0).min() < 12:
                continue  # too narrow for windows to show
            length = math.dist(face[0], face[1])
            panes = _grid(face, max(int(length / pitch), 1), max(int(height / storey), 1), fill_u, fill_v)
            lit = self.rng.random(len(panes)) < 0.25
            self.fill(panes[~lit], self.surface(_BUILDING, glass, near, shade))
            self.fill(panes[lit], self.surface(_BUILDING, self.lamp_colour, near, shade))
            edge = self.surface(_BUILDING, trim, near, shade)
            self.fill(_panel(face, 0, 1, 1 - 0.35 / height, 1), edge)
            self.fill(_panel(face, door, door + min(1.1 / length, 0.2), 0, min(2.1 / height, 0.8)), edge)

    def _fence(self, x: float, near: float, far: float) -> None:
        """A solid fence of upright or level boards along the street at X = `x`."""
        near, height = max(near, 0.8), self.uniform(1.3, 2.0)
        colour = self.other_colour(self.pavement_colour, self.road_colour)
        post = self.other_colour(colour)
        left, right = (far, near) if x > 0 else (near, far)
        face = np.array([(x, 0, left), (x, 0, right), (x, height, right), (x, height, left)])
        self.fill(face, self.surface(_FENCE, colour, near))
        boards = self.surface(_FENCE, 0.35 * colour + 0.65 * post, near)
        if self.chance(0.7):
            self.fill(_grid(face, max(int((far - near) / 0.5), 1), 1, 0.5, 1.0), boards)
            self.fill(_grid(face, 1, 2, 1.0, 0.2), self.surface(_FENCE, colour * 0.8, near))
        else:
            self.fill(_grid(face, 1, 4, 1.0, 0.5), boards)
            posts = _grid(face, max(int((far - near) / 2.5), 1), 1, 0.06, 1.0)
            self.fill(posts, self.surface(_FENCE, post, near))

    def _furniture(self) -> None:
        """Everything that stands free in the street, far to near."""
        things = [(self._spot(self.road, 4.5, 13, margin=1.0, room=0.15), self._car) for _ in range(self._count(2, 4))]
        for _ in range(self._count(1, 3)):
            things.append((self._spot(self._pavement(), 3, 6), self._sign))
        for _ in range(self._count(1, 3)):
            things.append((self._spot(self._pavement(), 4, 11), lambda x, z: self._tree(x, z, self.uniform(3.5, 6.0))))
        for _ in range(self._count(2, 4)):
            lane = self.road if self.chance(0.25) else self._pavement()
            things.append((self._spot(lane, 3, 5.5), self._person))
        for side in range(2):
            if self.chance(0.4):
                spot = self.road[side] + (-0.35, 0.35)[side], self.uniform(2, 6)
                things.append((spot, lambda x, z: self._fence(x, z, z + self.uniform(4, 9))))
        things = [(spot, paint) for spot, paint in things if spot is not None]
        for (x, z), paint in sorted(things, key=lambda thing: -thing[0][1]):
            paint(x, z)

    def _count(self, fewest: int, most: int) -> int:
        return int(self.rng.integers(fewest, most + 1))

    def _pavement(self) -> tuple[float, float]:
        side = self.rng.integers(2)
        return tuple(sorted((float(self.road[side]), float(self.walls[side]))))

    def _spot(
        self, lane: tuple[float, float], near: float, far: float, margin: float = 0.4, room: float = 0.06
    ) -> tuple[float, float] | None:
        """A place `(X, Z)` in the picture, `room` (of its width) beside the others; None where none is soon found."""
        for _ in range(8):
            z = 1 / self.uniform(1 / far, 1 / near)
            x = self.uniform(lane[0] + margin, max(lane[1] - margin, lane[0] + margin))
            column = (self.vanishing[0] + self.focal * x / z) / self.raster.width
            if 0.03 < column < 0.97 and all(abs(column - other) > room for other in self.taken_columns):
                self.taken_columns.append(column)
                return x, z
        return None

    def _car(self, x: float, z: float) -> None:
        """A car, a hatchback or a van, along the street or turned across it."""
        colour = self.other_colour(self.road_colour)
        glass, tyre = (
            part if np.abs(part - colour).sum() >= 0.5 else self.other_colour(colour)
            for part in (self.glass_colour, self.tyre_colour)
        )
        end, half = self.uniform(3.6, 4.8) / 2, self.uniform(0.85, 1.0)
        waist, roof = self.uniform(0.8, 1.0), self.uniform(1.4, 1.65)
        rear, front = self.rng.choice([0.15, 0.5, 0.9]), self.uniform(0.9, 1.3)
        if self.chance(0.2):  # a van
            roof, rear, front = self.uniform(1.9, 2.4), 0.05, 0.6
        yaw = self.rng.choice([0.0, np.pi / 2, np.pi, -np.pi / 2], p=[0.4, 0.1, 0.4, 0.1]) + self.uniform(-0.12, 0.12)
        sine, cosine = np.sin(yaw), np.cos(yaw)
        centre = z + abs(cosine) * end + abs(sine) * half

        def place(local: np.ndarray) -> np.ndarray:
            """Local (across, up, along) metres to the world."""
            across, up, along = local[..., 0], local[..., 1], local[..., 2]
            return np.stack([x + cosine * across + sine * along, up, centre - sine * across + cosine * along], axis=-1)

        self.cast_shadow(place(_flat(-half - 0.15, half + 0.25, -end - 0.1, end + 0.1)))
        floor = (-half, half, -end, end)
        chassis = _frustum((-half + 0.08, half - 0.08, -end + 0.3, end - 0.3), 0.08, floor, 0.3)
        self.solid(place(chassis), _CAR, tyre)
        sides = self._bodywork(place(_frustum(floor, 0.25, floor, waist)), colour, tyre, z)
        sill = (-half + 0.04, half - 0.04, -end + rear * 0.5, end - front)
        ceiling = (-half + 0.16, half - 0.16, -end + rear, end - front - 0.55)
        self._cabin(place(_frustum(sill, waist, ceiling, roof)), colour, glass, z)

        rubber, hub = self.surface(_CAR, tyre, z), self.surface(_CAR, 0.5 * (tyre + colour), z)
        for across in [half + 0.02] * (_RIGHT in sides) + [-half - 0.02] * (_LEFT in sides):
            for along in (-end + 0.75, end - 0.75):
                for radius, surface in ((0.36, rubber), (0.18, hub)):
                    rim = np.column_stack([np.full(16, across), _CIRCLE * radius + (0.34, along)])
                    self.fill(place(rim), surface)

    def _bodywork(self, faces: np.ndarray, colour: np.ndarray, tyre: np.ndarray, distance: float) -> set[int]:
        """A car's body with lamps, bumpers and trim strips; returns which of its faces the camera sees."""
        visible = self.solid(faces, _CAR, colour)
        lamp = self.surface(_CAR, self.other_colour(colour), distance)
        for number, face, shade in visible:
            if number in (_FRONT, _BACK):
                for left in (0.06, 0.74):
                    self.fill(_panel(face, left, left + 0.2, 0.5, 0.8), lamp)
                self.fill(_panel(face, 0, 1, 0, 0.25), self.surface(_CAR, tyre, distance))
            elif number in (_RIGHT, _LEFT):
                self.fill(_panel(face, 0.02, 0.98, 0.45, 0.55), self.surface(_CAR, colour * 0.8, distance, shade))
        return {number for number, _, _ in visible}

    def _cabin(self, faces: np.ndarray, colour: np.ndarray, glass: np.ndarray, distance: float) -> None:
        for number, face, shade in self.solid(faces, _CAR, colour):
            panes = {_FRONT: [(0.08, 0.92)], _BACK: [(0.08, 0.92)], _TOP: []}.get(number, [(0.06, 0.48), (0.54, 0.94)])
            for left, right in panes:
                self.fill(_panel(face, left, right, 0.1, 0.85), self.surface(_CAR, glass, distance, shade))

    def _tree(self, x: float, z: float, height: float) -> None:
        """A broad-leaved tree, a poplar or a conifer."""
        leaves = self.leaf_colours[self.rng.integers(2)]
        bark = self.other_colour(leaves)
        wood = self.surface(_TREE, bark, z)
        dark, bright = self.surface(_TREE, leaves * 0.85, z), self.surface(_TREE, 0.6 * leaves + 0.4 * bark, z)
        self.cast_shadow(_disc(x + 0.3, z, 0.28 * height))

        def fill(points: np.ndarray, surface: int) -> None:
            self.fill(_upright(x, z, points * height), surface)

        fill(np.array([(-0.06, 0), (0.06, 0), (0.04, 0.9), (-0.04, 0.9)]), wood)
        shape = self.rng.integers(4)
        if shape == 0:
            tufts = self.rng.uniform((-0.14, 0.25), (0.14, 0.65), (10, 2))
            spread = np.array([0.18, 0.18])
            for foot, reach in ((0.2, 0.3), (0.4, 0.24), (0.62, 0.17)):
                fill(np.array([(-reach, foot), (reach, foot), (0, foot + 0.38)]), dark)
        else:
            spread = np.array([0.16, 0.33] if shape == 1 else [0.26, 0.19])
            centre = np.array([0, 0.68])
            clumps = np.clip(self.rng.normal(size=(9, 2)), -1.4, 1.4) * 0.65 * spread
            clumps[0] = 0
            fill(_CIRCLE * spread * np.linspace(1, 0.5, 9)[:, None, None] + (centre + clumps)[:, None], dark)
            tufts = centre + np.clip(self.rng.normal(size=(14, 2)), -1.5, 1.5) * 0.5 * spread + [0, 0.05]
        fill(_CIRCLE * spread * self.rng.uniform(0.1, 0.25, (len(tufts), 1, 1)) + tufts[:, None], bright)

    def _person(self, x: float, z: float) -> None:
        """A walking person: legs, torso or coat, arms, head."""
        size = self.uniform(1.5, 2.0)
        top = self.other_colour(self.pavement_colour, self.facade_colours[1])
        bottom = self.other_colour(self.pavement_colour, self.road_colour)
        skin, hair = self.other_colour(top), self.other_colour(top)
        stride, swing = self.uniform(0.02, 0.16), self.uniform(-0.1, 0.1)
        legs = self.surface(_PERSON, bottom, z)
        coat, sleeve = self.surface(_PERSON, top, z), self.surface(_PERSON, top * 0.85, z)
        self.cast_shadow(_disc(x + 0.1, z, 0.35))
        shoulder = self.uniform(0.13, 0.17)

        def fill(points: Sequence[tuple[float, float]], surface: int) -> None:
            self.fill(_upright(x, z, np.asarray(points) * size), surface)

        for foot in (-stride, stride):
            fill([(foot - 0.06, 0), (foot + 0.06, 0), (0.11, 0.5), (-0.11, 0.5)], legs)
        for side in (-1, 1):
            hand = side * (shoulder + 0.05) + swing
            arm = side * shoulder
            fill([(hand - 0.04, 0.42), (hand + 0.04, 0.42), (arm + 0.05, 0.8), (arm - 0.05, 0.8)], sleeve)
        hem = self.rng.choice([0.44, 0.3])
        fill([(-0.13, hem), (0.13, hem), (shoulder, 0.8), (0.06, 0.85), (-0.06, 0.85), (-shoulder, 0.8)], coat)
        fill(_CIRCLE * [0.075, 0.09] + [0, 0.91], self.surface(_PERSON, skin, z))
        fill(_CIRCLE[:9] * [0.08, 0.08] + [0, 0.93], self.surface(_PERSON, hair, z))
        if self.chance(0.4):
            fill([(-0.2, 0.5), (-0.08, 0.5), (-0.08, 0.76), (-0.2, 0.76)], self.surface(_PERSON, hair * 0.9, z))

    def _sign(self, x: float, z: float) -> None:
        """A post with a board: disc, triangle, diamond, octagon or rectangle."""
        backdrops = self.pavement_colour, self.facade_colours[1], self.sky_colour
        post, rim = self.other_colour(*backdrops), self.other_colour(*backdrops)
        plate = self.other_colour(rim)
        height, radius = self.uniform(2.1, 3.0), self.uniform(0.45, 0.65)
        pole = [(-0.14, 0), (0.14, 0), (0.14, height), (-0.14, height)]
        self.fill(_upright(x, z, pole), self.surface(_SIGN, post, z))
        corners, turn = _BOARDS[self.rng.integers(len(_BOARDS))]
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        board = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        centre = np.array([0, height])
        self.fill(_upright(x, z, 1.1 * board + centre), self.surface(_SIGN, rim, z))
        self.fill(_upright(x, z, 0.78 * board + centre), self.surface(_SIGN, plate, z))
        bar = np.array([(-0.4, -0.12), (0.4, -0.12), (0.4, 0.12), (-0.4, 0.12)])
        if self.chance(0.5):
            bar = bar[:, ::-1]
        self.fill(_upright(x, z, radius * bar + centre), self.surface(_SIGN, rim, z))

    # --- from surfaces to picture and label ------------------------------------------------------------------------

    def _label(self, surfaces: np.ndarray) -> PILImage.Image:
        """Class numbers; void where another class comes within half a pixel."""
        classes = np.pad(self._classes().take(surfaces), 1, mode="edge")
        lowest, highest = (_window(_window(classes, end).T, end).T for end in (np.minimum, np.maximum))
        return PILImage.fromarray(np.where(lowest == highest, lowest, np.uint8(VOID)))

    def _classes(self) -> np.ndarray:
        return np.array([surface[0] for surface in self.surfaces], dtype=np.uint8)

    def _develop(self, surfaces: np.ndarray) -> PILImage.Image:
        """Looks the colours up and adds the sky's gradient, texture, shadows, light, contrast and noise."""
        _, colours, distances, shades = map(np.array, zip(*self.surfaces, strict=True))
        haze = 1 - np.exp(-distances / self.haze_distance)[:, None]
        table = colours * shades[:, None] * (1 - haze) + self.haze_colour * haze
        table = np.rint(np.clip(table, 0, 1) * 255).astype(np.uint8)
        flat = PILImage.fromarray(table.take(surfaces, axis=0)).reduce(_SUPERSAMPLING)
        picture = np.asarray(flat, dtype=np.float32) / 255
        centres = surfaces[::_SUPERSAMPLING, ::_SUPERSAMPLING]
        classes = self._classes().take(centres)

        descent = np.arange(self.height, dtype=np.float32)[:, None] * _SUPERSAMPLING / self.vanishing[1]
        dawn = np.where(classes == _SKY, np.minimum(descent, 1), 0)[..., None].astype(np.float32)
        picture += dawn * (self.haze_colour.astype(np.float32) - picture)

        shadow = np.asarray(self.shadows, dtype=np.float32) / 255 * ((classes == _ROAD) | (classes == _PAVEMENT))
        light = (1 + self._texture(centres)) * (1 - self.uniform(0.25, 0.5) * shadow)
        light *= 1 + self.uniform(0.0, 0.2) * self._clouded(2, 3)
        gain = self.uniform(0.55, 0.8) if self.chance(0.15) else self.uniform(0.85, 1.15)
        picture *= light[..., None] * (gain * (1 + 0.06 * self.rng.normal(size=3))).astype(np.float32)
        picture += self.uniform(0.003, 0.02) * self.rng.standard_normal(picture.shape, dtype=np.float32)
        return PILImage.fromarray(np.rint(picture.clip(0, 1) * 255).astype(np.uint8))

    def _texture(self, surfaces: np.ndarray) -> np.ndarray:
        """Relative brightness `(H, W)`: each surface shows one of four patterns in a strength of its own."""
        rows, columns = np.ogrid[: self.height, : self.width]
        angle, period = self.uniform(0, math.pi), self.uniform(3, 8)
        phase = (rows * math.sin(angle) + columns * math.cos(angle)) * (2 * math.pi / period)
        stripes = np.sin(phase.astype(np.float32))
        grain = 2 * self.rng.random((self.height, self.width), dtype=np.float32) - 1
        blots, patches = (self._clouded(max(self.height // k, 2), max(self.width // k, 2)) for k in (4, 16))
        count = len(self.surfaces)
        kinds = self.rng.choice(4, size=count, p=[0.1, 0.3, 0.3, 0.3])
        strengths = self.rng.uniform(0, np.array([0.06, 0.1, 0.1, 0.1])[kinds]).astype(np.float32)
        return np.choose(kinds.take(surfaces), [stripes, grain, blots, patches]) * strengths.take(surfaces)

    def _clouded(self, rows: int, columns: int) -> np.ndarray:
        """Smooth noise in [-1, 1] at the picture's size, from a grid of rows × columns."""
        grid = PILImage.fromarray(self.rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
        return np.asarray(grid.resize((self.width, self.height), PILImage.Resampling.BILINEAR))


def _oklch_to_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """OKLCH `(n,)` each to sRGB `(n, 3)` in [0, 1], clipped to the gamut (Ottosson 2020)."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    cones = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ (cones @ lab) ** 3, 0, 1).T
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _flat(left: ArrayLike, right: ArrayLike, near: ArrayLike, far: ArrayLike) -> np.ndarray:
    """Rectangles on the ground, `(..., 4, 3)` for bounds `(...)`."""
    shape = np.broadcast_shapes(*map(np.shape, (left, right, near, far)))
    corners = np.zeros((*shape, 4, 3))
    for corner, (x, z) in enumerate(((left, near), (right, near), (right, far), (left, far))):
        corners[..., corner, 0] = x
        corners[..., corner, 2] = z
    return corners


def _disc(x: float, z: float, radius: float) -> np.ndarray:
    """A disc on the ground, `(16, 3)`."""
    return np.column_stack([x + radius * _CIRCLE[:, 0], np.zeros(len(_CIRCLE)), z + radius * _CIRCLE[:, 1]])


def _upright(x: float, z: float, points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Points `(..., 2)`, sideways and up from the foot `(x, z)`, as a billboard `(..., 3)` that faces the camera."""
    points = np.asarray(points, dtype=float)
    billboard = np.empty((*points.shape[:-1], 3))
    billboard[..., :2] = points
    billboard[..., 0] += x
    billboard[..., 2] = z
    return billboard


def _frustum(base: Sequence[float], bottom: float, lid: Sequence[float], top: float) -> np.ndarray:
    """Faces `(5, 4, 3)`, front, right, back, left and top, between two rectangles (left, right, near, far) at two heights."""
    low, high = _flat(*base), _flat(*lid)
    low[:, 1], high[:, 1] = bottom, top
    after = [1, 2, 3, 0]
    faces = np.empty((5, 4, 3))
    faces[:4, 0], faces[:4, 1], faces[:4, 2], faces[:4, 3] = low, low[after], high[after], high
    faces[_TOP] = high
    return faces


def _window(values: np.ndarray, reduce: np.ufunc) -> np.ndarray:
    """Reduces windows of one pixel and half a pixel to either side along the first axis."""
    last = len(values) - _SUPERSAMPLING - 1
    return reduce.reduce([values[start : start + last : _SUPERSAMPLING] for start in range(_SUPERSAMPLING + 2)])


def _panel(face: np.ndarray, left: float, right: float, bottom: float, top: float) -> np.ndarray:
    """The part `(4, 3)` of a face between fractions of its width and height."""
    corners = np.array([[left, bottom], [right, bottom], [right, top], [left, top]])
    return _on_face(face, corners)


def _grid(face: np.ndarray, columns: int, rows: int, fill_u: float, fill_v: float) -> np.ndarray:
    """Panels `(columns * rows, 4, 3)` centred in the cells of a grid, each filling the given fractions of its cell."""
    panels = np.empty((rows, columns, 4, 2))
    panels[..., 0] = (np.arange(columns)[:, None] + 0.5 + fill_u * _SQUARE[:, 0]) / columns
    panels[..., 1] = (np.arange(rows)[:, None, None] + 0.5 + fill_v * _SQUARE[:, 1]) / rows
    return _on_face(face, panels.reshape(-1, 4, 2))


def _on_face(face: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Fractions `(..., 2)` of a face's width and height to world points `(..., 3)`."""
    u, v = fractions[..., :1], fractions[..., 1:]
    lower, upper = face[0] + u * (face[1] - face[0]), face[3] + u * (face[2] - face[3])
    return lower + v * (upper - lower)
