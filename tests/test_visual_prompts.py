"""Bent visual prompts: what each kind does to a mask, a box and a point, and what a network does with them."""

import numpy as np
import pytest
from scipy import ndimage

from pgseg_lite.errors import SettingsError
from pgseg_lite.visual.network import CHANNELS, PromptNet, as_channels, bend_prompt, prompts_of, train
from pgseg_lite.visual.perturb import KINDS, SEVERITIES, perturb_boxes, perturb_mask, perturb_points
from pgseg_lite.visual.phantoms import ORGANS, make_phantom, make_phantoms
from pgseg_lite.visual.surfaces import border, overlap, surface_distance

BOXES = [name for name, kind in KINDS.items() if kind.of_box]
POINTS = [name for name, kind in KINDS.items() if kind.of_point]
FLAT = ("missing slices", "wrong slice", "thick slices")  # nothing to do in one slice


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(0, "test")


@pytest.fixture(scope="module")
def organs(phantom):
    return {organ: (phantom.mask(organ), phantom.others(organ)) for organ in ("liver", "left kidney", "aorta")}


@pytest.fixture(scope="module")
def volumes(organs):
    """Voxels of each organ by kind and severity."""
    return {
        kind: np.array([[perturb_mask(mask, kind, r, 3, others).sum() for r in (0, *SEVERITIES)]
                        for mask, others in organs.values()])
        for kind in KINDS
    }  # fmt: skip


# ---- masks ----


@pytest.mark.parametrize("kind", KINDS)
def test_severity_zero_is_the_mask_itself_and_the_same_seed_the_same_mask(kind, organs):
    for mask, others in organs.values():
        kept = mask.copy()
        untouched = perturb_mask(mask, kind, 0, 5, others)
        assert np.array_equal(untouched, mask) and untouched is not mask
        for severity in (1, 4, 10):
            first, again, other = (perturb_mask(mask, kind, severity, seed, others) for seed in (5, 5, 6))
            assert first.dtype == bool and first.shape == mask.shape and np.array_equal(first, again)
            if kind in ("dilate", "erode", "hole", "leak"):
                assert np.array_equal(first, other)  # nothing about these is left to chance
        assert np.array_equal(mask, kept)
        assert not perturb_mask(np.zeros_like(mask), kind, 3, 5, others).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_bends_the_organs(kind, organs):
    for organ, (mask, others) in organs.items():
        bent = [perturb_mask(mask, kind, 1, seed, others) for seed in range(6)]
        if (kind, organ) != ("leak", "aorta"):  # which may touch nobody
            assert any(not np.array_equal(each, mask) for each in bent), organ


def test_more_severe_is_larger_for_dilate_and_leak_and_smaller_for_erode(volumes):
    for kind in ("dilate", "leak"):
        assert (np.diff(volumes[kind]) >= 0).all(), kind
    assert (np.diff(volumes["dilate"][:, :5]) > 0).all()
    for kind in ("erode", "missing slices"):
        assert (np.diff(volumes[kind]) <= 0).all(), kind
    assert (volumes["erode"][:, -1] == 0).all()


def test_a_hole_is_milder_with_a_larger_radius(volumes, organs):
    marked = volumes["hole"]
    assert KINDS["hole"].milder and (np.diff(marked[:, 1:]) >= 0).all()  # severity 0 stands apart: no hole
    assert (marked[:, 1] < marked[:, 0]).all() and (marked[:, -1] == marked[:, 0]).all()
    mask = organs["liver"][0]
    assert np.array_equal(perturb_mask(mask, "hole", 2), mask & ~perturb_mask(mask, "erode", 2))


