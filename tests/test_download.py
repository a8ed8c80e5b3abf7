"""Getting data over real HTTP from a server on this machine: whole, broken off, wrong, refused, and by hand."""

import hashlib
import io
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import pgseg_lite as pg
from pgseg_lite.cli import main
from pgseg_lite.data import download, load_dataset, pannuke
from pgseg_lite.errors import DataError


def fold(number, count=2):
    """One of PanNuke's archives with `count` patches."""
    rng = np.random.default_rng(number)
    masks = np.zeros((count, 256, 256, 6), np.uint8)
    masks[:, 10:20, 10:20, 0] = 1
    images = rng.integers(0, 256, (count, 256, 256, 3), np.uint8)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for kind, array in (("images", images), ("masks", masks)):
            with file.open(f"Fold {number}/{kind}/fold{number}/{kind}.npy", "w") as member:
                np.save(member, array)
        file.writestr("__MACOSX/._Fold", b"")
    return content.getvalue()


FOLDS = {f"/fold_{number}.zip": fold(number) for number in (1, 2)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        if status := self.server.statuses.pop(0) if self.server.statuses else None:
            self.send_error(status)
            return
        content, start = self.server.files[self.path], 0
        if self.server.honours_range:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if self.server.honours_range else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        sent = self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[start : start + sent])  # a cut: fewer bytes than promised
        self.wfile.flush()
        if self.server.stalls:
            self.server.stalls.pop().wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.statuses, server.cuts, server.stalls = dict(FOLDS), [], [], [], []
    server.honours_range, server.url = True, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def source(server):
    """As in sources.yaml, with this server in place of the official one."""
    archives = [
        {"file": path[1:], "url": server.url + path, "bytes": len(content), "split": f"fold{path[6]}",
         "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in FOLDS.items()
    ]  # fmt: skip
    counts = {"fold1": 2, "fold2": 2}
    return {"terms": "free", "page": server.url, "counts": counts, "archives": archives, "steps": ["fill {folder}"]}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_archives_are_fetched_checked_and_unpacked(server, source, tmp_path, capsys):
    folder = tmp_path / "deep" / "PanNuke"
    assert download.obtain("pannuke", source, folder) == folder
    assert left(folder) == ["Fold 1", "Fold 2"]  # no archive, nothing half done
    assert len(load_dataset("pannuke", folder, "fold2")) == 2
    assert "fold_1.zip: 100%" in capsys.readouterr().err  # progress
    download.obtain("pannuke", source, folder)
    assert len(server.asked) == 2  # nothing is fetched again


def test_a_fold_that_is_there_is_not_fetched_again(server, source, tmp_path):
    download.obtain("pannuke", source, tmp_path)
    shutil.rmtree(tmp_path / "Fold 2")
    download.obtain("pannuke", source, tmp_path)
    assert [path for path, _ in server.asked] == ["/fold_1.zip", "/fold_2.zip", "/fold_2.zip"]


def fetch(server, path, name="/fold_1.zip"):
    content = FOLDS[name]
    download.download(server.url + name, path, len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("honours_range", [True, False])
def test_a_broken_connection_is_gone_on_from(server, tmp_path, honours_range):
    server.honours_range, server.cuts = honours_range, [1000, 5000]
    fetch(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == FOLDS["/fold_1.zip"] and left(tmp_path) == ["a.zip"]
    starts = [asked for _, asked in server.asked]
    assert starts == ["bytes=0-", "bytes=1000-", "bytes=6000-" if honours_range else "bytes=5000-"]


def test_a_killed_download_is_gone_on_from(server, tmp_path):
    waiting = threading.Event()
    server.cuts, server.stalls = [200_000], [waiting]
    code = "import sys; from pgseg_lite.data.download import download; download(sys.argv[1], __import__('pathlib').Path(sys.argv[2]), int(sys.argv[3]), '')"
    size = str(len(FOLDS["/fold_1.zip"]))
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url + "/fold_1.zip", tmp_path / "a.zip", size], stderr=subprocess.DEVNULL
    )
    part, deadline = tmp_path / "a.zip.part", time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    waiting.set()
    there = part.stat().st_size
    assert 0 < there <= 200_000 and left(tmp_path) == ["a.zip.part"]
    fetch(server, tmp_path / "a.zip")
    assert server.asked[1:] == [("/fold_1.zip", f"bytes={there}-")]
    assert (tmp_path / "a.zip").read_bytes() == FOLDS["/fold_1.zip"]


def test_a_busy_server_is_asked_again_and_given_time(server, tmp_path, no_waiting):
    server.statuses = [503, 429, None]
    fetch(server, tmp_path / "a.zip")
    assert no_waiting == [1, 2] and left(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"statuses": [404]}, "the server answers 404 Not Found; get it in a browser"),
        ({"statuses": [403]}, "the server answers 403 Forbidden; get it in a browser"),
        ({"statuses": [500] * 5}, "the server answers 500; 0 of [0-9,]+ bytes are here, so try again to go on"),
        ({"cuts": [0] * 5}, "the connection broke; 0 of"),
        (
            {"files": {"/fold_1.zip": b"<html>Log in"}},
            r"offers 12 bytes \(text/plain\) and not [0-9,]+; it may ask for a login",
        ),
        (
            {"files": {"/fold_1.zip": bytes(len(FOLDS["/fold_1.zip"]))}},
            "sha256 is [0-9a-f]{64} and not [0-9a-f]{64}, so this is not",
        ),
    ],
)
def test_what_a_server_may_do_wrong(server, source, tmp_path, trouble, message):
    for name, value in trouble.items():
        setattr(server, name, value)
    with pytest.raises(DataError, match=message):
        download.obtain("pannuke", source, tmp_path)
    assert not left(tmp_path) or left(tmp_path) == ["fold_1.zip.part"]


