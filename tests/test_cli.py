"""`pgseg` as a person types it: what it prints, what it leaves, and what it says when something is wrong."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from PIL import Image

from pgseg_lite.cli import build_parser, main


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_installed_command_prints_help_without_loading_torch():
    code = "import sys; from pgseg_lite.cli import build_parser; build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "command",
    ["", "train", "evaluate", "prompts", "prompts list", "prompts lint", "data", "data list", "data check", "data show",
     "data get",
     "book", "book execute", "book build", "book check", "book sync", "book handout"],
)  # fmt: skip
def test_every_command_has_help(capsys, command):
    status, out, _ = run(capsys, *command.split(), "--help")
    assert status == 0 and out.startswith("usage: pgseg")
    assert len(out.splitlines()) > 3


def test_a_full_gpu_is_one_sentence(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("pgseg_lite.evaluation.predict_packed", full)
    status, _, said = run(capsys, *["evaluate", "--device", "cpu", "--size", "1", "--per-level", "1"])
    assert status == 2 and "pgseg: the GPU's memory is too small; cut the images smaller, or use --device cpu" in said


def test_more_targets_than_a_view_can_carry_are_refused_before_anything_is_written(capsys, tmp_path):
    names = [f"kind{i}" for i in range(31)]
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    kinds = [{"id": i, "name": name} for i, name in enumerate(names)]
    images = [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "categories": kinds, "annotations": []}))
    bank = "".join(f"  {n}: {{fixed: the {n} nuclei, phrasings: {{low: [find {n}]}}}}\n" for n in ("all", *names))
    (tmp_path / "bank.yaml").write_text("targets:\n" + bank)
    asked = f"train --dataset coco --root {tmp_path} --split all --bank {tmp_path}/bank.yaml --tile 0 --view 32 --k 1"
    status, _, said = run(capsys, *asked.split(), "--steps", "1", "--device", "cpu", "--output", tmp_path / "run")
    assert status == 2 and "has 32 targets; at most 31 can be trained" in said
    assert not (tmp_path / "run").exists()


def test_train_offers_every_setting():
    from dataclasses import fields

    from pgseg_lite.settings import TRAINING

    parser = build_parser()._subparsers._group_actions[0].choices["train"]
    options = {option for action in parser._actions for option in action.option_strings}
    for profiles in TRAINING.values():
        assert {"--" + field.name.replace("_", "-") for field in fields(profiles["lite"])} <= options


def test_an_option_s_value_is_read_as_what_it_looks_like():
    from pgseg_lite.options import option

    texts = ("tile=336", "rate=1e-3", "truncate=True", "gate=false", "top_k=none", "reading=union", "path=a=b")
    read = dict(map(option, texts))
    assert read == {
        "tile": 336, "rate": 1e-3, "truncate": True, "gate": False, "top_k": None, "reading": "union", "path": "a=b",
    }  # fmt: skip
    assert isinstance(read["tile"], int) and isinstance(read["truncate"], bool)


def test_the_command_line_names_every_segmenter():
    from pgseg_lite.models import SEGMENTERS
    from pgseg_lite.settings import SEGMENTER_NAMES, TRAINING

    assert {*SEGMENTER_NAMES} == {*SEGMENTERS} and {*TRAINING} <= {*SEGMENTERS}


def test_train_then_evaluate_from_the_shell(tmp_path):
    """A stranger's first two commands, in processes of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pgseg = [sys.executable, "-m", "pgseg_lite.cli"]
    small = ["--dataset", "synthetic", "--size", "4"]
    train = [
        *pgseg,
        "train",
        *small,
        "--profile",
        "smoke",
        "--steps",
        "3",
        "--view",
        "64",
        "--output",
        tmp_path / "run",
    ]
    done = subprocess.run(train, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trained 3 steps in" in done.stdout and "synthetic train: 4 samples, digest" in done.stdout
    assert "training: 100%" in done.stderr  # progress is for the terminal, not for a pipe
    evaluate = [
        *pgseg,
        "evaluate",
        *small,
        "--checkpoint",
        tmp_path / "run",
        "--per-level",
        "2",
        "--records",
        tmp_path / "r.csv",
    ]
    done = subprocess.run(evaluate, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "worst for all: '" in done.stdout
    records = pd.read_csv(tmp_path / "r.csv")
    assert len(records) == 4 * 6 * 3 * 2  # images, targets, levels, phrasings
    assert not list(tmp_path.glob("*.part"))


def test_prompts_list_counts_and_prints(capsys):
    status, out, _ = run(capsys, "prompts", "list")
    assert status == 0 and "inflammatory" in out and "heldout" in out
    status, out, _ = run(capsys, "prompts", "list", "--target", "dead")
    assert status == 0 and len(out.splitlines()) >= 150


def test_lint_of_the_bundled_bank_finds_no_errors_but_reports_what_sam3_would_cut(capsys):
    status, out, _ = run(capsys, "prompts", "lint")
    assert status == 0 and "\n0 errors, " in out
    assert "SAM3" in out


def test_lint_of_a_bad_bank_exits_with_1(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "targets: {all: {fixed: nuclei, phrasings: {low: [nuclei, 'Nuclei!']}},"
        " dead: {fixed: dead nuclei, phrasings: {low: [dead nuclei, nuclei]}}}"
    )
    status, out, _ = run(capsys, "prompts", "lint", tmp_path / "bad.yaml")
    assert status == 1 and "error" in out


def test_data_commands(capsys, tmp_path):
    status, out, _ = run(capsys, "data", "list")
    assert status == 0 and all(name in out for name in ("synthetic", "pannuke", "consep", "folder", "coco"))
    status, out, _ = run(capsys, "data", "check", "--dataset", "synthetic", "--size", "3")
    assert status == 0 and "of 3" in out and "inflammatory" in out
    picture = tmp_path / "look.png"
    status, out, _ = run(capsys, "data", "show", "--dataset", "synthetic", "--size", "2", "--output", picture)
    assert status == 0 and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "the following arguments are required: --output"),
        ("fly", "invalid choice: 'fly'"),
        ("train --output {tmp}/run --dataset sea", "there is no dataset 'sea'; choose one of synthetic"),
        ("train --output {tmp}/run --size 4 --fraction 0", "fraction"),
        ("train --output {tmp}/run --size 0", "size"),
        ("train --output {tmp}/run --size 4 --shift sideways", "shift 'sideways'"),
        ("train --output {tmp}/run --size 4 --split nowhere", "split 'nowhere'"),
        ("train --output {tmp}/run --hub", "synthetic has no option 'hub'; it has: size, shift"),
        ("data check --dataset coco --root {tmp} --split all --annotations none.json", "none.json"),
        ("train --output {tmp}/run --dataset consep --root {tmp}/nothing", "{tmp}/nothing"),
        ("train --output {tmp}/run --size 4 --bank {tmp}/none.yaml", "{tmp}/none.yaml"),
        ("train --output {tmp}/run --size 4 --steps 0", "steps is 0; it must be a whole number and at least 1"),
        ("train --output {tmp}/run --size 4 --steps few", "argument --steps: invalid int value: 'few'"),
        ("train --output {tmp}/run --size 4 --levels lowest", "lowest"),
        ("train --output {tmp}/run --size 4 --start-from {tmp}/absent", "no such checkpoint folder"),
        ("train --output {tmp}/run --size 4 --resume", "there is no run to resume here; start one without resume"),
        ("evaluate --size 2 --checkpoint {tmp}/absent", "no such checkpoint folder"),
        ("evaluate --size 2 --records {tmp}/no/r.csv", "no such folder for the records; create it first"),
        ("evaluate --size 2 --phrasings all", "argument --phrasings: invalid choice: 'all'"),
        ("evaluate --size 2 --per-level -3", "per_level is -3; it must be at least 1, or None"),
        ("evaluate --size 2 --option truncate=true", "lite has no option 'truncate'; it has none"),
        ("evaluate --size 2 --option truncate", "argument --option: 'truncate' is not NAME=VALUE"),
        ("evaluate --size 2 --segmenter sam4", "argument --segmenter: invalid choice: 'sam4'"),
        ("train --output {tmp}/run --segmenter medsam", "medsam is not trained here, only evaluated; train one of lite"),
        ("data get sea --root {tmp}", "there is no dataset 'sea'; choose one of pannuke"),
        ("prompts lint {tmp}/none.yaml", "{tmp}/none.yaml"),
        ("prompts list --target cytoplasm", "cytoplasm"),
        ("data check --dataset kumar --root {tmp}", "{tmp}"),
        ("train --output {tmp}/file --size 4", "{tmp}/file: a file; give a folder for the checkpoint"),
        ("train --output {tmp}/file/run --size 4", "{tmp}/file: a file; give a folder for the checkpoint"),
        ("evaluate --size 2 --records {tmp}", "{tmp}: a folder; name a file in it for the records"),
        ("data show --size 2 --output {tmp}/no/x.png", "{tmp}/no: no such folder for the picture; create it first"),
        ("data show --size 2 --output {tmp}/x.foo", "x.foo: the picture is a PNG; give a name that ends in .png"),
        ("prompts perturb --output {tmp}", "{tmp}: a folder; name a file in it for the table"),
        ("prompts perturb --output {tmp}/no/t.csv", "{tmp}/no: no such folder for the table; create it first"),
        ("experiment table1 --profile smoke --jobs -1", "argument --jobs: '-1' is not a whole number of at least 1"),
        ("experiment table1 --profile smoke --folder {tmp}/file", "{tmp}/file: a file; give a folder for the runs"),
        ("experiment table1 --profile smoke --output {tmp}/file", "{tmp}/file: a file; give a folder for the tables"),
        ("experiment imprecise --profile smoke --jobs 2", "imprecise has no jobs to choose; leave --jobs out"),
        ("book execute --jobs 0", "argument --jobs: '0' is not a whole number of at least 1"),
        ("book execute", "there is no notebooks/ here; run this in a checkout"),
        ("book build", "there is no notebooks/ here; run this in a checkout"),
        ("book check", "there is no notebooks/ here; run this in a checkout"),
        ("book sync", "there is no notebooks/ here; run this in a checkout"),
    ],
)  # fmt: skip
def test_bad_command_lines_exit_with_2_and_one_sentence(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.delenv("PGSEG_DATA", raising=False)
    monkeypatch.chdir(tmp_path)  # no checkout
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, *arguments.format(tmp=tmp_path).split())
    assert status == 2
    assert message.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoint-1").exists()


def test_what_cannot_be_written_or_read_is_a_sentence_and_no_traceback(capsys, tmp_path):
    """`pgseg robustness` ends with 1 where a gate failed; a traceback would end with 1 too."""
    table = tmp_path / ("x" * 300 + ".csv")  # longer than any file system takes
    status, _, err = run(capsys, "prompts", "perturb", "--kinds", "typos", "--output", table)
    assert status == 2 and err.startswith("pgseg: ") and "File name too long; see that it can be" in err
    assert not list(tmp_path.glob("*.csv*"))
