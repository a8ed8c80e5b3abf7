"""What decides a training run, and the three profiles. Light to import: the command line reads it for its help."""

from dataclasses import dataclass
from math import inf
from numbers import Integral
from typing import ClassVar

from .errors import SettingsError
from .prompts import LEVELS

WORDINGS = ("groups", "fixed")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TRAINABLE = ("decoder", "lora", "full")
SCHEDULES = ("inverse_sqrt", "cosine", "linear")


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

    schedule: ClassVar = "cosine"
    clip: ClassVar = 1.0  # largest norm of a gradient

    def __post_init__(self):
        counts = dict.fromkeys(("steps", "batch_size", "k", "accumulation", "save_every"), 1) | dict(workers=0, seed=0)
        for name, least in counts.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise SettingsError(f"{name} is {value}; it must be a whole number and at least {least}")
        if self.seed >= 2**32:
            raise SettingsError(f"seed is {self.seed}; it must be below 2**32, as numpy takes it")
        if self.view < 32 or self.view % 16:
            raise SettingsError(f"view is {self.view}; it must be a multiple of 16 and at least 32")
        if not 0 < self.learning_rate < inf:
            raise SettingsError(f"learning_rate is {self.learning_rate}; it must be above zero and finite")
        if not 0 <= self.weight_decay < inf:
            raise SettingsError(f"weight_decay is {self.weight_decay}; it must be zero or more, and finite")
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


@dataclass(frozen=True)
class Sam3Settings(TrainSettings):
    """What fine-tuning `sam3` needs besides. Rates, decay, clipping and schedule are those of SAM3's own fine-tuning;
    its loss weights (200 focal, 10 Dice, 20 presence) are not: tau measures differences of L_seg as `lite` has it.
    """

    batch_size: int = 1
    accumulation: int = 4
    learning_rate: float = 8e-5  # of all but the vision encoder
    weight_decay: float = 0.1
    trainable: str = "decoder"  # or "lora", "full"; the text encoder is frozen in all
    vision_rate: float = 2.5e-5  # of the vision encoder's last part ...
    layer_decay: float = 0.9  # ... times this for each layer towards the pixels
    schedule: str = "inverse_sqrt"
    clip: float = 0.1
    lora_rank: int = 16
    # One phrasing's graph at a time: a quarter more work at most, the memory of one phrasing and the same gradients.
    serial: bool | None = None  # None: on a CPU, and where all phrasings at once do not fit the GPU
    checkpointing: bool = True  # the vision encoder's layers are computed again for the backward pass

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("trainable", TRAINABLE), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        for name in ("vision_rate", "clip", "lora_rank"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be above zero")
        if not 0 < self.layer_decay <= 1:
            raise SettingsError(f"layer_decay is {self.layer_decay}; it is a factor above 0 and at most 1")


PROFILES = {
    "smoke": TrainSettings(steps=12, batch_size=2, view=128, save_every=6),
    "lite": TrainSettings(),
    "full": TrainSettings(steps=10_000, batch_size=16, workers=4, save_every=1000),
}

SAM3_PROFILES = {
    "smoke": Sam3Settings(steps=12, accumulation=1, view=128, save_every=6),
    "lite": Sam3Settings(),
    "full": Sam3Settings(steps=10_000, accumulation=16, workers=4, save_every=1000),
}

# Parts of pretrained transformers: slow steps, and one image at a time, since all its phrasings are decoded together.
BASELINE_PROFILES = {
    "smoke": TrainSettings(steps=12, batch_size=1, view=128, learning_rate=1e-4, save_every=6),
    "lite": TrainSettings(batch_size=1, accumulation=4, learning_rate=1e-4),
    "full": TrainSettings(steps=10_000, batch_size=2, accumulation=8, learning_rate=1e-4, workers=4, save_every=1000),
}

TRAINING = {  # what can be trained -> its settings by profile
    "lite": PROFILES,
    "sam3": SAM3_PROFILES,
    "clipseg": BASELINE_PROFILES,
    "grounded-sam2": BASELINE_PROFILES,
}
# Every name of models.SEGMENTERS, which is not light to import; the last four are evaluated as they are published.
SEGMENTER_NAMES = (*TRAINING, "sam2", "medsam", "seg-zero", "vision-reasoner")


def training_profiles(segmenter):
    if segmenter not in TRAINING:
        raise SettingsError(f"{segmenter} is not trained here, only evaluated; train one of {', '.join(TRAINING)}")
    return TRAINING[segmenter]


PER_LEVEL = {"smoke": 2, "lite": 10, "full": 0}  # phrasings to evaluate a target and level; 0 for all of them
