"""H&E-like tissue painted from a seed: glands, tumour and stroma, five classes of nuclei, their exact masks.

Dyes (haematoxylin, eosin, the orange of red cells) are painted as amounts and become light by Beer-Lambert.
Layout, ground, shapes and optics draw from separate streams of the seed, so a shift in looks leaves
layout and masks alone. `u` is the size of a 40x pixel; what is painted with is listed in tissue.yaml.
"""

import hashlib
import math
from numbers import Integral
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from ..errors import DataError
from .shifts import TISSUE, apply_effect, find_shift

CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")  # codes 1..5, 0 is no nucleus
PRESENT = (0.70, 0.72, 0.74, 0.6, 0.62)  # chance that a tile is meant to hold the class at all
KINDS = list(TISSUE["kinds"])
TRAITS = [SimpleNamespace(**dict(zip(TISSUE["columns"], row, strict=True))) for row in TISSUE["kinds"].values()]
STROMA, NEST, GLAND, LUMEN, GAP, NECROSIS = range(6)


def _noise(rng, size, wave, stretch=1.0):
    """Smooth noise, mean 0, variance about 1, features `wave` px high and `stretch` times as wide."""
    shape = [max(2, round(size / w)) + 1 for w in (wave, wave * stretch)]
    small = Image.fromarray(rng.standard_normal(shape, dtype=np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.35)


def _step(x):
    return np.minimum(np.maximum(x + np.float32(0.5), 0), 1)  # quicker than np.clip on a small patch


def _outline(r, waves, c, s):
    """Radius of a gland in the direction (c, s) = (cos t, sin t)."""
    lobes = np.array([2 * c * c - 1, 2 * s * c, c * (4 * c * c - 3), s * (4 * c * c - 1)], np.float32)
    return np.float32(r) * (1 + np.tensordot(waves, lobes, 1))


def _regions(rng, size, u, holes):
    """What is where -> glands, along and across the fibres [2, H, W], soft masks by region, present [5]."""
    has = rng.random(5) < PRESENT
    turn, x = rng.uniform(0, 2 * np.pi), np.arange(size, dtype=np.float32)[None]
    c, s, y = np.float32(np.cos(turn)), np.float32(np.sin(turn)), x.T
    flow = np.stack([x * c + y * s, y * c - x * s + rng.uniform(6, 22) * u * _noise(rng, size, 90 * u)])
    ragged, glands = _noise(rng, size, 9 * u), []
    builds_glands = has[0] and rng.random() < 0.35  # this tumour does, others grow in nests
    inside = np.full((2, size, size), -99, np.float32)  # depth into the nearest gland, and into its lumen
    for label in [5] * (has[4] * rng.integers(2, 5)) + [1] * (builds_glands * rng.integers(1, 4)):
        for _ in range(max(1, round((size / 256 / u) ** 2))):
            r, (gx, gy) = u * rng.uniform(36, 80), rng.uniform(-0.15, 1.15, 2) * size
            if any(np.hypot(gx - g[0], gy - g[1]) < 0.95 * (r + g[2]) + 6 * u for g in glands):
                continue
            waves = (rng.standard_normal(4) * [0.12, 0.12, 0.05, 0.05]).astype(np.float32)
            wall, dx, dy = np.float32(u * rng.uniform(25, 36)), x - np.float32(gx), y - np.float32(gy)
            rho = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)
            depth = _outline(r, waves, dx / rho, dy / rho) - rho
            np.maximum(inside, [depth, depth - wall], out=inside)
            flow[1] += 1.3 * r * np.exp(-((rho / np.float32(1.2 * r)) ** 2))  # fibres wrap around it
            glands.append((gx, gy, r, waves, label))
    gland, lumen = _step(inside[0] / 2), _step((inside[1] + 1.5 * ragged) / 3)
    gap = _step((_noise(rng, size, 85 * u) - rng.uniform(1.0, 2.6)) * 14 + ragged) * (1 - gland)
    nest, necrosis = np.zeros_like(gap), np.zeros_like(gap)
    if has[0] and not builds_glands:
        nest = _step((_noise(rng, size, 130 * u) + rng.uniform(-0.3, 1.6)) * 14 + ragged) * (1 - gland - gap)
    if has[3] and rng.random() < 0.4:
        necrosis = _step((_noise(rng, size, 110 * u) - rng.uniform(0.2, 1)) * 6 + ragged) * (1 - gland - gap)
    if holes:
        ice = _noise(rng, size, 13 * u, 1.6)
        gap = np.maximum(gap, _step((ice - np.quantile(ice[::4, ::4], 1 - holes)) * 4))
    return glands, flow, dict(nest=nest, gland=gland, lumen=lumen, gap=gap, necrosis=necrosis), has


