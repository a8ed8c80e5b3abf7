"""One outcome of one question about a measurement."""

from dataclasses import dataclass

import numpy as np

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True)
class Check:
    gate: str
    target: str
    level: str  # "" where it is about all
    outcome: str
    reason: str
    estimate: float = np.nan
    low: float = np.nan
    high: float = np.nan
    limit: float = np.nan
    phrasings: tuple = ()  # which it is about, where it is about some
