"""Learning from preferences: a few labels first, then what an annotator prefers among candidate masks.

After arXiv 2503.04639. Nothing of the engine imports this package.
"""
