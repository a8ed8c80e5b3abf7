"""How far may a visual prompt be wrong? The small network, asked with prompts bent in every way and degree.

Two ways of training it, as with words: on exact prompts only, and on prompts bent as the published study mixes them.
The second is tested on kinds and radii that it has not seen, as a model trained on groups of wordings is on new ones.
"""

from hashlib import sha256

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..studies import Study
from .network import CHANNELS, as_channels, bend_prompt, prompts_of, train
from .perturb import KINDS, SEVERITIES
from .phantoms import SHAPE, about, make_phantoms
from .surfaces import overlap, surface_distance

EXACT, BENT = "exact prompts", "bent prompts"
SIZES = {  # by profile: phantoms to train on and to test on, their shape, steps of training, severities asked
    "smoke": dict(train=3, test=2, shape=(16, 24, 24), steps=6, severities=(1, 4)),
    "lite": dict(train=32, test=8, shape=SHAPE, steps=400, severities=(1, 2, 4, 6, 8, 10)),
    "full": dict(train=256, test=32, shape=(64, 96, 96), steps=4000, severities=SEVERITIES),
}
PROMPTS = {"mask": tuple(KINDS), "box": ("dilate", "erode", "shift"), "point": ("shift",)}
MEASURES = {"dice": 3, "distance": 2, "copied": 3}  # and their decimals in the stored table
SEEN = ("dilate", "erode", "hole", "shift", "mix")  # in training on bent prompts, at a radius of up to 4


def measure(cell, seed, profile, folder):
    """A row per prompt, kind, severity and phantom; for each organ a column of every one of MEASURES."""
    sizes = SIZES[profile]
    known = make_phantoms(sizes["train"], "train", sizes["shape"])
    model = train(known, seed, sizes["steps"], cell["bent"])
    tests = make_phantoms(sizes["test"], "test", sizes["shape"])
    table = ask_bent(model, tests, sizes["severities"])
    roles = [about(known, "train") | {"role": "training"}, about(tests, "test")]
    table.attrs["datasets"] = roles
    return table


def ask_bent(model, volumes, severities=SEVERITIES, prompts=PROMPTS, quiet=False):
    """Ask a model for each organ with an exact prompt, then with bent ones; all it needs is `ask(image, prompts)`,
    and `raw = True` if it takes Hounsfield units rather than an abdominal window.

    dice and distance  of the answer
    copied             Dice of the prompt itself: what a model gets that returns it untouched; empty for points
    severity           0 is the exact prompt, of the kind "exact"
    """
    rows = []
    for number, volume in enumerate(tqdm(volumes, desc="asking", unit="volume", disable=quiet)):
        image = volume.image if getattr(model, "raw", False) else volume.windowed
        masks = {organ: volume.mask(organ) for organ in volume.organs if volume.mask(organ).any()}
        exact = {organ: prompts_of(mask) for organ, mask in masks.items()}
        scores = {}  # by organ and prompt: one that is eroded away, or has no hole left, is asked about once
        for kind_of_prompt, kinds in prompts.items():
            for kind, severity in [("exact", 0), *((k, s) for k in kinds for s in severities)]:
                bent = {}
                for place, organ in enumerate(masks):
                    value = exact[organ][kind_of_prompt]
                    if kind != "exact":
                        seed, shape = (number, place, severity), volume.labels.shape
                        value = bend_prompt(kind_of_prompt, value, kind, severity, seed, shape, volume.others(organ))
                    bent[organ] = {kind_of_prompt: value}
                named = {organ: (organ, *shown(prompt)) for organ, prompt in bent.items()}
                new = {name: bent[organ] for organ, name in named.items() if name not in scores}
                answers = model.ask(image, list(new.values())) if new else ()  # [new, D, H, W]
                for (name, prompt), answer in zip(new.items(), answers, strict=True):
                    scores[name] = scored(name[0], answer, masks[name[0]], prompt)
                row = dict(prompt=kind_of_prompt, kind=kind, severity=severity, volume=number)
                for name in named.values():
                    row |= scores[name]
                rows.append(row)
    return pd.DataFrame(rows)


def shown(prompt):
    """A prompt's kind and a digest of it: whole masks of a scan would fill the memory."""
    ((kind, value),) = prompt.items()
    return kind, sha256(np.ascontiguousarray(value)).digest()


def scored(organ, answer, truth, prompt):
    (kind,) = prompt
    told = as_channels(prompt, truth.shape)[CHANNELS.index(kind)] > 0
    found = dict(
        dice=overlap(answer, truth), distance=surface_distance(answer, truth),
        copied=np.nan if kind == "point" else overlap(told, truth),
    )  # fmt: skip
    return {f"{name} {organ}": round(found[name], digits) for name, digits in MEASURES.items()}


STUDY = Study(
    about="a small 3D network asked with masks, boxes and points that are bent, trained with and without such",
    measure=measure,
    cells={EXACT: {"bent": False}, BENT: {"bent": True}},
    code=("visual/perturb", "visual/phantoms", "visual/network", "visual/surfaces", "visual/study"),
)
