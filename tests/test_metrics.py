"""Masks as packed bits against torchmetrics, the empty-mask convention, and the group figures by hand."""

import numpy as np
import pytest

from pgseg_lite import metrics
from pgseg_lite.errors import SettingsError

SIZES = [(256, 256), (250, 250), (7, 9), (1, 1), (64, 3), (33, 31)]  # most are no multiple of 64 pixels


def random_masks(shape, seed=0, share=0.4):
    return np.random.default_rng(seed).random(shape) < share


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("size", SIZES)
def test_pack_keeps_every_pixel_and_adds_none(size):
    masks = random_masks((2, 3, *size))
    packed = metrics.pack(masks)
    pixels = size[0] * size[1]
    assert packed.dtype == np.uint64 and packed.shape == (2, 3, -(-pixels // 64))
    bits = np.unpackbits(packed.view(np.uint8), axis=-1)  # [2, 3, 64 * N]
    assert np.array_equal(bits[..., :pixels], masks.reshape(2, 3, pixels))
    assert not bits[..., pixels:].any()
    assert np.array_equal(metrics.areas(packed), masks.sum(axis=(-1, -2)))
    assert metrics.areas(metrics.pack(np.ones(size, bool))) == pixels  # a full mask ends with its last pixel


def test_pack_takes_any_memory_layout_and_a_single_mask():
    masks = random_masks((5, 40, 48))
    assert np.array_equal(metrics.pack(masks.transpose(0, 2, 1)), metrics.pack(masks.transpose(0, 2, 1).copy()))
    assert np.array_equal(metrics.pack(masks[::2, ::-1]), metrics.pack(masks[::2, ::-1].copy()))
    assert np.array_equal(metrics.pack(masks[3]), metrics.pack(masks)[3])


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.full((4, 4), 255, np.uint8), np.zeros(16, bool)])
def test_pack_refuses_what_is_not_a_stack_of_decisions(wrong):
    with pytest.raises(SettingsError, match="give it bool"):
        metrics.pack(wrong)


# ---------------------------------------------------------------- Dice and IoU


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_dice_and_iou_equal_torchmetrics(size, share):
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("torchmetrics.functional.segmentation")
    a, b = random_masks((20, *size), 1, share), random_masks((20, *size), 2, share)
    a[:, 0, 0] = b[:, -1, -1] = True  # nonempty: on empty masks the libraries disagree, see the next test
    a_t, b_t = (torch.from_numpy(masks)[:, None] for masks in (a, b))  # [M, 1, H, W]
    packed = metrics.pack(a), metrics.pack(b)
    options = {"num_classes": 1, "input_format": "one-hot"}
    dice = oracle.dice_score(a_t, b_t, **options).numpy()
    iou = oracle.mean_iou(a_t, b_t, **options).numpy()
    np.testing.assert_allclose(metrics.dice(*packed), dice, rtol=0, atol=1e-7)
    np.testing.assert_allclose(metrics.iou(*packed), iou, rtol=0, atol=1e-7)


@pytest.mark.parametrize("measure", [metrics.dice, metrics.iou])
def test_the_empty_mask_convention(measure):
    empty, some = metrics.pack(np.zeros((9, 9), bool)), metrics.pack(np.eye(9, dtype=bool))
    with np.errstate(all="raise"):
        assert measure(empty, empty) == 1.0
        assert measure(empty, some) == measure(some, empty) == 0.0
        assert measure(some, some) == 1.0


def test_torchmetrics_scores_two_empty_masks_otherwise():
    """Why the convention has to be said: the oracle leaves this case undefined."""
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("torchmetrics.functional.segmentation")
    empty = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    assert torch.isnan(oracle.dice_score(empty, empty, num_classes=1, input_format="one-hot")).all()


def test_dice_and_iou_by_hand_and_by_their_properties():
    a, b = np.zeros((2, 10, 10), bool)
    a[:, :4], b[:, 2:6] = True, True  # 40 and 40 pixels, 20 shared
    a, b = metrics.pack(a), metrics.pack(b)
    assert metrics.dice(a, b) == 0.5 and metrics.iou(a, b) == pytest.approx(20 / 60)
    many = metrics.pack(random_masks((30, 21, 17), 3))
    dice = metrics.dice(many[:, None], many[None])  # [30, 30]
    iou = metrics.iou(many[:, None], many[None])
    assert dice.shape == (30, 30) and (np.diag(dice) == 1).all()
    assert np.array_equal(dice, dice.T) and ((dice >= 0) & (dice <= 1)).all()
    np.testing.assert_allclose(dice, 2 * iou / (1 + iou), atol=1e-12)


def test_leading_axes_broadcast():
    predicted = metrics.pack(random_masks((2, 3, 16, 20), 4))  # [B, K, N]
    true = metrics.pack(random_masks((2, 16, 20), 5))  # [B, N]
    scores = metrics.dice(predicted, true[:, None])
    assert scores.shape == (2, 3)
    assert scores[1, 2] == metrics.dice(predicted[1, 2], true[1])


