"""The painted tissue: the same bytes for the same seed, masks that fit, classes that differ as real ones."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from pgseg_lite.data import load_dataset
from pgseg_lite.data.shifts import SHIFTS
from pgseg_lite.data.synthetic import CLASSES, SyntheticSource, paint
from pgseg_lite.errors import DataError

TILES = 40


def digest(tile):
    return hashlib.sha256(b"".join(part.tobytes() for part in tile)).hexdigest()


@pytest.fixture(scope="module")
def samples():
    source = SyntheticSource("train", TILES)
    return [source.read(id) for id in source.ids]


@pytest.fixture(scope="module")
def nuclei(samples):
    """class -> area, axis ratio and mean brightness of each nucleus that does not touch the border [n, 3]."""
    rows = {name: [] for name in CLASSES}
    for sample in samples:
        grey, inst = sample.image.mean(2), sample.instances
        edge = {*inst[0], *inst[-1], *inst[:, 0], *inst[:, -1]}
        for k, where in enumerate(ndimage.find_objects(inst), 1):
            mask = inst[where] == k
            if k in edge or mask.sum() < 30:
                continue
            short, long = np.linalg.eigvalsh(np.cov(np.nonzero(mask)))
            row = mask.sum(), np.sqrt(long / short), grey[where][mask].mean()
            (name,) = [name for name in CLASSES if sample.masks[name][where][mask].all()]
            rows[name].append(row)
    return {name: np.array(values) for name, values in rows.items()}


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    here = digest(paint(7)) + digest(paint(7, shift="noise"))
    assert here == digest(paint(7)) + digest(paint(7, shift="noise"))
    code = (
        "import hashlib; from pgseg_lite.data.synthetic import paint\n"
        "for s in (None, 'noise'):\n"
        "    print(hashlib.sha256(b''.join(p.tobytes() for p in paint(7, shift=s))).hexdigest(), end='')"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there == here


def test_seeds_splits_and_sizes():
    assert digest(paint(1)) != digest(paint(2))
    first = {split: SyntheticSource(split, 2) for split in ("train", "val", "test")}
    tiles = {digest([source.read(id).image]) for source in first.values() for id in source.ids}
    assert len(tiles) == 6  # no two splits share a tile
    assert SyntheticSource("train", 9).ids[:2] == first["train"].ids == ["train_00000", "train_00001"]
    assert first["train"].shape("train_00000") == (256, 256)
    image, instances, classes = paint(3, size_px=96)
    assert image.shape == (96, 96, 3) and instances.shape == classes.shape == (96, 96)


def test_instances_and_classes_agree(samples):
    for seed in range(8):
        image, instances, classes = paint(seed)
        assert image.flags.writeable
        assert (image.dtype, instances.dtype, classes.dtype) == (np.uint8, np.int32, np.uint8)
        assert ((instances > 0) == (classes > 0)).all() and classes.max() <= 5
        ids, sizes = np.unique(instances[instances > 0], return_counts=True)
        assert (ids == np.arange(1, len(ids) + 1)).all()  # no gaps
        assert (sizes >= 10).all()
        for k in ids:
            assert len(np.unique(classes[instances == k])) == 1
    for sample in samples:
        parts = np.stack([sample.masks[name] for name in CLASSES])
        assert (parts.sum(0) == sample.masks["all"]).all()  # the classes share no pixel and leave none out
        assert (sample.masks["all"] == (sample.instances > 0)).all()


def test_classes_differ_as_documented(nuclei):
    area, axes, grey = ({name: np.median(v[:, i]) for name, v in nuclei.items()} for i in range(3))
    assert area["neoplastic"] > 1.3 * area["epithelial"] > 1.3 * area["inflammatory"]
    assert area["dead"] < area["inflammatory"]
    assert axes["connective"] > 2 > 1.2 * max(v for name, v in axes.items() if name != "connective")
    assert grey["dead"] < grey["inflammatory"] < min(grey["neoplastic"], grey["epithelial"], grey["connective"])
    spread = {name: v[:, 0].std() / v[:, 0].mean() for name, v in nuclei.items()}
    assert spread["neoplastic"] > 1.5 * spread["epithelial"]  # pleomorphic against regular


def test_colour_and_size_do_not_give_the_answer_away(samples, nuclei):
    """The best threshold on red, the channel that shows haematoxylin best, chosen with the truth in hand."""
    red = np.stack([s.image[..., 0] for s in samples])
    truth = np.stack([s.masks["all"] for s in samples])
    dice = [2 * ((red < t) & truth).sum() / ((red < t).sum() + truth.sum()) for t in range(110, 220, 5)]
    assert 0.5 < max(dice) < 0.85
    for i in (0, 2):  # in area and in brightness every class overlaps with some other
        low, high = ({n: np.percentile(v[:, i], q) for n, v in nuclei.items()} for q in (10, 90))
        for name in CLASSES:
            assert any(low[name] < high[b] and low[b] < high[name] for b in CLASSES if b != name)


def test_each_class_is_absent_from_some_tiles(samples):
    absent = {name: np.mean([not s.masks[name].any() for s in samples]) for name in CLASSES}
    assert all(0.15 <= share <= 0.55 for share in absent.values()), absent
    counts = [s.instances.max() for s in samples]
    assert np.percentile(counts, 90) > 1.8 * np.percentile(counts, 10)  # crowding varies


def test_looks_like_haematoxylin_and_eosin(samples):
    """Nuclei are blue-violet, what lies around them is paler and pinker."""
    inside = np.concatenate([s.image[s.masks["all"]] for s in samples]).mean(0)
    around = np.concatenate([s.image[~s.masks["all"]] for s in samples]).mean(0)
    assert inside[2] > inside[0] > inside[1] and around[0] > around[1] < around[2]
    assert (around - inside > 20).all() and around[0] - inside[0] > around[2] - inside[2]


def test_looks_like_consep(real_data, samples):
    """Mean colours of nuclei and of the rest lie within 40 grey levels of the real tiles'."""
    real = load_dataset("consep", root=real_data / "CoNSeP", split="train", tile=None, fraction=0.2)
    for nucleus in (True, False):
        of = [np.concatenate([s.image[s.masks["all"] == nucleus] for s in group]).mean(0) for group in (samples, real)]
        assert (abs(of[0] - of[1]) < 40).all(), of


