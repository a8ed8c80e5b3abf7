"""A command-line model: image, phrasing, output and the address of a service. It starts in a moment, as it loads no model."""

import base64
import json
import sys
import urllib.request
from pathlib import Path

image, phrasing, output, address = sys.argv[1:]
body = json.dumps({"image": base64.b64encode(Path(image).read_bytes()).decode(), "phrasing": phrasing}).encode()
with urllib.request.urlopen(urllib.request.Request(address, body)) as reply:
    Path(output).write_bytes(reply.read())
