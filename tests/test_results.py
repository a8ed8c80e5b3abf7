"""The store of measurements: a whole stamp, an untouched table, both or neither, and nothing private."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pgseg_lite
from pgseg_lite import results
from pgseg_lite.errors import ResultError

FACTS = {
    "profile": "lite",
    "datasets": [{"name": "consep", "split": "test", "digest": "0123456789ab"}],
    "seeds": [0, 1, 2],
    "settings": {"tau": 1.0, "levels": ["low", "high"], "note": "T1 / T2, see https://example.org/x"},
    "wall_s": 61.5,
}


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "image": ["007", "007", "12"],  # would come back as numbers if the store let it
            "target": ["all", "None", 'a, "b"\nc'],
            "dice": [1 / 3, np.nan, 0.1 + 0.2],
            "area": [10, 0, 2**40],
            "absent": [False, True, False],
        }
    )


@pytest.fixture
def saved(tmp_path, frame):
    root = tmp_path / "results"
    results.save_result("consep_lite", frame, results.stamp(**FACTS), root)
    return root


# ---------------------------------------------------------------- the stamp


def test_stamp_says_how_it_was_measured():
    stamp = results.stamp(**FACTS, note="extra facts stay")
    assert set(results.FIELDS) < set(stamp) and stamp["note"] == "extra facts stay"
    assert {name: stamp[name] for name in FACTS} == FACTS
    assert stamp["packages"]["numpy"] == np.__version__ and stamp["packages"]["pandas"] == pd.__version__
    assert stamp["packages"]["python"] == sys.version.split()[0]
    assert stamp["packages"]["torch"] and stamp["packages"]["transformers"]
    assert stamp["hardware"]["cores"] == os.cpu_count() and stamp["hardware"]["cpu"]
    assert stamp["code"]["version"] == pgseg_lite.__version__
    assert abs(pd.Timestamp(stamp["date"]) - pd.Timestamp.now("UTC")) < pd.Timedelta("1min")


def test_stamp_names_no_host_user_or_path():
    text = json.dumps(results.stamp(**FACTS))
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), os.sep + "home"):
        assert private not in text
    user = getpass.getuser()
    assert f'"{user}"' not in text


@pytest.mark.parametrize(
    "path", ["/home/me/x.safetensors", "~/data", "../shared/data", "C:\\Users\\me", "train --root=/mnt/x"]
)
def test_a_path_among_the_settings_is_refused(path):
    with pytest.raises(ResultError, match="holds the path"):
        results.stamp(**{**FACTS, "settings": {"checkpoint": [path]}})


@pytest.mark.parametrize("field", results.MEASURED)
def test_stamp_wants_every_fact(field):
    with pytest.raises(ResultError, match=f"lacks {field}"):
        results.stamp(**{name: value for name, value in FACTS.items() if name != field})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "fast"}, "profile 'fast'"),
        ({"datasets": [{"name": "consep"}]}, "without name, split or digest"),
        ({"seeds": [np.int64(1)]}, "JSON cannot hold"),
        ({"wall_s": float("nan")}, "JSON cannot hold"),
    ],
)
def test_stamp_refuses_wrong_facts(change, message):
    with pytest.raises(ResultError, match=message):
        results.stamp(**{**FACTS, **change})


def test_stamp_leaves_torch_alone():
    """A caller without torch must not wait seconds for a GPU's name."""
    code = f"import sys; from pgseg_lite import results; results.stamp(**{FACTS}); print('torch' in sys.modules)"
    root = Path(results.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_version_in_and_out_of_a_checkout(tmp_path, monkeypatch):
    """In a checkout the commit and a dirty flag; in somebody else's checkout only the version."""

    def git(*words):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    module = tmp_path / "pgseg_lite" / "results.py"
    module.parent.mkdir()
    module.write_text("a\n")
    monkeypatch.setattr(results, "__file__", str(module))
    plain = {"version": pgseg_lite.__version__, "commit": None, "dirty": False}
    assert results._code() == plain
    git("init", "-q")
    assert results._code() == plain  # there, but not tracked
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert results._code() == {**plain, "commit": commit}
    (tmp_path / "elsewhere.csv").write_text("a new result is no change of the code")
    assert not results._code()["dirty"]
    module.write_text("b\n")
    assert results._code() == {**plain, "commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert results._code() == plain  # no git


# ---------------------------------------------------------------- save and load


def test_a_result_comes_back_as_it_was(saved, frame):
    loaded = results.load_result("consep_lite", saved)
    pd.testing.assert_frame_equal(loaded, frame, check_exact=True, check_dtype=False)
    assert loaded["image"].tolist() == ["007", "007", "12"] and loaded["target"][1] == "None"
    assert loaded["absent"].dtype == bool and loaded["area"].dtype == np.int64
    assert loaded.attrs["stamp"]["settings"] == FACTS["settings"]
    assert sorted(path.name for path in saved.iterdir()) == ["consep_lite.csv", "consep_lite.json"]


def test_the_same_table_gives_the_same_bytes(saved, frame, tmp_path):
    again = results.load_result("consep_lite", saved)
    path = results.save_result("consep_lite", again, again.attrs["stamp"], tmp_path / "again")
    assert path.read_bytes() == (saved / "consep_lite.csv").read_bytes()
    assert path.with_suffix(".json").read_bytes() == (saved / "consep_lite.json").read_bytes()


def test_group_keys_in_the_index_are_kept(frame, tmp_path):
    by_target = frame.groupby("image")[["area"]].sum()
    results.save_result("grouped", by_target, results.stamp(**FACTS), tmp_path)
    assert results.load_result("grouped", tmp_path).columns.tolist() == ["image", "area"]


def test_results_are_found_from_a_folder_below(saved, monkeypatch):
    below = saved.parent / "notebooks" / "deep"
    (saved.parent / "notebooks" / "results").mkdir(parents=True)  # an empty one on the way does not hide it
    below.mkdir()
    monkeypatch.chdir(below)
    assert len(results.load_result("consep_lite")) == 3
    with pytest.raises(ResultError, match=r"no absent\.csv in .* or in a results folder above it"):
        results.load_result("absent")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda csv, stamp: csv.unlink(), "there is no"),
        (lambda csv, stamp: stamp.unlink(), "no readable stamp"),
        (lambda csv, stamp: stamp.write_text("{"), "no readable stamp"),
        (lambda csv, stamp: stamp.write_text("[]"), "lacks profile"),
        (lambda csv, stamp: stamp.write_text("7"), "lacks profile"),
        (lambda csv, stamp: csv.write_text(csv.read_text().replace("0.33", "0.99")), "not the table"),
        (lambda csv, stamp: csv.write_text(""), "not the table"),
        (lambda csv, stamp: edit(stamp, lambda facts: facts.pop("seeds")), "lacks seeds"),
        (lambda csv, stamp: edit(stamp, lambda facts: facts.pop("sha256")), "lacks sha256"),
        (lambda csv, stamp: edit(stamp, lambda facts: facts.update(profile="best")), "profile 'best'"),
    ],
)
def test_a_damaged_result_is_refused(saved, damage, message):
    damage(saved / "consep_lite.csv", saved / "consep_lite.json")
    with pytest.raises(ResultError, match=message):
        results.load_result("consep_lite", saved)


