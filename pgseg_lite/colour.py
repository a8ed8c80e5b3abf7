"""Give images the colours of others: each channel the mean and the spread that it has in a reference set.

This is the transfer of Reinhard et al. (2001) with the three channels as they are. It looks at an image and at the
reference, and at no label, so it may be applied to images that nobody has annotated.
"""

import copy
from dataclasses import replace
from functools import cached_property

import numpy as np

STRIDE = 8  # every eighth pixel each way says enough about a mean


def statistics(samples):
    """Mean and standard deviation of each channel over all samples: [3], [3]."""
    pixels = np.concatenate([sample.image[::STRIDE, ::STRIDE].reshape(-1, 3) for sample in samples])
    return pixels.mean(axis=0), pixels.std(axis=0)


def recolour(image, mean, sd):
    """The image with this mean and standard deviation in each channel, but for what is clipped: uint8 in and out."""
    light = image.astype(np.float32)
    own_mean, own_sd = light.mean(axis=(0, 1)), light.std(axis=(0, 1))
    light = (light - own_mean) / np.maximum(own_sd, 1) * sd + mean
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)


class Recoloured:
    """A source whose images have the colours of `like`, a dataset; masks and ids stay. Whole images, before tiling."""

    def __init__(self, source, like):
        self.source, self.like = source, like
        self.name, self.targets, self.ids, self.shape = source.name, source.targets, source.ids, source.shape

    @cached_property
    def colours(self):  # when the first image is read: it means reading all of `like`
        return statistics(self.like[i] for i in range(len(self.like)))

    def read(self, id):
        sample = self.source.read(id)
        return replace(sample, image=recolour(sample.image, *self.colours))


def recoloured(data, like):
    """The dataset with every image in the colours of the dataset `like`; its digest says so."""
    found = copy.copy(data)
    found.source, found.options = Recoloured(data.source, like), data.options | {"colour": like.digest}
    found._cache, found._cached_bytes = {}, 0
    return found