@pytest.mark.parametrize("radius", [1, 2, 5, 8])
def test_dilate_and_erode_are_those_of_scipy_with_a_cube(radius):
    rng = np.random.default_rng(radius)
    for mask in (rng.random((9, 14, 17)) < 0.03, rng.random((9, 14, 17)) < 0.97):
        size = 2 * radius + 1
        assert np.array_equal(perturb_mask(mask, "dilate", radius), ndimage.maximum_filter(mask, size, mode="nearest"))
        assert np.array_equal(perturb_mask(mask, "erode", radius), ndimage.minimum_filter(mask, size, mode="nearest"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_2d_mask_is_a_volume_of_one_slice(kind, phantom):
    mask, others = phantom.mask("liver")[14], phantom.others("liver")[14]
    for severity in (1, 3, 7):
        for seed in range(3):
            flat = perturb_mask(mask, kind, severity, seed, others)
            assert np.array_equal(flat, perturb_mask(mask[None], kind, severity, seed, others[None])[0])
            assert kind not in FLAT or np.array_equal(flat, mask)


def test_shift_moves_by_up_to_the_radius_and_keeps_the_shape(organs):
    mask = organs["left kidney"][0]
    centre = np.argwhere(mask).mean(axis=0)
    steps = []
    for seed in range(40):
        moved = np.argwhere(perturb_mask(mask, "shift", 3, seed))
        assert len(moved) == mask.sum()
        steps.append(np.round(moved.mean(axis=0) - centre, 6))
    assert np.abs(steps).max() == 3 and (np.array(steps) == np.round(steps)).all()
    wrong = np.argwhere(perturb_mask(mask, "wrong slice", 4, 0)).mean(axis=0) - centre
    assert np.allclose(np.abs(wrong), (4, 0, 0))


def test_mix_is_one_of_four_kinds_each_a_quarter(organs):
    mask = organs["liver"][0]
    radii = range(1, 5)
    known = {kind: [perturb_mask(mask, kind, r).tobytes() for r in radii] for kind in ("dilate", "erode", "hole")}
    counts = dict.fromkeys(known, 0)
    for seed in range(200):
        bent = perturb_mask(mask, "mix", 4, seed).tobytes()
        for kind, masks in known.items():
            counts[kind] += bent in masks
    assert all(30 <= count <= 70 for count in counts.values()) and 30 <= 200 - sum(counts.values()) <= 70


def test_slices_go_missing_or_are_copied_and_a_leak_stays_in_organs(organs):
    mask, others = organs["liver"]
    marked = mask.any(axis=(1, 2))
    first, *inner, last = np.flatnonzero(marked)
    five = perturb_mask(mask, "missing slices", 5, 2)
    gone = marked & ~five.any(axis=(1, 2))
    assert gone.sum() == round(len(inner) / 2) and not gone[[first, last]].any()
    assert not (perturb_mask(mask, "missing slices", 8, 2) & ~five).any()  # what five miss, eight miss too
    thick = perturb_mask(mask, "thick slices", 3, 1)
    changes = np.flatnonzero((thick[1:] != thick[:-1]).any(axis=(1, 2))) + 1
    assert len(set(changes % 4)) == 1  # a new slice begins every four voxels
    leaked = perturb_mask(mask, "leak", 3, others=others) & ~mask
    assert leaked.any() and not (leaked & ~others).any()
    assert not (leaked & ~perturb_mask(mask, "dilate", 3)).any()


def test_a_jagged_boundary_changes_only_what_lies_near_it(organs):
    mask = organs["liver"][0]
    depth = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
    for reach in (1, 3):
        changed = perturb_mask(mask, "jagged", reach, 0) != mask
        assert changed.any() and depth[changed].max() <= reach + 0.5


# ---- boxes and points ----


@pytest.mark.parametrize("kind", BOXES)
def test_boxes_stay_boxes_inside_the_image(kind):
    shape = (20, 30, 40)
    boxes = np.array([[[5, 5, 5], [12, 20, 31]], [[0, 0, 0], [2, 3, 4]]])
    assert np.array_equal(perturb_boxes(boxes, kind, 0, shape), boxes)
    for severity in SEVERITIES:
        bent = perturb_boxes(boxes, kind, severity, shape, seed=1)
        assert np.array_equal(bent, perturb_boxes(boxes, kind, severity, shape, seed=1))
        assert (bent[:, 0] <= bent[:, 1]).all() and (bent >= 0).all() and (bent < shape).all()
        plane = perturb_boxes(boxes[..., 1:], kind, severity, shape[1:], seed=1)
        volume = perturb_boxes(boxes * [0, 1, 1], kind, severity, (1, *shape[1:]), seed=1)
        assert np.array_equal(plane, volume[..., 1:]) and (volume[..., 0] == 0).all()


def test_boxes_grow_and_shrink_as_masks_do():
    shape, box = (40, 40, 40), np.array([[[10, 12, 14], [29, 27, 31]]])
    for radius in (1, 4):
        for kind, sign in (("dilate", 1), ("erode", -1)):
            assert np.array_equal(perturb_boxes(box, kind, radius, shape), box + sign * radius * np.array([[-1], [1]]))
    small = perturb_boxes(np.array([[[10, 10, 10], [14, 12, 11]]]), "erode", 9, shape)
    assert np.array_equal(small, [[[12, 11, 10.5], [12, 11, 10.5]]])


@pytest.mark.parametrize("kind", POINTS)
def test_points_move_by_no_more_than_the_radius(kind):
    shape, points = (20, 30, 40), np.array([[10, 15, 20], [0, 0, 0], [19, 29, 39]])
    assert np.array_equal(perturb_points(points, kind, 0, shape), points)
    for severity in SEVERITIES:
        bent = perturb_points(points, kind, severity, shape, seed=2)
        assert np.array_equal(bent, perturb_points(points, kind, severity, shape, seed=2))
        assert np.abs(bent - points).max() <= severity and (bent >= 0).all() and (bent < shape).all()
        plane = perturb_points(points[:, 1:], kind, severity, shape[1:], seed=2)
        assert np.array_equal(plane, perturb_points(points * [0, 1, 1], kind, severity, (1, 30, 40), seed=2)[:, 1:])


MASK = np.ones((4, 4, 4), bool)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: perturb_mask(MASK.astype(int), "dilate", 1), r"got int64 \[4, 4, 4\]; give it bool"),
        (lambda: perturb_mask(MASK[0, 0], "dilate", 1), r"bool \[4\]; give it bool"),
        (lambda: perturb_mask(MASK, "melt", 1), "kind 'melt' is not one of those.*dilate, erode"),
        (lambda: perturb_mask(MASK, "dilate", 11), "severity 11 is none of 0 to 10"),
        (lambda: perturb_mask(MASK, "dilate", 1.5), "severity 1.5 is none"),
        (lambda: perturb_mask(MASK, "dilate", True), "severity True is none"),
        (lambda: perturb_mask(MASK, "leak", 1), "must know where the other organs are; give others="),
        (lambda: perturb_mask(MASK, "leak", 1, others=MASK[0]), r"others is bool \[4, 4\] beside"),
        (lambda: perturb_boxes([[[0, 0], [1, 1]]], "dilate", 1, (4, 4, 4)), r"for an image \[4, 4, 4\]; give boxes"),
        (lambda: perturb_boxes([[[3, 3], [1, 1]]], "dilate", 1, (4, 4)), "ends before it begins"),
        (lambda: perturb_boxes([[[0, 0], [1, 1]]], "hole", 1, (4, 4)), "'hole' is not one of those for this prompt"),
        (lambda: perturb_points([1, 1], "shift", 1, (4, 4)), r"got \[2\] for an image.*points \[N, d\]"),
        (lambda: perturb_points([[1, 1]], "dilate", 1, (4, 4)), "'dilate' is not one of those.*shift"),
        (lambda: surface_distance(MASK, MASK[0]), "beside a truth"),
        (lambda: surface_distance(MASK, MASK, (1, 1)), "does not fit 3 axes"),
        (lambda: as_channels({"scribble": 1}, (4, 4, 4)), "a prompt of scribble; give one or more of mask"),
        (lambda: as_channels({"mask": MASK[0]}, (4, 4, 4)), r"the mask is \[4, 4\], not \[4, 4, 4\]"),
        (lambda: make_phantom(0, "validation"), "no split 'validation'"),
        (lambda: make_phantom(0, shape=(8, 8, 8)), "no room for six organs"),
        (lambda: train([], steps=4), "4 steps on 0 volumes train nothing"),
    ],
)
def test_bad_input_gets_one_sentence(call, said):
    with pytest.raises(SettingsError, match=said):
        call()


