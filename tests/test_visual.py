"""`sam2` and `medsam` on tiny random models, shown boxes and points made from the true masks."""

import numpy as np
import pytest
import torch
from tiny_sam import SIDE, each_mask, save_sam, save_sam2
from transformers import SamModel

import pgseg_lite as pg
from pgseg_lite.data.dataset import Sample
from pgseg_lite.errors import ModelError, SettingsError
from pgseg_lite.models import visual
from pgseg_lite.models.base import THRESHOLD
from pgseg_lite.models.sam2 import EMPTY
from pgseg_lite.regression import adapt

NAMES = ("sam2", "medsam")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("visual")
    return {"sam2": save_sam2(root / "sam2"), "medsam": save_sam(root / "medsam")}


@pytest.fixture
def load(folders):
    return lambda name, **options: pg.load_segmenter(name, folders[name], "cpu", **options)


@pytest.fixture(scope="module")
def data():
    return pg.load_dataset("synthetic", split="test", size=2)


def make_sample(instances=True):
    """Two touching nuclei of "all", the left one inflammatory and bent; nothing is dead."""
    labels = np.zeros((48, 80), np.int32)
    labels[10:30, 8:12] = labels[26:30, 8:24] = 7
    labels[10:26, 12:40] = 40
    masks = {"all": labels > 0, "inflammatory": labels == 7, "dead": labels < 0}
    image = np.random.default_rng(0).integers(40, 200, (48, 80, 3), dtype=np.uint8)
    return Sample(image, masks, "s", "made", labels if instances else None)


@pytest.mark.parametrize("name", NAMES)
def test_no_phrasing_is_asked_of_a_model_that_reads_none(load, name):
    with pytest.raises(ModelError, match=f"{name} reads no words: it is shown the true nuclei, and no phrasing"):
        adapt(load(name))


# Prompts made from masks


def test_boxes_touch_the_outermost_pixels_of_every_nucleus():
    labels = visual.label_nuclei(make_sample(), "all")
    assert visual.boxes_around(labels).tolist() == [[8, 10, 23, 29], [12, 10, 39, 25]]
    assert visual.boxes_around(visual.label_nuclei(make_sample(), "inflammatory")).tolist() == [[8, 10, 23, 29]]
    merged = visual.label_nuclei(make_sample(instances=False), "all")  # touching nuclei cannot be told apart
    assert visual.boxes_around(merged).tolist() == [[8, 10, 39, 29]]


def test_a_point_lies_in_its_nucleus_even_where_the_middle_of_the_box_does_not():
    sample = make_sample()
    points = visual.points_inside(sample.instances).astype(int)
    assert [sample.instances[y, x] for x, y in points] == [7, 40]
    assert sample.instances[20, 15] != 7  # the middle of its box is in the neighbour


def test_prompts_of_real_samples_cover_every_nucleus_once(data):
    sample = data[0]
    numbers = set(np.unique(sample.instances)) - {0}
    assert len(visual.boxes_around(sample.instances)) == len(numbers) > 5
    at = visual.points_inside(sample.instances).astype(int)
    assert {sample.instances[y, x] for x, y in at} == numbers


