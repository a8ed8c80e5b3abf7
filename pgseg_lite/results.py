"""Results are data: a tidy table (NAME.csv) beside a stamp (NAME.json) that says how it was measured."""

import datetime
import io
import json
import os
import platform
import re
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from . import __version__
from .errors import ResultError

MEASURED = ("profile", "datasets", "seeds", "settings", "wall_s")  # what only the caller knows
FIELDS = (*MEASURED, "code", "packages", "hardware", "date")
EXACT = {"float_precision": "round_trip"} if pd.__version__ < "3" else {}  # reading CSV; pandas 3 always is
LIMIT = 1_000_000  # bytes of a file
PATH = re.compile(r"""["'\s=:,](/|~/|\.\./|[A-Za-z]:\\+)\w[^"]*""")  # neither "T1 / T2" nor https://


def stamp(**facts):
    """The caller's facts (MEASURED and any more) with code version, packages, hardware and date (UTC)."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "pandas")}
    packages["python"] = platform.python_version()
    found = {"code": _code(), "packages": packages, "hardware": _hardware(), "date": now}
    return _checked({**found, **facts}, FIELDS, "the stamp")


def save_result(name, frame, stamp, root="results"):
    """Write root/NAME.csv and .json, both or neither; return the csv's path. Index names turn to columns."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ResultError(f"a result cannot be named {name!r}; use lower-case letters, digits, - and _")
    frame = frame.reset_index() if any(label is not None for label in frame.index.names) else frame
    if frame.empty or frame.columns.nlevels > 1 or not frame.columns.is_unique:
        raise ResultError(f"{name} has no rows, or stacked or repeated column names; give each column its own")
    table = frame.to_csv(index=False, lineterminator="\n").encode()
    texts = [column for column in frame.columns if not pd.api.types.is_numeric_dtype(frame[column])]
    stamp = {**_checked(stamp, FIELDS, name), "text_columns": texts, "sha256": sha256(table).hexdigest()}
    files = {f"{name}.csv": table, f"{name}.json": json.dumps(stamp, indent=1).encode() + b"\n"}
    if (size := max(map(len, files.values()))) > LIMIT:
        raise ResultError(f"{name} has {size:,} bytes, over {LIMIT:,}; round it, group it or split it")
    Path(root).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=root) as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        for file in files:  # killed between the two, the sha256 no longer fits, and load_result says so
            os.replace(Path(folder, file), Path(root, file))
    return Path(root, f"{name}.csv")


def find_result(file, root=None):
    """root/FILE; without a root, from the nearest results/ upward that has it."""
    checkout = Path(__file__).parents[1]  # a notebook may run anywhere
    roots = [Path(root)] if root else [above / "results" for above in (Path.cwd(), *Path.cwd().parents, checkout)]
    path = next((place / file for place in roots if (place / file).is_file()), None)
    if path is None:
        upward = "" if root else " or in a results folder above it"
        raise ResultError(f"there is no {file} in {roots[0]}{upward}; run what measures it")
    return path


def load_result(name, root=None):
    """The table, its stamp in .attrs["stamp"]; without a root, from the nearest results/ upward that has it."""
    path = find_result(f"{name}.csv", root)
    try:
        stamp = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} has no readable stamp beside it ({error}); measure it again") from None
    stamp, table = _checked(stamp, (*FIELDS, "text_columns", "sha256"), path), path.read_bytes()
    if sha256(table).hexdigest() != stamp["sha256"]:
        raise ResultError(f"{path} is not the table that its stamp was made for; measure it again")
    texts = dict.fromkeys(stamp["text_columns"], str)  # so that image "007" and a category "None" stay text
    frame = pd.read_csv(io.BytesIO(table), dtype=texts, keep_default_na=False, na_values=[""], **EXACT)
    frame.attrs["stamp"] = stamp
    return frame


def describe(stamp):
    """One line of provenance for a caption; a run at the smoke profile says so first."""
    code, machine, profile = stamp["code"], stamp["hardware"], stamp["profile"]
    label = "smoke run, not a measurement" if profile == "smoke" else f"{profile} profile"
    roles = {}  # (name, split, digest) -> what the set was used for
    for one in stamp["datasets"]:
        roles.setdefault((one["name"], one["split"], one["digest"]), []).append(one.get("role", ""))
    parts = [f"{name} {split} ({'; '.join(filter(None, [d, *used]))})" for (name, split, d), used in roles.items()]
    data = ", ".join(parts) or "no data set"
    seeds = ", ".join(map(str, stamp["seeds"])) or "none"
    commit = f" at {code['commit'][:10]}{' with changes' * code['dirty']}" if code["commit"] else ""
    engine = f"pgseg_lite {code['version']}{commit}, torch {stamp['packages']['torch']}"
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    took = f"{stamp['wall_s']:.0f} s{' of training' * ('runs' in stamp)}"  # a grid's tests are not counted
    return f"{label}: {data}; seeds {seeds}; {engine}; {where}; {took}; {stamp['date'][:10]}"


def _checked(stamp, fields, where):
    """The stamp as JSON keeps it, once it is known to be whole and to name no place on this machine."""
    try:
        text = json.dumps(stamp, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultError(f"{where} has a stamp that JSON cannot hold ({error}); use plain values") from None
    if missing := [field for field in fields if not isinstance(stamp, dict) or field not in stamp]:
        raise ResultError(f"{where} lacks {', '.join(missing)}; make its stamp with results.stamp()")
    if stamp["profile"] not in ("smoke", "lite", "full"):
        raise ResultError(f"{where} has profile {stamp['profile']!r}; it is smoke, lite or full")
    if not all({"name", "split", "digest"} <= {*one} for one in stamp["datasets"]):
        raise ResultError(f"{where} has a data set without name, split or digest; take them from the Dataset")
    if found := PATH.search(text):
        raise ResultError(f"{where} holds the path {found[0]!r}; a stamp is public, so name things instead")
    return json.loads(text)


def _code():
    """Version; in a git checkout also the last commit of this folder, and whether it has changed since."""

    def git(*words):  # an installed copy may lie inside a checkout of something else: then it has no commit
        run = subprocess.run(["git", *words, "."], cwd=Path(__file__).parent, capture_output=True, text=True)
        return run.stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H", "--") or None
        dirty = bool(commit and git("status", "--porcelain"))
    except OSError:  # no git on this machine
        commit, dirty = None, False
    return {"version": __version__, "commit": commit, "dirty": dirty}


def _hardware():
    """Model names and counts. A GPU only where the caller has torch loaded: importing it takes seconds."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    gpu = cuda.get_device_name() if cuda and cuda.is_available() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}
