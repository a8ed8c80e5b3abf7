"""Models in processes of their own: a function, kept running, and a command, started for every item."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from PIL import Image

from ..errors import ModelError
from .answers import fingerprint, read_mask, version_of
from .worker import receive, send

PLACES = ("{image}", "{phrasing}", "{output}")

LOADING = 300.0  # seconds that a module may take to load its weights


def end(process):
    """A process and those it started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own: start_new_session
        else:
            process.kill()


@contextmanager
def ended_after(process, seconds):
    """Ends the process when the time is up; the list is empty until then."""
    late = []
    timer = Timer(seconds, lambda: (late.append(True), end(process)))
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()  # it must not end the process of the next item


class Worker:
    """`module:function`. A call that takes too long, or a crash, ends the process; the next item starts another."""

    def __init__(self, name, version, timeout):
        self.name, self.timeout, self.process = name, timeout, None
        source = self.start()  # a module that cannot be imported shows now
        self.fingerprint = fingerprint("function", name, version_of(source or ""), version)

    def start(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "pgseg_lite.regression.worker", self.name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)
        limit = max(LOADING, self.timeout)
        with ended_after(self.process, limit) as late:
            try:
                (reason, source), _ = receive(self.process.stdout)
            except EOFError:
                reason = f"its import does not end within {limit:g} s" if late else "its process ended at once"
        if reason:
            self.close()
            raise ModelError(f"{self.name} cannot be loaded ({reason}); check the name, and that it imports from here")
        return source

    @contextmanager
    def asking(self, image):
        yield partial(self.ask, image)

    def ask(self, image, text):
        if self.process is None:
            self.start()
        with ended_after(self.process, self.timeout) as late:
            try:
                send(self.process.stdin, text, image)
                reason, mask = receive(self.process.stdout)
            except (OSError, EOFError):  # the pipe broke, or ended in the middle
                reason = "" if late else f"its process ended with status {self.close()}"
        if late:
            self.close()
            raise ModelError(f"no answer within {self.timeout:g} s")
        if reason:
            raise ModelError(reason)
        return mask

    def close(self):
        """The exit status. Without input its loop ends; one that does not listen is ended."""
        process, self.process = self.process, None
        if process is None:
            return None
        with contextlib.suppress(OSError):  # what was not yet written has no reader
            process.stdin.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            end(process)
        process.stdout.close()
        return process.wait()


class Command:
    """A command line. Files that it names are part of the fingerprint: another script is another model."""

    def __init__(self, template, version, timeout):
        self.timeout = timeout
        try:
            self.words = shlex.split(template)
        except ValueError as error:
            raise ModelError(f"the command {template!r} cannot be read ({error}); close its quotes") from error
        for place in PLACES:
            if not any(place in word for word in self.words):
                raise ModelError(f"the command {template!r} has no {place}; it needs {', '.join(PLACES)}")
        if shutil.which(self.words[0]) is None:
            raise ModelError(f"the command {self.words[0]!r} is not found; give its path, or install it")
        self.name = Path(self.words[0]).name
        self.fingerprint = fingerprint("command", *self.words, *map(version_of, self.words), version)

    @contextmanager
    def asking(self, image):
        with TemporaryDirectory() as folder:
            path = Path(folder, "image.png")
            Image.fromarray(image).save(path)
            yield partial(self.ask, path)

    def ask(self, image, text):
        with TemporaryDirectory(dir=image.parent) as folder:  # several run at a time
            output = Path(folder, "mask.png")
            filled = dict(zip(PLACES, (str(image), text, str(output)), strict=True))
            with open(Path(folder, "stderr"), "w+b") as errors:
                process = subprocess.Popen(
                    [fill(word, filled) for word in self.words],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
                )  # fmt: skip
                try:
                    status = process.wait(self.timeout)
                except BaseException as error:
                    end(process)
                    process.wait()
                    if isinstance(error, subprocess.TimeoutExpired):
                        raise ModelError(f"no answer within {self.timeout:g} s") from None
                    raise
                errors.seek(0)
                said = errors.read()[-2000:].decode(errors="replace").strip().splitlines()
            if status:
                raise ModelError(f"the command ended with status {status}: {said[-1] if said else 'it said nothing'}")
            if not output.is_file():
                raise ModelError("the command wrote no mask; it must write an image file to {output}")
            return read_mask(output)


def fill(word, filled):
    """One pass, so that a phrasing with {output} in it stays a phrasing."""
    return re.sub("|".join(map(re.escape, filled)), lambda match: filled[match[0]], word)
