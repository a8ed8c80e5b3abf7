"""Experiments: keys, runs that are kept, skipped, resumed and reported, on processes and on a Dask cluster."""

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest

import pgseg_lite as pg
from pgseg_lite import experiments, runner
from pgseg_lite.cli import main
from pgseg_lite.errors import SettingsError, TrainingError
from pgseg_lite.experiments import EXPERIMENTS, FULL, Data, Experiment, Test, make_run, runs
from pgseg_lite.results import load_result

Test.__test__ = False  # a part of an experiment, not a test case

TINY = Experiment(
    "two methods on a few painted tiles", {FULL: {}, "K=2": dict(k=2)}, {"painted": Test(Data("consep"))}, FULL, True
)


@pytest.fixture(scope="module")
def tiny():
    """A named experiment of two runs, and its tables after running it once."""
    EXPERIMENTS["tiny"] = TINY
    yield TINY
    del EXPERIMENTS["tiny"]


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("runs"), []
    return folder, runner.run_experiment("tiny", "smoke", jobs=2, folder=folder, report=said.append), said


# ---- what is defined ----


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_every_experiment_has_settings_that_are_valid_and_its_own(name):
    experiment = EXPERIMENTS[name]
    for profile in ("smoke", "lite", "full"):
        grid = runs(experiment, profile)
        assert len({repr(run) for run in grid}) == len(grid)
        assert len(grid) == len(experiment.methods) * len(experiments.SEEDS[profile])
    assert experiment.reference in experiment.methods
    assert len(experiments.SEEDS["lite"]) >= 3


def test_the_full_method_is_one_run_wherever_it_appears():
    full = {repr([run for run in runs(EXPERIMENTS[name], "lite") if run.method == FULL]) for name in EXPERIMENTS}
    assert len(full) == 1


def test_test_images_are_never_trained_on():
    for experiment in EXPERIMENTS.values():
        for run in runs(experiment, "lite"):
            assert (run.data.name, run.data.split, run.data.part) == ("consep", "train", "rest")
        for test in experiment.tests.values():
            held = (test.data.name, test.data.split, test.data.part) == ("consep", "train", "held")
            assert held or test.data.split != "train"


