"""Records and what is made of them: against counting by hand, on masks that are known."""

import numpy as np
import pandas as pd
import pytest
import torch

import pgseg_lite as pg
from pgseg_lite.errors import BankError, ModelError, SettingsError
from pgseg_lite.evaluation import COLUMNS, choose
from pgseg_lite.models.lite import LiteConfig, LiteSegmenter
from pgseg_lite.regression import adapt

BANK = """
name: tiny
targets:
  all: {fixed: nuclei, phrasings: {low: [nuclei, all nuclei, every nucleus], high: [all nuclei in the whole image]}}
  dead: {fixed: dead nuclei, phrasings: {low: [dead nuclei, necrotic nuclei], high: [dead nuclei in the whole image]}}
"""


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "tiny.yaml"
    path.write_text(BANK)
    return pg.PromptBank.load(path)


class Images:
    """Two 4 x 4 images: the first has nuclei in its upper half, one of them dead; the second has no dead ones."""

    name, targets = "hand-made", ("all", "dead")

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index > 1:
            raise IndexError(index)
        upper, dead = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
        upper[:2] = True
        dead[0] = index == 0
        return pg.Sample(np.zeros((4, 4, 3), np.uint8), {"all": upper, "dead": dead}, f"slide{index}@0,0", self.name)


class ByLength:
    """Marks as many rows, from the top, as the phrasing has words. From outside: only `predict`."""

    name = "by-length"

    def predict(self, image, prompts):
        logits = torch.full((1, len(prompts), 4, 4), -5.0)
        for i, prompt in enumerate(prompts):
            logits[0, i, : len(prompt.split())] = 5.0
        return pg.SegmentationOutput(logits, torch.full((1, len(prompts)), 2.0))


@pytest.fixture(scope="module")
def records(bank):
    return pg.evaluate(ByLength(), Images(), bank, levels=("low",), split="train", quiet=True)


def test_records_are_one_tidy_row_per_image_target_and_phrasing(records):
    assert tuple(records) == COLUMNS
    assert len(records) == 2 * (3 + 2)
    assert not records.duplicated(["image", "target", "phrasing"]).any()
    assert set(records["segmenter"]) == {"by-length"} and set(records["dataset"]) == {"hand-made"}


def row(records, **where):
    for name, value in where.items():
        records = records[records[name] == value]
    assert len(records) == 1
    return records.iloc[0]


def test_values_are_those_counted_by_hand(records):
    one = row(records, image="slide0@0,0", phrasing="nuclei")  # one row of the two: 4 of 8 pixels
    assert (one.dice, one.iou, one.area_pred, one.area_true) == pytest.approx((8 / 12, 0.5, 0.25, 0.5))
    assert one.presence == pytest.approx(1 / (1 + np.exp(-2)))
    assert row(records, image="slide0@0,0", phrasing="all nuclei").dice == 1
    assert one.agreement == pytest.approx(0.5)  # IoU 1/2 with each of the two-row masks
    assert one.flips == pytest.approx(0.25)  # the second of four rows
    assert not one.absent


def test_absent_targets_are_scored_not_dropped(records):
    absent = records[records["absent"]]
    assert set(absent["image"]) == {"slide1@0,0"} and set(absent["target"]) == {"dead"}
    assert (absent["dice"] == 0).all() and (absent["area_pred"] == 0.5).all()


def test_robustness_by_hand(records):
    table = pg.robustness(records, by=("target",)).set_index("target")
    fits = np.array([2 / 3, 1, 1])  # "nuclei", "all nuclei", "every nucleus"; the same on both images
    assert table.loc["all", "mean"] == pytest.approx(fits.mean())
    assert table.loc["all", "sd"] == pytest.approx(fits.std())
    assert table.loc["all", "range"] == pytest.approx(1 / 3)
    assert table.loc["all", "worst"] == pytest.approx(2 / 3)
    assert table.loc["all", "worst_phrasing"] == "nuclei"
    assert table.loc["all", "agreement"] == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    assert table.loc["all", "flips"] == pytest.approx(0.25)
    assert np.isnan(table.loc["all", "false_area"])
    assert table.loc["dead", "false_area"] == pytest.approx(0.5)
    assert table.loc["dead", "mean"] == pytest.approx(2 * 4 / 12)  # only the image that has dead nuclei counts
    assert table.loc["all", "mean_low"] == table.loc["all", "mean_high"] == pytest.approx(fits.mean())