def test_no_network_and_no_space(tmp_path, source, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/fold_1.zip"
    with pytest.raises(DataError, match=r"cannot be reached \(.*refused.*\); 0 of 9 bytes are here"):
        download.download(url, tmp_path / "a.zip", 9, "")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"fold_1.zip needs 0\.\d GB and 0\.0 are free; choose another"):
        download.obtain("pannuke", source, tmp_path)
    assert left(tmp_path) == []


def archive(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def link():
    member = zipfile.ZipInfo("Fold 1")
    member.create_system, member.external_attr = 3, 0o120777 << 16
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../out.txt", "'../out.txt' leaves its folder"),
        ("/out.txt", "'/out.txt' leaves its folder"),
        (link(), "'Fold 1' is a link"),
    ],
)
def test_an_archive_that_reaches_outside_is_refused(tmp_path, member, message):
    path = tmp_path / "deep" / "bad.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("Fold 1/good.txt", "x")
        file.writestr(member, "elsewhere")
    with pytest.raises(DataError, match=message):
        download.unpack("pannuke", path, path.parent, {"fold1": 2})
    assert left(tmp_path) == ["deep"] and left(path.parent) == ["bad.zip"]


def test_nothing_half_unpacked_is_left(tmp_path):
    content = bytearray(FOLDS["/fold_1.zip"])
    content[1000] ^= 255  # within the compressed images: its checksum fails while it is unpacked
    path = tmp_path / "fold_1.zip"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"fold_1.zip: cannot be unpacked \(.+\); get the archive again"):
        download.unpack("pannuke", path, tmp_path, {"fold1": 2})
    assert left(tmp_path) == ["fold_1.zip"]
    path.write_bytes(FOLDS["/fold_1.zip"])
    with pytest.raises(DataError, match="looked for 3 images of fold1 and found 2; get the official archive"):
        download.unpack("pannuke", path, tmp_path, {"fold1": 3})
    (tmp_path / "Fold 1").mkdir()
    with pytest.raises(DataError, match="Fold 1: is there and not whole; move it away, then try again"):
        download.unpack("pannuke", path, tmp_path, {"fold1": 2})
    assert left(tmp_path) == ["Fold 1", "fold_1.zip"] and not left(tmp_path / "Fold 1")


# ---- sets that only a person can get ----


def consep_tree(root, count):
    from scipy.io import savemat

    for kind in ("Images", "Labels"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (32, 32)).save(root / "Images" / f"image_{i}.png")
        savemat(root / "Labels" / f"image_{i}.mat", {"inst_map": np.eye(32)})


def test_a_manual_set_gets_steps_and_a_check(tmp_path, capsys):
    folder = tmp_path / "cpm15"
    assert main(["data", "get", "cpm15", "--root", str(folder)]) == 2
    said = capsys.readouterr().err
    assert (
        f"{folder}: no such folder" in said
        and "drive.google.com" in said
        and f"3. run `pgseg data get cpm15 --root {folder}`" in said
    )
    assert not folder.exists()
    consep_tree(folder, 14)
    with pytest.raises(DataError, match="looked for 15 images of all and found 14"):
        pg.get_dataset("cpm15", folder)
    (folder / "Labels" / "image_3.mat").unlink()
    with pytest.raises(DataError, match=r"no image_3\.mat for the image image_3\.png"):
        pg.get_dataset("cpm15", folder)
    shutil.rmtree(folder)
    consep_tree(folder, 15)
    assert main(["data", "get", "cpm15", "--root", str(folder)]) == 0
    assert f"cpm15 is whole: {folder}" in capsys.readouterr().out