def _place(rng, size, how, glands, flow, soft, has):
    """Where nuclei and distractors lie -> cells [4, n]: kind, x, y, angle; distractors first."""
    u, rows, land = how.scale, [], np.zeros((size, size), np.int8)
    area = (size / u / 256 + 0.06) ** 2
    rate = area * how.crowd
    for code, name in enumerate(soft, 1):
        land[soft[name] > 0.5] = code

    def at(field, x, y):
        return field[tuple(np.clip([y, x], 0, size - 1).astype(int))]

    def put(odds, x, y, angle):
        kinds = rng.choice([KINDS.index(name) for name in odds], len(x), p=list(odds.values()))
        rows.append(np.stack([kinds, x, y, angle]))

    def scatter(count, where, odds, spots=(), stray=9.0):
        """`count` in the tile and n around each spot (centre, width, n), kept where the land is right."""
        xy = [rng.uniform(-8 * u, size + 8 * u, (2, rng.poisson(count)))]
        xy += [centre[:, None] + wide * rng.standard_normal((2, int(n))) for centre, wide, n in spots]
        x, y = np.hstack(xy)
        x, y = np.stack([x, y])[:, np.isin(at(land, x, y), where)]
        slope = [at(flow[1], x + 3, y) - at(flow[1], x - 3, y), at(flow[1], x, y - 3) - at(flow[1], x, y + 3)]
        put(odds, x, y, np.arctan2(*slope) + rng.normal(0, stray, len(x)))  # more or less along the fibres

    grades = rng.dirichlet([1.2, 0.6, 0.8])  # one tumour is wild, the next hard to tell from healthy glands
    tumour = dict(zip(("vesicular", "hyperchromatic", "bland"), grades, strict=True))
    for x, y, r, waves, label in glands:  # rings of nuclei near the outer wall, at times in two rows
        n = max(6, int(2 * np.pi * r / u / (15 if label == 5 else 17) * min(how.crowd, 1.3)))
        for row in range(1 + (rng.random() < (0.35 if label == 5 else 0.8))):
            t = (np.arange(n) + rng.uniform() + rng.normal(0, 0.16, n)) * 2 * np.pi / n
            t = t[rng.random(n) > (0.06, 0.5)[row]]
            c, s = np.cos(t), np.sin(t)
            rho = _outline(r, waves, c, s) - u * (11 + 14 * row + rng.normal(0, 2.2, len(t)))
            lean = rng.normal(0, 0.2 if label == 5 else 0.5, len(t))
            put({"columnar": 1} if label == 5 else tumour, x + rho * c, y + rho * s, t + lean)
    if has[0]:
        scatter(rng.uniform(90, 280) * rate, [NEST], tumour, stray=rng.choice([0.4, 9.0]))
    if has[3]:
        dying = {"pyknotic": 0.65, "fragments": 0.15, "ghost": 0.2}
        scatter(rng.uniform(10, 26) * rate, [STROMA, NEST, GLAND], dying)
        scatter(70 * rate, [NECROSIS], dying)
    if has[1]:
        mix = dict(zip(("lymphocyte", "plasma", "neutrophil"), rng.dirichlet([9, 2, 1]), strict=True))
        spots = [(rng.uniform(0, size, 2), u * w, 30 * how.crowd) for w in rng.uniform(14, 45, rng.integers(5))]
        many = 400 if rng.random() < 0.12 else rng.uniform(4, 30)
        scatter(many * rate, [STROMA, GAP, NECROSIS], mix, spots)
        scatter(rng.uniform(0, 12) * rate, [NEST, GLAND], mix)  # few walk into the epithelium
    if has[2]:
        plump = rng.choice([0.1, 0.3, 0.6])
        scatter(rng.uniform(30, 110) * rate, [STROMA], {"spindle": 1 - plump, "fibroblast": plump}, stray=0.17)
    nuclei = np.hstack([np.zeros((4, 0)), *rows])
    kinds, x, y = [TRAITS[int(k)] for k in nuclei[0]], *nuclei[1:3]
    reach = rng.uniform(0.78, 1.12) * u * np.array([k.a * math.sqrt(k.ratio / how.crowd) for k in kinds])
    close, free = np.hypot(x[:, None] - x, y[:, None] - y) < reach[:, None] + reach, np.ones(len(x), bool)
    for i in range(len(x)):  # where two collide the earlier stays
        free[i + 1 :] &= ~(close[i, i + 1 :] & free[i])
    rows.clear()
    scatter(rng.uniform(0, 90) * area, [GLAND, LUMEN] if rng.random() < 0.3 else [GLAND], {"goblet": 1})
    spots = [(rng.uniform(0, size, 2), u * w, 80 / w) for w in rng.uniform(8, 20, rng.poisson(1.2 * area))]
    scatter(0, [STROMA, GAP, NECROSIS], {"red_cell": 1}, spots)
    scatter(rng.uniform(6, 36) * area, range(6), {"debris": 0.4, "unfocused": 0.6})
    return np.hstack([*rows, nuclei[:, free]])