def edit(path, change):
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize("name", ["../up", "a/b", "Upper", "", ".hidden", "a.csv"])
def test_a_name_that_is_no_plain_word_is_refused(name, frame, tmp_path):
    with pytest.raises(ResultError, match="cannot be named"):
        results.save_result(name, frame, results.stamp(**FACTS), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.iloc[:0], "no rows"),
        (lambda frame: frame.groupby("image").agg({"dice": ["mean", "std"]}), "stacked or repeated"),
        (lambda frame: frame.rename(columns={"dice": "area"}), "stacked or repeated"),
        (lambda frame: pd.concat([frame] * 20_000), r"bytes, over 1,000,000"),
    ],
)
def test_a_table_that_should_not_be_stored_is_refused(frame, change, message, tmp_path):
    with pytest.raises(ResultError, match=message):
        results.save_result("table", change(frame), results.stamp(**FACTS), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_table_without_a_stamp_is_refused(frame, tmp_path):
    with pytest.raises(ResultError, match="table lacks code, packages, hardware, date"):
        results.save_result("table", frame, dict(FACTS), tmp_path)


def test_a_failed_save_leaves_the_old_result(saved, frame, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    before = {path: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(results.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        results.save_result("consep_lite", frame.head(1), results.stamp(**FACTS), saved)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before  # and no temporary file


def test_a_save_killed_between_its_two_files_is_noticed(saved, frame, monkeypatch):
    calls, replace = [], os.replace

    def only_the_first(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(results.os, "replace", only_the_first)
    with pytest.raises(KeyboardInterrupt):
        results.save_result("consep_lite", frame.head(1), results.stamp(**FACTS), saved)
    with pytest.raises(ResultError, match="not the table"):
        results.load_result("consep_lite", saved)


# ---------------------------------------------------------------- the line for captions


def test_describe_is_one_line_with_all_that_matters(saved):
    stamp = results.load_result("consep_lite", saved).attrs["stamp"]
    stamp["code"] = {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": True}
    stamp["hardware"] = {"cpu": "A Chip", "cores": 2, "gpu": None}
    line = results.describe(stamp)
    assert line.startswith("lite profile: consep test (0123456789ab); seeds 0, 1, 2; ")
    assert "pgseg_lite 0.1.0 at 0123456789 with changes, torch " in line
    assert "; 2 cores of A Chip; 62 s; 20" in line and "\n" not in line
    one = stamp["datasets"][0]
    stamp |= {"datasets": [one | {"role": "validation"}, one | {"role": "test"}], "runs": ["of a grid"]}
    assert ": consep test (0123456789ab; validation; test); seeds" in results.describe(stamp)
    assert "; 62 s of training; 20" in results.describe(stamp)
    stamp |= {"datasets": [], "seeds": [], "wall_s": 3600}
    stamp["hardware"]["gpu"] = "A GPU"
    assert "no data set; seeds none; " in results.describe(stamp)
    assert "; A GPU; 3600 s of training; " in results.describe(stamp)


def test_a_smoke_run_is_labelled_first():
    line = results.describe(results.stamp(**{**FACTS, "profile": "smoke"}))
    assert line.startswith("smoke run, not a measurement: consep test")


def test_every_committed_result_loads():
    root = Path(__file__).parents[1] / "results"
    for path in root.glob("*.csv"):
        assert len(results.load_result(path.stem, root)) > 0


def test_the_book_says_how_long_its_tables_took():
    repo = Path(__file__).parents[1]

    def hours(*names):
        return sum(json.loads((repo / f"results/{name}.json").read_text())["wall_s"] for name in names) / 3600

    text = " ".join((repo / "book/reproduce.md").read_text().split())
    assert "paper's tables took about two and a half hours" in text
    assert 2.25 < hours("table1", "table2", "table4") < 2.75
    assert "{doc}`part_neighbours` nearly two." in text
    assert 1.75 < hours("imprecise", "evolve", "preferences") < 2
