"""`pgseg compare`: two fine-tunings side by side, resumed and not mixed, and one sentence of advice that can be trusted."""

import json
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from regression_models import painted
from tiny_models import save_tiny_clipseg

import pgseg_lite as pg
from pgseg_lite.cli import main
from pgseg_lite.errors import BankError, DataError, SettingsError, TrainingError
from pgseg_lite.experiments import FULL, LEARNERS, SEG
from pgseg_lite.regression.checks import FAIL, PASS
from pgseg_lite.regression.compare import Comparison, claim, compare, describe, side_by_side

BANK = """
levels:
  low: {templates: ["{noun}", "find {noun}", {text: "show {noun}", heldout: true}]}
  medium: {templates: ["outline the {noun} in this tile", {text: "where are the {noun} in this tile", heldout: true}]}
  high: {templates: ["carefully outline every one of the {noun} up to its edge",
    {text: "wherever they lie in the tissue fill in all of the {noun}", heldout: true}]}
targets:
  all: {fixed: nuclei, nouns: [nuclei, cell nuclei]}
  inflammatory: {fixed: inflammatory nuclei, nouns: [inflammatory nuclei, immune nuclei]}
  epithelial: {fixed: epithelial nuclei, nouns: [epithelial nuclei, gland nuclei]}
"""
TINY = replace(LEARNERS["lite"].settings["smoke"], steps=2, batch_size=1, view=32, precision="fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "bank.yaml").write_text(BANK)
    painted(folder / "data", 8, 64)
    return folder


@pytest.fixture(scope="module")
def bank(place):
    return pg.PromptBank.load(place / "bank.yaml")


@pytest.fixture(scope="module")
def data(place):
    return pg.load_dataset("folder", place / "data", "all", tile=None)


@pytest.fixture(scope="module")
def done(data, bank, tmp_path_factory):
    return compare(data, bank, tmp_path_factory.mktemp("runs"), TINY, seeds=1, per_level=1, quiet=True)


def test_both_runs_are_the_same_but_for_the_terms(done):
    runs = [json.loads((done.folder / f"{name}-0" / "run.json").read_text()) for name in ("baseline", "group")]
    differ = {name for name in runs[0] if runs[0][name] != runs[1][name]}
    assert differ == {"group", "consistency"}
    assert runs[0]["group"] == runs[0]["consistency"] == "none"
    assert not list(done.folder.rglob("checkpoint-*")) and len(list(done.folder.rglob("model.safetensors"))) == 2


def test_what_is_tested_was_neither_seen_nor_heard(done, data, bank):
    records = pd.read_csv(done.folder / "group-0" / "records.csv", dtype={"image": str})
    assert set(records["split"]) == {"heldout"}
    rest, held = data.hold_out(0.2)
    assert set(records["image"]) == set(held.ids) and not set(held.ids) & set(rest.ids)
    assert done.about["training_images"] == len(rest) and done.about["held_out_images"] == len(held)


def test_table_holds_every_target_and_the_mean_of_the_categories(done):
    assert list(dict.fromkeys(done.table["target"])) == ["all", "categories", "epithelial", "inflammatory"]
    assert {"dice", "lowest", "sd", "agreement"} <= set(done.table["measure"])
    assert np.allclose(done.table["with_terms"] - done.table["without"], done.table["difference"])
    assert ((done.table["low"] <= done.table["difference"]) & (done.table["difference"] <= done.table["high"])).all()
    dice = done.table[done.table["measure"] == "dice"].set_index("target")["without"]
    records = pd.read_csv(done.folder / "baseline-0" / "records.csv")
    assert dice["all"] == pytest.approx(records.query("target == 'all' and not absent")["dice"].mean(), abs=1e-4)
    assert set(done.table.query("decides")["target"]) == {"all", "categories"}


def test_few_images_and_seeds_never_give_a_verdict(done):
    assert set(done.table["verdict"]) == {"undecided"}
    assert done.advice.startswith(("undecided: 2 held-out images and 1 seeds are too few", "neither", "leave"))


def test_reports_say_the_same(done):
    assert done.text().splitlines()[-1] == done.advice
    assert "target-swap test: masks of one target overlap more than masks of two" in done.text()
    stored = json.loads((done.folder / "compare.json").read_text())
    assert stored["advice"] == done.advice and len(stored["table"]) == len(done.table)
    assert len(pd.read_csv(done.folder / "compare.csv")) == len(done.table)


def test_a_second_call_goes_on_and_more_seeds_only_add(done, data, bank):
    before = {path: path.read_bytes() for path in done.folder.rglob("records.csv")}
    (done.folder / "group-0" / "records.csv").unlink()  # killed before it was tested
    said = []
    again = compare(data, bank, done.folder, TINY, seeds=2, per_level=1, quiet=True, report=said.append)
    assert [line.split(": ")[1][:4] for line in said] == ["was ", "done", "done", "done"]
    assert {path: path.read_bytes() for path in before} == before
    assert again.about["seeds"] == 2 and again.about["setup"] == done.about["setup"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(settings=replace(TINY, steps=3)), "holds another comparison: steps was 2 and is now 3"),
        (dict(per_level=2), "per_level was 1 and is now 2"),
        (dict(held_out=0.5), "held_out was 0.2 and is now 0.5"),
        (dict(start=lambda: pg.load_segmenter("lite", "group")), "start was "),
    ],
)
def test_another_comparison_does_not_go_into_the_folder(done, data, bank, change, message):
    options = dict(settings=TINY, seeds=1, per_level=1, quiet=True) | change
    with pytest.raises(SettingsError, match=message):
        compare(data, bank, done.folder, **options)


