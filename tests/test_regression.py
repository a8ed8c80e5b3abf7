"""Prompt regression: the same figures through every adapter, seeded regressions caught for the right reason."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from regression_models import BANK, Replay, bundled, loaded, odd, painted, segment, served
from tiny_dino import save_dino
from tiny_models import save_tiny_clipseg, save_tiny_sam3
from tiny_sam import save_sam2
from tiny_text import short_bank

import pgseg_lite as pg
from pgseg_lite.cli import main
from pgseg_lite.errors import PgsegError
from pgseg_lite.metrics import majority, pack
from pgseg_lite.models import SegmentationOutput
from pgseg_lite.prompts import Phrasing
from pgseg_lite.regression import (
    Report,
    adapt,
    alarms,
    check_gates,
    dispersion,
    load_baseline,
    measure,
    open_pictures,
    save_baseline,
)  # fmt: skip
from pgseg_lite.regression.pytest_plugin import MarkedBank
from pgseg_lite.regression.summary import level_gap, separation, simultaneous

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bank and a small dataset."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bank.yaml").write_text(BANK)
    painted(folder / "data")
    return folder


@pytest.fixture(scope="module")
def bank(place):
    return pg.PromptBank.load(place / "bank.yaml")


@pytest.fixture(scope="module")
def data(place):
    return pg.load_dataset("folder", place / "data", "all", tile=None)


@pytest.fixture(scope="module")
def masks(bank, data):
    """What the bundled checkpoint answers: (image bytes, phrasing) -> bool [H, W]."""
    texts = list({p.text for p in (*bank.phrasings, *bank.foils)})
    found = {}
    for sample in data:
        predicted = bundled("group").predict(sample.image, texts).masks[0].numpy()
        found |= {(sample.image.tobytes(), text): mask for text, mask in zip(texts, predicted, strict=True)}
    return found


@pytest.fixture(scope="module")
def ask(masks, bank, data):
    """Measure the checkpoint's masks after a change."""

    def measured(change=lambda mask, text, generator: mask, seed=0, bank=bank, data=data, **options):
        return measure(adapt(Replay(masks, change, seed)), data, bank, quiet=True, **options)

    return measured


@pytest.fixture(scope="module")
def plain(ask):
    return ask()