def test_rest_and_held_share_no_image(real_data, monkeypatch):
    monkeypatch.setenv("PGSEG_DATA", str(real_data))
    rest, held = (Data("consep", "train", part).load() for part in ("rest", "held"))
    sources = [{name.split("@")[0] for name in part.ids} for part in (rest, held)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 27


# ---- keys ----


def key(**changes):
    run = make_run(FULL, {}, 0, "smoke")
    return runner.run_key(replace(run, settings=replace(run.settings, **changes)))


def test_a_key_hangs_on_what_decides_the_outcome_and_on_nothing_else():
    run = make_run(FULL, {}, 0, "smoke")
    assert key() == runner.run_key(run) == key(save_every=3)
    others = {
        key(beta=0.3),
        key(seed=1),
        key(steps=5),
        key(precision="bf16" if key() == key(precision="fp32") else "fp32"),
    }
    others |= {
        runner.run_key(replace(run, text_dropout=0.0)),
        runner.run_key(replace(run, data=replace(run.data, part="held"))),
    }
    assert len(others | {key()}) == 7


def test_code_counts_and_comments_do_not():
    before = 'def f(x):\n    """Say."""\n    return x + 1\n'
    assert runner.without_docstrings(before) == runner.without_docstrings("def f(x):\n    return x + 1  # why\n")
    assert runner.without_docstrings(before) != runner.without_docstrings("def f(x):\n    return x + 2\n")


def test_the_code_that_counts_exists():
    digests = {runner.code_digest((module,)) for module in {*runner.TRAINS, *runner.TESTS}}
    assert len(digests) == len({*runner.TRAINS, *runner.TESTS})


# ---- running ----


def test_progress_says_which_run_of_how_many_and_when_it_ends(done):
    _, _, said = done
    assert said[0] == "tiny: 2 runs, 0 of them finished before; 2 at a time"
    assert re.fullmatch(r"\[1/2\] .+, seed 0: \d+ s; the rest until about \d\d:\d\d", said[1])
    assert re.fullmatch(r"\[2/2\] .+, seed 0: \d+ s", said[2])


def test_tables_hold_every_method_level_and_target(done):
    table = done[1]["by_image"]
    assert set(table["method"]) == {*TINY.methods} and set(table["level"]) == {"any", *pg.prompts.LEVELS}
    assert set(table["target"]) == {*pg.load_dataset("synthetic", split="test", size=1).targets}
    assert not done[1]["by_phrasing"].duplicated(["method", "seed", "test", "target", "phrasing"]).any()
    facts = table.attrs["facts"]
    assert len(facts["runs"]) == 2 and facts["failed"] == {} and facts["seeds"] == [0]


def test_what_is_there_is_not_run_again(done):
    folder, tables, _ = done
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    said = []
    again = runner.run_experiment("tiny", "smoke", folder=folder, report=said.append)
    assert said == ["tiny: 2 runs, 2 of them finished before; 1 at a time"]
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    pd.testing.assert_frame_equal(again["by_image"], tables["by_image"])


def test_a_lost_test_is_done_again_without_training_and_a_killed_run_goes_on(done, tmp_path):
    folder, tables, _ = done
    shutil.copytree(folder, tmp_path / "runs")
    tested, killed = (tmp_path / "runs" / name for name in tables["by_image"].attrs["facts"]["runs"])
    for path in [*tested.glob("*.csv"), *killed.glob("*.csv"), killed / "finished.json", killed / "model.safetensors"]:
        if path.name != "history.csv":
            path.unlink()
    kept = (tested / "model.safetensors").stat().st_mtime_ns
    again = runner.run_experiment("tiny", "smoke", jobs=2, folder=tmp_path / "runs", report=str)
    assert (tested / "model.safetensors").stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(again["by_image"], tables["by_image"])


def test_a_dask_cluster_gives_the_same_tables(done, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        said = []
        options = dict(scheduler=cluster.scheduler_address, folder=tmp_path, report=said.append)
        tables = runner.run_experiment("tiny", "smoke", **options)
    assert said[0].endswith("2 at a time")
    pd.testing.assert_frame_equal(tables["by_image"], done[1]["by_image"], atol=2e-3)


def test_a_scheduler_that_does_not_answer_is_an_error_with_the_next_step(tiny, tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(SettingsError, match=r"no Dask scheduler answers at .*start one"):
        runner.connect("tcp://127.0.0.1:9", wait_s=1)


def test_one_failing_run_does_not_stop_the_others(tiny, tmp_path):
    grid = {run.method: runner.run_key(run) for run in runs(tiny, "smoke")}
    (tmp_path / grid[FULL]).write_text("a file where the run's folder should be")
    said = []
    with pytest.raises(TrainingError, match=r"tiny: 1 of 2 runs failed; the first is full method, seed 0"):
        runner.run_experiment("tiny", "smoke", folder=tmp_path, report=said.append)
    assert (tmp_path / grid["K=2"] / "finished.json").is_file()


def test_a_loss_that_diverges_is_an_outcome(tiny, tmp_path):
    grid = {run.method: runner.run_key(run) for run in runs(tiny, "smoke")}
    for found, failed in ((grid[FULL], "the loss is NaN"), (grid["K=2"], "")):
        (tmp_path / found).mkdir()
        (tmp_path / found / "finished.json").write_text(json.dumps({"wall_s": 1, "cpu_s": 1, "failed": failed}))
    model = pg.load_segmenter("lite", "fixed", "cpu")
    model.save_pretrained(tmp_path / grid["K=2"])
    tables = runner.run_experiment("tiny", "smoke", folder=tmp_path, report=str)
    assert tables["by_image"].attrs["facts"]["failed"] == {"full method, seed 0": "the loss is NaN"}
    assert set(tables["by_image"]["method"]) == {"K=2"}


def test_a_data_set_that_is_not_there_is_left_out_where_the_experiment_allows_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path))
    said = []
    assert "CPM15" not in runner.available_tests(EXPERIMENTS["table5"], "lite", said.append)
    assert any(line.startswith("CPM15 is left out: ") for line in said)
    with pytest.raises(pg.PgsegError, match="looked for CoNSeP"):
        runner.available_tests(EXPERIMENTS["table1"], "lite", str)


def test_the_command_stores_stamped_tables(done, tmp_path, capsys):
    folder, tables, _ = done
    assert main(["experiment", "tiny", "--profile", "smoke", "--folder", str(folder), "--output", str(tmp_path)]) == 0
    stored = load_result("tiny", tmp_path)
    pd.testing.assert_frame_equal(stored, tables["by_image"], check_dtype=False)
    stamp = stored.attrs["stamp"]
    assert stamp["profile"] == "smoke" and stamp["experiment"] == "tiny" and stamp["start"] == experiments.START
    assert len(load_result("tiny_phrasings", tmp_path))
    assert "full method" in capsys.readouterr().out


def test_an_unknown_experiment_is_refused_with_the_list(capsys):
    assert main(["experiment", "table9"]) == 2
    assert "choose one of table1" in capsys.readouterr().err
