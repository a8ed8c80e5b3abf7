"""Chest films: painted phantoms with the truth of every structure, or a folder of open ones.

As films are hung, the patient's left lung is on the picture's right. It is the task, as in the paper.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from ..data.files import by_stem, find_root, read_image, subfolder
from ..errors import DataError

TASK = "left lung"
SPLITS = {"train": 41, "val": 28, "test": 53}  # subjects, as in the paper
OFFICIAL = "MontgomerySet"


@dataclass
class Film:
    image: np.ndarray  # uint8 [S, S], dense is bright
    masks: dict[str, np.ndarray]  # structure -> bool [s, s], s <= S; TASK is always there
    id: str


@dataclass(frozen=True)
class Films:
    """Films with the facts that a stamp wants of a data set."""

    name: str
    split: str
    films: tuple
    digest: str

    def about(self):
        return {"name": self.name, "split": self.split, "digest": self.digest}

    def __iter__(self):
        return iter(self.films)

    def __len__(self):
        return len(self.films)


def gather(name, split, films):
    content = hashlib.sha256()
    for film in films:
        content.update(film.id.encode() + film.image.tobytes() + film.masks[TASK].tobytes())
    return Films(name, split, tuple(films), content.hexdigest()[:12])


# ---- painted ----


def phantoms(split, count, side=64):
    """`count` painted films; film k of a split is the same whatever the count.

    The films of split "pretrain" are clean and show neither opacities nor lines: a promptable model trained on them
    meets those for the first time in the others, as SAM meets its first film.
    """
    if split not in ("pretrain", *SPLITS):
        raise DataError(f"there is no split {split!r} of films; choose pretrain, {', '.join(SPLITS)}")
    films = []
    for k in range(count):
        id = f"{split}_{k:04d}"
        seed = int.from_bytes(hashlib.sha256(f"film {id}".encode()).digest()[:6])
        films.append(Film(*paint(seed, side, clean=split == "pretrain"), id))
    return gather("chest phantoms", split, films)


def paint(seed, side=64, clean=False):
    """(image uint8 [S, S], {structure: bool [S, S]}): two lungs, heart, ribs, spine, at times an opacity and a line."""
    rng = np.random.default_rng(seed)
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(axis * rng.uniform(0.95, 1.1), axis * rng.uniform(0.95, 1.08))
    x = x + rng.normal(0, 0.03) + 0.03 * np.sin(rng.uniform(2, 4) * y + rng.uniform(0, 6))
    y = y + rng.normal(0, 0.03)
    heart = ellipse(x, y, rng.uniform(0.1, 0.2), rng.uniform(0.22, 0.34), *rng.uniform([0.26, 0.24], [0.42, 0.34]), 0.5)
    lungs, base = {}, rng.uniform(0.5, 0.68)
    for name, sign in (("left lung", 1), ("right lung", -1)):
        centre, wide = sign * rng.uniform(0.4, 0.46), rng.uniform(0.27, 0.34)
        oval = ellipse(x, y, centre, rng.uniform(0.0, 0.08), wide, rng.uniform(0.72, 0.82), -0.12 * sign, power=2.6)
        dome = base + rng.normal(0, 0.04) - rng.uniform(0.1, 0.2) * (1 - ((x - centre) / 0.4) ** 2)
        lungs[name] = np.minimum(np.minimum(oval, (dome - y) * 4), -heart)
    spine = 0.13 - np.abs(x - 0.02 * np.sin(3 * y))
    ribs, upper = paint_ribs(rng, x, y)
    soft = {name: step(depth * side / 8) for name, depth in (lungs | {"heart": heart}).items()}
    body = step((1 - ellipse_radius(x, y, 0, 0.25, 0.97, 1.35)) * side / 8)
    film = 0.62 * body + 0.12 * step(spine * side / 3) + rng.uniform(0.05, 0.16) * soft["heart"]
    film -= rng.uniform(0.28, 0.42) * (soft["left lung"] + soft["right lung"])
    wall = body * step((0.9 - np.abs(x)) * side / 6)
    for depth in ribs.values():
        film += rng.uniform(0.05, 0.12) * step(depth * side / 3) * wall
    masks = parts_and_wholes(lungs, heart, upper, body > 0.5)
    masks |= {name: (depth > 0) & (wall > 0.5) for name, depth in ribs.items()}
    if not clean:
        film += disease(rng, x, y, side)
    film += rng.uniform(-0.12, 0.12) * x + rng.uniform(-0.12, 0.12) * y  # the tube is never quite in the middle
    film += gaussian_filter(rng.standard_normal((side, side)), side / 40) * (0.02 if clean else 0.08)
    film = gaussian_filter(film, rng.uniform(0.3, 0.7) * side / 64)
    film = film.clip(0, 1.2) ** rng.uniform(0.8, 1.25) + rng.normal(0, rng.uniform(0.01, 0.03), (side, side))
    return (film.clip(0, 1) * 255).astype(np.uint8), {name: mask for name, mask in masks.items() if mask.sum() > 8}


def parts_and_wholes(lungs, heart, zones, body):
    """What a click in a lung may mean: the lung, the part above or below its fourth rib, or both lungs; and more."""
    masks = {name: depth > 0 for name, depth in lungs.items()}
    for side in ("left", "right"):
        above = zones[side]
        masks[f"{side} upper zone"] = masks[f"{side} lung"] & above
        masks[f"{side} lower zone"] = masks[f"{side} lung"] & ~above
    return masks | {"both lungs": masks["left lung"] | masks["right lung"], "heart": heart > 0, "body": body}


def paint_ribs(rng, x, y):
    """Depth inside each rib, a band that falls outwards and turns up at the wall; what lies above the fourth."""
    first, gap, wide = rng.uniform(-0.75, -0.65), rng.uniform(0.19, 0.24), rng.uniform(0.028, 0.045)
    ribs, upper = {}, {}
    for side, sign in (("left", 1), ("right", -1)):
        away, slope = np.maximum(sign * x, 0), rng.uniform(0.15, 0.45)
        for k in range(6):
            middle = first + gap * k + slope * away - 0.35 * away**2
            upper |= {side: y < middle} if k == 3 else {}
            ribs[f"{side} rib {k + 1}"] = np.minimum(wide - np.abs(y - middle), sign * x - 0.1)
        collar = rng.uniform(-0.72, -0.6) - 0.25 * away
        ribs[f"{side} clavicle"] = np.minimum(1.3 * wide - np.abs(y - collar), sign * x - 0.08)
    return ribs, upper


def disease(rng, x, y, side):
    """What a clean film does not have: opacities in the lungs, fluid at a base, a line."""
    extra = np.zeros_like(x)
    for _ in range(rng.integers(0, 3)):
        at = rng.choice([-1, 1]) * rng.uniform(0.3, 0.55), rng.uniform(-0.5, 0.4)
        spot = ellipse_radius(x, y, *at, *rng.uniform(0.1, 0.26, 2))
        extra += rng.uniform(0.12, 0.34) * np.exp(-(spot**2) * 1.5)
    if rng.random() < 0.3:  # fluid, brighter towards the base
        sign = rng.choice([-1, 1])
        extra += rng.uniform(0.1, 0.3) * step((y - rng.uniform(0.15, 0.4)) * 8) * step((sign * x - 0.1) * 12)
    if rng.random() < 0.4:
        path = 0.25 * np.cos(2.2 * y + rng.uniform(0, 3)) + rng.uniform(0.1, 0.4)
        extra += 0.2 * step((0.02 - np.abs(x - path)) * side / 2) * (y < rng.uniform(0, 0.4))
    return extra


def ellipse_radius(x, y, cx, cy, a, b, turn=0.0, power=2.0):
    """1 on the outline, 0 in the middle."""
    c, s = math.cos(turn), math.sin(turn)
    p, q = (c * (x - cx) + s * (y - cy)) / a, (c * (y - cy) - s * (x - cx)) / b
    return (np.abs(p) ** power + np.abs(q) ** power) ** (1 / power)


def ellipse(*where, power=2.0):
    """About how deep inside the outline, in units of its radius; below 0 outside."""
    return 1 - ellipse_radius(*where, power=power)


def step(x):
    return 1 / (1 + np.exp(-np.clip(4 * x, -30, 30)))


# ---- a folder of open films ----

FILM_SIDE, MASK_SIDE = 1024, 256  # px that SAM takes and gives


def open_films(split, root=None):
    """The Montgomery County set as its publisher packs it, cut 41 : 28 : 53 by a hash of the names.

    MontgomerySet/CXR_png/NAME.png             the films, of any size; stretched to a square here
    MontgomerySet/ManualMask/leftMask/NAME.png   the patient's left lung, above half is lung
    MontgomerySet/ManualMask/rightMask/NAME.png
    root: that folder, by default under $PGSEG_DATA. Any films of one's own may be laid out like this.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r} of films; choose one of {', '.join(SPLITS)}")
    root = find_root("open chest films", OFFICIAL, root)
    images = by_stem(subfolder(root, "CXR_png"), (".png",))
    lungs = {name: by_stem(subfolder(root, f"ManualMask/{folder}"), (".png",))
             for name, folder in ((TASK, "leftMask"), ("right lung", "rightMask"))}  # fmt: skip
    for name, files in lungs.items():
        if missing := [stem for stem in images if stem not in files]:
            raise DataError(f"{root}: {missing[0]}.png has no mask of the {name}; add it, or take the film away")
    ranked = sorted(images, key=lambda stem: hashlib.sha256(f"film {stem}".encode()).hexdigest())
    if len(ranked) < 3:
        raise DataError(f"{root}: {len(ranked)} films are too few for {', '.join(SPLITS)}; three are the least")
    edges = np.round(np.cumsum([0, *SPLITS.values()]) / sum(SPLITS.values()) * len(ranked)).astype(int)
    place = [*SPLITS].index(split)
    films = []
    for stem in sorted(ranked[edges[place] : edges[place + 1]]):
        film = square(Image.fromarray(read_image(images[stem])).convert("L"), FILM_SIDE)
        masks = {name: square(read_mask(files[stem]), MASK_SIDE) >= 128 for name, files in lungs.items()}
        if not masks[TASK].any():
            raise DataError(f"{lungs[TASK][stem]}: the mask is empty; every film needs its {TASK}")
        films.append(Film(film, masks, stem))
    return gather(OFFICIAL, split, films)


def read_mask(path):
    return Image.fromarray((read_image(path)[..., 0] > 127).astype(np.uint8) * 255)


def square(picture, side):
    return np.array(picture.resize((side, side), Image.Resampling.BILINEAR))


def load_films(split, count, profile):
    """What a profile asks of: phantoms, and at full open films."""
    return open_films(split) if profile == "full" else phantoms(split, count)
