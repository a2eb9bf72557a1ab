"""The anatomy of the phantom: an invented thorax in 3-D, different for every patient.

Lengths are in mm: x runs to the patient's left, y to the back, z to the head. A height is also given as `t`, the
fraction of the scan (0 = upper abdomen, 1 = above the lungs), a depth as a fraction of the rib cage's half depth
(-1 = breastbone, 1 = back). Surfaces are signed distances (negative inside), so an edge covers a pixel in part.
"""

from collections.abc import Sequence
from functools import lru_cache, reduce
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
from scipy.interpolate import PchipInterpolator

_ANGLES = np.linspace(0, np.pi, 257)  # around the chest: 0 = back, pi = front; both sides alike
# Along t: half width and half depth of the rib cage, shift of its centre to the back.
_CAGE = PchipInterpolator(
    (0.0, 0.15, 0.35, 0.55, 0.75, 0.88, 1.0),
    np.transpose([(126, 133, 138, 133, 114, 88, 60), (90, 95, 97, 92, 78, 62, 47), (0, 0, 0, 1, 6, 11, 14)]),
)
# fmt: off
# Traits drawn uniformly. `inspiration` lowers the diaphragm by that fraction of the scan, `zoom` widens the view.
_TRAITS = {
    "length": (300, 345), "width": (0.86, 1.1), "depth": (0.88, 1.12), "squareness": (2.2, 2.7), "fat": (5, 26),
    "muscle": (0.6, 1.25), "heart": (0.86, 1.18), "inspiration": (-0.04, 0.05), "lung_hu": (-860, -775),
    "emphysema": (-150, 90), "calcium": (-1, 1), "pitch": (24, 28), "drop": (100, 140), "phase": (-0.4, 0.4),
    "zoom": (1.0, 1.2), "offset": (-12, 12), "level": (-0.025, 0.025),
    "table_gap": (-25, 25), "table_curve": (3e-4, 9e-4), "table": (24, 55),
}
# Ellipsoids: centre x, depth, t; half axes; turn in the slice (degrees). "_pair": one on each side.
_ELLIPSOIDS = {
    "heart": (22, -0.33, 0.385, 64, 45, 50, -32), "right": (-20, -0.18, 0.43, 27, 32, 38, 0),
    "left": (3, 0.12, 0.49, 31, 19, 22, 0), "upper": (0, -0.05, 0.66, 25, 62, 75, 0),
    "lower": (6, 0.1, 0.27, 22, 66, 60, 0), "lung_pair": (46, 0.08, 0.36, 90, 108, 194, 0),
    "lv": (42, -0.21, 0.37, 32, 18, 30, -32), "rv": (12, -0.58, 0.385, 38, 13, 32, -22),
    "ra": (-25, -0.2, 0.43, 17, 24, 30, 0), "la": (3, 0.15, 0.49, 27, 14, 18, 0),
    "dome_right": (-60, -0.28, 0.0, 76, 104, 120, 0), "dome_left": (64, -0.28, 0.0, 76, 104, 108, 0),
    "dome_middle": (-4, -0.4, 0.0, 62, 85, 104, 0), "liver": (-48, -0.1, 0.12, 100, 94, 94, 12),
    "spleen": (86, 0.42, 0.16, 28, 44, 48, 25), "stomach": (56, -0.2, 0.17, 44, 46, 55, 0),
}
# Tubes: radius at the start and at the end, way points (x, depth, t).
_VESSELS = (
    (15, 10, (2, -.14, .46), (-14, -.3, .56), (-16, -.27, .66), (-8, -.2, .72), (8, .02, .75),  # aorta
     (22, .28, .73), (27, .42, .66), (25, .46, .4), (14, .42, .15), (8, .38, 0)),
    (14, 11, (18, -.42, .46), (18, -.34, .56), (22, -.08, .605)),  # pulmonary trunk, its two arteries, veins
    (11, 7, (18, -.2, .60), (-12, .02, .595), (-44, .08, .575)),
    (11, 7, (20, -.12, .605), (36, .12, .625), (46, .28, .585)),
    (8, 5, (-18, .14, .49), (-46, .1, .5)), (8, 5, (22, .16, .49), (48, .12, .51)),
    (9, 10, (-30, -.16, .74), (-28, -.16, .6), (-24, -.16, .46)),  # venae cavae and what they gather
    (6, 6, (-29, -.2, .745), (8, -.42, .79), (42, -.42, .88), (62, -.4, .97)),
    (7, 6, (-30, -.16, .74), (-38, -.24, .85), (-56, -.4, .97)),
    (12, 12, (-22, -.02, .41), (-24, .2, .3), (-20, .32, 0)),
    (3.5, 3, (-28, .05, .69), (-22, .32, .69), (-8, .4, .62), (-6, .42, .2)),
    (6, 5, (-7, -.2, .74), (-16, -.22, .83), (-30, -.2, 1.05)),  # branches of the arch
    (4, 3.5, (6, -.05, .76), (16, -.2, .86), (24, -.45, 1.05)),
    (5, 4.5, (20, .18, .755), (27, .05, .86), (50, -.05, 1.0)),
)
_AIRWAYS = (
    (9, 8.5, (0, -.45, 1.05), (0, -.15, .86), (-2, .12, .66)), (7, 5, (-3, .12, .665), (-30, .16, .61), (-44, .2, .55)),
    (5, 3.5, (-24, .15, .62), (-46, .12, .625), (-58, .1, .64)),
    (6.5, 4.5, (-1, .12, .665), (28, .2, .595), (46, .26, .55)),
)
_GULLET = ((6.5, 7.5, (3, -.1, 1.05), (4, .08, .86), (5, .27, .66), (8, .34, .45), (20, .2, .25)),)
_SHOULDERS = tuple(tube for s in (-1, 1) for tube in (  # collar bone, head of the humerus
    (6, 5, (s * 24, -.92, .865), (s * 70, -.75, .93), (s * 125, .1, .985)),
    (22, 22, (s * 150, .1, .98), (s * 152, .1, 1.1)),
))
# fmt: on