# ---- phantoms ----


def test_phantoms_are_whole_and_the_same_each_time(phantom):
    again = make_phantom(0, "test")
    assert np.array_equal(phantom.labels, again.labels) and np.array_equal(phantom.image, again.image)
    assert not np.array_equal(phantom.labels, make_phantom(0, "train").labels)
    assert not np.array_equal(phantom.labels, make_phantom(1, "test").labels)
    for each in make_phantoms(3):
        assert (np.bincount(each.labels.ravel(), minlength=7)[1:] > 100).all()  # all six organs
        assert -1 <= each.windowed.min() and each.windowed.max() <= 1
        assert all(ndimage.label(each.mask(organ))[1] == 1 for organ in ORGANS)
    touching = [(ndimage.binary_dilation(phantom.mask(o)) & phantom.others(o)).any() for o in ORGANS]
    assert sum(touching) >= 2  # there is something to leak into


# ---- surfaces ----


def test_surface_distance_is_what_can_be_counted():
    truth = np.zeros((12, 12, 12), bool)
    truth[3:9, 3:9, 3:9] = True
    assert surface_distance(truth, truth) == 0 and overlap(truth, truth) == 1
    assert border(truth).sum() == 6**3 - 4**3
    moved = np.roll(truth, 2, axis=0)
    assert 0 < surface_distance(moved, truth) <= 2
    assert surface_distance(moved, truth, (3, 1, 1)) > surface_distance(moved, truth)
    plane, other = np.zeros((2, 5, 5), bool)
    plane[1, 1:4], other[2, 1:4] = True, True
    assert surface_distance(plane, other) == 1 == surface_distance(plane[None], other[None])


