"""Bad data and bad requests: what a person reads, word for word."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from tifffile import imwrite

from pgseg_lite.data import load_dataset
from pgseg_lite.errors import DataError

RGB = np.full((12, 10, 3), 200, np.uint8)
MASK = np.zeros((12, 10), np.uint8)
MASK[2:4, 2:4] = 1


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def save_mat(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


# ---- one good copy of each layout; a case then spoils it


def consep(root):
    for name in ("train_1", "train_2"):
        save(root / "Train" / "Images" / f"{name}.png", RGB)
        save_mat(root / "Train" / "Labels" / f"{name}.mat", inst_map=MASK, type_map=MASK)
    return {"name": "consep", "split": "train"}


def cpm15(root):
    save(root / "Images" / "image_00.png", RGB)
    save_mat(root / "Labels" / "image_00.mat", inst_map=MASK)
    return {"name": "cpm15", "split": "all"}


def folder(root):
    save(root / "images" / "a.png", RGB)
    save(root / "masks" / "a.png", MASK)
    return {"name": "folder", "split": "all"}


def histology(root):
    save(root / "data" / "a.png", RGB)
    save(root / "label" / "a.png", MASK * 255)
    return {"name": "histology", "split": "all"}


def cryonuseg(root):
    save(root / "tissue images" / "a.tif", RGB)
    save(root / "Annotator 1 (biologist)" / "label masks modify" / "a.tif", MASK)
    return {"name": "cryonuseg", "split": "all"}


def pannuke(root, images=(1, 256, 256, 3), masks=(1, 256, 256, 6), fill=200.0):
    for kind, shape in (("images", images), ("masks", masks)):
        (root / "Fold 1" / kind / "fold1").mkdir(parents=True, exist_ok=True)
        np.save(
            root / "Fold 1" / kind / "fold1" / f"{kind}.npy",
            np.full(shape, fill if kind == "images" else 0.0),
        )
    return {"name": "pannuke", "split": "fold1"}


IMAGE = {"id": 1, "file_name": "a.png", "height": 12, "width": 10}


def coco(root, segmentation=((1, 1, 5, 1, 5, 5),), **changes):
    save(root / "a.png", RGB)
    annotation = {"id": 8, "image_id": 1, "category_id": 1, "segmentation": segmentation}
    content = {
        "images": [IMAGE],
        "categories": [{"id": 1, "name": "tumour"}],
        "annotations": [annotation],
    }
    (root / "labels.json").write_text(json.dumps(content | changes))
    return {"name": "coco", "split": "all"}


GOOD = [consep, cpm15, folder, histology, cryonuseg, pannuke, coco]


@pytest.mark.parametrize("layout", GOOD, ids=lambda f: f.__name__)
def test_the_unspoilt_copy_is_read(layout, tmp_path):
    assert len(list(load_dataset(root=tmp_path, **layout(tmp_path)))) > 0


def then(layout, *spoil, **more):
    """A case: the good layout, then what spoils it (called with root), then more for load_dataset."""

    def build(root):
        request = layout(root) | more
        for step in spoil:
            step(root)
        return request

    return build


def write(path, array, **options):
    return lambda root: save(root / path, array, **options)


def mat(path, **arrays):
    return lambda root: save_mat(root / path, **arrays)


def raw(path, content):
    return lambda root: (root / path).write_bytes(content)


def gone(path):
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def cut(path, share=0.5):
    def spoil(root):
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[: int(len(content) * share)])

    return spoil


def pages(path):
    def spoil(root):
        page = Image.fromarray(RGB)
        page.save(root / path, save_all=True, append_images=[page, page])

    return spoil


def deep(path):
    """A 16-bit RGB PNG, which PIL cannot write: the header says 16, the rest is real."""

    def spoil(root):
        import struct
        import zlib

        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        rows = b"".join(b"\0" + bytes(10 * 6) for _ in range(12))
        header = struct.pack(">IIBBBBB", 10, 12, 16, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (root / path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)

    return spoil


HALF_CLEAR = np.dstack([RGB, np.repeat([[255], [0]], 6, axis=0).repeat(10, axis=1).astype(np.uint8)])
PLANES = np.full((3, 12, 10), 999, np.uint16)
FOLD = "Fold 1/{0}/fold1/{0}.npy"

CASES = {
    # -- the image files
    "an image that is not one": (
        then(folder, raw("images/a.png", b"GIF? no")),
        "{root}/images/a.png: no readable image (cannot identify image file",
    ),
    "a truncated image": (
        then(
            folder,
            write("images/a.png", np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)),
            cut("images/a.png"),
        ),
        "fetch or export it again",
    ),
    "16-bit colour": (
        then(folder, deep("images/a.png")),
        "{root}/images/a.png: more than 8 bits a channel; save it as 8-bit RGB, scaled as it should look",
    ),
    "16-bit grey": (
        then(folder, write("images/a.png", np.full((12, 10), 40_000, np.uint16))),
        "{root}/images/a.png: more than 8 bits a channel; save it as 8-bit RGB, scaled as it should look",
    ),
    "16-bit colour in planes": (
        then(
            folder,
            gone("images/a.png"),
            lambda root: imwrite(root / "images" / "a.tif", PLANES, photometric="rgb", planarconfig="separate"),
        ),
        "a.tif: more than 8 bits a channel; save it as 8-bit RGB, scaled as it should look",
    ),
    "transparency": (
        then(folder, write("images/a.png", HALF_CLEAR)),
        "{root}/images/a.png: 50.0% of its pixels are transparent; save it without alpha",
    ),
    "an image stack": (
        then(cryonuseg, pages("tissue images/a.tif")),
        "{root}/tissue images/a.tif: holds 3 pages; save the one that is meant as a file",
    ),
    # -- the label files
    "a mask of another size": (
        then(folder, write("masks/a.png", MASK[:11, :9])),
        "{root}/masks/a.png: mask is 9 x 11 but the image a.png is 10 x 12; make both the same size",
    ),
    "an inst_map of another size": (
        then(cpm15, mat("Labels/image_00.mat", inst_map=MASK[:5])),
        "/image_00.mat: inst_map is 10 x 5 but the image image_00.png is 10 x 12; make both the same size",
    ),
    "a mask in colour": (
        then(folder, write("masks/a.png", np.dstack([MASK, MASK, MASK * 3]))),
        "{root}/masks/a.png: a mask in colour; save it as grey, one number a pixel",
    ),
    "a missing label": (
        then(consep, gone("Train/Labels/train_2.mat")),
        "{root}/Train/Labels: no train_2.mat for the image train_2.png; add it or drop the image",
    ),
    "a category without its mask": (
        then(folder, write("images/b.png", RGB), write("masks/b.png", MASK), write("masks/dead/a.png", MASK)),
        "{root}/masks/dead: no b.png for the image b.png; add it or drop the image",
    ),
    "a missing key": (
        then(consep, mat("Train/Labels/train_1.mat", inst_map=MASK, inst_type=MASK)),
        "/train_1.mat: no 'type_map' in it, it holds inst_map, inst_type; fetch the official labels again",
    ),
    "an unknown class": (
        then(consep, mat("Train/Labels/train_1.mat", inst_map=MASK, type_map=MASK * 9)),
        "{root}/Train/Labels/train_1.mat: type_map holds class 9, but they end at 7; fetch it again",
    ),
    "labels with fractions": (
        then(cpm15, mat("Labels/image_00.mat", inst_map=MASK * 0.5)),
        "image_00.mat: inst_map holds fractions or negative numbers; labels are whole numbers from 0",
    ),
    "labels with one axis too many": (
        then(cpm15, mat("Labels/image_00.mat", inst_map=np.dstack([MASK, MASK]))),
        "image_00.mat: inst_map is uint8 of shape (12, 10, 2); it must be whole numbers [H, W]",
    ),
    "a truncated .mat": (
        then(cpm15, cut("Labels/image_00.mat", 0.7)),
        "{root}/Labels/image_00.mat: no readable MATLAB file (",
    ),
    "an empty .mat": (
        then(cpm15, raw("Labels/image_00.mat", b"")),
        "{root}/Labels/image_00.mat: no readable MATLAB file (",
    ),
    "a label of another kind": (
        then(histology, write("label/a.png", MASK * 7)),
        "{root}/label/a.png: has none of the grey values 255, 150 and 76; fetch the official file",
    ),
    # -- PanNuke
    "a truncated npy": (
        then(pannuke, cut(FOLD.format("masks"))),
        "{root}/Fold 1/masks/fold1/masks.npy: truncated or no plain .npy file (",
    ),
    "an npy with pickled objects": (
        then(pannuke, lambda root: np.save(root / FOLD.format("images"), np.array([{}], object))),
        "{root}/Fold 1/images/fold1/images.npy: truncated or no plain .npy file (",
    ),
    "a missing npy": (
        then(pannuke, gone(FOLD.format("masks"))),
        "{root}/Fold 1/masks/fold1/masks.npy: truncated or no plain .npy file ([Errno 2] No such file",
    ),
    "masks of another length": (
        lambda root: pannuke(root, masks=(2, 256, 256, 6)),
        "masks.npy: has shape (2, 256, 256, 6) and not (1, 256, 256, 6); fetch this fold again",
    ),
    "a fold that is not there": (
        then(pannuke, split="fold2"),
        "{root}: looked for Fold 2/images/fold2, but {here} holds Fold 1; correct root",
    ),
    "a hub copy that is none": (
        then(pannuke, hub=True),
        "{root}: fold1 cannot be used (",
    ),
    # -- your own data
    "an empty folder": (
        then(folder, gone("images/a.png")),
        "{root}/images: looked for png, tif, jpg or bmp and found nothing; add images",
    ),
    "no masks": (
        then(folder, gone("masks/a.png")),
        "{root}/masks: looked for masks (.png, .tif, .tiff, .bmp) and found none; add them",
    ),
    "masks as jpg": (
        then(folder, gone("masks/a.png"), write("masks/a.jpg", MASK)),
        "{root}/masks: looked for masks (.png, .tif, .tiff, .bmp) and found none; add them",
    ),
    "two images of one name": (
        then(folder, write("images/a.jpg", RGB)),
        "{root}/images/a.png: a.jpg has the same name; rename one of them",
    ),
    "a split that the folder lacks": (
        then(folder, split="train"),
        "{root}/train: looked for images and masks, found no such folder; splits in root: all",
    ),
    "COCO that is no JSON": (
        then(coco, raw("labels.json", b"{'images': ")),
        "{root}/labels.json: no usable COCO (Expecting property name enclosed in double quotes",
    ),
    "COCO without images": (
        then(coco, raw("labels.json", b'{"annotations": []}')),
        "{root}/labels.json: no usable COCO (no 'images'); export it with segmentations",
    ),
    "COCO with a lone list": (
        then(coco, raw("labels.json", b"[1, 2]")),
        "{root}/labels.json: no usable COCO (list indices must be integers",
    ),
    "two JSON files": (
        then(coco, raw("more.json", b"{}")),
        "{root}: looked for one *.json and found a.png, labels.json, more.json; pass annotations=",
    ),
    "annotations= that is not there": (
        then(coco, annotations="val.json"),
        "{root}/val.json: no usable COCO ([Errno 2] No such file",
    ),
    "an annotation of no listed category": (
        lambda root: coco(root, categories=[{"id": 2, "name": "tumour"}]),
        "{root}/labels.json: annotation 8 has an image_id or category_id that is not listed; export it again",
    ),
    "a category called all": (
        lambda root: coco(root, categories=[{"id": 1, "name": "all"}]),
        "{root}/labels.json: no image, a category twice, or one called 'all'; correct it",
    ),
    "an image that COCO lists in vain": (
        then(coco, gone("a.png")),
        "{root}/labels.json: the image a.png is neither in root nor in its folder images; correct the names",
    ),
    "two images of one id": (
        lambda root: coco(root, images=[IMAGE, IMAGE]),
        "{root}/labels.json: two images have the same id, as where exports were joined; number them anew",
    ),
    "an image with two entries": (
        lambda root: coco(root, images=[IMAGE, IMAGE | {"id": 2}]),
        "{root}/labels.json: two images are called a; give each its own file name and one entry",
    ),
    "an image of another size than COCO says": (
        then(coco, write("a.png", RGB[:9])),
        "{root}/a.png: is 10 x 9 but its entry in the JSON says 10 x 12; export it again",
    ),
    "a polygon of two points": (
        lambda root: coco(root, segmentation=[[1, 1, 2, 2]]),
        "annotation 8: segmentation not readable (no polygon of at least three points); draw it again",
    ),
    "a polygon with an odd number": (
        lambda root: coco(root, segmentation=[[1, 1, 5, 1, 5, 5, 3]]),
        "annotation 8: segmentation not readable (cannot reshape",
    ),
    "a flat polygon": (
        lambda root: coco(root, segmentation=[1, 1, 5, 1, 5, 5]),
        "annotation 8: segmentation not readable (object of type 'int' has no len()); draw it again",
    ),
    "a run-length code of another size": (
        lambda root: coco(root, segmentation={"size": [12, 10], "counts": [100]}),
        "annotation 8: segmentation not readable (a run-length code that does not fill 10 x 12); draw it",
    ),
    # -- the request
    "an unknown name": (
        then(consep, name="consept"),
        "there is no dataset 'consept'; choose one of synthetic, pannuke, consep, cpm15, cpm17, kumar,",
    ),
    "an unknown split": (
        then(cpm15, split="train"),
        "cpm15 has no split 'train'; choose one of all",
    ),
    "an unknown option": (
        then(consep, shift="blur"),
        "consep has no option 'shift'; it has: none",
    ),
    "a fraction of nothing": (
        then(consep, fraction=0),
        "fraction is 0; give a number above 0 and up to 1",
    ),
    "a fraction in percent": (
        then(consep, fraction=10),
        "fraction is 10; give a number above 0 and up to 1",
    ),
    "a fraction in words": (
        then(consep, fraction="0.1"),
        "fraction is '0.1'; give a number above 0 and up to 1",
    ),
    "a tile of no size": (then(consep, tile=0), "tile is 0; give a whole number of at least 1"),
    "a tile of two sizes": (
        then(consep, tile=(256, 256)),
        "tile is (256, 256); give a whole number of at least 1",
    ),
    # -- the root
    "a root that is not there": (
        then(consep, gone("Train"), lambda root: root.rmdir()),
        "{root}: no such folder; correct root (or PGSEG_DATA) for consep",
    ),
    "a root one level too high": (
        lambda root: consep(root / "CoNSeP"),
        "{root}: looked for train, but {here} holds CoNSeP; correct root",
    ),
    "a root with another layout": (
        then(cpm15, name="consep", split="test"),
        "{root}: looked for test, but {here} holds Images, Labels; correct root",
    ),
    "a split without its labels": (
        then(consep, gone("Train/Labels")),
        "{root}/Train: looked for Labels, but Train holds Images; correct root",
    ),
    "a synthetic root": (
        lambda root: {"name": "synthetic", "split": "train"},
        "synthetic paints its images and reads nothing from {root}; leave root away",
    ),
}


def message(call):
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) > 20
    return text


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_sentence(case, tmp_path):
    build, expected = CASES[case]
    root = tmp_path / "data"
    root.mkdir()
    request = build(root)
    assert expected.format(root=root, here=root.name) in message(lambda: list(load_dataset(root=root, **request)))


def test_data_given_nowhere(monkeypatch):
    monkeypatch.delenv("PGSEG_DATA", raising=False)
    wanted = "folder: no data given; pass root=, the folder of its files"
    assert message(lambda: load_dataset("folder", split="all")) == wanted
    wanted = wanted.replace("folder:", "consep:") + ", or set PGSEG_DATA to the folder that holds CoNSeP"
    assert message(lambda: load_dataset("consep")) == wanted


def test_environment_without_the_dataset(monkeypatch, tmp_path):
    for name in [f"set_{number}" for number in range(1, 12)]:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path))
    wanted = "looked for Kumar, but env holds set_1, set_2, set_3, set_4, set_5, set_6 and 5 more; correct root"
    assert wanted.replace("env", tmp_path.name) in message(lambda: load_dataset("kumar"))
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path / "nowhere"))
    assert "nowhere: no such folder; correct root (or PGSEG_DATA) for kumar" in message(lambda: load_dataset("kumar"))
