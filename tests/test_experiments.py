"""Experiments: keys, runs that are kept, skipped, resumed and reported, on processes and on a Dask cluster."""

import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny_models import save_tiny_sam3

import pgseg_lite as pg
from pgseg_lite import experiments, keys, runner, training
from pgseg_lite.cli import main
from pgseg_lite.errors import Diverged, ModelError, SettingsError, TrainingError
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
        for segmenter in experiments.LEARNERS:
            grid = runs(experiment, profile, segmenter)
            assert len({repr(run) for run in grid}) == len({str(run) for run in grid}) == len(grid)
            sets = 1 + (name == "table1" and segmenter == "sam3")
            methods = len(experiment.methods) - (name == "causes" and segmenter == "sam3")  # it has no text dropout
            assert len(grid) == sets * methods * len(experiments.SEEDS[profile])
    assert experiment.reference in experiment.methods
    assert len(experiments.SEEDS["lite"]) >= 3


def test_the_full_method_is_one_run_wherever_it_appears():
    full = {repr([run for run in runs(EXPERIMENTS[name], "lite") if run.method == FULL]) for name in EXPERIMENTS}
    assert len(full) == 1


def test_test_images_are_never_trained_on():
    trained = {"CoNSeP": ("consep", "train", "rest"), "PanNuke": ("pannuke", "fold1", "whole")}
    for experiment in EXPERIMENTS.values():
        for run in [*runs(experiment, "lite"), *runs(experiment, "full")]:
            assert (run.data.name, run.data.split, run.data.part) == trained[run.trained]
        for test in experiment.tests.values():
            held = (test.data.name, test.data.split, test.data.part) == ("consep", "train", "held")
            assert held or test.data.split not in ("train", "fold1")


def test_the_full_profile_is_the_paper_s_own_scale():
    grid = runs(EXPERIMENTS["table1"], "full")
    assert {run.segmenter for run in grid} == {"sam3"} and {run.data.fraction for run in grid} == {0.1}
    assert {(run.trained, run.settings.steps) for run in grid} == {("CoNSeP", 175), ("PanNuke", 1330)}
    assert {(s.trainable, s.batch_size * s.accumulation) for s in (run.settings for run in grid)} == {("full", 1)}
    assert {run.options["truncate"] for run in grid} == {True}
    assert {run.settings.trainable for run in runs(EXPERIMENTS["table2"], "full", trainable="lora")} == {"lora"}
    assert {run.segmenter for run in runs(EXPERIMENTS["table1"], "full", "lite")} == {"lite"}


def test_a_tenth_of_what_is_not_held_out_is_five_passes_at_the_steps_given(real_data, monkeypatch):
    monkeypatch.setenv("PGSEG_DATA", str(real_data))
    tenth, rest = experiments.TENTH["CoNSeP"].load(), experiments.CONSEP.load()
    assert set(tenth.ids) < set(rest.ids) and len(tenth) == round(0.1 * len(rest))
    assert 5 * len(tenth) == experiments.PAPER_STEPS["CoNSeP"]


