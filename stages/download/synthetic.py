"""Procedural faces: a training set and verification protocols that need no photographs.

An identity is a point in a parametric space of faces (`Face`); a photograph of it is a point in a space of
circumstances (`View`). The head is an ellipsoid with a relief on it (nose, brow ridge, eye sockets, lips, ...): a
height for every direction from its centre, kept as a map in Lambert's azimuthal equal-area projection. A photograph
casts a ray for every pixel to that surface, paints it in the face's own coordinates, lights it, and passes it through a
camera (focus, exposure, noise, JPEG).

Everything follows from the seed and the numbers of identity, video and photograph alone, so that any process may
render any part of a set. Lengths on the head are in units of about 10 cm: x to the right, y down, z towards the
camera, the origin in the middle of the head between the ears.
"""

import math
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any, Self, cast

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.params import Synthetic
from pipeline.tables import PAIRS
from stages.download.errors import SourceError

Floats = npt.NDArray[np.floating[Any]]
"""float32, except where points are projected; NumPy keeps it when Python's own floats join in. Pictures are
(3, height, width) and colours (3, 1, 1), planes being several times faster to mix than pixels."""
Image = npt.NDArray[np.uint8]

# How hard the sets are: factors on the spread of the traits below; 1 is the default run's difficulty.
IDENTITY_SPREAD = 1.0
"""Differences between people; larger is easier."""
POSE = 1.0
"""Yaw, pitch and roll; larger is harder, as are the following."""
EXPRESSION = 1.0
LIGHT = 1.0
CAMERA = 1.0
"""Blur, noise, exposure and compression."""
GLASSES, HAT, FRINGE, VEIL = 0.15, 0.06, 0.25, 0.05
"""Shares of photographs in which something hides a part of the face."""


def _trait(
    mean: float,
    spread: float,
    factor: float = 1.0,
    *,
    wobble: float = 0.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A field drawn from a normal distribution, cut at two deviations and at `low` and `high`.

    `factor` multiplies the deviation, `spread`, and `wobble`, how far the value moves over the frames of a video.
    """
    return field(metadata={"normal": (mean, spread * factor), "wobble": wobble * factor, "range": (low, high)})


@dataclass(frozen=True)
class _Drawn:
    """Values drawn at random, each by its field's `_trait`."""

    @classmethod
    def draw(cls, rng: np.random.Generator, frame: int | None = None) -> Self:
        """Values for one identity, one photograph, or one frame of a video (`rng` then being the video's)."""
        values = {}
        for item in fields(cls):
            (mean, spread), (low, high) = item.metadata["normal"], item.metadata["range"]
            deviation = min(max(rng.standard_normal(), -2.0), 2.0)
            phase, pace = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 1.0)
            motion = 0.0 if frame is None else item.metadata["wobble"] * math.sin(phase + pace * frame)
            values[item.name] = min(max(mean + spread * deviation + motion, low), high)
        return cls(**values)


@dataclass(frozen=True)
class Face(_Drawn):
    """What makes a person: the same in every photograph of them."""

    head_width: float = _trait(0.77, 0.035, IDENTITY_SPREAD)
    head_height: float = _trait(1.13, 0.04, IDENTITY_SPREAD)
    head_depth: float = _trait(0.95, 0.03, IDENTITY_SPREAD)
    crown: float = _trait(0.12, 0.05, IDENTITY_SPREAD)
    """Width of the skull's upper half against the head's ellipse."""
    jaw: float = _trait(0.0, 0.10, IDENTITY_SPREAD)
    """Width of the jaw against the head's ellipse."""
    chin: float = _trait(0.06, 0.025, IDENTITY_SPREAD)
    chin_width: float = _trait(0.26, 0.05, IDENTITY_SPREAD)
    cleft: float = _trait(0.0, 0.012, IDENTITY_SPREAD, low=0.0)
    cheekbone: float = _trait(0.05, 0.02, IDENTITY_SPREAD)
    cheekbone_y: float = _trait(0.20, 0.04, IDENTITY_SPREAD)
    hollow: float = _trait(0.03, 0.03, IDENTITY_SPREAD)
    forehead: float = _trait(0.02, 0.025, IDENTITY_SPREAD)
    temple: float = _trait(0.03, 0.02, IDENTITY_SPREAD)
    eye_x: float = _trait(0.325, 0.022, IDENTITY_SPREAD)
    eye_y: float = _trait(-0.04, 0.025, IDENTITY_SPREAD)
    eye_width: float = _trait(0.160, 0.014, IDENTITY_SPREAD)
    eye_open: float = _trait(0.070, 0.012, IDENTITY_SPREAD)
    eye_tilt: float = _trait(0.04, 0.10, IDENTITY_SPREAD)
    eye_round: float = _trait(0.0, 0.35, IDENTITY_SPREAD)
    """Where the upper lid is highest, inwards or outwards."""
    socket: float = _trait(0.075, 0.025, IDENTITY_SPREAD)
    crease: float = _trait(0.055, 0.018, IDENTITY_SPREAD, low=0.02)
    iris: float = _trait(0.066, 0.004, IDENTITY_SPREAD)
    iris_dark: float = _trait(0.5, 0.35, IDENTITY_SPREAD, low=0.0, high=1.0)
    iris_blue: float = _trait(0.3, 0.35, IDENTITY_SPREAD, low=0.0, high=1.0)
    brow_y: float = _trait(-0.24, 0.03, IDENTITY_SPREAD)
    brow_arch: float = _trait(0.045, 0.025, IDENTITY_SPREAD)
    brow_tilt: float = _trait(0.0, 0.10, IDENTITY_SPREAD)
    brow_thick: float = _trait(0.034, 0.010, IDENTITY_SPREAD, low=0.012)
    brow_length: float = _trait(0.21, 0.02, IDENTITY_SPREAD)
    brow_gap: float = _trait(0.12, 0.025, IDENTITY_SPREAD)
    brow_ridge: float = _trait(0.035, 0.02, IDENTITY_SPREAD)
    nose_tip_y: float = _trait(0.37, 0.035, IDENTITY_SPREAD)
    nose_tip: float = _trait(0.215, 0.03, IDENTITY_SPREAD)
    nose_bridge: float = _trait(0.075, 0.025, IDENTITY_SPREAD)
    nose_bridge_width: float = _trait(0.13, 0.018, IDENTITY_SPREAD)
    nose_hump: float = _trait(0.0, 0.018, IDENTITY_SPREAD)
    nose_width: float = _trait(0.145, 0.022, IDENTITY_SPREAD)
    nose_ball: float = _trait(0.04, 0.018, IDENTITY_SPREAD)
    nostril: float = _trait(0.055, 0.008, IDENTITY_SPREAD)
    mouth_y: float = _trait(0.66, 0.03, IDENTITY_SPREAD)
    mouth_width: float = _trait(0.245, 0.025, IDENTITY_SPREAD)
    lip_upper: float = _trait(0.055, 0.014, IDENTITY_SPREAD, low=0.02)
    lip_lower: float = _trait(0.075, 0.017, IDENTITY_SPREAD, low=0.03)
    lip_bow: float = _trait(0.35, 0.2, IDENTITY_SPREAD)
    lip_red: float = _trait(0.5, 0.22, IDENTITY_SPREAD)
    muzzle: float = _trait(0.05, 0.025, IDENTITY_SPREAD)
    skin: float = _trait(0.4, 0.28, IDENTITY_SPREAD, low=0.0, high=1.0)
    skin_red: float = _trait(0.0, 1.0, IDENTITY_SPREAD)
    blush: float = _trait(0.06, 0.05, IDENTITY_SPREAD)
    freckles: float = _trait(-0.1, 0.16, IDENTITY_SPREAD, low=0.0)
    hair: float = _trait(0.35, 0.22, IDENTITY_SPREAD)
    hair_red: float = _trait(0.3, 0.3, IDENTITY_SPREAD, low=0.0, high=1.0)
    hairline: float = _trait(-0.72, 0.07, IDENTITY_SPREAD)
    widow: float = _trait(0.1, 0.3, IDENTITY_SPREAD)
    """How far the hairline recedes at the temples."""
    beard: float = _trait(-0.35, 0.6, IDENTITY_SPREAD, low=0.0)
    ear: float = _trait(0.16, 0.04, IDENTITY_SPREAD)
    ear_y: float = _trait(0.13, 0.04, IDENTITY_SPREAD)
    lines: float = _trait(0.5, 0.35, IDENTITY_SPREAD, low=0.0)
    """Depth of the folds from nose to mouth and under the eyes."""


