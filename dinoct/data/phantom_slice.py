"""Tissue by tissue, the HU of one slice of the phantom; coordinates as in phantom_body."""

import numpy as np

from dinoct.data.phantom_body import Plane, both, bump, draw, ellipsoid, lung_surfaces, place, spine_at, step


def cut(plane: Plane) -> np.ndarray:
    """HU [size, size] (float32) of the slice, before a scanner blurs it and adds noise."""
    image = _shell(plane)
    _inside(plane, image)
    _skeleton(plane, image)
    return image


def _shell(plane: Plane) -> np.ndarray:
    """HU of air, table, skin, fat and muscle."""
    p, t = plane.p, plane.t
    image = np.full(plane.x.shape, -1000, np.float32)
    bend = p.table_curve * (plane.x - p.offset) ** 2
    deep = plane.y - p.table_y + bend
    broad = _cover(plane, np.abs(plane.x - p.offset) - 205)
    _paint(image, broad * _cover(plane, np.abs(deep - 2 - p.table / 2) - p.table / 2), -940)
    for distance in (deep - 2, deep - 2 - p.table - 0.5 * bend):
        _paint(image, broad * _cover(plane, np.abs(distance) - 1.3), -250)
    outside = both(plane.r - plane.skin, deep, 12)
    _paint(image, _cover(plane, outside), 15)
    _paint(image, _cover(plane, outside + 2), -105 + 7 * plane.fine)
    if p.breast:
        gland = both(outside + 9 - 4 * plane.coarse, plane.muscle + 4 - plane.r, 3) - 2 * plane.fine
        share = 1.1 * bump(2.45, 0.25, plane.phi) * bump(0.42, 0.1, t)
        _paint(image, _cover(plane, np.maximum(gland, outside + 4)) * np.minimum(share, 0.8), 30)
    flesh = both(plane.r - plane.muscle + 1.2 * plane.coarse, outside + 4, 5)
    _paint(image, _cover(plane, flesh), 55 + 8 * plane.fine)
    height = plane.muscle - plane.cage
    for level in (0.35, 0.68):  # fat between the layers of muscle
        gap = np.abs(plane.r - plane.cage - (level + 0.08 * plane.coarse) * height) - 0.9
        _paint(image, _cover(plane, gap) * np.clip(0.5 + 0.4 * plane.fine, 0, 1) * (height > 9), -80)
    return image


def _inside(plane: Plane, image: np.ndarray) -> None:
    """Paints mediastinum, abdomen and lungs."""
    p = plane.p
    lung, inside, below, heart = lung_surfaces(plane)
    blood, great = 42 + p.contrast, draw(plane, p.great)
    _paint(image, _cover(plane, inside), -95 + 8 * plane.fine)
    _paint(image, _cover(plane, heart), 48 + 0.25 * p.contrast)
    for name in ("rv", "ra", "la", "lv"):
        _paint(image, _cover(plane, np.maximum(ellipsoid(plane, name), heart + 3) + 0.8 * plane.coarse), blood)
    _abdomen(plane, image, _cover(plane, np.maximum(inside, below)))
    _paint(image, draw(plane, p.gullet), 40)
    _paint(image, draw(plane, p.gullet, -5.0) * np.clip(plane.fine, 0, 1), -700)
    air = _cover(plane, lung) * (1 - draw(plane, p.great, 2.5))
    _paint(image, great, blood)
    _parenchyma(plane, image, air)
    _paint(image, draw(plane, p.airways, 1.4), 30)
    _paint(image, draw(plane, p.airways), -990)


def _abdomen(plane: Plane, image: np.ndarray, under: np.ndarray) -> None:
    """Paints the organs where `under` (share of each pixel) is below the diaphragm."""
    p = plane.p
    if not under.any():
        return
    _paint(image, under, -100 + 6 * plane.fine)
    stomach = ellipsoid(plane, "stomach") + 2 * plane.coarse
    veins = np.where(np.abs(plane.coarse) < 0.12, 25 if p.contrast else -12, 3 * plane.fine)
    for distance, hu in (
        (ellipsoid(plane, "spleen") + plane.coarse, 48 + 0.4 * p.contrast),
        (stomach, 45.0),
        (stomach + 4, np.where(plane.y < place(p, 0, -0.3, 0.17)[1], -950, 12 + 15 * plane.fine)),
        (ellipsoid(plane, "liver") + 1.5 * plane.coarse, 58 + 0.3 * p.contrast + veins),
    ):
        _paint(image, under * _cover(plane, distance), hu)


def _parenchyma(plane: Plane, image: np.ndarray, lung: np.ndarray) -> None:
    p = plane.p
    holes = np.clip(plane.coarse + 0.6 * plane.fine - 0.6, 0, 1.2) * max(p.emphysema, 0)
    # Blood sinks: a patient on the back has denser lungs behind.
    hu = p.lung_hu + 38 * np.clip(plane.y / 90, -1.2, 1.2) + 10 * plane.fine + 8 * plane.coarse - holes
    for side, slope in ((-1, 255), (1, 280)):
        fissure = plane.y - 62 + (0.76 - plane.t) * slope - 0.15 * side * plane.x
        hu += 130 * _cover(plane, np.abs(fissure) - 0.5) * (plane.x * side > 0)
    _paint(image, lung, np.maximum(hu, -985))
    _paint(image, lung * draw(plane, p.vessels), 35 + 0.8 * p.contrast)
    for density in np.unique(p.balls[:, 4]).tolist():
        _paint(image, lung * draw(plane, p.balls[p.balls[:, 4] == density]), density)
    _paint(image, 0.8 * lung * draw(plane, p.bronchi, 0.9), 0)
    _paint(image, draw(plane, p.bronchi), -960)


