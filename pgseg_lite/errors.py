"""What bad input gets: one sentence that says what is wrong, where, and what to do."""


class PgsegError(Exception):
    """Base of every error that this module raises on purpose."""


class BankError(PgsegError):
    """A prompt bank, or a request to one, that makes no sense."""


class DataError(PgsegError):
    """A dataset, image or mask that cannot be read as it should."""


class ModelError(PgsegError):
    """A checkpoint, encoder or segmenter that cannot be loaded or called."""


class SettingsError(PgsegError):
    """A setting outside what a loss, a training run or an evaluation accepts."""


class TrainingError(PgsegError):
    """A training run that had to stop."""


class Diverged(TrainingError):
    """The loss or the weights left the finite numbers: an outcome, since the same run would do so again."""


class ResultError(PgsegError):
    """A stored result that is missing, unstamped or damaged."""


def first_line(error):
    """What another package's error says, as part of a sentence."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
