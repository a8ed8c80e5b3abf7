"""`pgseg train` with SAM3's architecture in several processes, as torchrun and accelerate start them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_sam3
from tiny_text import short_bank

import pgseg_lite as pg
from pgseg_lite.cli import build_parser, main
from pgseg_lite.errors import ModelError

# accelerate starts its processes through torchrun's own code; test_training.py has a run of torchrun itself.
LAUNCHER = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The arguments of a run without its output: all of a tiny Sam3Model trained on two short phrasings a level."""
    folder = tmp_path_factory.mktemp("tiny")
    bank = short_bank(save_tiny_sam3(folder) / "bank.yaml")
    settings = "--profile smoke --steps 3 --save-every 2 --k 2 --view 64 --precision fp32 --trainable full --device cpu"
    return [
        "train",
        "--segmenter",
        "sam3",
        "--start-from",
        str(folder),
        "--bank",
        str(bank),
        "--size",
        "4",
        *settings.split(),
    ]


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The run in one process that accumulates over two images."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert main([*run, "--accumulation", "2", "--output", str(output)]) == 0
    return output


def test_two_processes_give_the_weights_of_accumulation_2(run, alone, tmp_path):
    """Three steps: had a trained parameter no gradient, the second would fail (find_unused_parameters is off)."""
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHER, "pgseg_lite.cli", *run, "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    together, apart = (load_file(folder / "model.safetensors") for folder in (output, alone))
    assert together.keys() == apart.keys()
    for name, weight in apart.items():
        torch.testing.assert_close(together[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    assert done.stdout.count("trained 3 steps in") == done.stdout.count("digest") == 1  # one of them speaks
    assert done.stderr.count("training:   0%") == done.stderr.count("Loading weights:   0%") == 1
    assert not list(output.glob("saving-*"))


def test_a_run_goes_on_on_a_machine_where_phrasings_fit_at_once(run, alone, capsys):
    again = [*run, "--accumulation", "2", "--output", str(alone), "--resume"]
    assert json.loads((alone / "run.json").read_text())["serial"] is True  # what was chosen on a CPU
    assert main([*again, "--no-serial", "--no-checkpointing"]) == 0  # a matter of memory alone
    assert main([*again, "--beta", "1"]) == 2
    assert "cannot resume, beta was 0.1 and is now 1.0; use the same" in capsys.readouterr().err


def test_no_option_is_taken_for_one_of_the_launchers():
    """They read the whole command line, and take an option that begins like two of theirs for a mistake."""
    from torch.distributed.run import get_args_parser

    theirs = get_args_parser()._option_string_actions
    train = build_parser()._subparsers._group_actions[0].choices["train"]
    for ours in train._option_string_actions:
        assert ours in theirs or len([name for name in theirs if name.startswith(ours)]) < 2, ours


def test_each_process_loads_onto_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "63")
    with pytest.raises(ModelError, match="device 'cuda:63' cannot be used here"):
        pg.load_segmenter("lite", device="cuda")
