"""Every reader on a tiny copy of its layout, tiles and manifests by hand, the real sets where they are."""

import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from pgseg_lite.data import READERS, Dataset, Sample, describe_datasets, load_dataset
from pgseg_lite.data import dataset as dataset_module
from pgseg_lite.data.dataset import pick, tile_starts
from pgseg_lite.data.own import decode, decode_counts
from pgseg_lite.errors import DataError

RNG = np.random.default_rng(0)


def save(path, array):
    """An image file from an array; the folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(height=12, width=10):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def save_mat(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


def hovernet(folder, names, ending=".png", typed=False):
    """Images and Labels of HoVer-Net's layout; {name: (image, inst_map, type_map)}."""
    made = {}
    for name in names:
        image, inst, types = picture(), np.zeros((12, 10), np.int32), np.zeros((12, 10))
        for number in range(1, 9):  # eight nuclei of two pixels, one of each class and one more of class 1
            inst[number, 2:4] = number
            types[number, 2:4] = number if number < 8 else 1
        save(folder / "Images" / f"{name}{ending}", image)
        save_mat(folder / "Labels" / f"{name}.mat", inst_map=inst, **({"type_map": types} if typed else {}))
        made[name] = (image, inst, types)
    return made


def same(sample: Sample, image, **masks):
    assert sample.image.dtype == np.uint8 and np.array_equal(sample.image, image)
    assert list(sample.masks) == list(masks)
    for target, mask in masks.items():
        assert sample.masks[target].dtype == bool and np.array_equal(sample.masks[target], mask), target


# ---- the official layouts


def test_consep(tmp_path):
    made = hovernet(tmp_path / "Train", ["train_1", "train_10", "train_2"], typed=True)
    hovernet(tmp_path / "Test", ["test_1"], typed=True)
    data = load_dataset("consep", root=tmp_path, tile=None)
    assert data.ids == ("train_1", "train_2", "train_10")  # natural order
    assert data.targets == ("all", "inflammatory", "epithelial", "spindle", "other")
    for sample in data:
        image, inst, types = made[sample.id]
        same(
            sample,
            image,
            all=inst > 0,
            inflammatory=types == 2,
            epithelial=(types == 3) | (types == 4),
            spindle=(types == 5) | (types == 6) | (types == 7),
            other=types == 1,
        )
        assert sample.instances.dtype == np.int32 and np.array_equal(sample.instances, inst)
        assert sample.dataset == "consep"
    assert load_dataset("consep", root=tmp_path, split="test", tile=None).ids == ("test_1",)


@pytest.mark.parametrize("name, split, folder", [("kumar", "test_diff", "test_diff"), ("cpm17", "test", "test")])
def test_splits_without_classes(tmp_path, name, split, folder):
    made = hovernet(tmp_path / folder, ["a", "b"], ending=".tif")
    data = load_dataset(name, root=tmp_path, split=split, tile=None)
    assert data.targets == ("all",) and data.ids == ("a", "b")
    same(data[1], made["b"][0], all=made["b"][1] > 0)


def test_cpm15_is_found_through_the_environment(tmp_path, monkeypatch):
    made = hovernet(tmp_path / "CPM15", ["image_00", "image_01"])  # upper case, as some copies have it
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path))
    data = load_dataset("cpm15", split="all", tile=None)
    same(data[0], made["image_00"][0], all=made["image_00"][1] > 0)
    assert np.array_equal(data[1].instances, made["image_01"][1])
    numbers = {"fraction": np.float32(0.5), "seed": np.int64(3), "tile": np.int64(4)}
    json.dumps(load_dataset("cpm15", split="all", **numbers).manifest())  # numpy's own numbers are no JSON


def test_cryonuseg(tmp_path):
    image, label = picture(), np.zeros((12, 10), np.uint16)
    label[1:3, 1:3], label[5:9, 5:9] = 300, 2
    save(tmp_path / "tissue images" / "Human_Lung_01.tif", image)
    save(tmp_path / "Annotator 1 (biologist)" / "label masks modify" / "Human_Lung_01.tif", label)
    data = load_dataset("cryonuseg", root=tmp_path, split="all", tile=None)
    same(data[0], image, all=label > 0)
    assert set(np.unique(data[0].instances)) == {0, 2, 300}


