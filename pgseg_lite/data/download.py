"""Getting the real data sets: `get_dataset(name)` fetches what may be fetched, says how to get the rest, and checks it.

An archive is fetched into a .part file that a killed download goes on from, compared with its published sha256,
unpacked beside its place, read as `load_dataset` reads it, and only then renamed. urllib of the standard library does
the fetching: what is needed of HTTP is one header, and huggingface_hub resumes only what the hub itself serves.
"""

import hashlib
import http.client
import os
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

import yaml
from tqdm import tqdm

from ..errors import DataError, first_line
from . import READERS, load_dataset
from .files import find_root, listing
from .pannuke import HUB, HUB_COPY

ATTEMPTS, TIMEOUT = 5, 30  # attempts in a row without a new byte; seconds without an answer
BLOCK = 1 << 20


def sources() -> dict:
    return yaml.safe_load((Path(__file__).parent / "sources.yaml").read_text())


def get_dataset(name, root=None, official=False) -> Path:
    """The folder of a whole copy of the named dataset, for `load_dataset(name, root=...)`; what is there is kept.

    root: where it is or shall be, else $PGSEG_DATA/<official name>. official: PanNuke's three archives of 2 GB (37 GB
    unpacked) in place of the copy on the hub.
    """
    known = sources()
    if name not in known:
        said = f"{name!r} is no dataset to get" if name in READERS else f"there is no dataset {name!r}"
        raise DataError(f"{said}; choose one of {', '.join(known)}")
    source = known[name]
    if official:
        if not source.get("hub"):
            raise DataError(f"{name} has one source only; leave official away")
        source = source | {"hub": False}
    return obtain(name, source, target_folder(name, root))


def obtain(name, source: dict, folder: Path) -> Path:
    """The same for a source as sources.yaml has them."""
    wrong = what_is_wrong(name, folder, source["counts"])
    if not wrong:
        return folder
    if source.get("hub"):
        copy_from_hub(name, folder)
    else:
        for archive in source.get("archives", []):
            split = archive.get("split")
            counts = {split: source["counts"][split]} if split else source["counts"]
            if what_is_wrong(name, folder, counts) and (path := find_archive(archive, folder)):
                unpack(name, path, folder, counts)
                if "url" in archive:
                    path.unlink()  # a person's own file stays
    if wrong := what_is_wrong(name, folder, source["counts"]):
        steps = [*source["steps"], f"run `pgseg data get {name} --root {folder}` again, which checks the folder"]
        numbered = "".join(f"\n  {i}. {step.format(folder=folder)}" for i, step in enumerate(steps, 1))
        raise DataError(f"{wrong}; how to get it ({source['terms']}), from {source['page']}:{numbered}")
    return folder


def target_folder(name, root) -> Path:
    if root is not None:
        return Path(root).expanduser()
    place = os.environ.get("PGSEG_DATA")
    if not place:
        raise DataError(f"{name}: where to? pass root= (--root), or set PGSEG_DATA to the folder for all data sets")
    try:
        return find_root(name, READERS[name].folder, None)
    except DataError:  # not there yet
        return Path(place).expanduser() / READERS[name].folder


def what_is_wrong(name, folder: Path, counts: dict) -> str | None:
    """None for a whole copy, or what was looked for and what was found."""
    for split, wanted in counts.items():
        try:
            data = load_dataset(name, folder, split, tile=None)
            data[0]  # its labels fit it
        except (DataError, OSError) as error:
            return f"{name} is not whole: {str(error).split('; ')[0]}"
        if wanted and len(data) != wanted:
            return f"{name} is not whole: {folder}: looked for {wanted} images of {split} and found {len(data)}"
    return None


def find_archive(archive: dict, folder: Path) -> Path | None:
    """The checked archive: one that lies in the folder, or fetched there; None for one that only a person can get."""
    path = folder / archive["file"]
    if not path.is_file():
        if "url" not in archive:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        download(archive["url"], path, archive["bytes"], archive["sha256"])
    elif (found := digest(path)) != archive["sha256"]:
        raise DataError(f"{path}: its sha256 is {found} and not {archive['sha256']}; get the official file again")
    return path