def _skeleton(plane: Plane, image: np.ndarray) -> None:
    p, t = plane.p, plane.t
    _ribs(plane, image)
    y, k = spine_at(plane)
    wave = float(np.cos(2 * np.pi * (plane.z / p.pitch + p.phase)))  # 1 in the middle of a vertebra, -1 in a disc
    disc, canal = step(0.75, 0.95, -wave), y + 22 * k
    axis = np.hypot(plane.x / 1.12, plane.y - canal)
    _paint(image, _cover(plane, axis - 12 * k), 45)
    spinous = _segment(plane, (0, canal + 13 * k), (0, canal + (24 + 8 * wave) * k), 3.2)
    _bone(plane, image, np.minimum(np.abs(axis - 11.5 * k) - 2.8, spinous), 1.6, 600, 280)
    transverse = _segment(plane, (9 * k, canal + 4), (30 * k, canal + 12), 4.5 * k) + 5 * max(-wave, 0)
    _bone(plane, image, transverse, 1.8, 520, 230)
    body = (np.hypot(plane.x / (17.5 * k), (plane.y - y) / (14 * k)) - 1) * 14 * k
    _bone(plane, image, body, 1.8, 480 - 340 * disc, 210 - 110 * disc)
    _paint(image, _cover(plane, axis - 8.5 * k), 25)
    _paint(image, _cover(plane, axis - 5 * k), 38)
    if 0.32 < t < 0.9:  # breastbone
        half, front = 12 + 16 * step(0.68, 0.8, t) + 3 * wave * (t < 0.68), place(p, 0, -1, t)[1] + 5.5
        _bone(plane, image, _segment(plane, (0, front), (half, front + 0.12 * half), 5.5), 1.5, 420, 130)
    _paint(image, draw(plane, p.shoulders), 520)
    _paint(image, draw(plane, p.shoulders, -2), 200)


def _ribs(plane: Plane, image: np.ndarray) -> None:
    """Twelve pairs that fall from back to front, so that a slice cuts several of them, and the shoulder blades."""
    p, t, phi = plane.p, plane.t, plane.phi
    level = (plane.z + p.drop * (1 - 0.45 * t) * (1 - np.cos(phi)) / 2) / p.pitch + p.phase
    index = np.clip(np.round(level), 0, 11)
    off = np.abs(level - index) * p.pitch + 99 * ((index == 0) * (phi > 0.9) + (index == 1) * (phi > 1.4))
    rib = (np.hypot((plane.r - plane.cage + 5.5) / 4.2, off / 7) - 1) * 4.2
    rib = np.maximum(rib, (0.22 - phi) * plane.r)
    _bone(plane, image, np.maximum(rib, (phi - 2.35) * plane.r), 1.3, 560, 190)
    cartilage = 90 + (60 + 40 * max(p.calcium, 0)) * np.clip(plane.fine, 0, 2)
    _paint(image, _cover(plane, np.maximum(rib, (2.35 - phi) * plane.r)) * (t > 0.2), cartilage)
    middle, half = 1.0 + 0.12 * step(0.48, 0.66, t), 0.1 + 0.3 * step(0.48, 0.66, t)
    along = np.clip((phi - middle) / half, -1, 1)
    blade = np.abs(plane.r - plane.cage - (plane.muscle - plane.cage) * (0.45 + 0.2 * (phi - 1)))
    blade += -1.6 - 1.8 * along**2 - 2 * np.maximum(along, 0) ** 4
    blade = both(blade, (np.abs(phi - middle) - half) * plane.r, 2)
    _bone(plane, image, blade + 99 * (abs(t - 0.74) > 0.24), 1.3, 560, 260)


def _bone(plane: Plane, image: np.ndarray, distance: np.ndarray, cortex: float, hard: float, soft: float) -> None:
    _paint(image, _cover(plane, distance), hard)
    _paint(image, _cover(plane, distance + cortex), soft + 0.12 * soft * plane.fine)


def _segment(plane: Plane, a: tuple[float, float], b: tuple[float, float], radius: float) -> np.ndarray:
    """A thick line in the slice and its mirror image on the other side."""
    x, y, dx, dy = np.abs(plane.x) - a[0], plane.y - a[1], b[0] - a[0], b[1] - a[1]
    along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - along * dx, y - along * dy) - radius


def _cover(plane: Plane, distance: np.ndarray) -> np.ndarray:
    """Share of each pixel inside a surface."""
    return np.clip(0.5 - distance / plane.pixel, 0, 1)


def _paint(image: np.ndarray, cover: np.ndarray, hu: np.ndarray | float) -> None:
    image += cover * (hu - image)