def test_intervals_hold_tiles_of_one_image_together():
    """Ten tiles of one slide are one observation: with a single source there is nothing to resample."""
    rng = np.random.default_rng(0)
    rows = [
        dict(segmenter="m", dataset="d", image=f"slide{source}@{tile},0", target="all", phrasing=text, level="low",
             split="heldout", dice=rng.uniform(), absent=False, agreement=1.0, flips=0.0, area_pred=0.1)
        for source in range(4) for tile in range(10) for text in ("a", "b")
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    one = pg.robustness(frame[frame["image"].str.startswith("slide0")]).iloc[0]
    assert one["mean_low"] == pytest.approx(one["mean_high"])
    four = pg.robustness(frame).iloc[0]
    assert four["mean_low"] < four["mean"] < four["mean_high"]
    assert four["mean"] == pytest.approx(frame["dice"].mean())


def test_lite_encodes_each_image_and_each_phrasing_once(bank, monkeypatch):
    model = LiteSegmenter(LiteConfig(widths=[8, 16], dim=8, text_hidden=16)).eval()
    images, texts = [], []
    encode_image, encode_text = model.encode_image, model.encode_text
    monkeypatch.setattr(model, "encode_image", lambda image: images.append(1) or encode_image(image))
    monkeypatch.setattr(model, "encode_text", lambda text: texts.extend(text) or encode_text(text))
    data = pg.load_dataset("synthetic", split="test", size=2)
    data.targets = ("all", "dead")
    records = pg.evaluate(model, data, bank, levels=("low", "high"), split="train", quiet=True)
    assert len(images) == 2 and len(texts) == 4 + 3 and len(records) == 2 * 7


def test_records_agree_with_predict(bank):
    """The packed, chunked path gives what plain masks and a plain formula give."""
    torch.manual_seed(3)
    model = LiteSegmenter(LiteConfig(widths=[8, 16], dim=8, text_hidden=16)).eval()
    data = pg.load_dataset("synthetic", split="test", size=1)
    data.targets = ("all",)
    records = pg.evaluate(model, data, bank, levels=("low",), split="train", quiet=True)
    truth = data[0].masks["all"]
    for record in records.itertuples():
        mask = model.predict(data[0].image, record.phrasing).masks[0, 0].numpy()
        assert record.dice == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def test_choose_spreads_over_the_bank():
    bank = pg.PromptBank.load("nuclei")
    everything = choose(bank, "all", ("low",), "heldout", None)
    some = choose(bank, "all", ("low",), "heldout", 5)
    assert len(some) == 5 and some[0] == everything[0] and some[-1] == everything[-1]
    assert {p.split for p in some} == {"heldout"}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            lambda k: pg.SegmentationOutput(torch.zeros(1, k, 8, 8), torch.zeros(1, k)),
            r"masks of \[8, 8\] for image slide0",
        ),
        (
            lambda k: pg.SegmentationOutput(torch.full((1, k, 4, 4), float("nan")), torch.zeros(1, k)),
            "NaN in the logits",
        ),
        (lambda k: torch.zeros(1, k, 4, 4), "predict must return a SegmentationOutput, got Tensor"),
        (
            lambda k: pg.SegmentationOutput(torch.zeros(1, k + 2, 4, 4), torch.zeros(1, k)),
            r"masks \[1, 7\] and presence \[1, 5\] for one image and 5 phrasings; return mask_logits \[1, 5, H, W\]",
        ),
    ],
)
def test_models_from_outside_that_misbehave(bank, output, message):
    model = type("Odd", (), {"name": "odd", "predict": lambda self, image, prompts: output(len(prompts))})()
    with pytest.raises(ModelError, match=message):
        pg.evaluate(model, Images(), bank, levels=("low",), split="train", quiet=True)


def test_a_level_without_phrasings_and_records_without_columns(bank, records):
    with pytest.raises(BankError, match="has no heldout phrasing of level low for target 'all'"):
        pg.evaluate(ByLength(), Images(), bank, levels=("low",), quiet=True)
    with pytest.raises(SettingsError, match="have no column 'dice'; use the table that evaluate"):
        pg.robustness(records.drop(columns="dice"))


def test_a_model_without_a_name_and_a_bank_without_foils_are_refused_at_once(bank):
    asked = []
    model = type("Own", (), {"predict": lambda self, image, prompts: asked.append(image)})()
    with pytest.raises(ModelError, match=r"Own has no name, which every record shows; set one: model\.name = 'ours'"):
        pg.evaluate(model, Images(), bank, quiet=True)
    with pytest.raises(ModelError, match="Own has no name"):
        adapt(model)
    model.name = "ours"
    with pytest.raises(BankError, match="bank 'tiny' has no foils for any of all, dead; add some first"):
        pg.evaluate(model, Images(), bank, split="foils", quiet=True)
    assert not asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_may_answer_in_half_precision(bank, records, dtype):
    class Half(ByLength):
        def predict(self, image, prompts):
            output = super().predict(image, prompts)
            return pg.SegmentationOutput(output.mask_logits.to(dtype), output.presence_logits.to(dtype))

    found = pg.evaluate(Half(), Images(), bank, levels=("low",), split="train", quiet=True)
    pd.testing.assert_frame_equal(found.drop(columns="presence"), records.drop(columns="presence"))
    np.testing.assert_allclose(found["presence"], records["presence"], atol=0.01)


def test_two_models_of_one_name_are_not_averaged(records):
    other = records.assign(dice=records["dice"] / 2)
    both = pd.concat([records, other])
    with pytest.raises(SettingsError, match=r"records of segmenter by-length, target all hold two answers to 'nuclei'"):
        pg.robustness(both)
    named = pd.concat([records.assign(method="one"), other.assign(method="other")])
    assert pg.robustness(named, by=("method", "target"))["mean"].iloc[0] == pg.robustness(records)["mean"].iloc[0]


def test_an_image_may_be_called_by_a_number_or_with_an_at(records):
    plain = pg.robustness(records)
    for names in ({"slide0@0,0": 7, "slide1@0,0": 8}, {"slide0@0,0": "a@20x_0", "slide1@0,0": "a@20x_1"}):
        found = pg.robustness(records.assign(image=records["image"].map(names)))
        pd.testing.assert_frame_equal(found, plain)