def test_options_of_the_model_belong_to_the_comparison(data, bank, tmp_path):
    folder = save_tiny_clipseg(tmp_path / "tiny")

    def setup(**options):
        model = pg.load_segmenter("clipseg", folder, "cpu", **options)
        return describe(data, bank, TINY, model, held_out=0.2, per_level=1, quiet=True)

    claim(tmp_path / "runs", setup())
    claim(tmp_path / "runs", setup())
    with pytest.raises(SettingsError, match="holds another comparison: tile was None and is now 64"):
        claim(tmp_path / "runs", setup(tile=64))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.4, 0.4]}')
    with pytest.raises(SettingsError, match="holds another comparison: start was"):
        claim(tmp_path / "runs", setup())


def test_other_masks_under_the_same_names_are_other_data(done, place, bank, tmp_path):
    painted(tmp_path, 8, 64)
    mask = next((tmp_path / "masks" / "epithelial").iterdir())
    from PIL import Image

    Image.new("L", (64, 64), 255).save(mask)
    other = pg.load_dataset("folder", tmp_path, "all", tile=None)
    with pytest.raises(SettingsError, match="holds another comparison: data was folder"):
        compare(other, bank, done.folder, TINY, seeds=1, per_level=1, quiet=True)


def test_what_would_fail_later_fails_before_anything_is_written(place, data, bank, tmp_path):
    def refused(kind, message, data=data, text=BANK, settings=TINY, **options):
        (tmp_path / "bank.yaml").write_text(text)
        with pytest.raises(kind, match=message):
            compare(
                data, pg.PromptBank.load(tmp_path / "bank.yaml"), tmp_path / "runs", settings, quiet=True, **options
            )
        assert not (tmp_path / "runs").exists()

    one = pg.load_dataset("synthetic", size=1, tile=64)  # sixteen tiles of one image
    refused(DataError, "synthetic has one source image; a comparison trains on some", data=one)
    words = BANK.replace("all:", "cows:").replace("inflammatory:", "sheep:").replace("epithelial:", "hens:")
    refused(BankError, "share no target: the dataset has all, epithelial, inflammatory and the bank", text=words)
    heard = BANK.replace(", heldout: true", "")
    refused(BankError, "has no heldout phrasings of 'all' at low, medium, high", text=heard)
    refused(BankError, r"cannot sample k=50 phrasings of 'all'", settings=replace(TINY, k=50))
    refused(DataError, "cannot hold out 1.5", held_out=1.5)
    refused(SettingsError, "seeds is 0", seeds=0)
    refused(SettingsError, "per_level is 0", per_level=0)


def test_a_bank_with_fewer_targets_than_the_data_compares_those(data, tmp_path):
    start = BANK.index("  inflammatory:")
    (tmp_path / "bank.yaml").write_text(BANK[: BANK.index("  all:")] + BANK[start:])
    bank = pg.PromptBank.load(tmp_path / "bank.yaml")
    found = compare(data, bank, tmp_path / "runs", TINY, seeds=1, per_level=1, quiet=True)
    assert list(dict.fromkeys(found.table["target"])) == ["epithelial", "inflammatory"]
    assert found.table["decides"].all()
    assert data.targets == ("all", "epithelial", "inflammatory")  # the reader's data is as it was


