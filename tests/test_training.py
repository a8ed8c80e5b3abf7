"""Training through the real Trainer: determinism, kill and resume, two processes, and what bad input gets."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import pgseg_lite as pg
from pgseg_lite.augment import augment, mirrored
from pgseg_lite.errors import BankError, Diverged, SettingsError, TrainingError
from pgseg_lite.models.lite import LiteConfig, LiteSegmenter
from pgseg_lite.training import GroupDataset, newest_whole_checkpoint, training_arguments

TINY = pg.TrainSettings(steps=6, batch_size=2, view=64, save_every=2, precision="fp32")


@pytest.fixture(scope="module")
def bank():
    return pg.PromptBank.load("nuclei")


@pytest.fixture(scope="module")
def data():
    return pg.load_dataset("synthetic", split="train", size=6)


def tiny_model():
    torch.manual_seed(0)
    return LiteSegmenter(LiteConfig(widths=[8, 16], dim=8, text_hidden=16))


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


# Data of a run


def test_item_depends_on_seed_and_index_alone(data, bank):
    one, other = (GroupDataset(data, bank, TINY, 100) for _ in range(2))
    list(map(one.__getitem__, range(5)))  # what was read before does not matter
    for name in ("image", "masks", "text_ids"):
        np.testing.assert_array_equal(one[17][name], other[17][name])
    assert (one[17]["image"] != one[18]["image"]).any()
    reseeded = GroupDataset(data, bank, pg.TrainSettings(**{**vars(TINY), "seed": 1}), 100)
    assert (one[17]["image"] != reseeded[17]["image"]).any()


def test_each_pass_shows_every_sample_once(data, bank):
    dataset = GroupDataset(data, bank, TINY, 24)
    seen = []
    dataset.data = type("Spy", (), {"__len__": lambda s: 6, "targets": data.targets,
                                    "__getitem__": lambda s, i: seen.append(i) or data[i]})()  # fmt: skip
    list(map(dataset.__getitem__, range(24)))
    assert all(sorted(seen[start : start + 6]) == list(range(6)) for start in (0, 6, 12, 18))
    assert seen[:6] != seen[6:12] or seen[6:12] != seen[12:18]


def test_groups_hold_k_different_train_phrasings_of_their_target(data, bank):
    dataset = GroupDataset(data, bank, TINY, 10)
    for index in range(10):
        for target, ids in zip(data.targets, dataset[index]["text_ids"], strict=True):
            texts = [dataset.texts[i] for i in ids]
            assert len(set(texts)) == 3
            allowed = {p.text for p in bank.select(target, split="train")}
            assert set(texts) <= allowed


def test_fixed_wording_always_asks_the_same(data, bank):
    settings = pg.TrainSettings(steps=1, wording="fixed", k=1)
    dataset = GroupDataset(data, bank, settings, 3)
    asked = {tuple(dataset.texts[i] for (i,) in dataset[index]["text_ids"]) for index in range(3)}
    assert asked == {tuple(bank.fixed(target) for target in data.targets)}


# Augmentation


def test_augmented_masks_stay_on_their_pixels():
    """A bright square on black is its own mask, before and after."""
    image = np.zeros((120, 160, 3), np.uint8)
    image[40:80, 50:110] = 200
    mask = image[None, ..., 0] > 0
    for seed in range(8):
        view, (moved,) = augment(image, mask, 96, np.random.default_rng(seed))
        assert view.shape == (96, 96, 3) and moved.shape == (96, 96)
        bright = view.astype(int).sum(-1) > view.astype(int).sum(-1).max() / 2
        assert (bright != moved).mean() < 0.03  # only the interpolated border may differ


def test_augmentation_varies_stain_and_geometry():
    rng = np.random.default_rng(0)
    image = rng.integers(120, 220, (80, 80, 3), dtype=np.uint8)
    views = [augment(image, np.ones((1, 80, 80), bool), 64, np.random.default_rng(i))[0] for i in range(4)]
    tints = np.array([view.mean((0, 1)) for view in views])
    assert tints.std(0).min() > 2


def test_mirrored_indices_fold_at_both_borders():
    assert mirrored(-3, 9, 4).tolist() == [3, 2, 1, 0, 1, 2, 3, 3, 2, 1, 0, 0]


# Runs


def test_a_run_leaves_a_loadable_model_a_history_and_a_record(data, bank, tmp_path):
    result = pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True)
    assert {"seg", "mask", "dice", "presence", "group", "consistency", "weight_min"} <= set(result.history)
    assert np.isfinite(result.history["seg"]).all()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 6 and record["data"] == f"synthetic {data.digest}" and bank.digest in record["bank"]
    again = pg.load_segmenter("lite", tmp_path / "run", device="cpu")
    assert_same_weights(again.state_dict(), result.model.state_dict())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "run" / "history.csv"), result.history, check_dtype=False)


def test_sixty_steps_lower_every_part_that_sees_the_masks(data, bank, tmp_path):
    settings = pg.TrainSettings(steps=60, batch_size=2, view=64, precision="fp32", learning_rate=5e-3)
    history = pg.train(data, bank, tmp_path / "run", settings, model=tiny_model(), quiet=True).history
    assert history["dice"].iloc[-1] < 0.92 * history["dice"].iloc[0]
    assert history["mask"].iloc[-1] < 0.7 * history["mask"].iloc[0]


@pytest.mark.parametrize("group", ["none", "literal", "log-weights", "clamped", "soft"])
def test_every_group_reading_trains(data, bank, tmp_path, group):
    result = pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True, group=group, steps=2)
    assert np.isfinite(result.history["seg"]).all()


RUN = [
    "train", "--dataset", "synthetic", "--size", "6", "--profile", "smoke", "--device", "cpu", "--precision", "fp32",
    "--batch-size", "2", "--view", "64",
]  # fmt: skip


def pgseg(*arguments, launcher=(), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "pgseg_lite.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def test_kill_9_and_resume_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    run = [*RUN, "--steps", "12", "--save-every", "3"]
    straight = pgseg(*run, "--output", tmp_path / "straight")
    finish(straight)
    broken = pgseg(*run, "--output", tmp_path / "broken")
    deadline = time.time() + 200
    while not (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.02)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "broken" / "config.json").exists()
    finish(pgseg(*run, "--output", tmp_path / "broken", "--resume"))
    assert_same_weights(weights(tmp_path / "broken"), weights(tmp_path / "straight"))


def test_two_processes_train_and_end_with_equal_finite_weights(tmp_path):
    """Each rank writes its own weights after the run through a tiny driver; both must be the same."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, sys, torch, pgseg_lite as pg\n"
        "from safetensors.torch import save_file\n"
        "data = pg.load_dataset('synthetic', split='train', size=6)\n"
        "settings = pg.TrainSettings(steps=4, batch_size=1, view=64, save_every=4, precision='fp32')\n"
        "result = pg.train(data, pg.PromptBank.load('nuclei'), sys.argv[1], settings, device='cpu', quiet=True)\n"
        "state = {k: v.contiguous() for k, v in result.model.state_dict().items()}\n"
        "save_file(state, sys.argv[1] + f'/rank{os.environ[\"RANK\"]}.safetensors')\n"
        "assert torch.distributed.get_world_size() == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", driver, tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [load_file(tmp_path / "run" / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert_same_weights(*ranks)
    assert all(torch.isfinite(tensor).all() for tensor in ranks[0].values())
    assert_same_weights(weights(tmp_path / "run"), ranks[0])


def test_resume_steps_over_a_half_written_checkpoint(data, bank, tmp_path):
    pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True)
    newest = tmp_path / "run" / "checkpoint-6"
    assert newest_whole_checkpoint(tmp_path / "run") == newest
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "run" / "checkpoint-best").mkdir()  # somebody's own copy
    assert newest_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match="none of the 2 checkpoints can be read; start in another folder"):
        newest_whole_checkpoint(tmp_path / "run")