@dataclass(frozen=True)
class View(_Drawn):
    """What differs between photographs of a person. Angles are in radians."""

    yaw: float = _trait(0.0, 0.30, POSE, wobble=0.15)
    pitch: float = _trait(0.02, 0.13, POSE, wobble=0.07)
    roll: float = _trait(0.0, 0.11, POSE, wobble=0.05)
    zoom: float = _trait(0.31, 0.022, wobble=0.006)
    """Length of a head unit as a share of the picture's side."""
    shift_x: float = _trait(0.0, 0.03, wobble=0.015)
    shift_y: float = _trait(-0.02, 0.02, wobble=0.01)
    smile: float = _trait(0.25, 0.5, EXPRESSION, wobble=0.3, low=-0.3)
    open: float = _trait(-0.1, 0.5, EXPRESSION, wobble=0.3, low=0.0)
    squint: float = _trait(0.0, 0.3, EXPRESSION, wobble=0.2)
    raised: float = _trait(0.2, 0.5, EXPRESSION, wobble=0.3)
    gaze_x: float = _trait(0.0, 0.4, EXPRESSION, wobble=0.2)
    gaze_y: float = _trait(0.0, 0.2, EXPRESSION, wobble=0.1)
    stubble: float = _trait(1.0, 0.25, low=0.0)
    hair_dye: float = _trait(0.0, 0.16)
    hair_long: float = _trait(0.1, 0.6)
    hair_volume: float = _trait(0.10, 0.035, low=0.04)
    light_x: float = _trait(0.0, 0.65, LIGHT)
    light_y: float = _trait(-0.45, 0.35, LIGHT)
    contrast: float = _trait(0.6, 0.15, LIGHT, low=0.1, high=0.95)
    """Share of the light that comes from its direction; the rest is from everywhere."""
    warmth: float = _trait(0.0, 0.10, LIGHT)
    tint: float = _trait(0.0, 0.04, LIGHT)
    gloss: float = _trait(0.10, 0.05, LIGHT, low=0.0)
    exposure: float = _trait(1.0, 0.16, CAMERA, wobble=0.03)
    colour: float = _trait(0.95, 0.2, CAMERA, low=0.0)
    blur: float = _trait(0.35, 0.35, CAMERA, wobble=0.2, low=0.0)
    """Standard deviation in hundredths of the picture's side."""
    noise: float = _trait(3.5, 2.0, CAMERA, low=0.5)
    """Standard deviation of the sensor's noise, grey levels."""
    quality: float = _trait(82.0, 8.0, CAMERA, low=10.0, high=100.0)
    """Of the JPEG."""


