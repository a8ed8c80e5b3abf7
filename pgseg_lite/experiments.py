"""Named experiments: each a grid of runs, and the tests that every run is put to. `runner` executes them."""

from dataclasses import dataclass, field, replace
from functools import cache

from .errors import SettingsError
from .prompts import LEVELS
from .settings import PROFILES, SAM3_PROFILES, TrainSettings

BANK = "nuclei"
START = "fixed"  # all methods of lite start from the model that has heard one wording per target
HELD_OUT = 0.2  # share of the training images that choices are made on
SEEDS = {"smoke": (0,), "lite": (0, 1, 2), "full": (0, 1, 2, 3, 4)}


@dataclass(frozen=True)
class Data:
    """The arguments of `load_dataset`, and which part of the images to take."""

    name: str
    split: str = "test"
    part: str = "whole"  # "rest" or "held": without, or only, the images held out from training
    targets: tuple = ()  # only these; all by default
    options: dict = field(default_factory=dict)
    like: "Data | None" = None  # every image is first given the colours of these
    fraction: float = 1.0  # share of the tiles that are left

    def load(self):
        from .data import load_dataset
        from .data.dataset import pick

        data = load_dataset(self.name, split=self.split, **self.options)
        if self.part != "whole":
            data = data.hold_out(HELD_OUT)[self.part == "held"]
        if self.fraction < 1:  # only now, so that no share of the one part reaches into the other
            data.ids = tuple(pick(data.ids, self.fraction, 0))
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
    trained: str = "CoNSeP"  # the models of this training set are put to it


@dataclass(frozen=True)
class Experiment:
    about: str
    methods: dict  # label -> changes to the settings, or the `Published` model that is only tested
    tests: dict  # label -> Test
    reference: str  # the method that all others are compared with
    detail: bool = False  # tables also by level of quality and by phrasing


@dataclass(frozen=True)
class Published:
    """A segmenter that is tested as it is."""

    segmenter: str
    checkpoint: str | None = None  # its publisher's by default
    options: dict = field(default_factory=dict)
    per_level: int | None = None  # where all phrasings would take days


@dataclass(frozen=True)
class Learner:
    """How a segmenter is trained in an experiment."""

    settings: dict  # by profile
    start: str  # the checkpoint that every run starts from
    sets: dict  # what it is trained on: label -> Data
    options: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)  # at full, by training set, where they are not the profile's


@dataclass(frozen=True)
class Run:
    method: str
    segmenter: str
    start: str | None
    options: dict
    trained: str = ""  # the label of the training set
    data: Data | None = None  # None: nothing is trained
    settings: TrainSettings | None = None
    text_dropout: float | None = None  # the start's own by default
    per_level: int | None = None  # the profile's by default

    @property
    def about(self):
        """What tells this run from the others of its grid."""
        return dict(method=self.method, seed=self.settings.seed if self.settings else 0)

    def __str__(self):
        if not self.settings:
            return self.method
        return f"{self.method}, seed {self.settings.seed}" + f", {self.trained}" * (self.trained != "CoNSeP")


