"""Bent visual prompts: what each kind does to a mask, a box and a point, and what a network does with them."""

import numpy as np
import pytest
from scipy import ndimage

from pgseg_lite.cli import main
from pgseg_lite.errors import DataError, ModelError, SettingsError
from pgseg_lite.results import load_result
from pgseg_lite.studies import run_study
from pgseg_lite.visual.adapters import NnInteractive, SamMed3D, overlapping, package, read_checkpoint
from pgseg_lite.visual.curves import curves, differences, tidy
from pgseg_lite.visual.network import CHANNELS, PromptNet, as_channels, bend_prompt, prompts_of, train
from pgseg_lite.visual.perturb import KINDS, SEVERITIES, perturb_boxes, perturb_mask, perturb_points
from pgseg_lite.visual.phantoms import ORGANS, make_phantom, make_phantoms
from pgseg_lite.visual.scans import load_scans
from pgseg_lite.visual.study import BENT, EXACT, ask_bent
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
        for kind, place in (("point", [-5, 3, 3]), ("box", [[-9, 2, 2], [-4, 5, 5]]), ("point", [900, 3, 3])):
            assert not as_channels({kind: np.array(place)}, mask.shape).any()  # outside, nothing is marked
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
    assert model.ask(new.windowed[:11, :19, :13], [{"point": [5, 5, 5]}]).shape == (1, 11, 19, 13)
    once, again = (train(phantoms, seed=1, steps=3, bent=True, width=4, quiet=True) for _ in range(2))
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- the study ----


class Copy:
    """Returns its mask prompts untouched."""

    def ask(self, image, prompts):
        assert image.min() >= -1 and image.max() <= 1
        return np.stack([prompt["mask"] for prompt in prompts])


def test_a_model_that_copies_scores_what_its_prompts_do(phantom):
    table = tidy(ask_bent(Copy(), [phantom], (2,), {"mask": tuple(KINDS)}, quiet=True))
    assert (table["dice"] == table["copied"]).all() and len(table) == (len(KINDS) + 1) * len(ORGANS)
    exact = table.query("kind == 'exact'")
    assert (exact["dice"] == 1).all() and (exact["distance"] == 0).all() and (exact["severity"] == 0).all()
    assert (table.query("kind in ['dilate', 'erode']")["dice"] < 1).all()


def test_the_study_runs_at_smoke_and_is_not_measured_twice(tmp_path):
    said = []
    table = run_study("imprecise", "smoke", tmp_path, said.append)
    again = run_study("imprecise", "smoke", tmp_path, said.append)
    assert table.equals(again) and "2 of them measured before" in said[-1]
    assert set(table["cell"]) == {EXACT, BENT} and set(table["prompt"]) == set(CHANNELS)
    assert set(table["kind"]) == {"exact", *KINDS} and len(table) == 2 * 2 * (3 + 2 * (len(KINDS) + 3 + 1))
    assert main(["experiment", "imprecise", "--profile", "smoke", "--segmenter", "sam3"]) == 2  # it has none
    facts = table.attrs["facts"]
    assert {one["split"] for one in facts["datasets"]} == {"train", "test"} and facts["seeds"] == [0]


def test_the_stored_study_has_three_seeds_and_its_curves_hold_their_means(repo):
    table = load_result("imprecise", repo / "results")
    assert len(table.attrs["stamp"]["seeds"]) >= 3 and table.attrs["stamp"]["profile"] == "lite"
    rows = tidy(table)
    dilated = rows.query("prompt == 'mask' and kind == 'dilate' and severity == 2")
    (exact,) = curves(dilated.query("cell == @EXACT"), resamples=200).itertuples()
    assert exact.low <= exact.value <= exact.high
    assert exact.value == pytest.approx(dilated.query("cell == @EXACT")["dice"].mean())
    (gained,) = differences(dilated, BENT, EXACT, resamples=200).itertuples()
    assert gained.value == pytest.approx(dilated.query("cell == @BENT")["dice"].mean() - exact.value)
    (none,) = differences(dilated, BENT, BENT, resamples=200).itertuples()
    assert none.value == none.low == none.high == 0 and none.verdict == "undecided"
    with pytest.raises(SettingsError, match="no way of training 'magic' here"):
        differences(dilated, "magic", EXACT)


# ---- adapters ----


def test_what_is_missing_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"no_such_package cannot be imported.*run `pip install it`"):
        package("no_such_package.inside", "it")
    for kind, name in ((NnInteractive, "nnInteractive"), (SamMed3D, "medim")):
        with pytest.raises(
            ModelError, match=f"{name} cannot be imported|not a trained nnInteractive|no such checkpoint"
        ):
            kind(tmp_path / "nothing")