class Plane(NamedTuple):
    """One axial slice of patient `p`; the arrays are [size, size]."""

    p: SimpleNamespace
    z: float
    t: float
    pixel: float
    thickness: float
    x: np.ndarray
    y: np.ndarray
    r: np.ndarray  # distance from the middle of the chest
    phi: np.ndarray  # angle as in _ANGLES
    cage: np.ndarray  # at that angle, the radius of the ribs' outer face, of the muscles on them and of the skin
    muscle: np.ndarray
    skin: np.ndarray
    coarse: np.ndarray  # textures around 0, continuous in z
    fine: np.ndarray


def plane_at(p: SimpleNamespace, z: float, size: int, thickness: float) -> Plane:
    """The frame of the slice at height z: `p.fov` mm across, in size x size pixels."""
    pixel, t = p.fov / size, z / p.length
    axis = ((np.arange(size) - (size - 1) / 2) * pixel).astype(np.float32)
    x, y = np.meshgrid(axis + p.centre[0], axis + p.centre[1])
    chest = y - place(p, 0, 0, t)[1]
    phi = np.arctan2(np.abs(x), chest)
    wall = (np.interp(phi, _ANGLES, radius).astype(np.float32) for radius in _wall(p, t))
    texture = (_texture((*p.key, k), z, p.fov, cell, size) for k, cell in enumerate((14.0, 3.5), 1))
    return Plane(p, z, t, pixel, thickness, x, y, np.hypot(x, chest), phi, *wall, *texture)


def place(p: SimpleNamespace, x: float, depth: float, t: float) -> list[float]:
    _, half_depth, shift = _CAGE(min(max(t, 0), 1)).tolist()
    return [x * p.width, shift + depth * half_depth * p.depth, t * p.length]


def step(low: float, high: float, value: float) -> float:
    u = min(max((value - low) / (high - low), 0.0), 1.0)
    return u * u * (3 - 2 * u)


def bump(at: float, width: float, value: np.ndarray | float = _ANGLES) -> np.ndarray:
    return np.exp(-(((value - at) / width) ** 2))