def copy_from_hub(name, folder: Path):
    """PanNuke's copy on the hub, which fetches, resumes and checks by itself, saved where `load_dataset` reads it."""
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: holds {listing(folder)} and no whole {name}; choose an empty folder")
    try:
        import datasets

        partial = folder.with_name(folder.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        datasets.load_dataset(**HUB).save_to_disk(partial)
    except Exception as error:  # no package, no network, no space: each raises its own class
        reason = first_line(error)
        said = f"{HUB['path']} cannot be copied from the hub ({reason}); check the network and `pip install datasets`"
        raise DataError(f"{said}, or take the official archives with official=True (--official)") from error
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == HUB_COPY):  # that file says: all is there
        file.replace(folder / file.name)
    partial.rmdir()


# ---- one file ----


def download(url, path: Path, size: int, sha256: str):
    """url -> path, whole and as published. What a broken connection left in path.part is gone on from."""
    part, failures, best, reason = path.with_name(path.name + ".part"), 0, -1, ""
    need_space(path.parent, size - (part.stat().st_size if part.is_file() else 0), path.name)
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True) as bar:
        while (there := part.stat().st_size if part.is_file() else 0) != size:
            if there > size:
                part.unlink()
                continue
            if there > best:
                failures, best = 0, there
            elif failures == ATTEMPTS:
                raise DataError(f"{url}: {reason}; {there:,} of {size:,} bytes are here, so try again to go on")
            else:
                time.sleep(2 ** (failures - 1))
            failures += 1
            reason = receive(url, part, there, size, bar)
    if (found := digest(part)) != sha256:
        part.unlink()
        raise DataError(f"{url}: sha256 is {found} and not {sha256}, so this is not the published file; get it by hand")
    part.replace(path)


def receive(url, part: Path, start: int, size: int, bar) -> str:
    """One attempt. Returns why it ended early; raises where another attempt would not help."""
    by_hand = f"get it in a browser and put it into {part.parent}"
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-", "User-Agent": "pgseg-lite"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            going_on = answer.status == 206  # else the server sends the file from its beginning
            first, length = start if going_on else 0, answer.headers.get("Content-Length")
            if length and (offered := first + int(length)) != size:
                said = f"offers {offered:,} bytes ({answer.headers.get_content_type()}) and not {size:,}"
                raise DataError(f"{url}: {said}; it may ask for a login; {by_hand}")
            bar.n = first
            with open(part, "ab" if going_on else "wb", buffering=0) as file:  # what has come is not lost with us
                while block := answer.read1(BLOCK):
                    file.write(block)
                    bar.update(len(block))
        return "the connection broke"
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise DataError(f"{url}: the server answers {error.code} {error.reason}; {by_hand}") from error
        return f"the server answers {error.code}"
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        return f"cannot be reached ({getattr(error, 'reason', None) or type(error).__name__})"
    except OSError as error:
        raise DataError(f"{part}: cannot be written ({error}); make room or choose another folder") from error


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need_space(folder: Path, size: int, what: str):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{folder}: {what} needs {size / 1e9:.1f} GB and {free / 1e9:.1f} are free; choose another")


def unpack(name, archive: Path, folder: Path, counts: dict):
    """The archive's files into the folder, once it is certain that they are what the reader takes."""
    partial = archive.with_name(archive.name + ".unpacking")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = [m for m in file.infolist() if "__MACOSX" not in m.filename and not m.is_dir()]
            for member in members:
                check_member(archive, member)
            need_space(folder, sum(member.file_size for member in members), f"unpacking {archive.name}")
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file"):
                file.extract(member, partial)
        inside = [partial, *filter(Path.is_dir, partial.iterdir())]  # some have one folder around everything
        whole = [here for here in inside if not what_is_wrong(name, here, counts)]
        if not whole:
            raise DataError(f"{archive}: {what_is_wrong(name, partial, counts)}; get the official archive")
        for file in sorted(whole[0].iterdir()):
            if (folder / file.name).exists():
                raise DataError(f"{folder / file.name}: is there and not whole; move it away, then try again")
        for file in sorted(whole[0].iterdir()):
            file.rename(folder / file.name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); get the archive again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_member(archive: Path, member: zipfile.ZipInfo):
    """Nothing may leave the folder, by its path or through a link."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
        raise DataError(f"{archive}: {member.filename!r} leaves its folder; do not use this archive")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(f"{archive}: {member.filename!r} is a link; do not use this archive")