@dataclass(frozen=True)
class Wear:
    """What a person wears, and what hides a part of the face, in one photograph."""

    glasses: bool
    hat: bool
    fringe: float
    """How far hair hangs into the forehead."""
    veil: bool
    """Something blurred in front of an edge of the face."""
    colours: Floats
    """Of clothes, hat, glasses and veil: (4, 3, 1, 1), linear light."""
    places: Floats
    """Numbers from 0 to 1 that decide forms and places: (8,)."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """For one photograph, or for all frames of a video."""
        glasses, hat, fringe, veil = (rng.random(4) < (GLASSES, HAT, FRINGE, VEIL)).tolist()
        depth = rng.uniform(0.15, 0.42) if fringe else 0.0
        colours = _muted(rng, 4)
        colours[2] *= 0.3
        return cls(glasses, hat, depth, veil, colours, rng.random(8, np.float32))


def _muted(rng: np.random.Generator, count: int) -> Floats:
    """Colours of things, most of them not very colourful, linear light: (count, 3, 1, 1)."""
    colour = np.square(rng.uniform(0.1, 0.95, (count, 3, 1, 1)))
    grey = colour.mean(axis=1, keepdims=True)
    return (grey + (colour - grey) * np.square(rng.uniform(0, 0.85, (count, 1, 1, 1)))).astype(np.float32)


# --- the head ---------------------------------------------------------------------------------------------------

_MAP = 176
"""Side of the maps of the head's surface."""
_REACH = 1.85
"""How far the maps reach: 2 would be the back of the head, 1.41 is the ears' plane."""
_OUTER, _INNER = 1.32, 0.72
"""Between these multiples of the ellipsoid the relief lies."""
_STEPS = 10