def test_only_one_model_is_held_at_a_time(data, bank, tmp_path):
    begun = []

    def start():
        assert not any(one() is not None for one in begun), "the run before still holds its model"
        model = pg.load_segmenter("lite", "fixed", "cpu")
        begun.append(weakref.ref(model))
        return model

    compare(data, bank, tmp_path, TINY, start=start, seeds=1, per_level=1, quiet=True)
    assert len(begun) == 3


def test_runs_that_diverge_are_named(data, bank, tmp_path):
    hopeless = replace(TINY, steps=6, learning_rate=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match="no seed has both runs, since others diverged"):
        compare(data, bank, tmp_path, hopeless, seeds=1, per_level=1, quiet=True)


def images(seeds=3, count=8, **gain):
    """Tables of `by_image` in which the full method differs by `gain`, plus what differs between images."""
    rows, noise = [], np.random.default_rng(0)
    for image in range(count):
        for target in ("all", "a", "b"):
            base = dict(dice=0.7, lowest=0.5, sd=0.1, agreement=0.6, flips=0.1, false_area=0.05)
            base |= {name: value + noise.normal(0, 0.01) for name, value in base.items()}
            for seed in range(seeds):
                for method in (SEG, FULL):
                    moved = {name: base[name] + gain.get(name, 0) * (method == FULL) for name in base}
                    key = dict(dataset="d", split="heldout", level="any", target=target, image=str(image))
                    rows.append(key | moved | dict(tiles=2, absent=1, method=method, seed=seed))
    table = pd.DataFrame(rows)
    about = dict(seeds=seeds, held_out_images=count, steps=500)
    heard = pd.DataFrame([dict(method=m, seed=0, outcome=PASS, reason="", estimate=0.3) for m in (SEG, FULL)])
    return Comparison(about, side_by_side(table, ["all", "a", "b"], count >= 6 and seeds >= 3), heard, {}, None)


@pytest.mark.parametrize(
    ("gain", "advice"),
    [
        (dict(dice=0.05), "keep the terms: they make the Dice of all and the Dice of categories better"),
        (dict(sd=-0.05), "keep the terms: they make the spread of all and the spread of categories better"),
        (dict(lowest=-0.05), "leave the terms out: they make the lowest Dice of all and"),
        (dict(false_area=0.05), "leave the terms out: they make the false area of all and"),
        (dict(sd=-0.05, dice=-0.05), "a trade that you must weigh: the terms make the spread of all"),
        (dict(agreement=0.3), "undecided: nothing is shown; train longer than 500 steps, or hold out more than 8"),
        ({}, "undecided: nothing is shown"),
    ],
)
def test_advice_follows_what_is_shown(gain, advice):
    assert images(**gain).advice.startswith(advice)


def test_advice_wants_enough_images_and_seeds_and_a_model_that_listens():
    assert images(count=5, dice=0.1).advice.startswith("undecided: 5 held-out images and 3 seeds are too few")
    assert images(seeds=2, dice=0.1).advice.startswith("undecided: 8 held-out images and 2 seeds are too few")
    found = images(dice=0.1)
    found.heard["outcome"] = [PASS, FAIL]
    assert found.advice == "leave the terms out: with them the model is deaf to words in 1 of 3 runs"
    found.heard["outcome"] = [FAIL, FAIL]
    assert found.advice.startswith("neither: even without the terms the model is deaf to words in 1 of 3 runs")


def test_advice_names_what_agreement_was_bought_with():
    found = images(sd=-0.05)
    found.heard["estimate"] = [0.3, 0.1]
    assert found.advice.startswith("a trade that you must weigh: the terms make the spread of all and")
    assert found.advice.endswith("better, and the model listens less: the target-swap test falls from 0.30 to 0.10")


def test_from_the_shell(place, tmp_path, capsys):
    words = f"compare --dataset folder --root {place / 'data'} --split all --tile 0 --bank {place / 'bank.yaml'}"
    small = f"--profile smoke --steps 1 --view 32 --per-level 1 --output {tmp_path / 'runs'}".split()
    assert main([*words.split(), *small]) == 0
    out = capsys.readouterr().out
    assert "[2/2] full method, seed 0: done in" in out and "swap test" in out and "compare.csv" in out
    assert main([*words.split(), *small, "--seeds", "0"]) == 2
    assert "seeds is 0" in capsys.readouterr().err