def test_nan_stops_the_run_and_names_the_phrasing(data, bank, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.query_head.queries.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"the mask term became NaN or infinite for phrasing '.+'; lower"):
        pg.train(data, bank, tmp_path / "run", TINY, model=model, quiet=True)


# What bad input gets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number and at least 1"),
        ({"k": 0}, "k is 0; it must be a whole number and at least 1"),
        ({"view": 100}, "view is 100; it must be a multiple of 16"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number and at least 1"),
        ({"seed": -1}, "seed is -1; it must be a whole number and at least 0"),
        ({"seed": 2**32}, r"seed is 4294967296; it must be below 2\*\*32"),
        ({"workers": -1}, "workers is -1; it must be a whole number and at least 0"),
        ({"learning_rate": 0}, "learning_rate is 0; it must be above zero"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be above zero and finite"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be zero or more"),
        ({"warmup": 1.0}, "warmup is 1.0; it is a share of the steps"),
        ({"wording": "free"}, "wording 'free' is unknown; choose one of groups, fixed"),
        ({"precision": "int4"}, "precision 'int4' is unknown; choose one of auto"),
        ({"precision": "fp16", "device": "cpu"}, "precision fp16 needs a GPU; use bf16 or fp32"),
        ({"device": "cuda"}, "device is cuda, but PyTorch finds no GPU here; use cpu"),
        ({"device": "cuda:1"}, "device is 'cuda:1'; choose cpu or cuda, and the GPU itself by CUDA_VISIBLE_DEVICES"),
        ({"model": torch.nn.Linear(1, 1)}, "Linear has no encode_text, so it cannot be trained here; add it"),
        ({"wording": "fixed"}, "k is 3 with one fixed phrasing per target; set k=1"),
        ({"group": "best"}, "group reading 'best' is unknown"),
        ({"tau": -1}, "tau is -1; a temperature must be above zero"),
        ({"epochs": 3}, "unexpected keyword argument 'epochs'; the settings are steps, batch_size"),
    ],
)
def test_bad_training_settings(data, bank, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=message):
        pg.train(data, bank, tmp_path / "run", TINY, quiet=True, **changes)
    assert not (tmp_path / "run").exists()