def test_a_checkpoint_that_holds_more_than_weights_is_refused_and_not_run(tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return (tmp_path / "run").touch, ()

    torch.save({"model_state_dict": {"a": torch.zeros(2)}, "best": np.float64(0.5)}, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth")["best"] == 0.5
    torch.save({"model_state_dict": {}, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match=r"evil\.pth: not plain weights \(it asks for .*\); fetch it again"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()
    (tmp_path / "torn.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:300])
    with pytest.raises(ModelError, match=r"torn\.pth: not plain weights"):
        read_checkpoint(tmp_path / "torn.pth")
    with pytest.raises(ModelError, match="there is no such checkpoint"):
        read_checkpoint(tmp_path / "none.pth")


def test_a_cube_and_a_volume_overlap_where_they_should():
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    for corner in ((-2, 1, 3), (1, 1, 1), (3, -3, 4)):
        inside, of_cube = overlapping(corner, 4, volume.shape)
        cube = np.full((4, 4, 4), -1)
        cube[of_cube] = volume[inside]
        for place in np.argwhere(cube >= 0):
            assert cube[tuple(place)] == volume[tuple(place + corner)]
        assert (cube >= 0).sum() == volume[inside].size > 0


def asked_twice(model, phantom):
    """The masks for a mask, a point, no mask at all; a second time the same."""
    exact = prompts_of(phantom.mask("liver"))
    prompts = [{"mask": exact["mask"]}, {"point": exact["point"]}, {"mask": np.zeros_like(exact["mask"])}]
    first, again = (model.ask(phantom.image, prompts) for _ in range(2))
    assert first.dtype == bool and first.shape == (3, *phantom.image.shape)
    assert np.array_equal(first, again) and not first[2].any()
    with pytest.raises(SettingsError, match="was given scribble; give one of mask"):
        model.ask(phantom.image, [{"scribble": 1}])


def test_sam_med3d_with_small_random_weights(tmp_path, phantom):
    import torch

    medim = pytest.importorskip("medim")
    sizes = dict(encoder_embed_dim=24, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=[1],
                 prompt_embed_dim=48, image_size=32)  # fmt: skip
    weights = medim.create_model("SAM-Med3D", **sizes).state_dict()
    torch.save({"model_state_dict": weights}, tmp_path / "small.pth")
    asked_twice(SamMed3D(tmp_path / "small.pth", "cpu", **sizes), phantom)
    with pytest.raises(ModelError, match="weights of another architecture"):
        SamMed3D(tmp_path / "small.pth", "cpu", **sizes | {"encoder_depth": 3})
    torch.save({"state_dict": weights}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="no model_state_dict in it"):
        SamMed3D(tmp_path / "other.pth", "cpu", **sizes)


def test_nninteractive_with_small_random_weights(tmp_path, phantom):
    import json

    import torch

    trainer = pytest.importorskip("nnInteractive.trainer.nnInteractiveTrainer").nnInteractiveTrainer_stub
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    network = dict(
        n_stages=3, features_per_stage=[4, 8, 8], conv_op="torch.nn.modules.conv.Conv3d", kernel_sizes=[[3] * 3] * 3,
        strides=[[1] * 3, [2] * 3, [2] * 3], n_blocks_per_stage=[1] * 3, n_conv_per_stage_decoder=[1] * 2,
        conv_bias=True, norm_op="torch.nn.modules.instancenorm.InstanceNorm3d", norm_op_kwargs={"affine": True},
        dropout_op=None, dropout_op_kwargs=None, nonlin="torch.nn.LeakyReLU", nonlin_kwargs={},
    )  # fmt: skip
    unet = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    ops = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    architecture = dict(network_class_name=unet, arch_kwargs=network, _kw_requires_import=ops)
    configuration = dict(patch_size=[64] * 3, spacing=[1] * 3, architecture=architecture)
    plans = dict(dataset_name="small", plans_name="small", label_manager="LabelManager", transpose_forward=[0, 1, 2],
                 transpose_backward=[0, 1, 2], configurations={"3d_fullres": configuration})  # fmt: skip
    labels = dict(channel_names={"0": "CT"}, labels={"background": 0, "object": 1}, file_ending=".nii.gz")
    for name, content in (("plans", plans), ("dataset", labels), ("inference_session_class", {"point_radius": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    manager = PlansManager(plans)
    torch.manual_seed(0)
    small = trainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 8, 2, False)
    with torch.no_grad():
        for name, bias in small.named_parameters():
            if "seg_layers" in name and name.endswith("bias"):
                bias.copy_(torch.tensor([2.5, -2.5]))  # little is marked, so its zooming soon stops
    (tmp_path / "fold_0").mkdir()
    init = dict(trainer_name="nnInteractiveTrainer_stub", init_args={"configuration": "3d_fullres"})
    torch.save({"network_weights": small.state_dict()} | init, tmp_path / "fold_0" / "checkpoint_final.pth")
    model = NnInteractive(tmp_path, "cpu")
    asked_twice(model, phantom)
    assert model.ask(phantom.image, [{"box": [[10, 8, 8], [18, 20, 20]]}]).shape == (1, *phantom.image.shape)


def test_scans_are_read_turned_and_resampled(tmp_path):
    with pytest.raises(DataError, match=r"0 images in img/ and 0 in label/; give a folder"):
        load_scans(tmp_path)
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((12, 10, 8), np.uint8)  # x, y, z
    labels[2:4, 3:8, 1:5], labels[8:11, 3:8, 1:5] = 1, 2
    grey = np.where(labels == 1, 100, -50).astype(np.int16)
    turned = np.diag([-1.5, 1.5, 3.0, 1.0])  # x runs from right to left, slices are 3 mm thick
    for name, values in (("img", grey), ("label", labels)):
        (tmp_path / name).mkdir()
        nibabel.save(nibabel.Nifti1Image(values, turned), tmp_path / name / f"{name}01.nii.gz")
    (scan,) = load_scans(tmp_path, ("one", "two"))
    assert scan.name == "img01" and scan.labels.shape == (16, 10, 12) and set(np.unique(scan.labels)) == {0, 1, 2}
    assert np.argwhere(scan.mask("one"))[:, 2].min() == 8  # canonical: x to the right
    assert scan.image[scan.mask("one")].mean() > 50
    with pytest.raises(DataError, match="label 2 has no name; name 2 organs, not 1"):
        load_scans(tmp_path, ("one",))
    (tmp_path / "label" / "label01.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable NIfTI file"):
        load_scans(tmp_path)