def test_rest_and_held_share_no_image(real_data, monkeypatch):
    monkeypatch.setenv("PGSEG_DATA", str(real_data))
    rest, held = (Data("consep", "train", part).load() for part in ("rest", "held"))
    sources = [{name.split("@")[0] for name in part.ids} for part in (rest, held)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 27


# ---- keys ----


def key(**changes):
    run = make_run(FULL, {}, 0, "smoke")
    return keys.run_key(replace(run, settings=replace(run.settings, **changes)))


def test_a_key_hangs_on_what_decides_the_outcome_and_on_nothing_else():
    run = make_run(FULL, {}, 0, "smoke")
    assert key() == keys.run_key(run) == key(save_every=3)
    others = {
        key(beta=0.3),
        key(seed=1),
        key(steps=5),
        key(precision="bf16" if key() == key(precision="fp32") else "fp32"),
    }
    others |= {
        keys.run_key(replace(run, text_dropout=0.0)),
        keys.run_key(replace(run, data=replace(run.data, part="held"))),
    }
    assert len(others | {key()}) == 7


def test_code_counts_and_comments_do_not():
    before = 'def f(x):\n    """Say."""\n    return x + 1\n'
    assert keys.without_docstrings(before) == keys.without_docstrings("def f(x):\n    return x + 1  # why\n")
    assert keys.without_docstrings(before) != keys.without_docstrings("def f(x):\n    return x + 2\n")


def test_the_code_that_counts_exists_and_is_the_segmenter_s_own():
    codes = {name: keys.code_of(name) for name in experiments.LEARNERS}
    assert codes["lite"] == ("models/base", "models/lite", "models/text")
    assert set(codes["sam3"]) >= {*codes["lite"], "models/sam3", "models/finetune", "models/tiles"}
    assert "models/access" not in codes["sam3"]
    modules = {*keys.TRAINS, *keys.TESTS, *codes["sam3"]}
    assert len({keys.code_digest((module,)) for module in modules}) == len(modules)
    assert keys.code_of("no-such") == ()


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
    grid = {run.method: keys.run_key(run) for run in runs(tiny, "smoke")}
    (tmp_path / grid[FULL]).write_text("a file where the run's folder should be")
    said = []
    with pytest.raises(TrainingError, match=r"tiny: 1 of 2 runs failed; the first is full method, seed 0"):
        runner.run_experiment("tiny", "smoke", folder=tmp_path, report=said.append)
    assert (tmp_path / grid["K=2"] / "finished.json").is_file()


def test_a_process_that_the_system_kills_is_reported_with_the_next_step(tiny, tmp_path):
    def kill(said):
        if said.startswith("tiny"):
            threading.Thread(target=kill_first_child, daemon=True).start()

    def kill_first_child():
        while not (children := [child for child in multiprocessing.active_children() if child.pid]):
            time.sleep(0.05)
        children[0].kill()

    with pytest.raises(
        TrainingError, match=r"tiny: 2 of 2 runs failed; .* a process was killed, .* same command goes on"
    ):
        runner.run_experiment("tiny", "smoke", folder=tmp_path, report=kill)


def test_a_loss_that_diverges_is_an_outcome(tiny, tmp_path):
    grid = {run.method: keys.run_key(run) for run in runs(tiny, "smoke")}
    for found, failed in ((grid[FULL], "the loss is NaN"), (grid["K=2"], "")):
        (tmp_path / found).mkdir()
        (tmp_path / found / "finished.json").write_text(json.dumps({"wall_s": 1, "cpu_s": 1, "failed": failed}))
    model = pg.load_segmenter("lite", "fixed", "cpu")
    model.save_pretrained(tmp_path / grid["K=2"])
    tables = runner.run_experiment("tiny", "smoke", folder=tmp_path, report=str)
    assert tables["by_image"].attrs["facts"]["failed"] == {"full method, seed 0": "the loss is NaN"}
    assert set(tables["by_image"]["method"]) == {"K=2"}


def test_a_data_set_that_is_not_there_is_left_out_where_the_experiment_allows_it(real_data, monkeypatch, tmp_path):
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path))
    said, table5, table1 = [], EXPERIMENTS["table5"], EXPERIMENTS["table1"]
    with pytest.raises(pg.PgsegError, match="looked for CoNSeP"):
        runner.available_tests(table1, runs(table1, "lite"), "lite", str)
    (tmp_path / "CoNSeP").symlink_to(real_data / "CoNSeP")
    assert "CPM15" not in runner.available_tests(table5, runs(table5, "lite"), "lite", said.append)
    assert any(line.startswith("CPM15 is left out: ") for line in said)
    said.clear()
    assert set(runner.available_tests(table1, runs(table1, "full"), "full", said.append)) == {"validation", "CoNSeP"}
    assert len(said) == 1 and said[0].startswith("PanNuke is left out: ")
    assert "PanNuke" not in runner.available_tests(table1, runs(table1, "lite"), "lite", said.append)
    assert len(said) == 1, "what lite is not trained on is not missed"


def test_the_command_stores_stamped_tables(done, tmp_path, capsys):
    folder, tables, _ = done
    assert main(["experiment", "tiny", "--profile", "smoke", "--folder", str(folder), "--output", str(tmp_path)]) == 0
    stored = load_result("tiny_smoke", tmp_path)
    pd.testing.assert_frame_equal(stored, tables["by_image"], check_dtype=False)
    stamp = stored.attrs["stamp"]
    assert stamp["profile"] == "smoke" and stamp["experiment"] == "tiny" and stamp["start"] == experiments.START
    assert len(load_result("tiny_smoke_phrasings", tmp_path))
    assert "full method" in capsys.readouterr().out


def test_an_unknown_experiment_is_refused_with_the_list(capsys):
    assert main(["experiment", "table9"]) == 2
    assert "choose one of table1" in capsys.readouterr().err