def test_k_larger_than_a_group_fails_before_training(data, bank, tmp_path):
    with pytest.raises(BankError, match="cannot sample k=5000 phrasings of 'all'"):
        pg.train(data, bank, tmp_path / "run", TINY, quiet=True, k=5000)
    assert not (tmp_path / "run").exists()


def test_a_bank_without_the_dataset_s_target(data, tmp_path):
    (tmp_path / "own.yaml").write_text("targets: {glands: {fixed: glands, phrasings: {low: [glands, all glands]}}}")
    with pytest.raises(BankError, match="has no phrasings for target 'all' of dataset 'synthetic'"):
        pg.train(data, pg.PromptBank.load(tmp_path / "own.yaml"), tmp_path / "run", TINY, quiet=True)


def test_two_runs_are_not_mixed_in_one_folder(data, bank, tmp_path):
    with pytest.raises(SettingsError, match="there is no run to resume here; start one without resume"):
        pg.train(data, bank, tmp_path / "run", TINY, quiet=True, resume=True)
    pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True, steps=2)
    with pytest.raises(SettingsError, match="already holds a run; resume it, or choose another output folder"):
        pg.train(data, bank, tmp_path / "run", TINY, quiet=True, steps=2)
    with pytest.raises(SettingsError, match="cannot resume, seed was 0 and is now 7; use the same"):
        pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True, steps=2, seed=7, resume=True)
    with pytest.raises(SettingsError, match=r"cannot resume, start was [0-9a-f]{12} and is now new weights"):
        pg.train(data, bank, tmp_path / "run", TINY, quiet=True, steps=2, resume=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_loss_and_the_gradients_of_fp32(dtype):
    """The arithmetic of a GPU in bf16, and in fp16 with a scaled loss, done by the CPU."""
    model = pg.load_segmenter("lite", "fixed", "cpu").eval()
    tile = pg.load_dataset("synthetic", split="train", size=1)[0]
    features = model.encode_text(["nuclei", "every nucleus", "cells"])[None]  # [1, 3, D]
    pixels = (torch.from_numpy(tile.image[:64, :64]).permute(2, 0, 1)[None].float() / 127.5) - 1
    truth = torch.from_numpy(tile.masks["all"][:64, :64])[None]

    def run(enabled):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=enabled and dtype == torch.float16)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = model(pixels, features)
            terms = pg.GroupLoss()(output.mask_logits, output.presence_logits, truth)
        scaler.scale(terms.total).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return terms.total.item(), torch.cat(gradients) / (scaler.get_scale() if scaler.is_enabled() else 1)

    (loss, gradient), (half_loss, half_gradient) = run(False), run(True)
    assert half_gradient.isfinite().all()
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > 0.98


def test_a_checkpoint_of_a_gpu_is_read_where_there_is_none(data, bank, tmp_path, monkeypatch):
    pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True)
    optimizer = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    state = torch.load(optimizer, weights_only=True)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as a GPU's run writes it
    torch.save(state, optimizer)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(optimizer, weights_only=True)
    assert newest_whole_checkpoint(tmp_path / "run") == optimizer.parent


def test_a_damaged_record_of_a_run(data, bank, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"steps": 6')
    with pytest.raises(TrainingError, match=r"run\.json: damaged .*; start in another folder"):
        pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True, resume=True)


def test_a_resumed_run_may_suit_another_machine(data, bank, tmp_path):
    pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    pg.train(data, bank, tmp_path / "run", TINY, model=tiny_model(), quiet=True, resume=True, save_every=3, workers=1)
    pg.train(data, bank, tmp_path / "whole", TINY, model=tiny_model(), quiet=True)
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_weights_that_the_last_step_spoils_are_not_saved(data, bank, tmp_path):
    wild = replace(TINY, steps=1, learning_rate=1e38, weight_decay=1e38, warmup=0.0)
    with pytest.raises(Diverged, match="the weights became NaN or infinite; lower the learning rate"):
        pg.train(data, bank, tmp_path / "run", wild, model=tiny_model(), quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()


def test_several_gpus_without_torchrun_are_one(tmp_path, monkeypatch):
    """The Trainer would wrap the model in nn.DataParallel, which cannot put our output together again."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu or 4))
    assert training_arguments(tmp_path, TINY).n_gpu == 1


def test_a_process_that_may_have_no_children_loads_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})  # as Dask starts its own
    assert training_arguments(tmp_path, replace(TINY, workers=4)).dataloader_num_workers == 0