CONSEP = Data("consep", "train", "rest")
TENTH = {"CoNSeP": replace(CONSEP, fraction=0.1), "PanNuke": Data("pannuke", "fold1", fraction=0.1)}
# As the paper says: all weights but the text encoder's, one image a step, five passes over a tenth of the tiles.
PAPER_RUN = dict(trainable="full", accumulation=1, learning_rate=1e-4, save_every=200)
PAPER_STEPS = {"CoNSeP": 175, "PanNuke": 1330}
LEARNERS = {
    "lite": Learner(
        {
            "smoke": replace(PROFILES["smoke"], steps=4, view=64),
            "lite": replace(PROFILES["lite"], steps=500, view=128),
            "full": PROFILES["full"],
        },
        START, {"CoNSeP": CONSEP},
    ),
    "sam3": Learner(
        {
            "smoke": replace(SAM3_PROFILES["smoke"], steps=4, view=64),
            "lite": SAM3_PROFILES["lite"],
            "full": replace(SAM3_PROFILES["full"], **PAPER_RUN),
        },
        "facebook/sam3", TENTH, {"truncate": True}, PAPER_STEPS,  # the bank has phrasings of over 32 tokens
    ),
}  # fmt: skip
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
STRONG = {FULL: {}, "beta=1": dict(beta=1.0)}
SHIFTS = "stain_pale", "scanner_colour", "blur", "frozen_section"
PANNUKE = Data("pannuke", "fold3")
UNTOUCHED = {  # label -> Data; only all nuclei, as in the paper
    "Histology": Data("histology", "all"),
    "CPM15": Data("cpm15", "all"),
    "CPM17": Data("cpm17", "test"),
    "Kumar-same": Data("kumar", "test_same"),
    "Kumar-diff": Data("kumar", "test_diff"),
    "CryoNuSeg": Data("cryonuseg", "all"),
    "PanNuke": PANNUKE,
    **{f"synthetic, {s}": Data("synthetic", options=dict(shift=s, size=32)) for s in SHIFTS},
}
BASELINES = {
    "sam3": Published("sam3", options={"truncate": True}),
    **{name: Published(name) for name in ("clipseg", "grounded-sam2", "sam2", "medsam")},
    # These two write a text before each mask: one phrasing a level, as all would take days.
    **{name: Published(name, per_level=1) for name in ("seg-zero", "vision-reasoner")},
}
BUNDLED = {f"lite {name}": Published("lite", name) for name in ("fixed", "group")}
EXPERIMENTS = {
    "table1": Experiment(
        "four ways to train on wording, tested on phrasings that none of them has seen",
        FOUR,
        {"validation": VALIDATION, "CoNSeP": Test(Data("consep")),
         "PanNuke": Test(PANNUKE, optional=True, trained="PanNuke")}, FIXED, True,
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
    "causes_beta": Experiment(
        "one more guess: ten times the paper's weight of consistency", STRONG, {"validation": VALIDATION}, FULL,
    ),
}  # fmt: skip

UNTRAINED = Experiment(
    "the models of Table 1 whose weights are public, as they are published",
    BASELINES, {"CoNSeP": Test(Data("consep")), "PanNuke": Test(PANNUKE, optional=True)}, "sam3", True,
)  # fmt: skip


def named():
    return {**EXPERIMENTS, "baselines": UNTRAINED}


def find(name):
    if name not in named():
        raise SettingsError(f"there is no experiment {name!r}; choose one of {', '.join(named())}")
    return named()[name]


def default_segmenter(profile):
    return "sam3" if profile == "full" else "lite"


def result_name(name, profile, segmenter):
    """NAME, the profile unless it is lite, the segmenter unless it is the profile's own: never a table of the book."""
    parts = [profile] * (profile != "lite") + [segmenter] * (segmenter not in (None, default_segmenter(profile)))
    return "_".join([name, *parts])


def learner(segmenter):
    if segmenter not in LEARNERS:
        raise SettingsError(f"experiments do not train {segmenter!r}; choose one of {', '.join(LEARNERS)}")
    return LEARNERS[segmenter]


def runs(experiment, profile, segmenter=None, starts=(), trainable=None):
    """Every run of the grid: training sets x methods x seeds, or a run for each published model."""
    if experiment is UNTRAINED:
        if segmenter or trainable:
            raise SettingsError(
                "baselines are not trained; leave this out, or add a model with --start NAME=CHECKPOINT"
            )
        return published(profile, starts)
    if len(starts) > 1:
        raise SettingsError(f"all runs start from one checkpoint; {len(starts)} were given with --start")
    segmenter = segmenter or default_segmenter(profile)
    return [
        make_run(method, changes, seed, profile, segmenter, trained, *starts, trainable=trainable)
        for trained in {test.trained: "" for test in experiment.tests.values()}
        if trained in learner(segmenter).sets
        for method, changes in experiment.methods.items()
        if segmenter == "lite" or "text_dropout" not in changes  # the others have none
        for seed in SEEDS[profile]
    ]


def make_run(method, changes, seed, profile, segmenter="lite", trained="CoNSeP", start=None, trainable=None):
    how, changes = learner(segmenter), PAPER | changes
    base, dropout = how.settings[profile], changes.pop("text_dropout", None)
    if trainable:
        if not hasattr(base, "trainable"):
            raise SettingsError(f"{segmenter} is always trained whole; leave trainable={trainable} out")
        base = replace(base, trainable=trainable)
    steps = how.steps.get(trained, base.steps) if profile == "full" else base.steps
    changes["steps"] = steps * changes.get("steps", 1)  # a method says how many times the budget
    settings = replace(base, seed=seed, precision=resolved_precision(base), **changes)
    data = how.sets[trained].at(profile)
    return Run(method, segmenter, start or how.start, how.options, trained, data, settings, dropout)


def published(profile, starts):
    """What `baselines` tests: BASELINES at full, the two bundled checkpoints below it, and what `starts` names.

    Each of those is NAME=CHECKPOINT, other weights for a model that is there or one more segmenter.
    """
    methods = dict(BASELINES if profile == "full" else BUNDLED)
    for given in starts:
        name, _, checkpoint = given.partition("=")
        if not checkpoint:
            raise SettingsError(f"--start {given}: which segmenter is it of? Write NAME=CHECKPOINT, as in sam3={given}")
        methods[name] = replace(BASELINES.get(name, Published(name)), checkpoint=checkpoint)
    return [Run(label, m.segmenter, m.checkpoint, m.options, per_level=m.per_level) for label, m in methods.items()]


@cache
def resolved_precision(settings):
    """What "auto" means here: part of what decides the outcome, so part of the key."""
    import torch

    from .training import best_precision

    return best_precision(not torch.cuda.is_available()) if settings.precision == "auto" else settings.precision
