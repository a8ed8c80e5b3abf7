"""Prompts that nobody draws: where to look, a short answer on shape and place, and a generic description.

    saliency -> refinement as a CRF does it -> box      where
    questions on shape and place -> a short answer      what it looks like here
    the bank's phrasings                                what it is

`Fused` puts them together for `lite`. The saliency and the answers of this file come from image statistics alone;
`pretrained.py` has those of a CLIP and of a VQA model. Any function of the same form may stand in for them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_opening, gaussian_filter, label

from ..augment import DENSITY, UNMIX
from ..errors import SettingsError

SIZES, SHAPES, COUNTS = ("small", "medium-sized", "large"), ("round", "elongated"), ("a few", "many", "very many")
PLACES = ("everywhere", "mostly in the upper half", "mostly in the lower half", "mostly on the left",
          "mostly on the right")  # fmt: skip


def haematoxylin(image):
    """The nuclear dye's density, 0..1: uint8 [H, W, 3] -> [H, W]."""
    amount = (DENSITY[image] @ UNMIX)[..., 0]
    low, high = np.percentile(amount, [1, 99])
    return ((amount - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float32)


def stain_saliency(image, text=""):
    """Where nuclei are likely, from the stain alone: [H, W] in 0..1. The text is not read."""
    return gaussian_filter(haematoxylin(image), 1.0)


def refine(image, saliency, rounds=5, near=3.0, weight=2.0, colours=8):
    """Mean-field rounds of a dense CRF with two kernels: neighbours agree, and neighbours of like colour agree more.

    Colour is brightness in `colours` bins, so that the second kernel is a few Gaussian filters. -> bool [H, W]
    """
    saliency = np.asarray(saliency, np.float32)
    if saliency.shape != image.shape[:2] or not np.isfinite(saliency).all():
        raise SettingsError(
            f"a saliency map must be finite and as large as its image, {list(image.shape[:2])}, got "
            f"{list(saliency.shape)}; resize it first"
        )
    unary = np.log(saliency.clip(1e-3, 1 - 1e-3) / (1 - saliency.clip(1e-3, 1 - 1e-3)))
    bins = np.eye(colours, dtype=np.float32)[(image.mean(-1) / 256 * colours).astype(int)]  # [H, W, colours]
    reach = (near, near, 0)
    counted = gaussian_filter(bins, reach) + 1e-6
    inside = 1 / (1 + np.exp(-unary))
    for _ in range(rounds):
        smooth = gaussian_filter(inside, near)
        alike = (bins * gaussian_filter(bins * inside[..., None], reach) / counted).sum(-1)
        inside = 1 / (1 + np.exp(-(unary + weight * (2 * smooth - 1) + weight * (2 * alike - 1))))
    return inside > 0.5


def box_of(region, margin=4):
    """(top, left, bottom, right) around the region, or None where there is none. bool [H, W]"""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return None
    height, width = region.shape
    top, left = max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0)
    return top, left, min(int(rows[-1]) + 1 + margin, height), min(int(columns[-1]) + 1 + margin, width)


def measured_answer(image, region):
    """What a VQA model would be asked, read off the region: size, shape, number and place of its parts."""
    parts, count = label(binary_opening(region, iterations=1))
    if not count:
        return "there are none in this image"
    height, width = region.shape
    ids, areas = np.unique(parts[parts > 0], return_counts=True)
    y, x = np.nonzero(parts == ids[areas.argsort()[len(areas) // 2]])  # the middling one by area
    spread = np.linalg.eigvalsh(np.cov(np.stack([y, x])) + np.eye(2) / 12) if len(y) > 1 else np.ones(2)
    size = SIZES[int(np.searchsorted((80, 200), np.median(areas)))]  # pixels at 40x
    shape = SHAPES[int(spread[1] > 3 * spread[0])]
    number = COUNTS[int(np.searchsorted((15, 60), count * 256 * 256 / (height * width)))]
    halves = [region[: height // 2].sum(), region[height // 2 :].sum(), region[:, : width // 2].sum(),
              region[:, width // 2 :].sum()]  # fmt: skip
    half = int(np.argmax(halves))
    place = PLACES[1 + half] if halves[half] > 0.65 * region.sum() else PLACES[0]
    return f"there are {number} {size} {shape} ones, {place}"


def possible_answers():
    sentences = [f"there are {n} {size} {shape} ones, {p}" for n in COUNTS for size in SIZES for shape in SHAPES
                 for p in PLACES]  # fmt: skip
    return ["there are none in this image", *sentences]


class Fused:
    """Prompts of several sources for `lite`: sentence vectors are added and scaled back, the box cuts the mask.

    saliency(image, text) -> [H, W] in 0..1; answer(image, region) -> a short sentence. description, answers, box say
    which sources are used.
    """

    def __init__(self, description=True, answers=False, box=False, saliency=stain_saliency, answer=measured_answer):
        if not description and not answers:
            raise SettingsError("a prompt needs words; use the description, the answers, or both")
        self.description, self.answers, self.box = description, answers, box
        self.saliency, self.answer, self.vectors = saliency, answer, {}

    def __call__(self, features, images):
        """[B, P, 384] vectors of the bank's phrasings and B images -> the same with all sources, and B boxes or None"""
        if not (self.answers or self.box):
            return features, None
        regions = [refine(image, self.saliency(image, "cell nuclei")) for image in images]
        if self.answers:
            said = self.encode([self.answer(image, region) for image, region in zip(images, regions, strict=True)])
            said = said.to(features.device)[:, None].expand_as(features)
            features = F.normalize(features + said, dim=-1) if self.description else said
        return features, [box_of(region) for region in regions] if self.box else None

    def encode(self, texts):
        from ..models.text import load_text_encoder

        if not self.vectors:  # the answers of this file, all at once: the encoder keeps what it is asked in a file
            known = possible_answers()
            self.vectors = dict(zip(known, load_text_encoder().encode(known), strict=True))
        if new := sorted({*texts} - {*self.vectors}):
            self.vectors |= dict(zip(new, load_text_encoder().encode(new), strict=True))
        return torch.stack([self.vectors[text] for text in texts])