def test_an_empty_mask_counts_as_the_convention_says():
    empty, full = np.zeros((4, 5, 6), bool), np.ones((4, 5, 6), bool)
    assert overlap(empty, empty) == 1 and surface_distance(empty, empty) == 0
    for pair in ((empty, full), (full, empty)):
        assert overlap(*pair) == 0
        assert surface_distance(*pair) == pytest.approx(np.sqrt(9 + 16 + 25))
        assert surface_distance(*pair, spacing=(2, 1, 1)) == pytest.approx(np.sqrt(36 + 16 + 25))


# ---- the network ----


def test_exact_prompts_lie_where_they_should(organs):
    for mask, _ in organs.values():
        exact = prompts_of(mask)
        assert set(exact) == set(CHANNELS) and mask[tuple(exact["point"])]
        inside = np.argwhere(mask)
        assert np.array_equal(exact["box"], [inside.min(axis=0), inside.max(axis=0)])
        box = as_channels({"box": exact["box"]}, mask.shape)[1].astype(bool)
        assert not (mask & ~box).any() and box.any(axis=(1, 2)).sum() == np.ptp(inside[:, 0]) + 1
        bent = bend_prompt("box", exact["box"], "dilate", 2, 0, mask.shape)
        assert (bent[0] <= exact["box"][0]).all() and (bent[1] >= exact["box"][1]).all()


@pytest.fixture(scope="module")
def small():
    """Small phantoms and a network that has seen them for a few steps."""
    phantoms = make_phantoms(4, shape=(16, 24, 24))
    return phantoms, train(phantoms, seed=0, steps=60, width=6, quiet=True)


def test_a_short_training_learns_something_and_is_the_same_each_time(small):
    phantoms, model = small
    new, fits = make_phantom(9, "test", (16, 24, 24)), {}
    import torch

    torch.manual_seed(0)
    for name, each in (("new", PromptNet(width=6)), ("trained", model)):
        for kind in CHANNELS:
            fits[name, kind] = np.mean([overlap(each.ask(new.windowed, [{kind: prompts_of(new.mask(o))[kind]}])[0],
                                                new.mask(o)) for o in ("liver", "spleen", "stomach")])  # fmt: skip
    assert all(fits["trained", kind] > fits["new", kind] + 0.1 for kind in ("mask", "box")), fits
    assert fits["trained", "mask"] > 0.6, fits
    once, again = (train(phantoms, seed=1, steps=3, bent=True, width=4, quiet=True) for _ in range(2))
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