def _wall(p: SimpleNamespace, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radii [257] of rib cage, muscles and skin along _ANGLES at height t."""

    def cage(t: float) -> np.ndarray:
        half_width, half_depth, _ = _CAGE(min(max(t, 0), 1)) * (p.width, p.depth, 1)
        ratio = (np.sin(_ANGLES) / half_width) ** p.squareness + (np.abs(np.cos(_ANGLES)) / half_depth) ** p.squareness
        return ratio ** (-1 / p.squareness) * (1 + 0.05 * bump(0.55, 0.25))

    ribs, upper = cage(t), step(0.45, 0.65, t)
    layers = 5 + 25 * bump(0.26, 0.34) + 16 * upper * bump(2.35, 0.5) + (6 + 14 * upper) * bump(1.0, 0.5)
    layers = p.muscle * (layers + 45 * step(0.72, 1.0, t) * bump(1.5, 0.5))
    # The cage narrows to its top and the shoulders do not: muscle fills the difference.
    muscle = ribs + layers + np.maximum(cage(0.72) - ribs, 0) * (1 - 0.25 * bump(np.pi, 0.9))
    fat = 5 * bump(0, 0.12) + p.fat * (0.55 + 0.35 * np.cos(_ANGLES) ** 2 + 0.4 * (1 - step(0, 0.35, t)))
    return ribs, muscle, muscle + 2 + fat + p.breast * bump(0.42, 0.14, t) * bump(2.45, 0.33)


def _texture(key: tuple[int, ...], z: float, fov: float, cell: float, size: int) -> np.ndarray:
    """Smooth noise [size, size] of about unit variance with grains of `cell` mm; layers along z blend."""
    count, layer = int(fov / cell) + 3, int(z // cell)
    low, high = (np.random.default_rng((*key, layer + k)) for k in (0, 1))
    a, b = (rng.standard_normal((count, count), np.float32) for rng in (low, high))
    turn = (z / cell - layer) * np.pi / 2  # cos and sin keep the variance
    mixed = cv2.GaussianBlur(float(np.cos(turn)) * a + float(np.sin(turn)) * b, (0, 0), 0.8)
    return cv2.resize(mixed, (size, size), interpolation=cv2.INTER_CUBIC) * 3.2


def both(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Intersection of two surfaces, its edge rounded over `blend` mm."""
    return np.maximum(a, b) + np.maximum(blend - np.abs(a - b), 0) ** 2 / (4 * blend)


def ellipsoid(plane: Plane, name: str) -> np.ndarray:
    cx, depth, t, across, along, up, turn = _ELLIPSOIDS[name]
    p = plane.p
    grow = p.heart if name in ("heart", "right", "left", "lv", "rv", "ra", "la") else 1.0
    cx, cy, cz = place(p, cx, depth, t - p.inspiration * (t < 0.45))
    up, dz = up * p.length / 320 * grow, plane.z - cz
    if abs(dz) > 1.6 * up:  # far off: spare the arithmetic
        return np.full_like(plane.x, 99)
    dx, dy = (np.abs(plane.x) if name.endswith("_pair") else plane.x) - cx, plane.y - cy
    cos, sin = float(np.cos(np.deg2rad(turn))), float(np.sin(np.deg2rad(turn)))
    u, v = (dx * cos + dy * sin) / (across * p.width * grow), (dy * cos - dx * sin) / (along * p.depth * grow)
    return (1 - 1 / (np.sqrt(u * u + v * v + (dz / up) ** 2) + 1e-3)) * np.sqrt(dx * dx + dy * dy + dz * dz)


def _union(surfaces: Sequence[np.ndarray], blend: float) -> np.ndarray:
    return -reduce(lambda a, b: both(a, b, blend), [-surface for surface in surfaces])


def draw(plane: Plane, cloud: np.ndarray, grow: float = 0.0) -> np.ndarray:
    """Share of each pixel [size, size] that a union of balls (rows x, y, z, radius + grow) fills in this slice."""
    size, dz = len(plane.x), np.maximum(np.abs(cloud[:, 2] - plane.z) - plane.thickness / 2, 0)
    near = dz < cloud[:, 3] + grow
    x, y, _, radius = cloud[near, :4].T
    radius = radius + grow
    rho = np.sqrt(radius**2 - dz[near] ** 2) / plane.pixel
    col, row = (x - plane.x[0, 0]) / plane.pixel, (y - plane.y[0, 0]) / plane.pixel
    # A vessel thinner than the pixel or the slice shares it with the lung around it.
    strength = np.minimum(1, 2 * rho) * np.minimum(1, 1.3 * np.sqrt(2 * radius / plane.thickness))
    cover, reach = np.zeros(size * size, np.float32), 2 ** np.ceil(np.log2(rho + 1))
    for half in np.unique(reach):
        of, span = reach == half, np.arange(-half, half + 1)
        c, r, rad, top = (v[of, None, None] for v in (col, row, rho, strength))
        at_c, at_r = np.round(c) + span, np.round(r) + span[:, None]
        part = np.clip(0.5 + rad - np.hypot(at_c - c, at_r - r), 0, 1) * top
        ok = (at_c >= 0) & (at_c < size) & (at_r >= 0) & (at_r < size) & (part > 0)
        np.maximum.at(cover, (at_r * size + at_c)[ok].astype(np.intp), part[ok].astype(np.float32))
    return cover.reshape(size, size)


def _tubes(p: SimpleNamespace, tubes: tuple) -> np.ndarray:
    """Balls [N, 4] along the tubes, 1 mm apart."""
    rows = []
    for first, last, *way in tubes:
        knots = np.array([place(p, x, depth, t + p.level * float(bump(0.62, 0.25, t))) for x, depth, t in way])
        s = np.r_[0, np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))]
        u = np.arange(0, s[-1], 1.0)
        rows.append(np.column_stack([PchipInterpolator(s, knots)(u), first + (last - first) * u / s[-1]]))
    return np.concatenate(rows)