def _ground(rng, size, u, flow, soft, nuclei):
    """Dyes [3, H, W] (haematoxylin, eosin, orange) of the tissue before any nucleus is painted."""
    grain, broad = _noise(rng, size, 2.5), _noise(rng, size, 40 * u)
    # Stroma: ribbons of collagen, looked up in noise stretched along the fibres and folded at its ends.
    wavy = flow[1] + 1.6 * u * _noise(rng, size, 12 * u)
    across = wavy * np.float32(rng.uniform(0.9, 3) / u) + 0.7 * grain
    place = np.stack([across, flow[0] * np.float32(2 / u) + 20 * broad]).astype(np.int32)
    ribbon = _noise(rng, 513, 5, 10)[tuple(np.abs((place & 1023) - 512))]
    pink = rng.uniform(0.12, 0.55) + rng.uniform(0.06, 0.2) * ribbon + 0.06 * broad + 0.05 * grain
    pink *= 1 - 0.85 * _step((-ribbon - rng.uniform(0.7, 2.5)) * 2)  # clefts between the bundles
    blue = 0.05 + 0.02 * ribbon
    # Epithelium: cytoplasm with vacuoles, and borders, clear or dense, half way between neighbouring nuclei.
    body = rng.uniform(0.16, 0.5) + 0.05 * grain + 0.06 * broad + 0.06 * ribbon
    if nuclei.shape[1] > 1:
        centres = np.moveaxis(np.mgrid[2:size:4, 2:size:4][::-1], 0, -1)  # every fourth pixel will do
        near = cKDTree(nuclei[1:3].T).query(centres, k=2)[0].astype(np.float32)
        border = Image.fromarray(near[..., 1] - near[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
        body += rng.choice([0.12, -0.2]) * np.exp(-((np.asarray(border) / np.float32(2.5 * u)) ** 2))
    body *= 1 - 0.6 * _step((_noise(rng, size, 5 * u) - rng.uniform(0.9, 2.5)) * 2)
    solid = np.maximum(soft["nest"], soft["gland"])
    pink += solid * (body - pink)
    blue += solid * (rng.uniform(0.06, 0.36) + 0.05 * grain + 0.05 * broad - blue)
    pink += soft["necrosis"] * (0.5 + 0.12 * grain + 0.1 * _noise(rng, size, 9 * u) - pink)
    tissue = 1 - 0.96 * np.maximum(soft["gap"], rng.uniform(0.75, 1) * soft["lumen"])
    return np.stack([blue * tissue, pink * tissue, np.zeros_like(pink)]).astype(np.float32)


def _stamp(rng, cells, u, swell, dyes):
    """Paint every cell into `dyes` in place, the earlier on top -> instances [H, W]."""
    size, n = dyes.shape[1], cells.shape[1]
    chromatin, axis = _noise(rng, 256, 3.2 * max(u, 0.6)), np.arange(size, dtype=np.float32)
    z = rng.standard_normal((n, 16)).clip(-2.2, 2.2)
    offsets = rng.integers(0, 128, (n, 2))
    cover, instances = np.zeros((size, size), np.float32), np.zeros((size, size), np.int32)
    for j, (kind, x, y, angle) in enumerate(cells.T.tolist()):
        k, d = TRAITS[int(kind)], z[j].tolist()
        a = u * swell * k.a * math.exp(k.spread * d[0])
        b = a * k.ratio * math.exp(0.14 * d[1])
        deep = d[13] > 0.8  # lies at the rim of the focal depth: paler, with soft edges
        edge, amount = k.edge + 3 * deep, math.exp(0.26 * d[2] - 0.6 * deep)
        half = (1 + 5 * k.wobble) * a + edge + 3 * (k.halo > 0)  # of the window, which the tile's border cuts
        rows, cols = (slice(max(int(v - half), 0), max(int(v + half) + 2, 0)) for v in (y, x))
        dx, dy, c, s = axis[None, cols] - x, axis[rows, None] - y, math.cos(angle), math.sin(angle)
        p, q = c / a * dx + s / a * dy, c / b * dy - s / b * dx  # [h, w]; the outline is about the unit circle
        if k.bend:  # pointed and curved
            q = q * (1 + k.bend * p * p) + k.bend * d[3] * (2 * p * p - 1)
        rho = np.sqrt(p * p + q * q) + 1e-4
        cos, w = p / rho, k.wobble
        outline = 1 + cos * (w * (d[4] - 3 * d[6]) + 4 * w * d[6] * cos * cos + 2 * w * d[7] / rho * q)
        depth = (rho - outline) * math.sqrt(b * min(a, 2 * b))  # px from the outline, < 0 inside
        if k.drops:  # drops of unequal size around the middle
            t = np.arange(int(k.drops)) * 6.28 / k.drops + 0.4 * z[j, : int(k.drops)]
            centres = 0.55 * np.array([np.cos(t), np.sin(t)], np.float32)[..., None, None]
            sizes = (0.36 + 0.08 * z[j, 5 : 5 + len(t), None, None]).astype(np.float32)
            depth = (np.hypot(p - centres[0], q - centres[1]) - sizes).min(0) * a
        oy, ox = offsets[j]
        h = k.fill + k.clump * chromatin[oy : oy + len(dy), ox : ox + dx.size]
        if k.rim:
            h += k.rim * np.exp(((depth + 1.3) / 1.1) ** 2 * -1)
        for i in (8, 10)[: (k.spot > 0) * (1 + (d[12] > 0.3))]:  # one nucleolus, at times two
            px, py = c * a * d[i] - s * b * d[i + 1], s * a * d[i] + c * b * d[i + 1]
            across, down = (np.exp((line - 0.25 * at) ** 2 / (-4.5 * u * u)) for line, at in ((dx, px), (dy, py)))
            h += k.spot * across * down
        alpha, under, (blue, pink, orange) = _step(depth * (-1 / edge)), cover[rows, cols], dyes[:, rows, cols]
        seen = alpha * (1 - 0.8 * under)  # what lies under an earlier nucleus shines through
        blue += seen * (h * amount - blue)
        pink += seen * (k.eosin - pink)
        if k.orange:
            orange += seen * k.orange
        if k.halo:
            pink += k.halo * abs(d[14]) * np.exp(np.maximum(depth, 0) ** 2 / -16) * (1 - alpha)
        if k.label:
            np.maximum(under, alpha, out=under)
            ids = instances[rows, cols]
            ids[(alpha >= 0.5) & (ids == 0)] = j + 1
    return instances


def _scan(rng, dyes, how):
    """Light through the dyes by Beer-Lambert, with this lab's stains, lens and sensor -> uint8 [H, W, 3]."""
    stains = np.array([[0.60, 0.72, 0.33], [0.16, 0.90, 0.26], [0.05, 0.75, 1.0]])  # by dye: red, green, blue
    amount = np.exp(rng.normal(0, [0.14, 0.22, 0.1])) * [1.1 * how.h, 0.95 * how.e, 1]
    stains = (stains + rng.normal(0, 0.025, (3, 3))) * amount[:, None]
    density = np.moveaxis(dyes.clip(0), 0, -1) @ stains.astype(np.float32)  # [H, W, 3]
    if how.haze:
        density = density + how.haze * gaussian_filter(density[::-1, ::-1], (3, 3, 0))
    white = rng.uniform(236, 250) * np.array([1, 0.99, 1]) + rng.normal(0, 1.5, 3)
    lamp = 1 + np.float32(rng.uniform(0, 0.03)) * _noise(rng, len(density), 200)[..., None]
    light = white.astype(np.float32) * lamp * np.exp(-density)
    light += np.float32(rng.uniform(1, 4)) * rng.standard_normal(light.shape, dtype=np.float32)
    image = Image.fromarray(np.clip(light + 0.5, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.8)))
    if rng.random() < 0.2:  # part of the section lies out of focus
        where = Image.fromarray((255 * _step(_noise(rng, len(light), 150))).astype(np.uint8))
        image = Image.composite(image.filter(ImageFilter.GaussianBlur(1.3)), image, where)
    return np.array(image)  # a copy: PIL's own memory is read-only


def paint(seed: int, size_px: int = 256, shift: str | None = None):
    """One tile -> (image uint8 [H, W, 3], instances int32 [H, W], classes uint8 [H, W])."""
    how = find_shift(shift)
    layout, looks, shapes, optics, last = (np.random.default_rng([seed, stream]) for stream in range(5))
    glands, flow, soft, has = _regions(layout, size_px, how.scale, how.holes)
    cells = _place(layout, size_px, how, glands, flow, soft, has)
    labels = np.array([TRAITS[int(k)].label for k in cells[0]], np.uint8)
    dyes = _ground(looks, size_px, how.scale, flow, soft, cells[:, labels > 0])
    instances = _stamp(shapes, cells, how.scale, how.swell, dyes)
    image = apply_effect(how.effect, _scan(optics, dyes, how), last)
    real = np.bincount(instances.ravel(), minlength=len(labels) + 1) >= 10  # a sliver at the border is no nucleus
    real[0] = False
    ids = (np.cumsum(real) * real).astype(np.int32)
    return image, ids[instances], (np.append(0, labels) * real).astype(np.uint8)[instances]


class SyntheticSource:
    """Painted tiles; tile k of a split is the same whatever `size`, and no two splits share a tile."""

    name, targets = "synthetic", ("all", *CLASSES)

    def __init__(self, split="train", size=64, shift=None):
        if split not in ("train", "val", "test"):
            raise DataError(f"synthetic: there is no split {split!r}; choose train, val or test")
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise DataError(f"synthetic: size is {size!r}; give a number of tiles, 1 or more")
        find_shift(shift)
        self.split, self.shift, self.ids = split, shift, [f"{split}_{k:05d}" for k in range(size)]

    def shape(self, id):
        return 256, 256

    def read(self, id):
        from . import Sample  # here, because that module imports this one

        seed = int.from_bytes(hashlib.sha256(f"pgseg {id}".encode()).digest()[:6])
        image, instances, classes = paint(seed, 256, self.shift)
        masks = {"all": instances > 0} | {name: classes == k for k, name in enumerate(CLASSES, 1)}
        return Sample(image, masks, id, self.name, instances)