@pytest.mark.parametrize("colour", [False, True])
def test_histology(tmp_path, colour):
    image, label = picture(), np.zeros((12, 10), np.uint8)
    label[2:8, 2:8], label[2, 2:8], label[7, 2:8] = 255, 150, 76
    label[11, 0] = 10  # neither nucleus nor edge
    shown = np.zeros((12, 10, 3), np.uint8)
    shown[label == 255], shown[label == 150], shown[label == 76] = (255, 255, 255), (0, 255, 0), (255, 0, 0)
    save(tmp_path / "data" / "x.png", image)
    save(tmp_path / "label" / "x.png", shown if colour else label)
    sample = load_dataset("histology", root=tmp_path, split="all", tile=None)[0]
    same(sample, image, all=label > 10)
    assert sample.instances is None


def pannuke_fold(root, images, masks, fold=1):
    for kind, array in (("images", images), ("masks", masks)):
        folder = root / f"Fold {fold}" / kind / f"fold{fold}"
        folder.mkdir(parents=True)
        np.save(folder / f"{kind}.npy", array)


def patches():
    """Two PanNuke patches: images [2, 256, 256, 3] and masks [2, 256, 256, 6]."""
    images = RNG.integers(0, 256, (2, 256, 256, 3)).astype(float)
    masks = np.zeros((2, 256, 256, 6))
    masks[0, 10:20, 10:20, 0], masks[0, 15:25, 15:25, 1] = 7, 7  # one id twice, overlapping by 25 pixels
    masks[0, 40:44, 40:44, 0], masks[0, 100:110, 100:110, 4] = 9, 3
    masks[..., 5] = masks[..., :5].max(-1) == 0
    return images, masks


def test_pannuke(tmp_path):
    images, masks = patches()
    pannuke_fold(tmp_path, images, masks)
    data = load_dataset("pannuke", root=tmp_path, split="fold1")
    assert data.ids == ("fold1_0000", "fold1_0001")  # 256 px tiles are the patches themselves
    classes = dict(zip(data.targets[1:], np.moveaxis(masks[0, ..., :5] > 0, -1, 0), strict=True))
    same(data[0], images[0], all=masks[0, ..., :5].max(-1) > 0, **classes)
    instances = data[0].instances
    assert instances.max() == 4  # four nuclei, told apart across the channels
    assert (instances > 0).sum() == 100 + 75 + 16 + 100 and len(
        set(instances[[12, 22, 42, 105], [12, 22, 42, 105]])
    ) == 4
    assert not any(mask.any() for mask in data[1].masks.values())  # no nucleus at all


def test_pannuke_from_the_hub_is_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    images, masks = patches()
    pannuke_fold(tmp_path / "official", images, masks)
    names = ["Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial"]  # as on the hub
    features = datasets.Features(
        {
            "image": datasets.Image(mode="RGB"),
            "instances": datasets.Sequence(datasets.Image(mode="1")),
            "categories": datasets.Sequence(datasets.ClassLabel(names=names)),
            "tissue": datasets.ClassLabel(names=["Breast", "Colon"]),
        }
    )
    rows = []
    for image, layers in zip(images, masks, strict=True):
        nuclei = [(c, layers[..., c] == n) for c in range(5) for n in np.unique(layers[..., c]) if n]
        rows.append(
            {
                "image": Image.fromarray(image.astype(np.uint8)),
                "instances": [Image.fromarray(mask) for _, mask in nuclei],
                "categories": [category for category, _ in nuclei],
                "tissue": 1,
            }
        )
    fold = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"fold1": fold}).save_to_disk(tmp_path / "copy")
    hub = load_dataset("pannuke", root=tmp_path / "copy", split="fold1", hub=True)
    for ours, theirs in zip(hub, load_dataset("pannuke", root=tmp_path / "official", split="fold1"), strict=True):
        same(ours, theirs.image, **theirs.masks)
        assert np.array_equal(ours.instances, theirs.instances) and ours.id == theirs.id


# ---- a reader's own data