def _tree(rng: np.random.Generator, root: list[float], targets: np.ndarray, leaf: float) -> np.ndarray:
    """A tapering tree of balls [N, 5] (x, y, z, radius, leaves beyond) that forks until it reaches every target."""
    curves, todo = [], [(np.array(root), targets)]
    chances, wobble = rng.random((2 * len(targets), 2)), rng.normal(0, 0.07, (2 * len(targets), 3))
    while todo:
        start, points = todo.pop()
        n, (far, share) = len(points), chances[len(curves)]
        end = points[0] if n == 1 else start + (points.mean(0) - start) * (0.3 + 0.2 * far)
        bend = (start + end) / 2 + wobble[len(curves)] * np.linalg.norm(end - start)
        curves.append((*start, *bend, *end, n))
        if n > 1:
            order = np.argsort(points[:, np.ptp(points, axis=0).argmax()])
            cut = min(max(round(n * (0.35 + 0.3 * share)), 1), n - 1)
            todo += [(end, points[order[:cut]]), (end, points[order[cut:]])]
    table = np.array(curves)
    radius = leaf * table[:, 9] ** (1 / 2.7)  # close to Murray's law
    length = np.linalg.norm(table[:, 6:9] - table[:, :3], axis=1)
    steps = np.ceil(length / np.maximum(0.5 * radius, 0.6)).astype(int) + 1
    which = np.repeat(np.arange(len(steps)), steps)
    u = ((np.arange(len(which)) - np.repeat(np.cumsum(steps) - steps, steps)) / steps[which])[:, None]
    start, bend, end = (table[which, k : k + 3] for k in (0, 3, 6))
    curve = (1 - u) ** 2 * start + 2 * u * (1 - u) * bend + u**2 * end
    return np.column_stack([curve, radius[which] * (1 - 0.15 * u[:, 0]), table[which, 9]])