# ---- another segmenter ----


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
    return save_tiny_sam3(tmp_path_factory.mktemp("sam3") / "tiny")


@pytest.fixture(scope="module")
def two_sets():
    """The same method trained on each of the two data sets that sam3 is trained on."""
    tests = {
        "CoNSeP": Test(Data("consep"), levels=("low",)),
        "PanNuke": Test(Data("pannuke", "fold3"), levels=("low",), optional=True, trained="PanNuke"),
    }
    EXPERIMENTS["two_sets"] = Experiment("both", {FULL: {}}, tests, FULL)
    yield EXPERIMENTS["two_sets"]
    del EXPERIMENTS["two_sets"]


@pytest.fixture(scope="module")
def trained(two_sets, sam3, tmp_path_factory):
    """`pgseg experiment` with the tiny Sam3 on its two data sets: its arguments, folders and what it prints."""
    folder, output = (tmp_path_factory.mktemp(name) for name in ("runs", "results"))
    command = ["experiment", "two_sets", "--profile", "smoke", "--segmenter", "sam3", "--start", str(sam3)]
    command += ["--folder", str(folder), "--output", str(output)]
    assert main(command) == 0
    return command, folder, output


@pytest.mark.filterwarnings("ignore:SAM3 reads 32 tokens")
def test_sam3_runs_from_a_checkpoint_on_both_data_sets_and_stores_its_own_table(trained, sam3):
    _, folder, output = trained
    assert sorted(path.name for path in output.iterdir()) == ["two_sets_smoke_sam3.csv", "two_sets_smoke_sam3.json"]
    table = load_result("two_sets_smoke_sam3", output)
    stamp = table.attrs["stamp"]
    assert set(table["test"]) == {"CoNSeP", "PanNuke"} and table.groupby("test")["method"].nunique().eq(1).all()
    assert (stamp["segmenter"], stamp["start"]) == ("sam3", sam3.name)
    assert [s["role"] for s in stamp["datasets"]] == ["training", "training", "CoNSeP", "PanNuke"]
    for key in stamp["runs"]:
        assert not list((folder / key).glob("checkpoint-*"))
        assert pg.load_segmenter("sam3", folder / key, "cpu").name == "sam3"


@pytest.mark.filterwarnings("ignore:SAM3 reads 32 tokens")
def test_sam3_runs_are_kept_and_hang_on_their_start_and_options(trained, sam3, tmp_path, capsys):
    command, folder, _ = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(command) == 0 and "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (run, _) = runs(EXPERIMENTS["two_sets"], "smoke", "sam3", (str(sam3),))
    shutil.copytree(sam3, tmp_path / "reads_otherwise")
    (tmp_path / "reads_otherwise" / "pgseg.json").write_text('{"reading": "union"}')
    others = [
        replace(run, start=str(tmp_path / "reads_otherwise")),
        replace(run, settings=replace(run.settings, trainable="full")),
        replace(run, options={}),
    ]
    assert len({keys.run_key(one) for one in (run, *others)}) == 4


@pytest.mark.filterwarnings("ignore:SAM3 reads 32 tokens")
def test_a_run_that_the_gpu_cannot_hold_says_what_to_change(two_sets, sam3, tmp_path, monkeypatch):
    from pgseg_lite.models import finetune

    run, _ = runs(two_sets, "smoke", "sam3", (str(sam3),))
    test = [("asked", two_sets.tests["CoNSeP"], 1)]
    test = [(key, replace(one, data=one.data.at("smoke")), n) for key, one, n in test]
    monkeypatch.setattr(finetune, "gpu_memory", lambda _: 0.5)
    with pytest.raises(
        ModelError, match=r"decoder needs about 1 GiB of GPU memory and 0 are there; (try|take a larger)"
    ):
        runner.execute(run, "small", test, tmp_path)
    assert not (tmp_path / "small").exists()
    monkeypatch.undo()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pg.GroupLoss, "__call__", full)
    with pytest.raises(ModelError, match="GPU's memory is too small for this run; try serial=True") as stopped:
        runner.execute(run, "full", test, tmp_path)
    assert stopped.value.__cause__.__traceback__ is None  # its frames hold the model, and a worker keeps the error
    small = replace(run, settings=replace(run.settings, serial=True))
    with pytest.raises(ModelError, match="GPU's memory is too small for this run; take a larger GPU"):
        runner.execute(small, "serial", test, tmp_path)
    wide = replace(small, settings=replace(small.settings, trainable="full", checkpointing=False))
    with pytest.raises(ModelError, match="too small for this run; try checkpointing=True, trainable='decoder'"):
        runner.execute(wide, "wide", test, tmp_path)
    monkeypatch.undo()
    runner.execute(run, "full", test, tmp_path)  # once there is memory, the same run goes on
    assert (tmp_path / "full" / "asked.csv").exists() and (tmp_path / "full" / "finished.json").exists()