def test_folder(tmp_path):
    image, labels, lymph = picture(), np.zeros((12, 10), np.uint8), np.zeros((12, 10), np.uint8)
    labels[1:3, 1:3], labels[4:6, 4:6], lymph[4:6, 4:6], lymph[8, 8] = 1, 2, 255, 255
    save(tmp_path / "images" / "a.jpg", image)
    save(tmp_path / "masks" / "a.png", labels)
    save(tmp_path / "masks" / "lymphocyte" / "a.png", lymph)
    save(tmp_path / "masks" / "dead" / "a.png", np.zeros((12, 10), np.uint8))
    data = load_dataset("folder", root=tmp_path, split="all", tile=None)
    seen = np.asarray(Image.open(tmp_path / "images" / "a.jpg"))
    same(data[0], seen, all=(labels > 0) | (lymph > 0), dead=lymph > 255, lymphocyte=lymph > 0)
    assert data.targets == ("all", "dead", "lymphocyte")
    assert np.array_equal(data[0].instances, labels)


def test_folder_with_splits_and_only_categories(tmp_path):
    one, two = np.zeros((12, 10), bool), np.zeros((12, 10), bool)
    one[3:5, 3:5], two[7, 7] = True, True
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.png", picture())
        save(tmp_path / split / "masks" / "one" / "a.png", one)
        save(tmp_path / split / "masks" / "two" / "a.png", two)
    sample = load_dataset("folder", root=tmp_path, split="val", tile=None)[0]
    same(sample, np.asarray(Image.open(tmp_path / "val/images/a.png")), all=one | two, one=one, two=two)
    assert sample.instances is None  # binary masks do not tell nuclei apart


def coco(root, annotations, size=(8, 9), name="labels.json", folder="images"):
    image = picture(*size)
    save(root / folder / "a.png", image)
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "categories": [{"id": 2, "name": "lymphocyte"}, {"id": 1, "name": "tumour"}],
        "annotations": [{"id": i, "image_id": 5, **a} for i, a in enumerate(annotations)],
    }
    (root / name).write_text(json.dumps(content))
    return image


def test_coco(tmp_path):
    square = np.zeros((8, 9), bool)
    square[2:5, 3:7] = True
    corner = np.zeros((8, 9), bool)
    corner[:2, :3] = True
    runs = [0, 2, 6, 2, 6, 2, 54]  # down the columns, background first: three columns of two
    image = coco(
        tmp_path,
        [
            {"category_id": 1, "segmentation": [[3, 2, 7, 2, 7, 5, 3, 5]]},
            {"category_id": 2, "segmentation": {"size": [8, 9], "counts": runs}},
        ],
    )
    data = load_dataset("coco", root=tmp_path, split="all", tile=None)
    assert data.targets == ("all", "tumour", "lymphocyte")  # in the order of the category ids
    same(data[0], image, all=square | corner, tumour=square, lymphocyte=corner)
    assert np.array_equal(data[0].instances, square + 2 * corner)


