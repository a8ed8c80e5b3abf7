"""pgseg_lite: measure and mend how far a segmentation mask moves when the request is phrased differently.

Everything here is a prompt group: an image, K phrasings, one mask. The names below load on first use, so
that importing the module costs nothing.
"""

from .lazy import on_first_use

__version__ = "0.1.0"

_HOME = {
    "PromptBank": "prompts",
    "PromptGroup": "prompts",
    "Sample": "data",
    "load_dataset": "data",
    "get_dataset": "data.download",
    "SegmentationOutput": "models",
    "Segmenter": "models",
    "aggregate": "models",
    "load_segmenter": "models",
    "GroupLoss": "losses",
    "Sam3Settings": "settings",
    "TrainSettings": "settings",
    "PROFILES": "settings",
    "train": "training",
    "evaluate": "evaluation",
    "robustness": "evaluation",
    "PgsegError": "errors",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = on_first_use(__name__, _HOME)
