"""Colours of other images: what changes, what stays, and that a digest tells the two apart."""

import numpy as np
import pytest

import pgseg_lite as pg
from pgseg_lite.colour import Recoloured, recolour, recoloured, statistics
from pgseg_lite.experiments import find


@pytest.fixture(scope="module")
def pale():
    return pg.load_dataset("synthetic", split="test", size=2, shift="stain_pale")


@pytest.fixture(scope="module")
def reference():
    return pg.load_dataset("synthetic", split="train", size=3)


def test_an_image_gets_the_mean_and_spread_that_are_asked_for():
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal((200, 150, 180), (10, 20, 5), (64, 64, 3)), 0, 255).astype(np.uint8)
    found = recolour(image, np.array([120, 130, 140]), np.array([15, 10, 20])).astype(float)
    assert found.mean(axis=(0, 1)) == pytest.approx([120, 130, 140], abs=0.5)
    assert found.std(axis=(0, 1)) == pytest.approx([15, 10, 20], abs=0.5)


def test_its_own_colours_leave_an_image_as_it_is(reference):
    image = reference[0].image
    same = recolour(image, image.mean(axis=(0, 1)), image.std(axis=(0, 1)))
    assert np.abs(same.astype(int) - image).max() <= 1


def test_a_flat_image_stays_flat_and_finite():
    found = recolour(np.full((8, 8, 3), 90, np.uint8), np.full(3, 200.0), np.full(3, 30.0))
    assert (found == 200).all()


def test_a_dataset_keeps_masks_and_ids_and_says_that_its_colours_are_others(pale, reference):
    found = recoloured(pale, reference)
    mean, _ = statistics(reference)
    for before, after in zip(pale, found, strict=True):
        assert before.id == after.id and (before.masks["all"] == after.masks["all"]).all()
        assert np.abs(after.image.mean(axis=(0, 1)) - mean).max() < np.abs(before.image.mean(axis=(0, 1)) - mean).max()
    assert found.digest != pale.digest and found.digest != recoloured(pale, pale).digest
    assert not isinstance(pale.source, Recoloured), "the dataset that was given is as before"


def test_table_5_is_repeated_with_the_colours_of_the_training_images():
    tests = find("table5_colour").tests
    assert {"CoNSeP", "CPM15", "Kumar-same", "Kumar-diff"} <= set(tests)
    assert all(test.data.like == find("table5_colour").tests["CoNSeP"].data.like for test in tests.values())
    at_smoke = tests["CPM15"].data.at("smoke").load()
    assert at_smoke.name == "synthetic" and "colour" in at_smoke.options