# ---- models as they are published ----


def test_baselines_test_what_can_be_loaded_and_say_what_cannot(sam3, tmp_path, monkeypatch, capsys):
    command = ["experiment", "baselines", "--profile", "smoke", "--start", f"sam3={sam3}", "--start", "sam2=nowhere"]
    command += ["--start", "no-such=x", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path)]
    levels = {label: replace(test, levels=("low",)) for label, test in experiments.UNTRAINED.tests.items()}
    monkeypatch.setattr(experiments, "UNTRAINED", replace(experiments.UNTRAINED, tests=levels))
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"sam2: left out: .*", said) and "no-such: left out: segmenter 'no-such' is unknown" in said
    table = load_result("baselines_smoke", tmp_path)
    assert set(table["method"]) == {"lite fixed", "lite group", "sam3"} and set(table["test"]) == {"CoNSeP", "PanNuke"}
    stamp = table.attrs["stamp"]
    assert stamp["seeds"] == [] and stamp["settings"]["sam3"] == {
        "segmenter": "sam3", "checkpoint": "tiny", "truncate": True
    }  # fmt: skip


def test_baselines_at_full_are_the_models_of_table_1_with_public_weights():
    grid = {
        run.method: run for run in runs(experiments.find("baselines"), "full", starts=("medsam=here", "lite=fixed"))
    }
    assert {*grid} == {*experiments.BASELINES, "lite"} and grid["medsam"].start == "here" and grid["sam2"].start is None
    assert grid["seg-zero"].per_level == 1 and grid["sam3"].options == {"truncate": True}


def test_a_single_baseline_that_is_not_there_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "BUNDLED", {})
    command = ["experiment", "baselines", "--profile", "smoke", "--start", "lite=nowhere"]
    assert main([*command, "--folder", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "no model of it can be loaded here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--trainable", "lora"], "lite is always trained whole; leave trainable=lora out"),
        (["table1", "--start", "a", "--start", "b"], "all runs start from one checkpoint; 2 were given"),
        (["table1", "--start", "nowhere"], "nowhere: no such checkpoint folder"),
        (["baselines", "--start", "folder"], "write NAME=CHECKPOINT"),
        (["baselines", "--segmenter", "sam3"], "baselines are not trained"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, tmp_path, capsys):
    command = ["experiment", *arguments, "--profile", "smoke", "--folder", str(tmp_path / "runs")]
    assert main(command) == 2
    assert message.lower() in capsys.readouterr().err.lower()
    assert not (tmp_path / "runs").exists()


def test_no_run_but_lite_at_lite_can_replace_a_table_of_the_book():
    shapes = [(profile, segmenter) for profile in ("smoke", "lite", "full") for segmenter in ("lite", "sam3")]
    names = [experiments.result_name("table1", *shape) for shape in shapes]
    assert names.count("table1") == 1 and len(set(names)) == 6
    assert experiments.result_name("table1", "lite", None) == "table1"
    assert experiments.result_name("table1", "full", None) == "table1_full" == names[5]


def test_a_process_takes_one_of_the_gpus_that_are_ours(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")  # as a cluster hands them out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with runner.workers(1, None) as (pool, _):
        assert pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "4"


def test_checkpoints_that_cannot_be_read_are_no_outcome(tiny, tmp_path, monkeypatch):
    """Only a loss that diverges is one: anything else may be otherwise the next time, so nothing is thrown away."""
    run = runs(tiny, "smoke")[0]

    def unreadable(*_, **__):
        raise TrainingError("none of the 2 checkpoints can be read; start in another folder")

    monkeypatch.setattr(training, "train", unreadable)
    (tmp_path / "key" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(TrainingError, match="none of the 2 checkpoints"):
        runner.execute(run, "key", [], tmp_path)
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["checkpoint-2"]

    def diverging(*_, **__):
        raise Diverged("the loss is NaN")

    monkeypatch.setattr(training, "train", diverging)
    runner.execute(run, "key", [], tmp_path)
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["finished.json"]
    assert json.loads((tmp_path / "key" / "finished.json").read_text())["failed"] == "the loss is NaN"