@lru_cache(maxsize=2)
def grow_patient(seed: int, number: int) -> SimpleNamespace:
    """The patient `number` of `seed`: traits, field of view (`fov`, `centre`), `nodules` and everything `cut` needs."""
    rng = np.random.default_rng((seed, number))
    p = SimpleNamespace(key=(seed, number), **{name: float(rng.uniform(*span)) for name, span in _TRAITS.items()})
    # One woman and one man in each two patients, half of them with contrast.
    p.female = bool(np.random.default_rng((seed, number // 2, 9)).integers(2) ^ number % 2)
    enhanced = bool(rng.random() < 0.5)
    p.breast, p.contrast = p.female * float(rng.uniform(12, 34)), enhanced * float(rng.uniform(120, 240))
    skin = _wall(p, 0.45)[2]
    p.table_y = float((skin * np.cos(_ANGLES)).max()) - 9  # the back gives way to the table
    p.fov = min(max(2 * float(skin[128]) * p.zoom, 280.0), 480.0)
    p.centre = (p.offset, (p.table_y + 30 - float(skin[-1])) / 2 + p.table_gap)
    p.great, p.airways, p.gullet, p.shoulders = (_tubes(p, t) for t in (_VESSELS, _AIRWAYS, _GULLET, _SHOULDERS))
    planes = [plane_at(p, t * p.length, 48, 1.0) for t in np.arange(0.05, 0.98, 0.03).tolist()]
    deep = [(q, lung_surfaces(q)[0] < -6) for q in planes]
    inner = np.concatenate([np.column_stack([q.x[m], q.y[m], np.full(m.sum(), q.z)]) for q, m in deep])
    inner = inner + rng.uniform(-4, 4, inner.shape)
    arteries, veins = (
        np.concatenate([
            _tree(rng, place(p, side * 40, depth, t), rng.choice(inner[inner[:, 0] * side > 0], 900), 0.62)
            for side in (-1, 1)
        ])
        for depth, t in ((0.1, 0.58), (0.12, 0.5))
    )  # fmt: skip
    p.vessels = np.concatenate([arteries, veins])[:, :4]
    bronchi = arteries[arteries[:, 4] >= 10][:, :4]  # an airway runs beside each larger artery
    p.bronchi = bronchi + bronchi[:, 3:] * (0.9, 1.3, 0.6, -0.25) + (0.5, 0.8, 0, 0)
    count = rng.integers(1, 5)
    density = rng.choice([40.0, 60.0, -550.0], count)
    p.nodules = np.column_stack([rng.choice(inner, count), rng.uniform(2.5, 9, count), density])
    p.balls = np.repeat(p.nodules, 6, axis=0)  # overlapping balls make the outline uneven
    p.balls[:, :3] += p.balls[:, 3:4] * rng.normal(0, 0.3, (6 * count, 3))
    p.balls[:, 3] *= rng.uniform(0.6, 1, 6 * count)
    return p


def lung_surfaces(plane: Plane) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Surfaces of the lungs, of the space inside the ribs, of what lies below the diaphragm, of the heart."""
    inside = plane.r - plane.cage + 11 + 0.6 * plane.coarse
    domes = [ellipsoid(plane, name) for name in ("dome_right", "dome_middle", "dome_left")]
    below = _union(domes, 25) + 0.5 * plane.coarse
    heart, right, left, upper, lower = (ellipsoid(plane, n) for n in ("heart", "right", "left", "upper", "lower"))
    y, scale = spine_at(plane)
    spine = np.hypot(plane.x, plane.y - y) - 23 * scale
    # The lungs meet behind the breastbone, but for a sheet that widens to a wedge of fat.
    wedge = np.clip(24 - plane.y + place(plane.p, 0, -1, plane.t)[1], 0, 24)
    middle = np.minimum(_union((heart, right, left, upper, lower, spine), 8), np.abs(plane.x - 3) - 1.2 - 0.6 * wedge)
    lung = both(both(inside, ellipsoid(plane, "lung_pair"), 6), both(-below, -middle, 5), 5)
    return lung, inside, below, np.minimum(np.minimum(heart, right) + 4.5, left + 3) + 0.8 * plane.coarse


def spine_at(plane: Plane) -> tuple[float, float]:
    """y of the middle of the vertebral body and the scale of the vertebra."""
    scale = 1.12 - 0.3 * plane.t
    return place(plane.p, 0, 1, plane.t)[1] - 15 - 20 * scale, scale