def _directions() -> tuple[Floats, Floats, Floats]:
    axis = np.linspace(-_REACH, _REACH, _MAP, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    square = np.minimum(u * u + v * v, 3.9)
    stretch = np.sqrt(1 - square / 4)
    return u * stretch, v * stretch, 1 - square / 2


_X, _Y, _Z = _directions()


def _hump(*distances: Floats | float) -> Floats:
    """A smooth bump: 1 where all distances are 0, 0 where their norm reaches 1."""
    rest = np.maximum(0, 1 - sum(np.square(distance) for distance in distances))
    return rest * rest * rest


def _edge(distance: Floats, softness: float) -> Floats:
    """A soft step: 0 below -softness, 1 above softness."""
    return np.clip(0.5 + distance * (0.5 / softness), 0, 1)


def _relief(face: Face, view: View, wear: Wear) -> Floats:
    """Height of the face over the ellipsoid in every direction, as a share of the ellipsoid's radius: (_MAP, _MAP)."""
    x, y = _X * face.head_width, _Y * face.head_height
    side, front = np.abs(x), np.maximum(_Z, 0)
    low = np.clip(_Y, 0, 1)
    smile, drop = view.smile, 0.12 * view.open
    mouth_y, width = face.mouth_y - 0.02 * smile, face.mouth_width * (1 + 0.16 * smile - 0.1 * view.open)
    tip, eye = face.nose_tip_y, face.eye_x

    relief = (1.2 * face.jaw * low + face.crown * np.clip(-_Y, 0, 1)) * _X * _X
    relief -= face.temple * _hump((side - 0.62) / 0.4, (y + 0.3) / 0.55)
    relief += face.forehead * _hump(x / 0.8, (y + 0.55) / 0.5)
    relief += face.brow_ridge * _hump((side - 0.24) / 0.42, (y - face.brow_y - 0.04) / 0.24)
    relief -= face.socket * _hump((side - eye + 0.02) / 0.32, (y - face.eye_y) / 0.26)
    relief += 0.05 * _hump((side - eye) / 0.24, (y - face.eye_y) / 0.18)
    cheek = face.cheekbone + 0.03 * max(smile, 0)
    relief += cheek * _hump((side - 0.42) / 0.4, (y - face.cheekbone_y) / 0.32)
    relief -= face.hollow * _hump((side - 0.48) / 0.28, (y - 0.58) / 0.35)
    relief += face.muzzle * _hump(x / 0.5, (y - mouth_y) / 0.4)
    relief += 0.05 * face.lip_upper / 0.055 * _hump(x / (width * 1.15), (y - mouth_y + 0.04) / 0.09)
    relief += 0.05 * face.lip_lower / 0.075 * _hump(x / width, (y - mouth_y - 0.05 - drop) / 0.10)
    relief -= 0.03 * _hump(x / (width * 1.1), (y - mouth_y - drop / 2) / (0.035 + drop / 2))
    relief -= 0.03 * _hump(x / 0.32, (y - mouth_y - 0.17 - drop) / 0.10)
    chin_y = face.head_height * 0.88 + drop
    relief += (face.chin + drop / 2) * _hump(x / (face.chin_width + 0.1), (y - chin_y) / 0.32) * np.sqrt(front)
    relief -= face.cleft * _hump(x / 0.05, (y - chin_y + 0.03) / 0.15)
    fold = side - 0.24 - 0.45 * (y - tip) * (1 + 0.2 * smile)
    relief -= 0.02 * (face.lines + max(smile, 0)) * _hump(fold / 0.09, (y - tip - 0.12) / 0.25)
    relief += _nose(face, x, y)
    relief += face.ear * _hump((_Z + 0.12) / 0.22, (y - face.ear_y) / 0.33, np.maximum(0.5 - side, 0) * 4)
    relief += view.hair_volume * _hair(face, view, wear, x, y, _Z, 0.12)
    return relief + 0.06 * _hat(wear, y, _Z, 0.03) if wear.hat else relief


def _nose(face: Face, x: Floats, y: Floats) -> Floats:
    side, tip = np.abs(x), face.nose_tip_y
    along = (y - face.eye_y + 0.1) / (tip - face.eye_y + 0.1)
    down = np.clip(along, 0, 1)
    height = face.nose_bridge + (face.nose_tip - face.nose_bridge) * down * down
    height = height * np.clip(along * 2.5 + 0.6, 0, 1) * _edge(1.13 - along, 0.12)
    height = height + face.nose_hump * _hump((along - 0.5) / 0.4)
    wide = face.nose_bridge_width + 0.02 + 0.12 * down * down
    ridge = height * np.maximum(0, 1 - np.square(x / wide)) ** 2
    ball = face.nose_ball * _hump(x / 0.15, (y - tip) / 0.13)
    wings = 0.08 * _hump((side - face.nose_width) / 0.10, (y - tip - 0.02) / 0.11)
    return ridge + ball + wings


@dataclass(frozen=True)
class _Surface:
    """What the rays of a picture's pixels meet: arrays of (height, width) over the window `rows`, `columns`."""

    rows: slice
    columns: slice
    cover: Floats
    """Share of the pixel that the head covers."""
    x: Floats
    y: Floats
    z: Floats
    """The direction that was hit, scaled to the head's ellipsoid without relief."""
    normal: Floats
    """In camera coordinates: (3, height, width)."""
    cavity: Floats
    """How deep the place lies below its surroundings; negative above."""


def _rotation(view: View) -> npt.NDArray[np.float64]:
    """From head to camera coordinates; positive pitch looks down, positive yaw to the right, roll is clockwise."""
    (cy, sy), (cp, sp), (cr, sr) = [(math.cos(a), math.sin(a)) for a in (view.yaw, view.pitch, view.roll)]
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return roll @ pitch @ yaw


def _project(view: View, size: int, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pixel coordinates (n, 2) of points on the head (n, 3)."""
    centre = np.array([0.5 + view.shift_x, 0.5 + view.shift_y - 0.1 * view.zoom])
    return (points @ _rotation(view)[:2].T * view.zoom + centre) * size


def _normals(relief: Floats, axes: list[float]) -> list[Floats]:
    """Unit normals of the relief's surface in head coordinates: x, y and z, each (_MAP, _MAP)."""
    radius = 1 + relief
    place = [direction * radius * axis for direction, axis in zip((_X, _Y, _Z), axes, strict=True)]
    (ax, ay, az), (dx, dy, dz) = ([cv2.Sobel(plane, cv2.CV_32F, *step) for plane in place] for step in ((1, 0), (0, 1)))
    nx, ny, nz = ay * dz - az * dy, az * dx - ax * dz, ax * dy - ay * dx
    length = np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-6
    return [nx / length, ny / length, nz / length]


def _look_up(planes: list[Floats], x: Floats, y: Floats, z: Floats) -> Floats:
    """Values of maps in the directions (x, y, z), unit vectors: (maps, height, width)."""
    scale = (_MAP - 1) / (2 * _REACH)
    stretch = np.sqrt(2 / np.maximum(1 + z, 0.02)) * scale
    centre = (_MAP - 1) / 2
    table, u, v = cv2.merge(planes), x * stretch + centre, y * stretch + centre
    seen = cv2.remap(table, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cast(Floats, np.stack(cv2.split(seen)))


def _cast(face: Face, view: View, relief: Floats, size: int) -> _Surface:
    """What each pixel's ray meets first of the head; the window holds all of the head that the picture does."""
    unit = view.zoom * size
    (centre_x, centre_y), *_ = _project(view, size, np.zeros((1, 3))).tolist()
    columns, rows = (
        slice(max(0, int(centre - _OUTER * axis * unit)), min(size, int(centre + _OUTER * axis * unit) + 2))
        for centre, axis in ((centre_x, max(face.head_width, face.head_depth)), (centre_y, face.head_height))
    )
    px = ((np.arange(columns.start, columns.stop) + 0.5 - centre_x) / unit).astype(np.float32)[None, :]
    py = ((np.arange(rows.start, rows.stop) + 0.5 - centre_y) / unit).astype(np.float32)[:, None]
    axes, rotation = [face.head_width, face.head_height, face.head_depth], _rotation(view)
    x, y, z, nearest = _march(relief, (rotation.T / np.array(axes)[:, None]).tolist(), px, py)

    hollow = cv2.GaussianBlur(relief, (0, 0), 5) - relief
    *normal, cavity = _look_up([*_normals(relief, axes), hollow], x, y, z)
    turned = [row[0] * normal[0] + row[1] * normal[1] + row[2] * normal[2] for row in rotation.tolist()]
    cover = _edge(-nearest * unit, 0.8)
    return _Surface(rows, columns, cover, x * axes[0], y * axes[1], z, np.stack(turned), cavity)


def _march(relief: Floats, to_ball: list[list[float]], px: Floats, py: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Follow rays inwards by even steps until they are below the relief, and back to it by the secant.

    Args:
        relief: as of `_relief`.
        to_ball: (3, 3), from camera coordinates to those in which the head's ellipsoid is the unit ball.
        px, py: where the rays are, in head units from the head's centre.

    Returns:
        The direction (x, y, z) in which each ray met the surface, and how near to the surface it came, in head units
        (negative: it met it). Rays that pass by give the direction of their last step.
    """
    ox, oy, oz = (row[0] * px + row[1] * py for row in to_ball)
    dx, dy, dz = (row[2] for row in to_ball)
    a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
    inside = b * b - a * (ox * ox + oy * oy + oz * oz)

    def enter(radius: float) -> Floats:
        """Where rays enter a ball; where they are nearest to its centre if they pass by."""
        return (np.sqrt(np.maximum(inside + a * radius * radius, 0)) - b) / a

    def at(way: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        x, y, z = ox + way * dx, oy + way * dy, oz + way * dz
        radius = np.sqrt(x * x + y * y + z * z) + 1e-6
        return x / radius, y / radius, z / radius, radius

    def height(way: Floats) -> Floats:
        x, y, z, radius = at(way)
        return radius - 1 - _look_up([relief], x, y, z)[0]

    first, last = enter(_OUTER), enter(_INNER)
    stride = (last - first) / _STEPS
    way, above, met = first, height(first), last
    nearest, found = above, above < 0
    for _ in range(_STEPS):
        way = way + stride
        below = height(way)
        new = (below <= 0) & ~found
        met = np.where(new, way - stride * (below / np.minimum(below - above, -1e-6)), met)
        found |= new
        nearest, above = np.minimum(nearest, below), below
    return *at(met)[:3], nearest


# --- its colours; all are in linear light, 0 to 1 -------------------------------------------------------------------


def _rgb(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1)


def _linear(red: float, green: float, blue: float) -> Floats:
    """A colour given as the screen shows it, 0 to 1, in linear light (gamma taken as 2)."""
    return np.square(_rgb(red, green, blue))


def _mix(first: Floats, second: Floats, share: Floats | float) -> Floats:
    return first + (second - first) * share


def _skin_colour(face: Face) -> Floats:
    colour = _mix(_linear(0.93, 0.76, 0.67), _linear(0.42, 0.28, 0.20), face.skin)
    return colour * _rgb(1 + 0.05 * face.skin_red, 1, 1 - 0.05 * face.skin_red)


def _hair_colour(face: Face, view: View) -> Floats:
    light = min(max(face.hair + view.hair_dye, 0.0), 1.0) ** 1.5 * (1 - 0.85 * face.skin)
    blond = _mix(_linear(0.82, 0.68, 0.45), _linear(0.75, 0.40, 0.22), face.hair_red)
    return _mix(_linear(0.13, 0.10, 0.09), blond, light)


def _lay(picture: Floats, mask: Floats, colour: Floats | float) -> None:
    """Lay a colour over the picture where the mask is; in place."""
    rows = np.flatnonzero(mask.max(axis=1))
    if len(rows):
        band = slice(rows[0], rows[-1] + 1)  # most layers are narrow
        picture[:, band] += mask[band] * (np.broadcast_to(colour, picture.shape)[:, band] - picture[:, band])


def _hair(face: Face, view: View, wear: Wear, x: Floats, y: Floats, z: Floats, softness: float) -> Floats:
    """Where hair grows, 0 to 1."""
    side = np.abs(x)
    line = face.hairline - 0.25 * face.widow * _hump((side - 0.36) / 0.28)
    line = line + 7 * np.square(np.maximum(side - 0.40, 0))
    line = np.minimum(line, 0.9 * max(view.hair_long, 0))
    line = line + wear.fringe * _hump((x + wear.places[0] - 0.5) / 0.7)
    behind = np.minimum(0.55 - y, -0.38 - z) * 2
    return _edge(np.maximum(line - y, behind), softness)


def _hat(wear: Wear, y: Floats, z: Floats, softness: float) -> Floats:
    """What a cap covers, 0 to 1."""
    return _edge(-0.42 - 0.25 * wear.places[1] - 0.35 * (z - 0.7) - y, softness)


def _paint(face: Face, view: View, wear: Wear, surface: _Surface, pattern: Floats, soft: float) -> Floats:
    """The head's own colour, without light: (3, height, width). `soft` is half a pixel's width on the head."""
    x, y = surface.x, surface.y
    side, (grain, strands) = np.abs(x), pattern
    skin = _skin_colour(face)
    red = face.blush * _hump((side - 0.42) / 0.32, (y - 0.35) / 0.3)
    red += 0.04 * _hump(x / 0.2, (y - face.nose_tip_y) / 0.2)
    freckles = face.freckles * np.maximum(grain - 0.8, 0) * _hump(x / 0.8, (y - 0.25) / 0.4)
    picture = skin * (1 - red * _rgb(0, 2.2, 2.0)) * (1 + 0.03 * grain - np.minimum(freckles * 3, 0.6))
    _paint_beard(picture, face, view, x, y, strands)
    _paint_brows(picture, face, view, x, y, strands, soft)
    _paint_eyes(picture, face, view, x, y, soft)
    _lay(picture, 0.85 * _hump((side - face.nostril) / 0.05, (y - face.nose_tip_y - 0.075) / 0.035), skin * 0.08)
    _paint_mouth(picture, face, view, x, y, soft)
    hair = _hair_colour(face, view) * (1 + 0.22 * strands)
    _lay(picture, _hair(face, view, wear, x + 0.02 * strands, y + 0.03 * strands, surface.z, 0.05), hair)
    if wear.hat:
        _lay(picture, _hat(wear, y, surface.z, soft), wear.colours[1])
    return picture


def _paint_beard(picture: Floats, face: Face, view: View, x: Floats, y: Floats, strands: Floats) -> None:
    side = np.abs(x)
    cheek = _edge(y - 0.52 - 0.35 * np.maximum(0.45 - side, 0) * 1.2, 0.1)
    lip = _edge(y - face.nose_tip_y - 0.13, 0.04) * _edge(face.mouth_width + 0.08 - side, 0.06)
    strength = min(face.beard * view.stubble, 0.9)
    mask = np.clip(np.maximum(cheek, lip) * strength * (1 + 0.3 * strands), 0, 0.95)
    _lay(picture, mask, _hair_colour(face, view) * 0.8)


def _paint_brows(picture: Floats, face: Face, view: View, x: Floats, y: Floats, strands: Floats, soft: float) -> None:
    along = (np.abs(x) - face.brow_gap) / (2 * face.brow_length)
    inside = np.clip(along, 0, 1)
    arch = face.brow_arch * 4 * inside * (1 - inside) * (0.5 + inside)
    middle = face.brow_y - 0.05 * view.raised - arch + (0.02 - face.brow_tilt * 0.3) * (inside - 0.3)
    half = face.brow_thick * (1.1 - 0.8 * inside * inside)
    mask = _edge(half - np.abs(y - middle), soft + 0.012) * _edge(along, 0.08) * _edge(1 - along, 0.1)
    _lay(picture, mask * np.clip(0.8 + 0.15 * strands, 0, 1), _hair_colour(face, view) * 0.6)


def _paint_eyes(picture: Floats, face: Face, view: View, x: Floats, y: Floats, soft: float) -> None:
    out = np.abs(x) - face.eye_x
    along, up = out / face.eye_width, y - face.eye_y + face.eye_tilt * out
    bow = np.maximum(0, 1 - along * along)
    opening = face.eye_open * (1 - 0.5 * max(view.squint, -0.4) - 0.25 * max(view.smile, 0))
    skewed = along - 0.3 * face.eye_round * bow
    upper = -opening * np.maximum(0, 1 - skewed * skewed)
    lower = 0.5 * opening * bow
    white = _edge(up - upper, soft) * _edge(lower - up, soft) * _edge(1 - np.abs(along), 0.1)
    inner_x = out - 0.06 * view.gaze_x * np.sign(x)
    inner_y = up + 0.15 * opening - 0.05 * view.gaze_y
    radius = np.sqrt(inner_x * inner_x + inner_y * inner_y)
    light = _mix(_linear(0.5, 0.42, 0.25), _linear(0.42, 0.55, 0.68), face.iris_blue)
    iris = _mix(light, _linear(0.22, 0.13, 0.09), face.iris_dark)

    shade = np.clip(0.55 + (up - upper) * 9, 0, 1)
    eye = np.broadcast_to(_linear(0.88, 0.85, 0.83), picture.shape).copy()
    _lay(eye, _edge(face.iris - radius, soft), iris * 0.5)
    _lay(eye, _edge(face.iris * 0.82 - radius, soft), iris)
    _lay(eye, _edge(face.iris * 0.42 - radius, soft), 0.005)
    glint = np.square(inner_x - 0.02 * view.light_x) + np.square(inner_y + 0.025)
    _lay(eye, _edge(0.014 - np.sqrt(glint), soft), 0.9)
    lid = _hump((up - upper + 0.004) / 0.026) * _edge(1.05 - np.abs(along), 0.08)
    fold = _hump((up - upper * 0.7 + face.crease) / 0.022) * _edge(0.95 - np.abs(along), 0.2)
    rim = _hump((up - lower) / 0.018) * _edge(1 - np.abs(along), 0.1)
    _lay(picture, 0.45 * fold, picture * 0.35)
    _lay(picture, white, eye * shade)
    _lay(picture, 0.35 * rim, picture * 0.3)
    _lay(picture, 0.85 * lid, 0.012)


def _paint_mouth(picture: Floats, face: Face, view: View, x: Floats, y: Floats, soft: float) -> None:
    smile, drop = view.smile, 0.12 * view.open + 0.05 * max(view.smile - 0.3, 0)
    along = x / (face.mouth_width * (1 + 0.16 * smile - 0.1 * view.open))
    bow = np.maximum(0, 1 - along * along)
    middle = face.mouth_y - 0.02 * smile - 0.07 * smile * (along * along - 0.3)
    top = middle - face.lip_upper * bow * (1 - face.lip_bow * _hump(x / 0.09)) - 0.01
    under = middle + drop * bow
    bottom = under + face.lip_lower * np.sqrt(bow) + 0.005
    within = _edge(1 - np.abs(along), 0.06)
    lips = _edge(y - top, soft + 0.008) * _edge(bottom - y, soft + 0.012) * within
    skin = _skin_colour(face)
    red = skin * _rgb(0.78, 0.42, 0.45)
    _lay(picture, 0.9 * lips, _mix(skin * 0.85, red, min(max(face.lip_red + 0.3, 0.1), 1.1)))
    inside = _edge(y - middle, soft) * _edge(under - y, soft) * within
    _lay(picture, inside, _linear(0.22, 0.08, 0.08))
    teeth = inside * _edge(middle + 0.07 * bow - y, soft) * _edge(0.8 - np.abs(along), 0.1)
    _lay(picture, teeth * min(max(smile + 0.5 * view.open, 0), 0.9), _linear(0.85, 0.82, 0.76))
    line = _hump((y - middle) / 0.022) * _edge(1.03 - np.abs(along), 0.05)
    _lay(picture, 0.75 * line, red * 0.12)


# --- the picture ----------------------------------------------------------------------------------------------------


def _pattern(fixed: np.random.Generator, free: np.random.Generator) -> list[Floats]:
    """Noise over the head: the skin's grain, which stays with the person, and the hair's strands: (_MAP, _MAP) each."""
    noises = fixed.standard_normal((90, 90), np.float32), free.standard_normal((24, 100), np.float32)
    return [np.asarray(cv2.resize(noise, (_MAP, _MAP)), np.float32) for noise in noises]


def _light(view: View, albedo: Floats, normal: Floats, cavity: Floats) -> Floats:
    """Lambert's law with light from everywhere, a hint of gloss, and shadow in hollows: (3, height, width)."""
    away = math.hypot(view.light_x, view.light_y, 0.8)
    lx, ly, lz = view.light_x / away, view.light_y / away, 0.8 / away
    nx, ny, nz = normal
    cosine = np.maximum((nx * lx + ny * ly + nz * lz) * 0.92 + 0.08, 0)
    around = (0.85 - 0.25 * ny) * np.clip(1 - 5 * cavity, 0.4, 1.2)
    share = view.contrast
    half = math.hypot(lx, ly, lz + 1)
    gloss = np.maximum((nx * lx + ny * ly + nz * (lz + 1)) / half, 0)
    gloss = np.square(np.square(np.square(np.square(gloss)))) * view.gloss
    bright = share * 1.25 * cosine * np.clip(1 - 2 * cavity, 0.6, 1.1) + (1 - share) * around
    return albedo * bright + 0.5 * gloss


def _backdrop(rng: np.random.Generator, size: int) -> Floats:
    """A gradient and out-of-focus shapes: (3, size, size)."""
    side = 48
    first, second, *others = _muted(rng, 9)
    ramp, (down, right) = np.linspace(0, 1, side, dtype=np.float32), rng.uniform((-0.5, -1), 1).tolist()
    share = np.clip(ramp[:, None] * down + ramp[None, :] * right, 0, 1)
    picture = cv2.merge(list(_mix(first, second, share)))
    for other in others[: rng.integers(1, 8)]:
        colour = _mix(first, other, 0.7).ravel().tolist()
        x, y, width, height = rng.integers((-8, -8, 6, 6), (side, side, 34, 40)).tolist()
        if rng.random() < 0.6:
            cv2.rectangle(picture, (x, y), (x + width, y + height), colour, -1)
        else:
            cv2.ellipse(picture, (x, y), (width // 2, height // 2), 0, 0, 360, colour, -1)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.6, 3))
    return np.stack(cv2.split(cv2.resize(picture, (size, size))))


def _body(picture: Floats, face: Face, view: View, wear: Wear) -> None:
    """Long hair, neck and shoulders, behind the head; in place."""
    size = picture.shape[1]
    (neck_x, neck_y), (base_x, base_y) = _project(view, size, np.array([[0, 0.8, -0.3], [0, 0.2, -0.3]])).tolist()
    base_x, top, unit = (base_x + neck_x) / 2, max(0, int(base_y)), view.zoom * size
    below = picture[:, top:]
    y = ((np.arange(top, size) + 0.5 - neck_y) / unit).astype(np.float32)[:, None]
    x = ((np.arange(size) + 0.5 - base_x) / unit).astype(np.float32)[None, :]
    if view.hair_long > 0.5:
        width = 0.85 + 0.3 * view.hair_volume + 0.06 * y
        _lay(below, _edge(width - np.abs(x), 0.03) * _edge(view.hair_long - y, 0.2), _hair_colour(face, view) * 0.5)

    lean = x - (neck_x - base_x) / unit * np.clip(1 - y, 0, 1)
    across = lean / (0.56 * face.head_width + 0.3 * max(face.jaw, 0))
    neck, across = _edge(1 - np.abs(across), 0.03), np.clip(across, -1, 1)
    normal = np.stack([across, np.zeros_like(across), np.sqrt(1 - across * across)])
    _lay(below, neck, _light(view, _skin_colour(face) * 0.85, normal, 0.25 * np.clip(1 - y / 0.5, 0, 1)))

    across = np.clip(x / 2, -0.9, 0.9)
    normal = np.stack([across, np.full_like(across, -0.3), np.sqrt(0.91 - 0.9 * across * across)])
    slope = 0.42 + 0.3 * wear.places[2] + np.square(x / (1.5 + wear.places[3])) - 0.25 * _hump(x / 0.9)
    collar = 0.8 * wear.places[4] * np.maximum(0, 0.45 - np.abs(x))
    _lay(below, _edge(y - slope - collar, 0.03), _light(view, wear.colours[0], normal, np.zeros_like(across)))


def _glasses(picture: Floats, face: Face, view: View, wear: Wear) -> None:
    """Rims, bridge and the nearer temple; in place."""
    size, shift = picture.shape[1], 4  # binary digits of a pixel's fraction
    mask, glare = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    places = wear.places.tolist()
    width, height, power = 0.21 + 0.04 * places[5], 0.13 + 0.07 * places[6], 0.5 + 0.5 * places[7]

    def at(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], lift: float = 0.12) -> npt.NDArray[np.int32]:
        rest = 1 - np.square(x / face.head_width) - np.square(y / face.head_height)
        points = np.stack([x, y, face.head_depth * np.sqrt(np.maximum(rest, 0)) + lift], axis=1)
        return np.rint(_project(view, size, points) * 2**shift).astype(np.int32)

    turn = np.linspace(0, 2 * math.pi, 33)
    cos, sin = (np.sign(wave) * np.abs(wave) ** power for wave in (np.cos(turn), np.sin(turn)))
    thickness = max(1, round((0.02 + 0.025 * places[4]) * view.zoom * size))
    for sign in (-1, 1):
        rim = at(sign * (face.eye_x + 0.01) + width * cos, face.eye_y + 0.03 + height * sin)
        cv2.fillPoly(glare, [rim], 255, cv2.LINE_AA, shift)
        cv2.polylines(mask, [rim], True, 255, thickness, cv2.LINE_AA, shift)
        if sign * _rotation(view)[2, 0] > -0.1:
            temple = sign * np.linspace(face.eye_x + width, face.head_width, 5)
            cv2.polylines(mask, [at(temple, np.full(5, face.eye_y), 0.1)], False, 255, thickness, cv2.LINE_AA, shift)
    inner = face.eye_x - width + 0.02
    bridge = at(np.linspace(-inner, inner, 7), np.full(7, face.eye_y), 0.16)
    cv2.polylines(mask, [bridge], False, 255, thickness, cv2.LINE_AA, shift)
    _lay(picture, glare * np.float32(0.12 / 255), 0.6)
    _lay(picture, mask * np.float32(0.9 / 255), wear.colours[2])


def _veil(picture: Floats, view: View, wear: Wear) -> None:
    """A blurred thing before an edge of the face: a hand, a cup, someone's shoulder; in place."""
    size, places = picture.shape[1], wear.places.tolist()
    angle, distance = 2 * math.pi * places[1], 0.75 + 0.25 * places[2]
    place = np.array([[distance * math.cos(angle), 0.25 + distance * math.sin(angle), 0.8]])
    x, y = np.rint(_project(view, size, place)[0]).astype(int).tolist()
    axes = [round((0.25 + 0.25 * share) * view.zoom * size) for share in places[3:5]]
    mask = cv2.ellipse(np.zeros((size, size), np.float32), (x, y), axes, math.degrees(angle), 0, 360, 1, -1)
    _lay(picture, np.asarray(cv2.GaussianBlur(mask, (0, 0), 0.012 * size), np.float32), wear.colours[3])


def _camera(view: View, picture: Floats, noise: Floats) -> Image:
    """From linear light to the sensor's grey levels: exposure, white balance, focus and noise."""
    warmth, tint = view.warmth, view.tint
    gains = _rgb(1 + warmth + tint, 1 - tint, 1 - warmth + tint) * view.exposure
    coloured = _mix(picture.mean(axis=0), picture, view.colour)
    seen = cv2.merge(list(np.sqrt(np.clip(coloured * gains, 0, 1))))
    sigma = view.blur / 100 * seen.shape[0]
    if sigma > 0.3:
        seen = cv2.GaussianBlur(seen, (0, 0), sigma)
    return np.clip(seen * 255 + noise * view.noise, 0, 255).astype(np.uint8)


def _draw(seed: int, person: int, photo: int, video: int | None) -> tuple[Face, View, Wear, np.random.Generator]:
    """What a picture shows, and the generator for the rest of its scene."""
    face = Face.draw(np.random.default_rng([seed, person, 0]))
    scene = np.random.default_rng([seed, person, 1, photo] if video is None else [seed, person, 2, video])
    return face, View.draw(scene, None if video is None else photo), Wear.draw(scene), scene


def render(seed: int, identity: int, photo: int, size: int, *, video: int | None = None) -> Image:
    """A photograph of a person: uint8 RGB, (size, size, 3).

    Args:
        seed: of the set; it and the following decide every pixel.
        identity: number of the person.
        photo: number of the photograph; of the frame, in a video.
        size: side of the picture, pixels.
        video: number of the video; its frames share the scene and follow each other smoothly.
    """
    face, view, wear, scene = _draw(seed, identity, photo, video)
    surface = _cast(face, view, _relief(face, view, wear), size)
    pattern = _pattern(np.random.default_rng([seed, identity, 4]), scene)
    direction = (surface.x / face.head_width, surface.y / face.head_height, surface.z)
    albedo = _paint(face, view, wear, surface, _look_up(pattern, *direction), 0.5 / (view.zoom * size))

    picture = _backdrop(scene, size)
    _body(picture, face, view, wear)
    window = picture[:, surface.rows, surface.columns]
    _lay(window, surface.cover, _light(view, albedo, surface.normal, surface.cavity))
    if wear.glasses:
        _glasses(picture, face, view, wear)
    if wear.veil:
        _veil(picture, view, wear)
    noise = np.random.default_rng([seed, identity, 3, 0 if video is None else video + 1, photo])
    return _camera(view, picture, noise.standard_normal((size, size, 3), np.float32))


def encode(image: Image, quality: int) -> bytes:
    """The image as JPEG of the given quality, 1 to 100."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


# --- the sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photograph:
    """An image of a set, not yet rendered."""

    image_id: str
    identity: str
    video: str | None
    frame: int | None
    person: int
    """Numbers that `render` takes, here and below."""
    photo: int
    film: int | None


def identity_name(seed: int, identity: int) -> str:
    """The name of a person, such as `p1_00042`: two sets share it only where they share the person."""
    return f"p{seed}_{identity:05d}"


def _image_id(seed: int, person: int, photo: int) -> str:
    """As in LFW: `<identity>/<identity>_%04d`, counted from 1."""
    return f"{identity_name(seed, person)}/{identity_name(seed, person)}_{photo + 1:04d}"


def _video_id(seed: int, person: int, film: int) -> str:
    return f"{identity_name(seed, person)}/{film}"


def photographs(params: Synthetic, set_name: str) -> list[Photograph]:
    """Every image of a set, in order: stills for `train` and `lfw`, frames of videos for `ytf`."""
    people, seed = range(params.identities), params.seed
    if set_name != "ytf":
        return [
            Photograph(_image_id(seed, person, photo), identity_name(seed, person), None, None, person, photo, None)
            for person in people
            for photo in range(params.images)
        ]
    return [
        Photograph(f"{video}/{film}.{frame}", identity_name(seed, person), video, frame, person, frame, film)
        for person in people
        for film in range(params.videos)
        for video in [_video_id(seed, person, film)]
        for frame in range(1, params.images + 1)
    ]


def render_part(params: Synthetic, photographs: list[Photograph]) -> list[bytes]:
    """The photographs as JPEG, in their order, each at a quality of its own."""
    images = []
    for item in photographs:
        _, view, _, _ = _draw(params.seed, item.person, item.photo, item.film)
        image = render(params.seed, item.person, item.photo, params.size, video=item.film)
        images.append(encode(image, round(view.quality)))
    return images


def protocol(params: Synthetic, set_name: str) -> pa.Table:
    """The pairs of a set in the manner of LFW's view 2, with the columns of `pipeline.tables.PAIRS`.

    The people are dealt out over the folds, so that none is in two. In each fold, half of the pairs show one person,
    the other half two; no pair comes twice. Left and right are images, or videos for `ytf`.

    Raises:
        SourceError: a fold's people have too few images or videos to give that many pairs.
    """
    ytf = set_name == "ytf"
    name, each = (_video_id, params.videos) if ytf else (_image_id, params.images)
    rng = np.random.default_rng([params.seed, 5])
    rows: list[dict[str, Any]] = []
    for fold, people in enumerate(np.array_split(rng.permutation(params.identities), params.folds)):
        own = list(combinations(range(each), 2))
        strangers = list(combinations(sorted(people.tolist()), 2))
        for same, possible in ((True, len(people) * len(own)), (False, len(strangers) * each * each)):
            if possible < params.pairs // 2:
                raise SourceError(
                    f"download.{set_name}: fold {fold} has {len(people)} of the {params.identities} identities with "
                    f"{each} {'videos' if ytf else 'images'} each: they give {possible} pairs of "
                    f"{'one person' if same else 'two people'}, but pairs = {params.pairs} needs {params.pairs // 2}; "
                    f"raise identities or {'videos' if ytf else 'images'}, or lower pairs"
                )
            for index in rng.choice(possible, params.pairs // 2, replace=False).tolist():
                if same:
                    person, pair = divmod(index, len(own))
                    (left, i), (right, j) = ((int(people[person]), photo) for photo in own[pair])
                else:
                    pair, photos = divmod(index, each * each)
                    (left, i), (right, j) = zip(strangers[pair], divmod(photos, each), strict=True)
                rows.append(
                    {
                        "fold": fold,
                        "left": name(params.seed, left, i),
                        "right": name(params.seed, right, j),
                        "same": same,
                    }
                )
    return pa.Table.from_pylist(rows, PAIRS)
