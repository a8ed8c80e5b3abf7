"""The models that tests/test_regression*.py ask: segmenters behind each adapter, and models that misbehave."""

import base64
import io
import json
import os
import time
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import numpy as np
from PIL import Image

BANK = """
name: small
targets:
  all:
    fixed: nuclei
    phrasings:
      low: [nuclei, all nuclei]
      medium: [please outline all nuclei in this tile, every nucleus in this field]
      high: [carefully trace the outline of every single nucleus in this tile whatever its type,
             wherever they lie in the tissue fill in all of the cell nuclei up to their outline]
  inflammatory:
    fixed: inflammatory nuclei
    phrasings:
      low: [inflammatory nuclei, immune cell nuclei]
      medium: [please outline all inflammatory nuclei in this tile, every immune cell nucleus in this field]
      high: [carefully trace the outline of every single inflammatory nucleus in this tile and no other,
             wherever they lie in the tissue fill in all of the immune cell nuclei up to their outline]
  epithelial:
    fixed: epithelial nuclei
    phrasings:
      low: [epithelial nuclei, nuclei of epithelium]
      medium: [please outline all epithelial nuclei in this tile, every epithelial nucleus in this field]
      high: [carefully trace the outline of every single epithelial nucleus in this tile and no other,
             wherever they lie in the tissue fill in all of the nuclei of epithelium up to their outline]
foils:
  - {text: cytoplasm of the cells, target: all, asks_for: null}
  - {text: everything but the inflammatory cells, target: inflammatory, asks_for: null}
  - {text: fibroblast nuclei beside the epithelium, target: epithelial, asks_for: null}
"""


@cache
def loaded(segmenter, checkpoint):
    import pgseg_lite as pg

    return pg.load_segmenter(segmenter, checkpoint, "cpu")


def bundled(checkpoint):
    return loaded("lite", checkpoint)


def segment(image, phrasing):
    """A `module:function` and a Python function in one; which model it is, the environment says."""
    model = loaded(os.environ.get("TEST_SEGMENTER", "lite"), os.environ.get("TEST_CHECKPOINT", "group"))
    return model.predict(image, phrasing).masks[0, 0].numpy()


def odd(image, phrasing):
    """Answers most phrasings; what it does with the others is in their words."""
    if "raise" in phrasing:
        raise RuntimeError("out of memory")
    if "hang" in phrasing:
        time.sleep(60)
    if "crash" in phrasing:
        os._exit(7)
    if "small" in phrasing:
        return np.zeros((8, 8), bool)
    if "nan" in phrasing:
        return np.full(image.shape[:2], np.nan)
    if "logits" in phrasing:
        return np.full(image.shape[:2], 5.0)
    if "grey" in phrasing:
        return np.arange(image[..., 0].size, dtype=np.int32).reshape(image.shape[:2])
    if "nothing" in phrasing:
        return None
    if "print" in phrasing:
        print("a model that talks")
    return image[..., 0] < 128


def slow(image, phrasing):
    time.sleep(0.02)
    return image[..., 0] < len(phrasing) * 4


def painted(folder, count=10, side=128):
    """`count` small painted images as a dataset of the layout `folder`, cut where both classes are, if they are."""
    import pgseg_lite as pg

    classes = ("inflammatory", "epithelial")
    for i, sample in enumerate(pg.load_dataset("synthetic", split="test", size=count, tile=None)):
        corners = [np.s_[y : y + side, x : x + side] for y in (0, 64, 128) for x in (0, 64, 128)]
        window = max(corners, key=lambda corner: min(sample.masks[name][corner].sum() for name in classes))
        layers = {"images": sample.image, "masks": sample.masks["all"]}
        for name, pixels in (layers | {f"masks/{name}": sample.masks[name] for name in classes}).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[window]).save(folder / name / f"{i}.png")
    return pg.load_dataset("folder", folder, "all", tile=None)


class Replay:
    """Masks that were computed before, changed by `change(mask, phrasing, seed of the item)`: an adapter of one's own."""

    def __init__(self, masks, change=lambda mask, text, generator: mask, seed=0, name="replay"):
        self.masks, self.change, self.seed, self.name, self.fingerprint = masks, change, seed, name, f"{name}-{seed}"

    @contextmanager
    def asking(self, image):
        def ask(text):
            generator = np.random.default_rng([self.seed, *image[:2].tobytes(), *text.encode()])
            return self.change(self.masks[image.tobytes(), text], text, generator)

        yield ask


ONE_AT_A_TIME = Lock()


class Service(BaseHTTPRequestHandler):
    """POST /segment as documented; other paths fail in their own ways."""

    failures: dict = {}  # noqa: RUF012  path -> requests so far
    got: list = []  # noqa: RUF012  what a redirect would ask for

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = self.failures[self.path] = self.failures.get(self.path, 0) + 1
        if self.path == "/busy" and count == 1:
            return self.reply(503, b"starting up", "text/plain")
        if self.path == "/token" and self.headers.get("Authorization") != "Bearer secret":
            return self.reply(401, b"no token", "text/plain")
        if self.path in REPLIES:
            return self.reply(*REPLIES[self.path])
        if self.path == "/slow":
            time.sleep(1)
        if self.path == "/trickle":
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # nobody waits that long
                for _ in range(20):
                    self.wfile.write(b"\x89")
                    self.wfile.flush()
                    time.sleep(0.05)
            return None
        image = np.array(Image.open(io.BytesIO(base64.b64decode(body["image"]))))
        with ONE_AT_A_TIME:
            mask = segment(image, body["phrasing"])
        Image.fromarray(mask).save(png := io.BytesIO(), "PNG")
        if self.path == "/json":
            answer = json.dumps({"mask": base64.b64encode(png.getvalue()).decode()}).encode()
            return self.reply(200, answer, "application/json")
        return self.reply(200, png.getvalue(), "image/png")

    def do_GET(self):
        self.got.append(self.path)
        self.reply(200, b"", "image/png")

    def reply(self, status, content, kind):
        self.send_response(status)
        if 300 <= status < 400:
            port = self.server.server_address[1]
            self.send_header("Location", f"http://localhost:{port}/moved?key=secret")  # another name of the same host
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) + (self.path == "/short")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


REPLIES = {
    "/html": (200, b"<html>log in</html>", "text/html"),
    "/not-json": (200, b"{mask:", "application/json"),
    "/no-mask": (200, b'{"result": 1}', "application/json"),
    "/error": (200, b'{"error": "no GPU left"}', "application/json"),
    "/not-base64": (200, b'{"mask": "%%%"}', "application/json"),
    "/not-png": (200, b"not a picture", "image/png"),
    **{f"/to-{status}": (status, b"", "text/plain") for status in (301, 302, 303, 307, 308)},
    "/refused": (400, b"phrasing too long\nmore", "text/plain"),
    "/always-busy": (503, b"overloaded", "text/plain"),
    "/short": (200, b"\x89PNG", "image/png"),
}


@contextmanager
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