def test_coco_by_name_beside_the_image(tmp_path):
    coco(tmp_path, [], folder=".")
    coco(tmp_path, [{"category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 8]]}], name="other.json", folder=".")
    named = [load_dataset("coco", root=tmp_path, split="all", annotations=n) for n in ("labels.json", "other.json")]
    assert not named[0][0].masks["all"].any() and named[1][0].masks["all"].any()
    assert named[0].ids == named[1].ids and named[0].digest != named[1].digest
    there = load_dataset("coco", root=tmp_path, split="all", annotations=tmp_path / "other.json")
    assert there.digest == named[1].digest  # the folder is no part of it


def test_coco_codes_against_pycocotools():
    """Literals written by pycocotools 2.0.11: mask.encode(np.asfortranarray(mask))."""
    small, wide = np.zeros((8, 9), bool), np.zeros((100, 120), bool)
    small[2:5, 3:7], small[6, 0], wide[10:60, 20:90], wide[50, 100] = True, True, True, True
    assert decode_counts("61c02B00000>") == [6, 1, 19, 3, 5, 3, 5, 3, 5, 3, 19]
    code = {"size": [8, 9], "counts": "61c02B00000>"}
    assert np.array_equal(decode(code, 8, 9, ""), small)
    code = {"size": [100, 120], "counts": "jn1b1b1" + "0" * 137 + "`P1_Nkj0"}
    assert np.array_equal(decode(code, 100, 120, ""), wide)


def test_a_polygon_has_its_area_and_may_be_concave_or_leave_the_image():
    letter_l = [[1, 1, 4, 1, 4, 7, 8, 7, 8, 9, 1, 9]]
    mask = decode(letter_l, 10, 10, "")
    assert mask.sum() == 3 * 8 + 4 * 2 and mask[8, 7] and not mask[5, 5]
    assert decode([[-5, -5, 5, -5, 5, 5, -5, 5]], 10, 10, "").sum() == 25
    assert decode([[2, 2, 4, 2, 4, 4, 2, 4], [6, 6, 8, 6, 8, 8, 6, 8]], 10, 10, "").sum() == 8  # two parts
    turns = np.linspace(0, 2 * np.pi, 400)[:-1]
    circle = np.stack([50 + 30 * np.cos(turns), 50 + 30 * np.sin(turns)], 1)
    assert abs(decode([circle.ravel().tolist()], 100, 100, "").sum() / (np.pi * 900) - 1) < 0.005


# ---- image files


def test_harmless_image_formats_become_rgb(tmp_path):
    grey = RNG.integers(0, 256, (12, 10), np.uint8)
    opaque = np.dstack([picture(), np.full((12, 10), 255, np.uint8)])
    save(tmp_path / "images" / "a_grey.png", grey)
    save(tmp_path / "images" / "b_alpha.png", opaque)
    Image.fromarray(grey).convert("P").save(tmp_path / "images" / "c_palette.png")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"not an image")
    for name in ("a_grey", "b_alpha", "c_palette"):
        save(tmp_path / "masks" / f"{name}.png", grey > 99)
    data = load_dataset("folder", root=tmp_path, split="all", tile=None)
    assert len(data) == 3
    for sample, wanted in zip(data, (np.dstack([grey] * 3), opaque[..., :3], np.dstack([grey] * 3)), strict=True):
        same(sample, wanted, all=grey > 99)


# ---- tiles and manifests


class Blank:
    """A source of numbered pixels, by hand; counts how often it is read."""

    name, targets = "blank", ("all", "odd")

    def __init__(self, **shapes):
        self.shapes, self.ids, self.read_ids = shapes, list(shapes), []

    def shape(self, name):
        return self.shapes[name]

    def read(self, name):
        self.read_ids.append(name)
        height, width = self.shapes[name]
        instances = np.arange(height * width, dtype=np.int32).reshape(height, width)
        image = np.dstack([instances % 256, instances // 256 % 256, instances * 0]).astype(np.uint8)
        return Sample(image, {"all": instances > 0, "odd": instances % 2 == 1}, name, "blank", instances)


@pytest.mark.parametrize(
    "length, tile, starts",
    [
        (1000, 256, [0, 256, 512, 744]),
        (512, 256, [0, 256]),
        (513, 256, [0, 256, 257]),
        (256, 256, [0]),
        (200, 256, [0]),
        (3, 1, [0, 1, 2]),
    ],
)
def test_tile_starts(length, tile, starts):
    assert tile_starts(length, tile) == starts


@pytest.mark.parametrize("shape, tile", [((100, 70), 32), ((64, 64), 32), ((20, 90), 32), ((33, 31), 32)])
def test_tiles_cover_every_pixel_and_hold_what_their_name_says(shape, tile):
    data = Dataset(Blank(a=shape), "all", tile)
    seen = np.zeros(shape, int)
    for sample in data:
        y, x = map(int, sample.id.split("@")[1].split(","))
        height, width = sample.image.shape[:2]
        assert (height, width) == (min(tile, shape[0]), min(tile, shape[1]))
        assert (
            sample.instances[0, 0] == y * shape[1] + x
            and sample.instances[-1, -1] == (y + height - 1) * shape[1] + x + width - 1
        )
        assert np.array_equal(sample.masks["odd"], sample.instances % 2 == 1)
        assert np.array_equal(sample.image[..., 0], sample.instances % 256)
        seen[y : y + height, x : x + width] += 1
    assert seen.min() == 1
    assert (seen > 1).any() == any(side > tile and side % tile for side in shape)  # only the tail overlaps


def test_an_image_is_read_once_and_changes_stay_with_the_caller():
    source = Blank(a=(40, 40), b=(40, 40))
    data = Dataset(source, "all", 20)
    for index in RNG.permutation(len(data)):
        data[index].image[:] = 0
        data[index].masks["all"][:] = False
    assert sorted(source.read_ids) == ["a", "b"]
    assert data[3].image.any() and data[3].masks["all"].all()


def test_past_the_memory_budget_only_the_latest_image_is_kept(monkeypatch):
    monkeypatch.setattr(dataset_module, "CACHE_BYTES", 40 * 40 * (3 + 2 + 4))  # one image, its masks, its ids
    source = Blank(a=(40, 40), b=(40, 40), c=(40, 40))
    data = Dataset(source, "all", 20)
    assert [sample.id[0] for sample in data] == list("aaaabbbbcccc")
    assert source.read_ids == ["a", "b", "c"]
    assert data[8].id == "c@0,0" and data[0].id == "a@0,0"
    assert source.read_ids == ["a", "b", "c", "a"]


def test_index_and_sequence():
    data = Dataset(Blank(a=(4, 4), b=(4, 4)), "all", None)
    assert len(data) == 2 and data[-1].id == "b" and [s.id for s in data] == ["a", "b"]
    with pytest.raises(IndexError):
        data[2]


def test_fraction_is_exact_nested_and_in_order():
    data = Dataset(Blank(a=(640, 640), b=(640, 640)), "all", 64)
    assert len(data) == 200
    chosen = [Dataset(data.source, "all", 64, fraction).ids for fraction in (0.001, 0.1, 0.2, 0.5, 1.0)]
    assert [len(ids) for ids in chosen] == [1, 20, 40, 100, 200]
    for fewer, more in pairwise(chosen):
        assert set(fewer) < set(more) and [i for i in more if i in set(fewer)] == list(fewer)
    assert set(Dataset(data.source, "all", 64, 0.1, seed=1).ids) != set(chosen[1])


def test_manifest_by_hand():
    """Literals: if one of these changes, every published split changes with it."""
    data = Dataset(Blank(a=(4, 4), b=(4, 6)), "all", 4, fraction=0.67, seed=3)
    # sha256 of '["blank", "all", 4, ["b@0,0", "b@0,2"]]'
    assert data.manifest() == {
        "name": "blank",
        "split": "all",
        "tile": 4,
        "fraction": 0.67,
        "seed": 3,
        "options": {},
        "n": 2,
        "digest": "ab783f246b8d",
        "ids": ["b@0,0", "b@0,2"],
    }
    json.dumps(data.manifest())
    assert pick(["a", "b", "c", "d"], 0.5, 0) == ["a", "d"]
    assert pick(["a", "b", "c", "d"], 0.5, 2) == ["c", "d"]


def test_digest_tells_datasets_apart():
    source = Blank(a=(8, 8), b=(8, 8))
    ways = [("all", 8, 1.0, None), ("test", 8, 1.0, None), ("all", None, 1.0, None), ("all", 4, 1.0, None)]
    ways += [("all", 8, 0.5, None), ("all", 8, 1.0, {"shift": "blur"}), ("all", 8, 1.0, {"shift": "stain"})]
    digests = [Dataset(source, split, tile, part, 0, options).digest for split, tile, part, options in ways]
    assert len(set(digests)) == len(digests)
    assert Dataset(source, "all", 8, 1.0, seed=7).digest == digests[0]  # the same samples, however chosen


def test_datasets_travel_to_worker_processes(tmp_path):
    hovernet(tmp_path / "Train", ["a"], typed=True)
    images, masks = patches()
    pannuke_fold(tmp_path, images, masks)
    save(tmp_path / "images" / "a.png", picture())
    save(tmp_path / "masks" / "a.png", np.ones((12, 10), np.uint8))
    coco(tmp_path / "coco", [{"category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 8]]}])
    opened = [
        load_dataset("consep", root=tmp_path, tile=4),
        load_dataset("pannuke", root=tmp_path, split="fold1"),
        load_dataset("folder", root=tmp_path, split="all"),
        load_dataset("coco", root=tmp_path / "coco", split="all"),
    ]
    for data in opened:
        there = pickle.loads(pickle.dumps(data))
        assert there.digest == data.digest
        same(there[0], data[0].image, **data[0].masks)
    assert len(pickle.dumps(opened[1].source)) < 5_000  # paths travel, not arrays


def test_importing_data_is_light():
    code = "import sys, pgseg_lite.data; print({'torch', 'transformers', 'scipy', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert done.stdout.strip() == "set()"


def test_every_name_of_the_design_is_there():
    names = [
        "synthetic",
        "pannuke",
        "consep",
        "cpm15",
        "cpm17",
        "kumar",
        "cryonuseg",
        "histology",
        "folder",
        "coco",
    ]
    assert list(READERS) == names
    lines = describe_datasets().splitlines()
    assert [line.split()[0] for line in lines[1:]] == names and "test_diff" in lines[6] and "CoNSeP" in lines[3]


# ---- the real sets


@pytest.fixture(scope="module")
def consep(real_data):
    return [load_dataset("consep", root=real_data / "CoNSeP", split=split, tile=None) for split in ("train", "test")]


def test_real_consep_counts(consep, real_data):
    assert [len(data) for data in consep] == [27, 14]
    nuclei = 0
    for sample in (sample for data in consep for sample in data):
        assert sample.image.shape == (1000, 1000, 3)
        nuclei += np.count_nonzero(np.bincount(sample.instances.ravel())[1:])
        classes = [sample.masks[target] for target in consep[0].targets[1:]]
        assert np.array_equal(np.logical_or.reduce(classes), sample.masks["all"])
        assert sum(mask.sum() for mask in classes) == sample.masks["all"].sum()  # and no pixel has two classes
    assert nuclei == 24_332
    label = loadmat(real_data / "CoNSeP" / "Test" / "Labels" / "test_3.mat")
    sample = consep[1][2]
    assert sample.id == "test_3" and np.array_equal(sample.masks["epithelial"], label["type_map"] == 4)
    assert np.array_equal(sample.image, np.asarray(Image.open(real_data / "CoNSeP/Test/Images/test_3.png")))


def test_real_consep_tiles(consep):
    tiles = Dataset(consep[1].source, "test", 256)
    assert len(tiles) == 14 * 16
    whole, again = consep[1][0], np.zeros((1000, 1000, 3), np.uint8)
    for sample in (tiles[index] for index in range(16)):
        y, x = map(int, sample.id.removeprefix("test_1@").split(","))
        again[y : y + 256, x : x + 256] = sample.image
        assert np.array_equal(sample.masks["spindle"], whole.masks["spindle"][y : y + 256, x : x + 256])
    assert np.array_equal(again, whole.image)


def test_real_kumar_and_cpm15(real_data, monkeypatch):
    monkeypatch.setenv("PGSEG_DATA", str(real_data))
    sizes = {split: len(load_dataset("kumar", split=split, tile=None)) for split in READERS["kumar"].splits}
    assert sizes == {"train": 16, "test_same": 8, "test_diff": 6}
    assert all(0.05 < s.masks["all"].mean() < 0.6 for s in load_dataset("kumar", split="test_diff", tile=None))
    data = load_dataset("cpm15", split="all", tile=None)
    assert len(data) == 15 and all(0.02 < s.masks["all"].mean() < 0.6 for s in data)
    assert data[0].image.shape == (488, 643, 3) and np.count_nonzero(np.unique(data[0].instances)) > 300
    assert len(load_dataset("cpm15", split="all")) == 136


def test_hold_out_divides_by_image():
    data = Dataset(Blank(**{name: (64, 64) for name in "abcdefghij"}), "train", 32, fraction=0.5)
    rest, held = data.hold_out(0.3, seed=0)
    images = [{name.split("@")[0] for name in part.ids} for part in (rest, held)]
    assert sorted(rest.ids + held.ids) == sorted(data.ids) and len(images[1]) == 3
    assert not images[0] & images[1]
    assert held.ids == data.hold_out(0.3, seed=0)[1].ids != data.hold_out(0.3, seed=1)[1].ids
    assert len({data.digest, rest.digest, held.digest}) == 3
    assert [s.id for s in held] == list(held.ids) and data[0].id == data.ids[0]
    with pytest.raises(DataError, match=r"cannot hold out 1.5 of \d+ images; use a share"):
        data.hold_out(1.5)
