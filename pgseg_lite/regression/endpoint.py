"""A model behind HTTP: one POST an item, with time limits, retries and the standard library alone."""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

from PIL import Image

from ..errors import ModelError
from .answers import fingerprint, read_mask

BUSY = (408, 425, 429, 500, 502, 503, 504)  # worth another try; any other refusal is final
LARGEST = 2**26  # bytes of a reply
LONGEST_WAIT = 30  # seconds before another try


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST would go on as a GET without its body, and the token to a host that it was not meant for."""

    def redirect_request(self, request, reply, code, message, headers, url):
        reply.close()
        place = urlsplit(url)._replace(query="", fragment="").geturl()  # a query may hold a secret
        raise ModelError(f"the endpoint redirects to {place}; give that URL")


OPENER = urllib.request.build_opener(NoRedirect)


class Endpoint:
    def __init__(self, url, version, timeout, retries):
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ModelError(f"{url}: not a URL ({error}); correct it") from error
        if not host:
            raise ModelError(f"{url}: names no host; write http://host:port/path")
        if parts.username or parts.password:
            raise ModelError("the URL holds a name or password; leave it out and set PGSEG_TOKEN to a bearer token")
        self.url, self.timeout, self.retries = url, timeout, retries
        self.name = host + parts.path  # a query may hold a secret
        self.fingerprint = fingerprint("endpoint", url, version)

    @contextmanager
    def asking(self, image):
        Image.fromarray(image).save(png := io.BytesIO(), "PNG")
        yield partial(self.ask, base64.b64encode(png.getvalue()).decode())

    def ask(self, png, text):
        body = json.dumps({"image": png, "phrasing": text}).encode()
        for attempt in range(self.retries + 1):
            try:
                return self.post(body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"the endpoint answers {error.code}: {first_line(error)}"
                if error.code not in BUSY:
                    raise ModelError(problem) from None
                wait = error.headers.get("Retry-After", "")
                wait = int(wait) if wait.isdecimal() else 2**attempt / 4
            except (OSError, http.client.HTTPException) as error:
                late = isinstance(getattr(error, "reason", error), TimeoutError)
                reason = getattr(error, "reason", error)
                problem = (
                    f"no answer within {self.timeout:g} s" if late else f"the endpoint cannot be reached ({reason})"
                )
                wait = 2**attempt / 4
            if attempt < self.retries:
                time.sleep(min(wait, LONGEST_WAIT))
        raise ModelError(f"{problem} (asked {self.retries + 1} times)")

    def post(self, body):
        headers = {"Content-Type": "application/json", "Accept": "image/png, application/json"}
        if token := os.environ.get("PGSEG_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        until = time.monotonic() + self.timeout
        request = urllib.request.Request(self.url, body, headers, method="POST")
        with OPENER.open(request, timeout=self.timeout) as reply:
            kind, content = reply.headers.get_content_type(), bytearray()
            while part := reply.read1(2**16):  # a reply that trickles in keeps a socket's own time limit happy
                content += part
                if time.monotonic() > until:
                    raise TimeoutError
                if len(content) > LARGEST:
                    raise ModelError(f"the reply is over {LARGEST >> 20} MiB; answer with a PNG")
            if reply.length:
                raise http.client.IncompleteRead(bytes(content), reply.length)
        return read_mask(io.BytesIO(content if kind.startswith("image/") else mask_of(kind, content)))


def mask_of(kind, content):
    """The PNG's bytes in a JSON reply."""
    if kind != "application/json":
        raise ModelError(f"the reply is {kind}; answer with image/png, or JSON with the field mask")
    try:
        reply = json.loads(content)
        if isinstance(reply, dict) and "error" in reply:
            raise ModelError(f"the endpoint reports: {str(reply['error']).splitlines()[0][:200]}")
        return base64.b64decode(reply["mask"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the JSON reply has no base64 PNG in its field mask ({said(error)})") from None


def said(error):
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def first_line(error):
    try:
        lines = error.read(2000).decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[0][:200] if lines else error.reason
