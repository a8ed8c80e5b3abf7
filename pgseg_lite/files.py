"""Files that are there whole or not at all: whoever is killed while writing leaves the old one, or none."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path):
    """A path beside `path` to write to; it takes its place when the block ends without an error."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may write the same
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    with whole(path) as partial:
        partial.write_text(text, "utf-8")
