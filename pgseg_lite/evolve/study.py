"""`pgseg experiment evolve`: the paper's four results and its open ends on films, then the search among wordings."""

from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch

from ..errors import ResultError
from ..evaluation import choose
from ..files import whole
from ..keys import code_digest, hash_of
from ..metrics import interval, two_level_means
from ..models.access import saving
from ..prompts import LEVELS, PromptBank
from ..studies import Study
from . import points, wording
from .chest import load_films, phantoms
from .promptable import Promptable, train_promptable
from .regressor import Regressor, score, true_dice

CODE = ("evolve", *(f"models/{name}" for name in ("sam2", "base", "lite", "text")), "metrics", "evaluation", "prompts",
        "data", "banks")  # fmt: skip


@dataclass(frozen=True)
class Size:
    films: tuple  # train, val, test
    pretraining: int  # clean films for the tiny model; 0: the published weights are taken
    steps: int  # of the tiny model
    epochs: int
    climb: int  # steps of a point
    tiles: tuple  # train, val, test of painted tissue
    asked: int  # held-out phrasings a level
    bank: int  # training phrasings a level


SIZES = {
    "smoke": Size((4, 3, 3), 6, 3, 1, 2, (2, 1, 2), 1, 2),
    "lite": Size((41, 28, 53), 200, 300, 20, 30, (24, 12, 24), 2, 10),
    "full": Size((41, 28, 53), 0, 0, 200, 60, (64, 32, 100), 4, 40),
}
CELLS = {
    "score": {"part": "score"},
    "score, level sets only": {"part": "score", "own": False},
    "heat-map": {"part": "heat-map"},
    "evolve": {"part": "evolve"},
    "evolve, gentle sigmoid": {"part": "evolve", "slope": 1.0},
    "evolve, four times the step": {"part": "evolve", "step": 4 * points.STEP},
    "evolve, level sets only": {"part": "evolve", "own": False},
    "evolve by SAM's confidence": {"part": "evolve", "by": "confidence"},
    "evolve from a random click": {"part": "evolve", "start": "random"},
    "search without a gradient": {"part": "evolve", "how": "search"},
    "wording, all": {"part": "wording", "target": "all"},
    "wording, inflammatory": {"part": "wording", "target": "inflammatory"},
}
MODELS = {"one fixed phrasing": "fixed", "prompt groups": "group"}  # the bundled checkpoints of lite


@cache  # the cells and their keys ask for the same
def films_of(profile):
    counts = zip(("train", "val", "test"), SIZES[profile].films, strict=True)
    return [load_films(split, count, profile) for split, count in counts]


def measure(cell, seed, profile, folder):
    size, cell = SIZES[profile], dict(cell)
    part = cell.pop("part")
    if part == "wording":
        return measure_wording(cell["target"], seed, size)
    torch.manual_seed(seed)
    model = promptable(size, seed, folder)
    films = films_of(profile)
    test = points.encode(model, films[2])
    if part == "heat-map":
        table, used = heat_map(model, test), films[2:]
    else:
        own = cell.pop("own", True)
        regressor, used = oracle(model, films, size, seed, own, folder), films
        if part == "score":
            table = scores(model, regressor, test, seed)
            table = table if own else table[table["source"] != "level set"]  # they are its training masks' like
        else:
            table = evolved(model, regressor, test, seed, size.climb, **cell)
    ids = [film.id for film in films[2]]
    table.insert(0, "image", [ids[film] for film in table.pop("film")])
    before = [phantoms("pretrain", size.pretraining)] if size.pretraining else []
    table.attrs["datasets"] = [one.about() for one in [*before, *used]]
    return table.round(4)