def test_masks_of_two_sizes_are_not_compared():
    one_word, many = metrics.pack(np.ones((8, 8), bool)), metrics.pack(np.ones((80, 80), bool))
    with pytest.raises(SettingsError, match="1 and 100 words"):
        metrics.dice(one_word, many)  # numpy alone would broadcast it


# ---------------------------------------------------------------- a group


def test_group_agreement_is_the_mean_iou_with_the_others():
    masks = metrics.pack(random_masks((4, 12, 12), 6))
    by_hand = [np.mean([metrics.iou(masks[i], masks[j]) for j in range(4) if j != i]) for i in range(4)]
    np.testing.assert_allclose(metrics.group_agreement(masks), by_hand, atol=1e-12)
    same = np.repeat(masks[:1], 5, axis=0)
    np.testing.assert_allclose(metrics.group_agreement(same), 1)
    assert (metrics.group_agreement(np.zeros((3, 3), np.uint64)) == 1).all()  # all empty: all agree


def test_a_group_of_one_has_no_agreement():
    alone = metrics.group_agreement(metrics.pack(random_masks((1, 8, 8))))
    assert alone.shape == (1,) and np.isnan(alone).all()


def test_flip_share_counts_the_pixels_without_unanimity():
    masks = np.zeros((3, 10, 10), bool)
    masks[:, 0], masks[0, 5], masks[1:, 6, :3] = True, True, True  # 10 agreed, 10 + 3 disputed
    assert metrics.flip_share(metrics.pack(masks), 100) == pytest.approx(0.13)
    assert metrics.flip_share(metrics.pack(~masks), 100) == pytest.approx(0.13)  # padding never counts
    assert metrics.flip_share(metrics.pack(masks[:1]), 100) == 0
    wild = random_masks((5, 30, 30), 7)
    expected = (wild.any(axis=0) & ~wild.all(axis=0)).mean()
    assert metrics.flip_share(metrics.pack(wild), 900) == pytest.approx(expected)


# ---------------------------------------------------------------- bootstrap


def test_bootstrap_means_are_means_of_resampled_images():
    values = np.random.default_rng(8).normal(size=(12, 3))
    samples = metrics.bootstrap_means(values, n=4000, seed=1)
    assert samples.shape == (4000, 3)
    np.testing.assert_allclose(samples.mean(axis=0), values.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(samples.std(axis=0), values.std(axis=0) / np.sqrt(12), rtol=0.05)
    assert np.array_equal(samples, metrics.bootstrap_means(values, n=4000, seed=1))
    assert not np.array_equal(samples, metrics.bootstrap_means(values, n=4000, seed=2))


def test_bootstrap_keeps_columns_paired():
    column = np.random.default_rng(9).normal(size=20)
    samples = metrics.bootstrap_means(np.stack([column, column + 0.5], axis=1), n=100)
    np.testing.assert_allclose(samples[:, 1] - samples[:, 0], 0.5)


def test_an_image_without_a_value_drops_out():
    values = np.array([[1.0, 5.0, np.nan], [np.nan, 5.0, np.nan], [3.0, np.nan, np.nan]])
    samples = metrics.bootstrap_means(values, n=500)
    first = samples[:, 0]
    missing = np.isnan(first)  # a resample of the second image alone has nothing to average
    assert 0 < missing.mean() < 0.15
    assert first[~missing].min() == 1 and first[~missing].max() == 3 and (first == 2).any()
    assert np.nanmax(np.abs(samples[:, 1] - 5)) == 0
    assert np.isnan(samples[:, 2]).all()
    low, high = metrics.interval(samples)
    assert (low[0], high[0], low[1], high[1]) == (1, 3, 5, 5)
    assert np.isnan([low[2], high[2]]).all()


@pytest.mark.filterwarnings("error")
def test_interval_is_the_middle_of_the_samples():
    samples = np.arange(1001.0)[:, None] * [1, 2]
    low, high = metrics.interval(samples, level=0.9)
    np.testing.assert_allclose([low, high], [[50, 100], [950, 1900]])
    samples[:, 1] = np.nan
    low, high = metrics.interval(samples, level=0.9)
    assert (low[0], high[0]) == pytest.approx((50, 950)) and np.isnan(low[1]) and np.isnan(high[1])


@pytest.mark.parametrize("wrong", [np.zeros(5), np.zeros((0, 3))])
def test_bootstrap_needs_images_by_columns(wrong):
    with pytest.raises(SettingsError, match="n_images"):
        metrics.bootstrap_means(wrong)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 repeats of 25 images from a known normal; the percentile bootstrap falls a little short of 95 %."""
    repeats = np.random.default_rng(10).normal(0.7, 0.1, size=(200, 25))
    covered = 0
    for values in repeats:  # a seed for all: the resamples may repeat, the images do not
        low, high = metrics.interval(metrics.bootstrap_means(values[:, None], n=500))
        covered += low[0] <= 0.7 <= high[0]
    assert 0.90 <= covered / 200 <= 0.98
