"""Named domain shifts of the painted tissue: what another lab or scanner does to the same slide."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from PIL import Image, ImageFilter

from ..errors import DataError

TISSUE = yaml.safe_load((Path(__file__).parent / "tissue.yaml").read_text(encoding="utf-8"))
SHIFTS = {name: SimpleNamespace(**TISSUE["none"] | changes) for name, changes in TISSUE["shifts"].items()}


def find_shift(name: str | None) -> SimpleNamespace:
    if name not in (None, *SHIFTS):
        raise DataError(f"synthetic: there is no shift {name!r}; choose None or one of {', '.join(SHIFTS)}")
    return SHIFTS[name] if name is not None else SimpleNamespace(**TISSUE["none"])


def apply_effect(effect: str, image, rng):
    """What happens to the finished picture, uint8 [H, W, 3] in and out."""
    if effect == "none":
        return image
    if effect in ("blur", "soft"):
        radius = {"blur": 2.0, "soft": 0.9}[effect]
        return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    if effect == "jpeg":
        Image.fromarray(image).save(packed := io.BytesIO(), "JPEG", quality=12)
        return np.array(Image.open(packed))
    light = image.astype(np.float32)
    if effect == "scanner":  # gamma by channel, then channels that leak into each other
        light = 255 * (light / 255) ** np.array([0.8, 1.0, 1.3], np.float32)
        light = light @ np.array([[0.9, 0.06, 0], [0.1, 0.88, 0.1], [0, 0.06, 0.9]], np.float32)
    elif effect == "noise":
        light += 20 * rng.standard_normal(light.shape, dtype=np.float32)
    elif effect == "uneven":
        light *= np.rot90(np.linspace(0.5, 1.05, len(light), dtype=np.float32)[:, None, None], rng.integers(4))
    elif effect == "fade":
        light = 0.5 * light + 0.5 * np.array([236, 218, 190], np.float32)
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)