def promptable(size, seed, folder):
    """The model of this seed, trained once for all cells; at full the published one."""
    if not size.pretraining:
        return Promptable.from_pretrained(device="cuda" if torch.cuda.is_available() else "cpu")
    kind = ("evolve/chest", "evolve/promptable")
    home = folder / f"sam_{hash_of([size.pretraining, size.steps, seed, code_digest(kind)])}"
    if not (home / "config.json").exists():
        model = train_promptable(phantoms("pretrain", size.pretraining), size.steps, seed)
        with saving(home) as partial:
            model.save_pretrained(partial)
    return Promptable.from_pretrained(home)


def oracle(model, films, size, seed, own, folder):
    """The regressor of this seed, fitted once for all cells."""
    from safetensors.torch import load_file, save_file

    about = [asdict(size), seed, own, [part.digest for part in films], code_digest(("evolve",))]
    path = folder / f"regressor_{hash_of(about)}.safetensors"
    if not path.exists():
        scenes = [points.encode(model, part) for part in films[:2]]
        fitted = points.fit_on(model, scenes, size.epochs, seed, own)
        with whole(path) as partial:
            save_file(fitted.state_dict(), partial)
    regressor = Regressor()
    regressor.load_state_dict(load_file(path))
    return regressor.to(model.device).eval()


def scores(model, regressor, scene, seed):
    """A row for each candidate mask of each film, and one for the click in the middle."""
    film, source, masks, fits, sure = points.candidates(model, scene, 2 * seed + 2)
    logits, confidence = points.ask(model, scene, points.middles(scene)[:, None])
    film = np.concatenate([film, np.arange(len(scene.truth))])
    source = [*source, *["click in the middle"] * len(scene.truth)]
    masks = np.concatenate([masks, logits[:, 0] > 0])
    fits, sure = np.concatenate([fits, each_dice(logits[:, 0] > 0, scene)]), np.concatenate([sure, confidence[:, 0]])
    guessed = score(regressor, scene.images[torch.from_numpy(film)], torch.from_numpy(masks).to(scene.images.device))
    return pd.DataFrame({"film": film, "source": source, "dice": fits, "score": guessed.cpu(), "confidence": sure})


