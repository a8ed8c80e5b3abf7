"""Evolving a prompt (SAMPOT, arXiv 2310.17128): a point climbs a learned quality score; so may a wording.

chest      films: painted phantoms, or a folder of open ones
promptable a `transformers.SamModel` that the gradient flows through
regressor  Dice guessed from image and mask, without the truth
points     Adam on the point, and the safeguard that the paper leaves open
wording    the same search among a bank's phrasings
study      `pgseg experiment evolve`
"""
