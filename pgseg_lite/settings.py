"""What decides a training run, and the three profiles. Light to import: the command line reads it for its help."""

from dataclasses import dataclass

from .errors import SettingsError
from .prompts import LEVELS

WORDINGS = ("groups", "fixed")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a run's outcome, besides data, bank and starting model."""

    steps: int = 2000
    batch_size: int = 4  # images; each brings all its targets
    k: int = 3  # phrasings per group
    wording: str = "groups"  # or "fixed": the bank's one canonical phrasing per target
    levels: tuple = LEVELS
    view: int = 256  # side of a training view in pixels
    tau: float = 1.0
    lam: float = 1.0
    beta: float = 0.1
    group: str = "clamped"
    consistency: str = "first"
    mask_weight: float = 1.0
    dice_weight: float = 1.0
    presence_weight: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps
    accumulation: int = 1
    precision: str = "auto"
    workers: int = 0
    seed: int = 0
    save_every: int = 200

    def __post_init__(self):
        for name in ("steps", "batch_size", "k", "accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.view < 32 or self.view % 16:
            raise SettingsError(f"view is {self.view}; it must be a multiple of 16 and at least 32")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate}; it must be above zero")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to below 1")
        for name, known in (("wording", WORDINGS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        if self.wording == "fixed" and self.k != 1:
            raise SettingsError(f"k is {self.k} with one fixed phrasing per target; set k=1, or wording='groups'")

    def loss(self):
        from .losses import GroupLoss

        names = ("tau", "lam", "beta", "group", "consistency", "mask_weight", "dice_weight", "presence_weight")
        return GroupLoss(**{name: getattr(self, name) for name in names})


PROFILES = {
    "smoke": TrainSettings(steps=12, batch_size=2, view=128, save_every=6),
    "lite": TrainSettings(),
    "full": TrainSettings(steps=10_000, batch_size=16, workers=4, save_every=1000),
}

PER_LEVEL = {"smoke": 2, "lite": 10, "full": 0}  # phrasings to evaluate a target and level; 0 for all of them
