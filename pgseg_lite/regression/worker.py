"""A `module:function` in a process of its own, so that one that hangs or crashes can be ended and started again.

The parent writes a line (the phrasing, as JSON) and the image; the answer is a line (why it failed, or null) and the mask.
"""

import importlib
import io
import json
import os
import sys

import numpy as np
from numpy.lib.format import read_array, write_array


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


def main(name):
    read, write = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints goes to the terminal, not between the answers
    try:
        function, reason = find(name), None
        source = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    except BaseException as error:  # a module may call sys.exit()
        reason, source = said(error), None
    write.write(json.dumps([reason, source]).encode() + b"\n")
    write.flush()
    while reason is None and (line := read.readline()):
        image, answer = read_array(read, allow_pickle=False), io.BytesIO()
        try:
            write_array(answer, np.asarray(function(image, json.loads(line))), allow_pickle=False)
            failed = None
        except BaseException as error:
            answer, failed = io.BytesIO(), said(error)
        write.write(json.dumps(failed).encode() + b"\n" + answer.getvalue())
        write.flush()


if __name__ == "__main__":
    main(sys.argv[1])
