"""Named experiments: each a grid of training runs, and the tests that every run is put to. `runner` executes them."""

from dataclasses import dataclass, field, replace
from functools import cache

from .errors import SettingsError
from .prompts import LEVELS
from .settings import PROFILES, TrainSettings

BANK, START = "nuclei", "fixed"  # all methods start from the model that has heard one wording per target
HELD_OUT = 0.2  # share of the training images that choices are made on
SEEDS = {"smoke": (0,), "lite": (0, 1, 2), "full": (0, 1, 2, 3, 4)}
TRAINING = {
    "smoke": replace(PROFILES["smoke"], steps=4, view=64),
    "lite": replace(PROFILES["lite"], steps=500, view=128),
    "full": PROFILES["full"],
}


@dataclass(frozen=True)
class Data:
    """The arguments of `load_dataset`, and which part of the images to take."""

    name: str
    split: str = "test"
    part: str = "whole"  # "rest" or "held": without, or only, the images held out from training
    targets: tuple = ()  # only these; all by default
    options: dict = field(default_factory=dict)
    like: "Data | None" = None  # every image is first given the colours of these

    def load(self):
        from .data import load_dataset

        data = load_dataset(self.name, split=self.split, **self.options)
        if self.part != "whole":
            data = data.hold_out(HELD_OUT)[self.part == "held"]
        data.targets = tuple(t for t in data.targets if t in self.targets or not self.targets)
        if self.like is None:
            return data
        from .colour import recoloured

        return recoloured(data, self.like.load())

    def at(self, profile):
        """The same role on a few painted tiles, where the profile is smoke."""
        if profile != "smoke":
            return self
        split = "train" if self.split == "train" else "test"
        size = 10 if self.part != "whole" else 4
        like = self.like and self.like.at(profile)
        options = self.options | {"size": size, "tile": 64}
        return replace(self, name="synthetic", split=split, options=options, like=like)


@dataclass(frozen=True)
class Test:
    """What a trained model is asked about which images."""

    data: Data
    split: str = "heldout"  # phrasings that training has seen ("train") or not, or the bank's "foils"
    levels: tuple = LEVELS
    optional: bool = False  # left out, with a word, where a reader does not have the data


@dataclass(frozen=True)
class Experiment:
    about: str
    methods: dict  # label -> changes to the settings
    tests: dict  # label -> Test
    reference: str  # the method that all others are compared with
    detail: bool = False  # tables also by level of quality and by phrasing


@dataclass(frozen=True)
class Run:
    method: str
    data: Data
    settings: TrainSettings
    text_dropout: float | None = None  # the start's own by default


CONSEP = Data("consep", "train", "rest")
VALIDATION = Test(Data("consep", "train", "held"))
PAPER = dict(k=3, tau=1.0, lam=1.0, beta=0.1, group="clamped", consistency="first")
FIXED, RANDOM, SEG, FULL = "one fixed phrasing", "one random phrasing", "K phrasings, L_seg only", "full method"
FOUR = {FIXED: dict(wording="fixed", k=1), RANDOM: dict(k=1), SEG: dict(group="none", consistency="none"), FULL: {}}
ABLATIONS = {
    FULL: {},
    "w/o L_group, L_cons": FOUR[SEG],
    "w/o L_cons": dict(consistency="none"),
    "w/o L_group": dict(group="none"),
    "L_cons pairwise": dict(consistency="pairwise"),
    "L_group soft": dict(group="soft"),
    "L_group log-weights": dict(group="log-weights"),
    "tau=0.5": dict(tau=0.5),
    "tau=2": dict(tau=2.0),
    "beta=0.05": dict(beta=0.05),
    "beta=0.2": dict(beta=0.2),
    **{f"K={k}": dict(k=k) for k in (2, 4, 5, 6)},
}
CAUSES = {
    FULL: {},
    SEG: FOUR[SEG],
    "no text dropout": dict(text_dropout=0.0),
    "twice the steps": dict(steps=2),
    "twice the steps, L_seg only": dict(steps=2, **FOUR[SEG]),
}
PRESENCE = {FULL: {}, "presence weight 1": dict(presence_weight=1.0)}
SHIFTS = "stain_pale", "scanner_colour", "blur", "frozen_section"
UNTOUCHED = {  # label -> Data; only all nuclei, as in the paper
    "Histology": Data("histology", "all"),
    "CPM15": Data("cpm15", "all"),
    "CPM17": Data("cpm17", "test"),
    "Kumar-same": Data("kumar", "test_same"),
    "Kumar-diff": Data("kumar", "test_diff"),
    "CryoNuSeg": Data("cryonuseg", "all"),
    "PanNuke": Data("pannuke", "fold3"),
    **{f"synthetic, {s}": Data("synthetic", options=dict(shift=s, size=32)) for s in SHIFTS},
}
EXPERIMENTS = {
    "table1": Experiment(
        "four ways to train on wording, tested on phrasings that none of them has seen",
        FOUR, {"validation": VALIDATION, "CoNSeP": Test(Data("consep"))}, FIXED, True,
    ),
    "table2": Experiment(
        "every loss term and constant changed by itself, tested on low-quality phrasings",
        ABLATIONS, {"validation": VALIDATION, "CoNSeP": Test(Data("consep"), levels=("low",))}, FULL,
    ),
    "table4": Experiment(
        "quality levels of phrasings, seen and unseen, and foils",
        {SEG: FOUR[SEG], FULL: {}, FIXED: FOUR[FIXED]},
        {"unseen": Test(Data("consep")), "seen": Test(Data("consep"), "train"), "foils": Test(Data("consep"), "foils")},
        SEG, True,
    ),
    "table5": Experiment(
        "trained on CoNSeP, tested on other data sets and on painted domain shifts",
        FOUR,
        {name: Test(replace(data, targets=("all",)), optional=True) for name, data in UNTOUCHED.items()}, FIXED,
    ),
    "table5_colour": Experiment(
        "the models and images of Table 5, each image first given the colours of the training images",
        FOUR,
        {name: Test(replace(data, targets=("all",), like=CONSEP), optional=True)
         for name, data in {"CoNSeP": Data("consep"), **UNTOUCHED}.items() if data.name != "synthetic"}, FIXED,
    ),
    "causes": Experiment(
        "one run for each guess at why the full method gains what it gains",
        CAUSES, {"validation": VALIDATION}, FULL,
    ),
    "causes_presence": Experiment(
        "one more guess: the presence loss at the weight of the masks' own, ten times its share here",
        PRESENCE, {"validation": VALIDATION}, FULL,
    ),
}  # fmt: skip


def find(name):
    if name not in EXPERIMENTS:
        raise SettingsError(f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def runs(experiment, profile):
    """Every run of the grid: methods x seeds."""
    return [make_run(method, changes, seed, profile) for method, changes in experiment.methods.items()
            for seed in SEEDS[profile]]  # fmt: skip


def make_run(method, changes, seed, profile):
    changes = PAPER | changes
    dropout = changes.pop("text_dropout", None)
    base = TRAINING[profile]
    changes["steps"] = base.steps * changes.get("steps", 1)  # a method says how many times the budget
    precision = changes.pop("precision", None) or resolved_precision(base)
    settings = replace(base, seed=seed, precision=precision, **changes)
    return Run(method, CONSEP.at(profile), settings, dropout)


@cache
def resolved_precision(settings):
    """What "auto" means here: part of what decides the outcome, so part of the key."""
    import torch

    from .training import best_precision

    return best_precision(not torch.cuda.is_available()) if settings.precision == "auto" else settings.precision
