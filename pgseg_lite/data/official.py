"""Six public datasets whose layout is a folder of images beside a folder of label files of the same names.

HoVer-Net's layout, `Images/NAME.png|tif` and `Labels/NAME.mat` with `inst_map` [H, W] (0 is background):
  consep: `Train|Test/...`, 41 tiles of 1000 px, colorectal, 40x, with `type_map`: 1 other, 2 inflammatory, 3 healthy
    and 4 malignant epithelial, 5 fibroblast, 6 muscle, 7 endothelial; as usual 3+4 are read as epithelial and 5+6+7
    as spindle. Research use. Graham et al., HoVer-Net, Medical Image Analysis 58:101563, 2019.
  kumar: `train|test_same|test_diff/...`, 16 + 8 + 6 tiles of 1000 px, 7 organs, 40x. CC BY-NC-SA 4.0.
    Kumar et al., IEEE Transactions on Medical Imaging 36(7):1550-1560, 2017.
  cpm15: one split, 15 tiles of 400 to 1000 px, brain tumours, 20x and 40x. cpm17: `train|test/...`, 32 + 32 tiles
    of 500 to 600 px, four tumours. Research use. Vu et al., Frontiers in Bioeng. Biotech. 7:53, 2019.
cryonuseg: `tissue images/*.tif`, label maps in `Annotator 1 (biologist)/label masks modify/*.tif`; 30 tiles of 512 px,
  ten organs, frozen sections, 40x. Mahbod et al., Computers in Biology and Medicine 132:104349, 2021.
histology, that of TransNuSeg: `data/*.png`, `label/*.png`. The label in grey is 255 in a nucleus, 150 on its edge and
  76 on an edge shared by touching nuclei (in colour: white, green, red). All three are read as nucleus, since the edge
  is its rim; TransNuSeg's own semantic mask takes only 255. He et al., TransNuSeg, MICCAI 2023.
"""

from pathlib import Path

import numpy as np

from ..errors import DataError
from .files import FileSource, as_labels, opened, pair_up, read_labels, subfolder

CONSEP = {"inflammatory": (2,), "epithelial": (3, 4), "spindle": (5, 6, 7), "other": (1,)}


def decode_map(labels: Path, image: Path, shape):
    instances = read_labels(labels, image, shape)  # [H, W]
    return {"all": instances > 0}, instances


def decode_consep(labels: Path, image: Path, shape):
    instances, types = (read_labels(labels, image, shape, key) for key in ("inst_map", "type_map"))  # [H, W]
    if types.max(initial=0) > 7:
        raise DataError(f"{labels}: type_map holds class {types.max()}, but they end at 7; fetch it again")
    nuclei = instances > 0
    return {"all": nuclei} | {target: nuclei & np.isin(types, codes) for target, codes in CONSEP.items()}, instances


def decode_histology(labels: Path, image: Path, shape):
    with opened(labels) as file:  # in grey red becomes 76 and green 150
        grey = as_labels(np.array(file.convert("L")), f"{labels}: mask", image, shape)  # [H, W]
    nuclei = np.isin(grey, (255, 150, 76))
    if grey.any() and not nuclei.any():
        raise DataError(f"{labels}: has none of the grey values 255, 150 and 76; fetch the official file")
    return {"all": nuclei}, None


HOVERNET = ("Images", "Labels", ".mat")
LAYOUTS = {  # folder of images, folder of labels, ending of labels, how to read them
    "consep": (*HOVERNET, decode_consep),
    "kumar": (*HOVERNET, decode_map),
    "cpm15": (*HOVERNET, decode_map),
    "cpm17": (*HOVERNET, decode_map),
    "cryonuseg": ("tissue images", "Annotator 1 (biologist)/label masks modify", ".tif", decode_map),
    "histology": ("data", "label", ".png", decode_histology),
}


def open_official(name: str, root: Path, split: str) -> FileSource:
    images, labels, ending, decode = LAYOUTS[name]
    here = root if split == "all" else subfolder(root, split)
    pairs = pair_up(subfolder(here, images), subfolder(here, labels), (ending,))
    return FileSource(name, ("all", *CONSEP) if name == "consep" else ("all",), pairs, decode)