def test_an_archive_that_a_person_fetched_is_checked_and_unpacked(tmp_path):
    consep_tree(tmp_path / "made" / "cpm15", 2)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "made")
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.move(tmp_path / "set.zip", folder)
    sum_ = download.digest(folder / "set.zip")
    source = {"terms": "ask", "page": "there", "counts": {"all": 2}, "steps": ["get it"]}
    with pytest.raises(DataError, match=r"its sha256 is .+ and not 0; get the official file again"):
        download.obtain("cpm15", source | {"archives": [{"file": "set.zip", "sha256": "0"}]}, folder)
    assert download.obtain("cpm15", source | {"archives": [{"file": "set.zip", "sha256": sum_}]}, folder) == folder
    assert left(folder) == ["Images", "Labels", "set.zip"]


def test_the_sets_that_are_here_are_whole(real_data):
    for name, folder in (("consep", "CoNSeP"), ("kumar", "Kumar"), ("cpm15", "cpm15")):
        assert pg.get_dataset(name, real_data / folder) == real_data / folder


def test_where_a_set_goes(tmp_path, monkeypatch):
    monkeypatch.delenv("PGSEG_DATA", raising=False)
    with pytest.raises(DataError, match=r"kumar: where to\? pass root= \(--root\), or set PGSEG_DATA"):
        pg.get_dataset("kumar")
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path))
    assert download.target_folder("kumar", None) == tmp_path / "Kumar"
    (tmp_path / "kumar").mkdir()
    assert download.target_folder("kumar", None) == tmp_path / "kumar"  # in either case
    with pytest.raises(DataError, match="'synthetic' is no dataset to get; choose one of pannuke, consep"):
        pg.get_dataset("synthetic")
    with pytest.raises(DataError, match="kumar has one source only; leave official away"):
        pg.get_dataset("kumar", official=True)


def test_sources_are_complete():
    from pgseg_lite.data import READERS

    known = download.sources()
    assert {*known} == {*READERS} - {"synthetic", "folder", "coco"}
    for name, source in known.items():
        assert {*source["counts"]} == {*READERS[name].splits}
        assert source["page"].startswith("https://") and source["steps"] and source["terms"]
        for entry in source.get("archives", []):
            assert len(entry["sha256"]) == 64 and entry.get("url", "https://").startswith("https://")
            assert ("url" in entry) == ("bytes" in entry)


# ---- the hub's copy ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of the hub's format, read by the call that reads the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    mask = Image.fromarray(np.eye(256, dtype=bool))
    row = {"image": Image.new("RGB", (256, 256)), "instances": [mask], "categories": [3], "tissue": 1}
    features = datasets.Features(
        {"image": datasets.Image(), "instances": datasets.Sequence(datasets.Image()),
         "categories": datasets.Sequence(datasets.Value("int64")), "tissue": datasets.Value("int64")}
    )  # fmt: skip
    (tmp_path / "repository" / "data").mkdir(parents=True)
    files = {}
    for number in (1, 2, 3):
        files[f"fold{number}"] = str(tmp_path / "repository" / "data" / f"fold{number}.parquet")
        datasets.Dataset.from_list([row] * number, features=features).to_parquet(files[f"fold{number}"])
    monkeypatch.setattr(download, "HUB", {"path": "parquet", "data_files": files})
    return download.sources()["pannuke"] | {"counts": {"fold1": 1, "fold2": 2, "fold3": 3}}


def test_pannuke_from_the_hub_is_saved_where_the_reader_finds_it(hub, tmp_path):
    folder = download.obtain("pannuke", hub, tmp_path / "data" / "PanNuke")
    sample = load_dataset("pannuke", folder, "fold3")[2]  # without hub=True: the folder says what it is
    assert sample.masks["dead"].sum() == 256 and left(tmp_path / "data") == ["PanNuke"]
    assert download.obtain("pannuke", hub, folder) == folder
    (folder / pannuke.HUB_COPY).unlink()
    with pytest.raises(
        DataError, match="PanNuke: holds fold1, fold2, fold3 and no whole pannuke; choose an empty folder"
    ):
        download.obtain("pannuke", hub, folder)


def test_the_hub_out_of_reach_names_the_other_way(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "HUB", {"path": "parquet", "data_files": str(tmp_path / "none.parquet")})
    with pytest.raises(DataError, match=r"or take the official archives with official=True \(--official\)"):
        download.obtain("pannuke", hub, tmp_path / "PanNuke")
    assert not (tmp_path / "PanNuke").exists()
