"""Scans of one's own, or BTCV's, as volumes that can be asked: a folder of images and one of labels, both NIfTI."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import DataError
from .adapters import package
from .phantoms import Volume

BTCV = ("spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta", "vena cava",
        "portal and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland")  # fmt: skip


def load_scans(root, organs=BTCV, spacing=1.5, limit=None):
    """Volumes of root/img/*.nii.gz and root/label/*.nii.gz, in the order of their names, as BTCV's training set lies.

    All axes are resampled to `spacing` in millimetres, which is what SAM-Med3D was trained on, so that a radius in
    voxels is the same length in every scan. `organs` names the labels 1, 2, ... Needs nibabel.
    """
    root = Path(root)
    images, labels = (sorted((root / name).glob("*.nii*")) for name in ("img", "label"))
    if not images or len(images) != len(labels):
        said = f"{len(images)} images in img/ and {len(labels)} in label/"
        raise DataError(f"{root}: {said}; give a folder with one .nii.gz in each for every scan")
    nibabel = package("nibabel", "nibabel")
    found = []
    for image, label in tqdm(list(zip(images, labels, strict=True))[:limit], desc="reading", unit="scan"):
        grey, marks = read(nibabel, image, spacing, order=1), read(nibabel, label, spacing, order=0)
        if grey.shape != marks.shape:
            raise DataError(
                f"{label}: {list(marks.shape)} voxels beside an image of {list(grey.shape)}; pair them right"
            )
        marks = np.rint(marks).astype(np.uint8)
        if marks.max() > len(organs):
            raise DataError(f"{label}: label {marks.max()} has no name; name {marks.max()} organs, not {len(organs)}")
        found.append(Volume(image.name.split(".")[0], grey.astype(np.float32), marks, tuple(organs)))
    return found


def read(nibabel, path, spacing, order):
    """One file as [D, H, W] = z, y, x, each axis in its usual direction."""
    from scipy.ndimage import zoom

    try:
        scan = nibabel.as_closest_canonical(nibabel.load(path))
        values, sizes = np.asanyarray(scan.dataobj), scan.header.get_zooms()[:3]
    except Exception as error:  # nibabel raises whatever the format's own reader does
        raise DataError(f"{path}: not a readable NIfTI file ({type(error).__name__}); fetch it again") from error
    if values.ndim != 3:
        raise DataError(f"{path}: {values.ndim} axes, not 3; give one volume a file")
    return zoom(values.astype(np.float32), [size / spacing for size in sizes], order=order).transpose(2, 1, 0)