@pytest.fixture(scope="module")
def baseline(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    save_baseline(plain, path)
    return load_baseline(path)


def failed(checks):
    return {(check.gate, check.target, check.level): check.reason for check in checks if check.outcome == "fail"}


# ---- one model, every adapter ----


@pytest.fixture(params=["lite, fixed", "lite, group", "clipseg, tiny"])
def model(request, bank, tmp_path, monkeypatch):
    """A segmenter with its checkpoint, which `segment` loads in whatever process, and a bank in words that it reads."""
    segmenter, checkpoint = request.param.split(", ")
    if checkpoint == "tiny":
        checkpoint = str(save_tiny_clipseg(tmp_path / "tiny"))
        bank = pg.PromptBank.load(short_bank(tmp_path / "short.yaml"))
    monkeypatch.setenv("TEST_SEGMENTER", segmenter)
    monkeypatch.setenv("TEST_CHECKPOINT", checkpoint)
    monkeypatch.syspath_prepend(HERE)
    return segmenter, checkpoint, bank


def test_every_adapter_gives_the_same_figures(model, place):
    segmenter, checkpoint, bank = model
    data = pg.load_dataset("folder", place / "data", "all", fraction=0.2, tile=None)
    with served() as address:
        command = f"{sys.executable} -S {HERE / 'regression_client.py'} {{image}} {{phrasing}} {{output}} {address}/png"
        models = {
            "built in": adapt(segmenter, checkpoint, "cpu"),
            "segmenter": adapt(loaded(segmenter, checkpoint)),
            "function": adapt(segment),
            "module:function": adapt("regression_models:segment"),
            "command": adapt(command, workers=2),
            "endpoint, PNG": adapt(f"{address}/png", workers=2),
            "endpoint, JSON": adapt(f"{address}/json", workers=2),
        }
        results = {name: measure(model, data, bank, per_level=1, quiet=True) for name, model in models.items()}
    first = results["built in"]
    assert len(first.records) == 2 * (3 * 3 + len(bank.foils))
    assert first.records["agreement"].min() < 0.999  # masks move with words, or the comparison would show nothing
    assert first.records["dice"].max() > (0.5 if segmenter == "lite" else 0)  # the tiny one has random weights
    assert results["segmenter"].about == first.about  # the same weights have the same fingerprint
    for name, result in results.items():
        assert result.failures.empty, name
        # A phrasing decoded alone may differ from one decoded among others in the last bit of a logit.
        same = dict(check_dtype=False, atol=2e-3, rtol=0)
        drop = ["presence", "segmenter"]  # a mask from outside says nothing about presence
        pd.testing.assert_frame_equal(result.records.drop(columns=drop), first.records.drop(columns=drop), **same)
        pd.testing.assert_frame_equal(dispersion(result), dispersion(first), **same)


def test_a_misbehaving_model_fails_its_items_and_no_others(data, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    reasons = {
        "raise": "RuntimeError: out of memory",
        "hang": "no answer within 1 s",
        "small": "returned a mask of 8 x 8 pixels for an image of 128 x 128",
        "nan": "returned NaN or infinity",
        "logits": "returned 5 to 5; return probabilities (0 to 1), or bool",
        "grey": "grey levels besides 0",
        "nothing": "it must be one mask [height, width]",
    }
    phrasings = ["print", "raise", "hang", "small", "crash", "nan", "logits", "grey", "nothing", "nuclei"]
    data = data.hold_out(0.2)[1]
    for model in (odd, "regression_models:odd"):
        here = [text for text in phrasings if text != "crash" or model is not odd]  # that would end this process
        bank = replace(pg.PromptBank.load("nuclei"), targets=("all",), foils=(), phrasings=tuple(
            Phrasing(text, "all", "low", "train", "", text) for text in here))  # fmt: skip
        result = measure(adapt(model, timeout=1), data, bank, levels=("low",), quiet=True)
        found = result.failures.groupby("phrasing")["reason"].unique()
        for text, reason in reasons.items():
            assert len(found[text]) == 1 and reason in found[text][0], (text, found[text])
        if model is not odd:
            assert "its process ended with status 7" in found["crash"][0]
        assert set(result.records["phrasing"]) == {"print", "nuclei"}
        assert len(result.failures) == len(data) * (len(here) - 2)
        (answers, *_) = check_gates(result)
        assert answers.gate == "answers" and answers.outcome == "fail" and "'raise' on" in answers.reason
        assert check_gates(result, max_failures=len(result.failures))[0].outcome == "pass"


def test_one_bad_phrasing_of_a_segmenter_fails_alone(data):
    """All phrasings of an image are asked at once; when that fails, each is asked alone."""

    class Partly:
        name = "partly"

        def predict(self, image, prompts):
            assert sys.exception() is None  # an error of the pass before would hold that pass's memory
            if any("every" in prompt for prompt in prompts):
                raise ValueError("32 tokens at most")
            return bundled("group").predict(image, prompts)

    texts = ("nuclei", "every nucleus")
    bank = replace(pg.PromptBank.load("nuclei"), targets=("all",), foils=(), phrasings=tuple(
        Phrasing(text, "all", "low", "train", "", text) for text in texts))  # fmt: skip
    result = measure(adapt(Partly()), data.hold_out(0.2)[1], bank, levels=("low",), quiet=True)
    assert set(result.failures["reason"]) == {"ValueError: 32 tokens at most"}
    assert set(result.records["phrasing"]) == {"nuclei"} and result.records["agreement"].isna().all()
    assert "nuclei" in Report(result, check_gates(result)).text()  # one phrasing alone has no agreement, and is shown


# ---- which model is this? ----


def test_a_model_that_answers_otherwise_is_another_model(tmp_path):
    """Options, and what Grounded-SAM2 and CLIPSeg keep out of their state dicts, decide answers as weights do."""
    sam3 = str(save_tiny_sam3(tmp_path / "sam3"))
    clipseg = save_tiny_clipseg(tmp_path / "clipseg")
    grounded = tmp_path / "grounded"
    grounded.mkdir()
    save_dino(grounded / "detector")
    save_sam2(grounded / "masks")
    models = [
        adapt("sam3", sam3, "cpu"),
        *(adapt("sam3", sam3, "cpu", **option) for option in
          (dict(reading="max-logit"), dict(presence_gate=False), dict(tile=64), dict(truncate=True))),
        adapt("clipseg", str(clipseg), "cpu"),
        adapt("clipseg", str(clipseg), "cpu", tile=64),
        adapt("grounded-sam2", str(grounded), "cpu"),
        adapt("grounded-sam2", str(grounded), "cpu", box_threshold=0.1),
    ]  # fmt: skip
    for folder in (clipseg, grounded / "detector"):
        other = {"image_mean": [0.4, 0.4, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(other))
    models += [adapt("clipseg", str(clipseg), "cpu"), adapt("grounded-sam2", str(grounded), "cpu")]
    trained = pg.load_segmenter("grounded-sam2", str(grounded), "cpu")
    with torch.no_grad():
        next(trained.detector.dino.bbox_embed.parameters()).add_(0.3)
    models.append(adapt(trained))
    found = [model.fingerprint for model in models]
    assert len(set(found)) == len(found)
    plain = torch.nn.Module()  # from outside, with attributes that mean something else
    plain.name, plain.hidden, plain.predict = "plain", 64, lambda image, prompts: None
    assert adapt(plain).fingerprint == adapt(plain).fingerprint
    again = [adapt("sam3", sam3, "cpu", serial=True), adapt("grounded-sam2", str(grounded), "cpu")]
    assert again[0].fingerprint == found[0] and again[1].fingerprint == found[-2]  # which is no chance


def test_kept_answers_are_not_those_of_an_object_retrained(data, bank, tmp_path):
    class Rows:
        """Marks the upper rows; how many, nobody can see from outside."""

        name = "rows"

        def __init__(self, share):
            self.share = share

        def predict(self, image, prompts):
            height, width = image.shape[:2]
            rows = torch.arange(height)[:, None].expand(height, width) < self.share * height
            logits = (rows * 2.0 - 1).expand(1, len(prompts), height, width)
            return SegmentationOutput(logits, torch.zeros(1, len(prompts)))

    def ask(share, version=""):
        found = measure(adapt(Rows(share), version=version), data, bank, per_level=1, folder=tmp_path, quiet=True)
        return found.kept / found.asked, found.records["area_pred"].mean()

    assert ask(0.25) == (0, 0.25) and ask(0.75) == (0, 0.75)
    assert ask(0.25, "1") == (0, 0.25) and ask(0.75, "1") == (1, 0.25)  # whoever says so is believed
    assert ask(0.75, "2") == (0, 0.75)


def test_an_option_of_the_model_reaches_it_from_the_command(place, tmp_path, capsys):
    """The bundled bank has phrasings that SAM3 must cut; its message says how, and that is how."""
    save_tiny_sam3(tmp_path / "sam3")
    bank = place / "long.yaml"
    bank.write_text("targets: {all: {fixed: nuclei, phrasings: {low: [nuclei, " + "every " * 40 + "cells]}}}")
    words = ["--model", "sam3", "--checkpoint", tmp_path / "sam3", "--bank", bank, "--levels", "low", "--device", "cpu"]
    words += ["--images", place / "data" / "images", "--json", tmp_path / "report.json"]

    def failures(*more):
        assert main([str(word) for word in ("robustness", *words, *more)]) in (0, 1)
        return json.loads((tmp_path / "report.json").read_text())["failures"]

    found = failures()
    assert len(found) == 10 and all("(--option truncate=true)" in failure["reason"] for failure in found)
    with pytest.warns(UserWarning, match="and they are cut"):
        assert not failures("--option", "truncate=true")
    capsys.readouterr()
    wrong = {"truncate=1": "give true or false", "tile=wide": "a value has the wrong type"}
    wrong |= {"tile=64.5": "tile is 64.5; give a whole number", "tile=inf": "tile is inf; give a whole number"}
    for option, message in wrong.items():
        assert main([str(word) for word in ("robustness", *words, "--option", option)]) == 2
        assert message in capsys.readouterr().err


def test_one_phrasing_a_target_is_enough_for_a_report(ask, bank):
    least = replace(bank, phrasings=tuple(p for p in bank.phrasings if p.text == bank.fixed(p.target)), foils=())
    report = Report(result := ask(bank=least), check_gates(result, max_spread=0.1))
    assert report.passed and result.records["agreement"].isna().all()
    assert '"agreement": null' in report.json() and "<td" in report.html() and report.junit() and report.text()


def test_a_busy_endpoint_is_asked_again_and_a_token_is_sent(data, bank, monkeypatch):
    image = data[0].image
    with served() as address:
        with adapt(f"{address}/busy", retries=1).model.asking(image) as asked:
            assert asked("nuclei").shape == image.shape[:2]
        monkeypatch.setenv("PGSEG_TOKEN", "secret")
        with adapt(f"{address}/token").model.asking(image) as asked:
            assert asked("nuclei").any()


# ---- with and without true masks ----


def test_without_masks_agreement_flips_and_foils_are_those_with_masks(place, ask, plain, bank):
    pictures = open_pictures(place / "data" / "images", tile=None)
    bare = ask(data=pictures)
    assert bare.records["dice"].isna().all() and not bare.about["truth"] and not bare.records["absent"].any()
    columns = ["agreement", "flips", "level_agreement", "majority", "area_pred"]
    pd.testing.assert_frame_equal(bare.records[columns], plain.records[columns])
    pd.testing.assert_frame_equal(separation(bare), separation(plain))
    table = dispersion(bare)
    assert table["mean"].between(0.5, 1).all() and table["worst_phrasing"].notna().all()
    assert "There are no true masks" in Report(bare, check_gates(bare)).text()


def test_figures_against_counting_by_hand(plain):
    """Agreement within a level, the majority mask, the gap between levels."""
    generator = np.random.default_rng(0)
    masks = generator.random((5, 9, 31)) < 0.5
    votes = majority(pack(masks))
    np.testing.assert_array_equal(votes, pack(masks.sum(0) > 2.5))
    records = plain.records[(plain.records["target"] == "all") & (plain.records["split"] != "foils")]
    low = records[records["level"] == "low"]
    assert (low.groupby("image")["level_agreement"].nunique() == 1).all()  # of two masks there is one IoU
    means = records[~records["absent"]].groupby("level")["dice"].mean()
    gaps = level_gap(plain).set_index("target")
    assert gaps.loc["all", "gap"] == pytest.approx(means["high"] - means["low"])
    assert gaps.loc["all", "levels"] == "high minus low"


# ---- gates ----


def jitter(mask, text, generator):
    """A model that is not deterministic: each pixel is decided otherwise with probability 0.01."""
    return mask ^ (generator.random(mask.shape) < 0.01)


def test_an_unchanged_model_under_a_new_seed_passes_20_times_out_of_20(ask, data, tmp_path):
    data = data.hold_out(0.2)[0]
    first = ask(jitter, seed=100, data=data)
    save_baseline(first, tmp_path / "b.json")
    before = load_baseline(tmp_path / "b.json")
    for seed in range(20):
        result = ask(jitter, seed=seed, data=data)
        assert not result.records.equals(first.records)
        checks = check_gates(result, before, max_drop=0.02, max_spread=0.1)
        assert not failed(checks), (seed, failed(checks))
        assert sum(check.gate == "drop" and check.outcome == "pass" for check in checks) >= 8  # shown, not undecided


def test_five_percent_worse_on_one_level_alone_is_found_there(ask, baseline, bank):
    """Each mask of level high loses what costs 5 % of its Dice; the other levels stay as they are."""
    high = {p.text for p in bank.phrasings if p.level == "high"}
    worse = ask(lambda mask, text, generator: mask & ~((text in high) & (generator.random(mask.shape) < 0.095)))
    change = worse.records["dice"] / ask().records["dice"] - 1
    touched = worse.records["level"].eq("high") & change.notna()
    assert change[touched].mean() == pytest.approx(-0.05, abs=0.02) and (change[~touched].dropna() == 0).all()
    reasons = failed(check_gates(worse, baseline))
    assert ("drop", "all", "high") in reasons
    assert {level for gate, _, level in reasons if gate == "drop"} == {"high"}
    assert reasons["drop", "all", "high"].startswith("Dice of all at level high got worse, by -0.0")


def test_the_false_area_is_told_as_it_changes(tmp_path):
    bank, data = pg.PromptBank.load("nuclei"), pg.load_dataset("synthetic", split="test", size=12, tile=None)

    def asked(share):
        def left_part(image, phrasing):
            return np.tile(np.arange(256) < share * 256, (256, 1))

        return measure(adapt(left_part), data, bank, levels=("low",), per_level=1, quiet=True)

    half, more = asked(0.5), asked(0.75)
    for name, result in (("half", half), ("more", more)):
        save_baseline(result, tmp_path / name)
    for result, before, outcome, said in (
        (more, "half", "fail", "got worse, by +0.250 (+0.250 to +0.250); the limit is +0.02"),
        (half, "more", "pass", "changed by -0.250 (-0.250 to -0.250); the limit is +0.02"),
    ):
        checks = check_gates(result, load_baseline(tmp_path / before))
        found = [check for check in checks if check.gate == "false area" and not np.isnan(check.estimate)]
        assert found and {check.outcome for check in found} == {outcome}
        assert all(check.reason.endswith(said) for check in found), found[0].reason


def test_bare_means_do_not_decide(ask, baseline):
    """A drop of the mean beyond the limit that hangs on one image of ten is undecided, and says so."""
    one = next(iter(baseline.keys))
    first = ask().records

    def lost(mask, text, generator):
        return mask & False if mask.sum() == areas else mask

    areas = round(first[first["image"] == one]["area_pred"].iloc[0] * 128 * 128)
    checks = check_gates(ask(lost), baseline)
    drop = next(check for check in checks if (check.gate, check.target, check.level) == ("drop", "all", "low"))
    assert drop.estimate < -0.02 and drop.outcome == "undecided"


def test_intervals_hold_together():
    """24 quantities of 20 images whose true change is zero: at least one interval misses it in about 5 % of runs."""
    generator, missed = np.random.default_rng(0), 0
    for seed in range(150):
        shared = generator.normal(size=(20, 1))
        wide = pd.DataFrame(shared + generator.normal(size=(20, 24)), index=[f"image{i}" for i in range(20)])
        _, low, high = simultaneous(wide, resamples=300, seed=seed)
        missed += ((low > 0) | (high < 0)).any()
    assert missed <= 18  # 12 %: the probability of more is below 0.001 if it is 5 %


def test_a_spread_is_gated_without_a_baseline(plain):
    assert failed(check_gates(plain, max_spread=0.001))
    assert not failed(check_gates(plain, max_spread=0.2))


def test_a_deaf_model_agrees_perfectly_and_fails(masks, data, bank, baseline):
    fixed = {image: mask for (image, text), mask in masks.items() if text == "nuclei"}

    model = Replay({(image, text): fixed[image] for image, text in masks})
    result = measure(adapt(model), data, bank, quiet=True)
    assert (result.records["agreement"].dropna() == 1).all()
    for before in (None, baseline):
        reasons = failed(check_gates(result, before))
        assert "agreement was bought by deafness" in reasons["deaf", "all targets", ""]
        assert "answers texts that ask for something else" in reasons["foils", "inflammatory", ""]
    report = Report(result, check_gates(result))
    assert report.verdict.startswith("FAILED: the model is deaf to words")
    assert report.verdict in report.text() and "deaf to words" in report.html()


def test_a_model_that_hears_all_but_the_target_is_told_from_a_deaf_one(data, bank):
    by_length = measure(adapt(lambda image, text: image[..., 0] < 3 * len(text)), data, bank, quiet=True)
    reason = failed(alarms(by_length))["deaf", "all targets", ""]
    assert reason.startswith("the model does not follow the target: masks of one target overlap 0.")


def swapped(bank, level="medium"):
    """The phrasings of two targets at one level, each listed under the other."""
    other = {"inflammatory": "epithelial", "epithelial": "inflammatory"}
    moved = [replace(p, target=other.get(p.target, p.target)) if p.level == level else p for p in bank.phrasings]
    return replace(bank, phrasings=tuple(moved), digest="swapped")


def test_a_bank_with_a_swapped_target_is_found(ask, bank, baseline, plain):
    assert not failed(alarms(plain))
    result = ask(bank=swapped(bank))
    alone = failed(alarms(result))
    assert {key for key in alone if key[0] == "misplaced"} == {
        ("misplaced", "inflammatory", "medium"), ("misplaced", "epithelial", "medium"),
    }  # fmt: skip
    assert (
        "2 phrasings listed under inflammatory (level medium) are answered with the mask of epithelial"
        in (alone["misplaced", "inflammatory", "medium"])
    )
    reasons = failed(check_gates(result, baseline))
    assert "2 phrasings under epithelial that stood under inflammatory" in reasons["bank", "epithelial", "medium"]
    assert not {key for key in reasons if key[0] == "drop"}  # those phrasings are not compared as if they were the same


def test_an_alarm_that_rang_before_is_no_regression(ask, bank, tmp_path):
    wrong = swapped(bank)
    first = ask(bank=wrong)
    assert failed(check_gates(first))
    save_baseline(first, tmp_path / "b.json")
    again = check_gates(ask(bank=wrong), load_baseline(tmp_path / "b.json"))
    assert not failed(again)
    assert any("(as in the baseline)" in check.reason for check in again)


def test_a_new_alarm_does_not_hide_behind_one_that_rang(ask, bank, tmp_path):
    """One phrasing stood under the wrong target when the baseline was stored; now a second one does, too."""
    one, two = (p.text for p in bank.phrasings if (p.target, p.level) == ("epithelial", "medium"))

    def slip(*texts):
        moved = [replace(p, target="inflammatory") if p.text in texts else p for p in bank.phrasings]
        return ask(bank=replace(bank, phrasings=tuple(moved), digest="slip"))

    save_baseline(slip(one), tmp_path / "b.json")
    before = load_baseline(tmp_path / "b.json")
    assert before.alarms["misplaced", "inflammatory", "medium"] == {one}
    assert not failed(check_gates(slip(one), before))
    reason = failed(check_gates(slip(one, two), before))["misplaced", "inflammatory", "medium"]
    assert reason.endswith(f"not so in the baseline: {two!r}")


def test_only_common_items_are_compared_and_it_is_said(ask, bank, baseline, data):
    part = data.hold_out(0.3)[0]
    smaller = replace(bank, phrasings=tuple(p for p in bank.phrasings if p.level != "low"), digest="smaller")
    checks = check_gates(ask(bank=smaller, data=part, levels=("medium", "high")), baseline)
    said = next(check.reason for check in checks if check.gate == "baseline")
    assert said == (
        "compared with baseline.json on 7 images (7 here, 10 there) and 15 phrasings, since banks differ: "
        "agreement and foils are not compared"
    )
    assert {check.level for check in checks if check.gate == "drop"} == {"any", "medium", "high"}
    assert not failed(checks)


def test_a_stored_baseline_has_no_machine_in_it_and_small_items(plain, baseline):
    text = baseline.path.read_text()
    content = json.loads(text)
    assert content["schema"] == 2 and content["versions"]["pgseg_lite"] == pg.__version__
    assert len(text) < 40 * len(plain.records) + 5000
    merged = baseline.records.merge(plain.records, on=["image", "target", "phrasing"], suffixes=("", "_new"))
    assert len(merged) == len(plain.records)
    np.testing.assert_allclose(merged["dice"], merged["dice_new"], atol=1e-5)
    np.testing.assert_array_equal(merged["absent"], merged["absent_new"])


# ---- reports ----


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_fetches_nothing_and_says_what_it_shows(ask, baseline, bank):
    result = ask(bank=swapped(bank))
    text = Report(result, check_gates(result, baseline)).html()
    page = Page(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3 and all(len(picture["alt"]) > 60 for picture in pictures)
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    assert not [t for t, a in page.tags if t in ("script", "link", "iframe") or "//" in a.get("href", "")]
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text and len(text) < 1_500_000


def test_junit_has_a_case_for_each_check(ask, baseline, bank):
    report = Report(result := ask(bank=swapped(bank)), check_gates(result, baseline))
    suite = ET.fromstring(report.junit())
    assert int(suite.get("tests")) == len(report.checks) == len(suite.findall("testcase"))
    assert int(suite.get("failures")) == len(report.failed) == len(suite.findall("testcase/failure")) > 0
    assert "swapped" in suite.find("testcase[@classname='pgseg.bank']/failure").get("message")


# ---- the command, kills and pytest ----


def robustness(place, *more):
    return ["robustness", "--dataset", "folder", "--root", place / "data", "--split", "all", "--tile", "0",
            "--bank", place / "bank.yaml", *more]  # fmt: skip


def test_the_command_saves_compares_and_fails(capsys, place, tmp_path):
    def run(*more):
        status = main([str(word) for word in robustness(place, "--device", "cpu", *more)])
        return status, capsys.readouterr().out

    status, out = run("--save", tmp_path / "b.json")
    assert status == 0 and "worst for all: '" in out and "\npassed: 0 of " in out
    kinds = [word for kind in ("json", "junit", "html") for word in (f"--{kind}", tmp_path / f"report.{kind}")]
    status, out = run("--against", tmp_path / "b.json", "--checkpoint", "fixed", *kinds)
    assert status == 1 and "fail: drop: all high: Dice of all at level high got worse" in out
    found = json.loads((tmp_path / "report.json").read_text())
    assert not found["passed"] and len(found["dispersion"]) == 3 * 4 and found["failures"] == []
    assert (tmp_path / "report.junit").read_text().startswith("<?xml") and (tmp_path / "report.html").stat().st_size
    assert not list(tmp_path.glob("*.part"))


def test_a_failing_gate_fails_the_next_time_too(capsys, place, tmp_path):
    """One command that compares with a baseline and stores it anew: what failed does not become the baseline."""
    stored = tmp_path / "b.json"

    def run(*more):
        return main([str(word) for word in robustness(place, "--device", "cpu", "--save", stored, *more)])

    assert run() == 0
    before = stored.read_bytes()
    for _ in range(2):
        assert run("--against", stored, "--checkpoint", "fixed") == 1
        said = "b.json: not written, since a gate failed; call without --against to store it"
        assert said in capsys.readouterr().err and stored.read_bytes() == before
    assert run("--against", stored, "--per-level", "1") == 0  # nothing failed: stored, and it has fewer phrasings
    assert len(stored.read_bytes()) < len(before) and "not written" not in capsys.readouterr().err


def test_the_help_has_a_recipe_for_ci(capsys):
    with pytest.raises(SystemExit):
        main(["robustness", "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: pgseg robustness") and "exit status\n  0  passed" in said
    assert "\n        - uses: actions/checkout" in said and "--against baseline.json --max-drop 0.02" in said


def test_killed_in_the_middle_and_called_again_gives_the_same_report(place, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(HERE)

    def words(folder, report):
        return [str(word) for word in robustness(
            place, "--model", "regression_models:slow", "--folder", tmp_path / folder, "--json", tmp_path / report)]  # fmt: skip

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    killed = subprocess.Popen(
        [sys.executable, "-m", "pgseg_lite.cli", *words("kept", "first.json")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    kept = 0
    while not kept and killed.poll() is None:
        time.sleep(0.1)
        if (tmp_path / "kept" / "answers.sqlite").is_file():
            with sqlite3.connect(tmp_path / "kept" / "answers.sqlite") as file:
                try:
                    kept = file.execute("SELECT count(*) FROM answers").fetchone()[0]
                except sqlite3.OperationalError:  # the table is being made
                    continue
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "first.json").exists()
    main(words("kept", "second.json"))
    said = capsys.readouterr().err
    assert " of 210 answers are from earlier calls" in said and "\n210 of 210" not in said
    main(words("other", "straight.json"))
    assert "from earlier calls" not in capsys.readouterr().err
    assert (tmp_path / "second.json").read_bytes() == (tmp_path / "straight.json").read_bytes()


def test_gating_in_pytest(place, tmp_path):
    (tmp_path / "test_site.py").write_text(f"""
import pytest
site = pytest.mark.prompt_bank("{place}/bank.yaml", images="{place}/data/images", tile=None, per_level=1,
                               baseline="b.json", max_drop=0.02)

def small(image, phrasing):
    dark = image[..., 0].astype(int) + len(phrasing) // 20
    if any(word in phrasing for word in ("cytoplasm", "beside", "everything")):
        return dark > 190
    if "inflammatory" in phrasing or "immune" in phrasing:
        return dark < 110
    return (dark > 109 * ("epithel" in phrasing)) & (dark < 160)

@site
def test_wording(prompt_bank):
    assert prompt_bank.check(small).passed

@site
def test_deaf(prompt_bank):
    prompt_bank.check(lambda image, phrasing: image[..., 0] < 100)

def test_unmarked(prompt_bank):
    pass
""")

    plugin = ["-p", "no:pgseg", "-p", "pgseg_lite.regression.pytest_plugin", "-p", "no:cacheprovider"]
    words = ["-q", "--strict-markers", *plugin]
    code = f"import pytest; pytest.main({words} + ['--prompt-bank-save', '-k', 'wording']); pytest.main({words})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert "1 passed, 2 deselected" in out and (tmp_path / "b.json").is_file()
    assert "1 failed, 1 passed, 1 error" in out, out
    assert "the model is deaf to words" in out
    assert "the fixture prompt_bank needs @pytest.mark.prompt_bank(BANK, images=...)" in out


def test_what_the_plugin_would_refuse_it_refuses_before_it_asks(place, plain, data, tmp_path):
    save_baseline(plain, tmp_path / "b.json")  # with true masks
    asked = []

    def refused(message, save=False, **options):
        options = dict(images=place / "data" / "images", tile=None, per_level=1) | options
        with pytest.raises(PgsegError, match=message):
            MarkedBank(place / "bank.yaml", options, tmp_path, save).report(lambda *item: asked.append(item))
        assert not asked

    refused("max_drop is -1; give a number of at least 0", max_drop=-1)
    refused("measured with true masks, this run without masks", baseline="b.json")
    others = pg.load_dataset("synthetic", size=2)
    refused("none of its images is in this run", baseline="b.json", images=None, data=others)
    refused("no such folder for the baseline; create it first", save=True, baseline="none/b.json")


def test_the_plugin_and_the_command_are_light():
    """Every pytest run imports the plugin and every `pgseg` the command's options."""
    heavy = {"torch", "pandas", "numpy", "matplotlib", "scipy", "transformers"}
    code = f"import sys, pgseg_lite.regression.pytest_plugin; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_of_the_engine_imports_it(repo):
    users = [p for p in (repo / "pgseg_lite").rglob("*.py") if "regression" not in p.parts and p.stem != "cli"]
    importing = re.compile(r"^\s*(from|import) .*\bregression\b", re.M)
    assert not [path for path in users if importing.search(path.read_text())]