def test_every_shift_shifts():
    assert len(SHIFTS) >= 10
    for seed in (1, 4):
        plain = paint(seed)
        for name, shift in SHIFTS.items():
            image, instances, classes = paint(seed, shift=name)
            assert image.shape == plain[0].shape and image.dtype == np.uint8
            change = abs(image.astype(int) - plain[0]).mean()
            assert change > 3, f"{name} hardly changes the picture: {change:.1f}"
            same = (instances == plain[1]).all() and (classes == plain[2]).all()
            assert same == shift.same_masks, f"{name}: same_masks is {shift.same_masks}"
            assert shift.about


def test_shifts_do_what_they_are_called():
    def about(shift):
        tiles = [paint(seed, shift=shift) for seed in range(4)]
        areas = [np.bincount(t[1].ravel())[1:] for t in tiles]
        return (
            np.median(np.concatenate(areas)),
            sum(map(len, areas)),
            np.mean([t[0].mean() for t in tiles]),
            np.mean([abs(np.diff(t[0].astype(int), axis=1)).mean() for t in tiles]),  # sharpness
        )

    area, count, light, sharp = about(None)
    small, many, *_ = about("low_magnification")
    assert small < 0.45 * area and many > 2 * count
    assert about("high_magnification")[0] > 1.6 * area
    assert about("frozen_section")[0] > 1.2 * area
    cut, many, *_ = about("crowded")
    assert many > 1.25 * count and cut > 0.75 * area  # what overlaps is cut, not swallowed
    assert about("stain_dark")[2] < light - 10 < light + 10 < about("stain_pale")[2]
    assert about("blur")[3] < 0.7 * sharp < sharp < about("noise")[3]
    assert about("thick_section")[2] < light


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": "stain_green"}, "no shift 'stain_green'; choose None or one of stain_dark, stain_pale"),
        ({"split": "fold1"}, "no split 'fold1'; choose train, val or test"),
        ({"size": 0}, "size is 0; give a number of tiles, 1 or more"),
        ({"size": 2.5}, "size is 2.5"),
        ({"size": True}, "size is True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=f"^synthetic: .*{message}"):
        SyntheticSource(**arguments)
    with pytest.raises(DataError):
        load_dataset("synthetic", **arguments)


def test_through_load_dataset():
    plain = load_dataset("synthetic", split="val", size=4)
    shifted = load_dataset("synthetic", split="val", size=4, shift="stain_pale")
    assert plain.targets == ("all", *CLASSES) and list(plain.ids) == list(shifted.ids)
    assert plain.digest != shifted.digest
    a, b = plain[0], shifted[0]
    assert (a.masks["all"] == b.masks["all"]).all() and (a.image != b.image).any()
    assert (a.dataset, a.id) == ("synthetic", "val_00000")
