"""A `module:function` in a process of its own, so that one that hangs or crashes can be ended and started again.

The parent sends a phrasing and an image; the answer is why it failed, or None, and the mask.
"""

import contextlib
import importlib
import io
import json
import os
import sys

import numpy as np


def find(name):
    """The function called `package.module:function`."""
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{attribute} is a {type(found).__name__}, not a function")
    return found


def said(error):
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def no_mask(answer):
    """What is wrong with an array that cannot be a mask at all; None otherwise."""
    if answer.ndim != 2 or answer.dtype.kind not in "biuf":
        return f"returned {answer.dtype} of shape {list(answer.shape)}; it must be one mask [height, width]"


def send(stream, value, array=None):
    """A line of JSON, the value and the number of bytes that follow; then the array as .npy."""
    content = io.BytesIO()
    if array is not None:
        np.save(content, array, allow_pickle=False)
    stream.write(json.dumps([value, len(content.getvalue())]).encode() + b"\n" + content.getvalue())
    stream.flush()


def receive(stream):
    """What `send` wrote; EOFError where the other side has gone."""
    if not (line := stream.readline()).endswith(b"\n"):
        raise EOFError
    value, size = json.loads(line)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return value, np.load(io.BytesIO(content), allow_pickle=False) if size else None


def main(name):
    read, write = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints goes to the terminal, not between the answers
    try:
        function = find(name)
        send(write, [None, getattr(sys.modules[name.partition(":")[0]], "__file__", None)])
    except BaseException as error:  # a module may call sys.exit()
        return send(write, [said(error), None])
    with contextlib.suppress(EOFError):
        while True:
            phrasing, image = receive(read)
            try:
                mask = np.asarray(function(image, phrasing))
                reason = no_mask(mask)
            except BaseException as error:
                mask, reason = None, said(error)
            send(write, reason, None if reason else mask)


if __name__ == "__main__":
    main(sys.argv[1])