def heat_map(model, scene):
    """Dice for a click on every third pixel of the lung, either way: its spread, a row a film."""
    rows, stride = [], max(1, 3 * scene.side // 64)
    for film, truth in enumerate(scene.truth):
        dice, _, _ = dice_by_position(model, scene, film, stride)
        middle = points.ask(model, one(scene, film), points.middles(scene)[None, [film]])[0]
        low, tenth, half, high = np.quantile(dice, [0, 0.1, 0.5, 1])
        at_middle = true_dice(middle[0] > 0, truth)[0]
        rows.append(dict(film=film, lowest=low, tenth=tenth, median=half, highest=high, dice=at_middle,
                         better=np.mean(dice > at_middle), clicks=len(dice)))  # fmt: skip
    return pd.DataFrame(rows)


def dice_by_position(model, scene, film, stride=1):
    """Dice [N], confidence [N] and clicks [N, 2] on every `stride`-th pixel of one film's lung."""
    truth = scene.truth[film]
    grid = np.zeros_like(truth)
    grid[::stride, ::stride] = True
    clicks = np.argwhere(truth & grid)[:, ::-1].astype(np.float32)
    parts = [points.ask(model, one(scene, film), part[None]) for part in np.array_split(clicks, -(-len(clicks) // 64))]
    dice = np.concatenate([true_dice(logits[0] > 0, truth) for logits, _ in parts])
    return dice, np.concatenate([confidence[0] for _, confidence in parts]), clicks


def one(scene, film):
    return points.Scene(scene.images[[film]], scene.embeddings[[film]], scene.truth[[film]])


def each_dice(masks, scene):
    return np.array([true_dice(mask[None], truth)[0] for mask, truth in zip(masks, scene.truth, strict=True)])


def evolved(model, regressor, scene, seed, steps, how="climb", start="middle", **options):
    """A row a film: Dice of the first and of the evolved mask, what the safeguard says, how far the point went."""
    rng = np.random.default_rng([seed, 13])
    begin = points.middles(scene)
    if start == "random":
        spots = [np.argwhere(truth) for truth in scene.truth]
        begin = np.stack([own[rng.integers(len(own))][::-1] for own in spots]).astype(np.float32)
    if how == "search":
        path = points.search(model, regressor, scene, begin, steps, rng)
    else:
        path = points.climb(model, regressor, scene, begin, steps, **options)
    best, films = path.best, np.arange(len(begin))
    ends, masks = path.at(best)
    first, after = each_dice(path.masks[0], scene), each_dice(masks, scene)
    changed = points.changes(points.facts(model, scene, begin), points.facts(model, scene, ends))
    safe = np.where(points.breaks(changed).any(1), first, after)
    along = np.stack([each_dice(step, scene) for step in path.masks])  # [T, B]
    return pd.DataFrame({
        "film": films, "dice_first": first, "dice": after, "dice_safe": safe,
        "dice_last": along[-1], "dice_oracle": along.max(0), "score_first": path.scores[0],
        "score": path.scores[best, films], "confidence_first": path.confidence[0],
        "confidence": path.confidence[best, films], "step": best,
        "moved": np.linalg.norm(ends - begin, axis=1) / scene.side,
        **dict(zip(points.LIMITS, changed.T, strict=True)),
    })  # fmt: skip


def measure_wording(target, seed, size):
    """A row a tile, model and asked phrasing, for painted tissue and both bundled models.

    `asked` and `chosen` count the held-out and the training phrasings that `phrasings` lists; -1 is the asked one.
    """
    from ..data import load_dataset
    from ..models import load_segmenter

    bank = PromptBank.load("nuclei")
    splits = zip(("train", "val", "test"), size.tiles, strict=True)
    data = [load_dataset("synthetic", split=split, size=count) for split, count in splits]
    models = {name: load_segmenter("lite", checkpoint) for name, checkpoint in MODELS.items()}
    regressor = wording.fit_on([*models.values()], *data[:2], bank, target, size.epochs, seed)
    asked, pool = phrasings(bank, target, size)
    rows = []
    for sample in data[2]:
        if not sample.masks[target].any():
            continue
        for name, model in models.items():
            found = wording.evolve(model, regressor, sample, target, asked, pool)
            for k in range(len(asked)):
                first, after, safe, oracle_dice, majority = found["dice"][:, k]
                rows.append(dict(
                    image=sample.id, model=name, asked=k, chosen=found["chosen"][k] - len(asked), dice_first=first,
                    dice=after, dice_safe=safe, dice_oracle=oracle_dice, dice_majority=majority,
                    score_first=found["scores"][k], score=found["scores"][found["chosen"][k]],
                    **dict(zip(points.LIMITS, found["changed"][k], strict=True)),
                ))  # fmt: skip
    table = pd.DataFrame(rows).round(4)
    table.attrs["datasets"] = [{"name": one.name, "split": one.split, "digest": one.digest} for one in data]
    return table


def phrasings(bank, target, size):
    """What is asked, and what is searched: texts that training has not seen, and texts that it has."""
    split = {"heldout": size.asked, "train": size.bank}
    return [[p.text for p in choose(bank, target, LEVELS, *one)] for one in split.items()]


def mean_with_interval(rows, column, resamples=2000, seed=0):
    """Mean and 95 % interval of a column, seeds and images drawn with replacement: (mean, low, high)."""
    cube = rows.pivot_table(index="seed", columns="image", values=column, sort=False).to_numpy(float)  # [seeds, images]
    if np.isnan(cube).any():
        raise ResultError(f"{column}: some seeds lack some images; measure the study again")
    low, high = interval(two_level_means(cube, resamples, seed))
    return float(cube.mean()), float(low), float(high)


STUDY = Study(
    about="a point evolved by a learned score, with and without a safeguard, and a wording",
    measure=measure,
    cells=CELLS,
    code=CODE,
    checkpoints=tuple(MODELS.values()),
    data=films_of,
)