# One image, its targets


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_encoded_once_for_all_targets_and_each_is_the_union_of_its_nuclei(load, name, monkeypatch):
    model, sample, calls = load(name), make_sample(), []
    model.masks.sam.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    out = model.predict_from_masks(sample, tuple(sample.masks))
    assert len(calls) == 1 and out.mask_logits.shape == (1, 3, 48, 80) and out.presence_logits.shape == (1, 3)
    for i, target in enumerate(sample.masks):  # together as alone
        alone = model.predict_from_masks(sample, (target,))
        torch.testing.assert_close(alone.mask_logits[:, 0], out.mask_logits[:, i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.presence_logits[:, 0], out.presence_logits[:, i], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        pixels = visual.to_pixel_values(torch.from_numpy(sample.image).permute(2, 0, 1)[None])
        boxes = torch.tensor([[8.0, 10, 23, 29], [12, 10, 39, 25]])
        maps, scores = each_mask(model.masks, model.masks.encode(pixels), (48, 80), boxes=boxes)
    torch.testing.assert_close(out.mask_logits[0, 0] - THRESHOLD, maps.amax(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.presence_logits[0, 0].sigmoid(), scores.mean().clamp(1e-6, 1 - 1e-6))
    assert torch.equal(out.masks[0, 0], maps.amax(0) > 0)  # SAM's own threshold
    assert (maps > 0).any() and (maps < 0).any()
    assert not out.masks[0, 2].any() and out.presence_logits[0, 2] < -10  # nothing is dead


def test_points_are_another_prompt(load):
    sample = make_sample()
    boxes, points = (load("sam2", visual=kind).predict_from_masks(sample, ("all",)) for kind in ("boxes", "points"))
    assert (boxes.mask_logits - points.mask_logits).abs().mean() > 1e-3


def test_medsam_stretches_each_image_to_its_own_range(load, folders):
    """A darker and flatter image gives the same answer, and the encoder sees 0..1."""
    model, seen = load("medsam"), []
    model.masks.sam.vision_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.rand(1, 3, 40, 56) * 2 - 1
    with torch.no_grad():
        first, second = model.masks.encode(pixels)[0], model.masks.encode(pixels * 0.3 - 0.5)[0]
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert seen[0].shape[-2:] == (SIDE, SIDE) and seen[0].min() == 0 and seen[0].max() == 1
    square = torch.rand(1, 3, SIDE, SIDE)
    expected = SamModel.from_pretrained(folders["medsam"]).get_image_embeddings(
        (square - square.min()) / (square.max() - square.min())
    )
    with torch.no_grad():
        torch.testing.assert_close(model.masks.encode(square * 2 - 1)[0], expected, atol=1e-4, rtol=1e-4)


def test_large_images_are_tiled_and_a_tile_without_nuclei_is_empty(load):
    model, sample, calls = load("sam2", tile=32), make_sample(), []
    model.masks.sam.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    out = model.predict_from_masks(sample, ("all", "dead"))
    assert len(calls) == 2 * 3 and out.mask_logits.shape == (1, 2, 48, 80)
    assert torch.equal(out.mask_logits[0, 0, :20, 60:], torch.full((20, 20), EMPTY + THRESHOLD))
    corner = Sample(
        sample.image[:32, :32], {"all": sample.masks["all"][:32, :32]}, "c", "made", sample.instances[:32, :32]
    )
    expected = load("sam2").predict_from_masks(corner, ("all",)).mask_logits[0, 0, :8, :8]
    torch.testing.assert_close(out.mask_logits[0, 0, :8, :8], expected, atol=1e-4, rtol=1e-4)


# Records


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_gives_a_row_per_image_and_target(load, data, name):
    bank, model = pg.PromptBank.load("nuclei"), load(name)
    records = pg.evaluate(model, data, bank, quiet=True)
    assert len(records) == len(data) * len(data.targets) and set(records["target"]) == set(data.targets)
    assert set(records["phrasing"]) == {"a box around every nucleus"} and set(records["segmenter"]) == {name}
    assert set(records["level"]) == set(records["split"]) == {"visual"}
    table = pg.robustness(records)
    assert (table["sd"].dropna() == 0).all() and table["mean"].between(0, 1).all() and table["agreement"].isna().all()
    absent = records[records["absent"]]
    assert (absent["area_pred"] == 0).all() and (absent["dice"] == 1).all() and (absent["presence"] < 1e-3).all()


def test_true_masks_as_answers_score_one_and_shifted_ones_do_not(load, data, monkeypatch):
    """The way from prompts to records, with a mask decoder that fills each box: on rectangles it is perfect."""
    model, sample = load("sam2"), make_sample()
    sample.masks = {"all": sample.instances == 40, "inflammatory": sample.instances == 40}
    data = [sample]

    class Rectangles(list):
        targets, name = ("all", "inflammatory"), "made"

    def fill(shift):
        def read(embeddings, size, boxes, points, labels):
            maps = torch.full((len(boxes), *size), EMPTY)
            for logits, (x0, y0, x1, y1) in zip(maps, boxes.int().tolist(), strict=True):
                logits[y0 : y1 + 1, x0 + shift : x1 + 1 + shift] = 5.0
            return maps, torch.full((len(boxes),), 0.9)

        return read

    bank = pg.PromptBank.load("nuclei")
    for shift, expected in ((0, 1.0), (14, 0.5)):
        monkeypatch.setattr(model.masks, "read", fill(shift))
        records = pg.evaluate(model, Rectangles(data), bank, quiet=True)
        assert records["dice"].tolist() == pytest.approx([expected] * 2)
        assert records["presence"].tolist() == pytest.approx([0.9] * 2, abs=1e-5)


# What it refuses


@pytest.mark.parametrize("name", NAMES)
def test_it_saves_and_loads_back(load, name, tmp_path):
    model, sample = load(name), make_sample()
    model.save_pretrained(tmp_path / "again")
    again = pg.load_segmenter(name, tmp_path / "again", "cpu")
    before, after = (m.predict_from_masks(sample, ("all",)) for m in (model, again))
    assert torch.equal(before.mask_logits, after.mask_logits)


def test_what_it_refuses(load, data, tmp_path, folders):
    with pytest.raises(ModelError, match="sam2 reads no words; call predict_from_masks"):
        load("sam2").predict(make_sample().image, ["nuclei"])
    with pytest.raises(SettingsError, match="sam2 cannot be trained here: it takes visual prompts"):
        pg.train(data, pg.PromptBank.load("nuclei"), tmp_path / "run", model=load("sam2"), device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match="medsam cannot be shown 'points'; choose boxes"):
        load("medsam", visual="points")
    with pytest.raises(SettingsError, match="sam2 cannot be shown 'words'; choose boxes or points"):
        load("sam2", visual="words")
    with pytest.raises(SettingsError, match="tile is 8; a tile must have at least 32"):
        load("sam2", tile=8)
    with pytest.raises(ModelError, match="model_type is 'sam2', not 'sam', so this is another model's"):
        pg.load_segmenter("medsam", folders["sam2"], "cpu")
