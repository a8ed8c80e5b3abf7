"""The loss terms against plain-numpy formulas, against autograd, and against what the paper claims of them."""

import numpy as np
import pytest
import torch

from pgseg_lite.errors import SettingsError, TrainingError
from pgseg_lite.losses import (
    CONSISTENCY_READINGS,
    GROUP_READINGS,
    GroupLoss,
    consistency_term,
    dice_loss,
    effective_weights,
    focal_loss,
    group_term,
)
from pgseg_lite.settings import TrainSettings


@pytest.fixture
def group():
    """Two groups of three phrasings at 6 x 5 pixels, the second with an empty mask; float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64) * 2
    presence = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, 5, generator=generator) > 0.6
    mask[1] = False
    return logits, presence, mask


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_segmentation_terms_equal_their_formulas(group):
    logits, presence, mask = group
    terms = GroupLoss(mask_weight=20, dice_weight=3, presence_weight=2, group="none")(logits, presence, mask)
    for b in range(2):
        y = mask[b].numpy().astype(float)
        for k in range(3):
            p = sigmoid(logits[b, k].numpy())
            pt = np.where(y == 1, p, 1 - p)
            alpha = np.where(y == 1, 0.25, 0.75)
            focal = (-alpha * (1 - pt) ** 2 * np.log(pt)).mean()
            dice = y.any() * (1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
            q = sigmoid(presence[b, k].item())
            bce = -np.log(q) if y.any() else -np.log(1 - q)
            assert terms.mask[b, k].item() == pytest.approx(focal, rel=1e-9)
            assert terms.dice[b, k].item() == pytest.approx(dice, rel=1e-9)
            assert terms.presence[b, k].item() == pytest.approx(bce, rel=1e-9)
            assert terms.seg[b, k].item() == pytest.approx(20 * focal + 3 * dice + 2 * bce, rel=1e-9)


def test_focal_stays_finite_where_a_log_of_the_probability_would_not():
    logits = torch.tensor([[[[-200.0, 200.0]]]], requires_grad=True)
    loss = focal_loss(logits, logits.sigmoid(), torch.tensor([[[[1.0, 0.0]]]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx((0.25 + 0.75) / 2 * 200)
    assert torch.isfinite(logits.grad).all()


def test_an_absent_target_is_left_to_focal_and_presence():
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    mask = torch.zeros(2, 8, 8)
    mask[0, :4] = 1
    terms = GroupLoss(mask_weight=0, presence_weight=0, group="none", consistency="none")(
        logits, torch.zeros(2, 3), mask
    )
    terms.total.backward()
    assert (terms.dice[0] > 0).all() and (terms.dice[1] == 0).all()
    assert (logits.grad[0] != 0).any() and (logits.grad[1] == 0).all()


def test_dice_of_an_empty_mask_is_defined_and_falls_with_the_prediction():
    empty = torch.zeros(1, 1, 4, 4)
    full, none = torch.full((1, 1, 4, 4), 50.0), torch.full((1, 1, 4, 4), -50.0)
    assert dice_loss(none.sigmoid(), empty).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(full.sigmoid(), empty).item() == pytest.approx(1 - 1 / 17)


@pytest.mark.parametrize("reading", GROUP_READINGS)
@pytest.mark.parametrize("consistency", CONSISTENCY_READINGS)
def test_gradcheck(reading, consistency):
    """Autograd agrees with finite differences wherever the loss is a function of its inputs.

    A stop-gradient makes it not one: what is detached is held fixed by differentiating the frozen form.
    """
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    presence = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 3, 2) > 0.5
    loss = GroupLoss(group=reading, consistency=consistency, mask_weight=2)
    terms = loss(logits, presence, mask)
    weights, anchor = terms.weights, logits.detach().clone()  # gradcheck moves logits in place

    def frozen(z, q):
        """The same gradient by the derivation in the docstrings, with every detached part a constant."""
        new = GroupLoss(group="none", consistency="none", mask_weight=2)(z, q, mask)
        total = (weights * new.seg).sum(-1).mean()
        if consistency == "first":
            total = total + 0.1 * (z[:, 1:] - anchor[:, :1]).square().mean()
        if consistency == "mean":
            total = total + 0.1 * (z - anchor.mean(1, keepdim=True)).square().mean()
        if consistency == "pairwise":
            pairs = [(z[:, i] - z[:, j]).square().mean() for i in range(3) for j in range(3) if i != j]
            total = total + 0.1 * sum(pairs) / len(pairs)
        return total

    assert torch.autograd.gradcheck(frozen, (logits, presence))
    expected = torch.autograd.grad(frozen(logits, presence), (logits, presence))
    got = torch.autograd.grad(terms.total, (logits, presence))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_printed_group_term_is_a_constant_equal_to_minus_the_variance():
    seg = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    for tau in (0.5, 1.0, 3.0):
        term = group_term(seg, tau)
        assert not term.requires_grad
        assert term.item() == pytest.approx((-5 / tau * seg.var(-1, correction=0)).mean().item())


@pytest.mark.parametrize("reading", ["none", "literal", "log-weights", "clamped", "soft"])
def test_effective_weights_are_the_gradient_of_the_total(reading):
    """Through L_seg the total's gradient is the effective weight of each phrasing, for every reading."""
    seg = (torch.rand(3, 4, dtype=torch.float64) * 3).requires_grad_()
    tau, lam = 0.7, 1.3
    weights = effective_weights(seg, reading, tau, lam)
    if reading in ("clamped", "soft"):
        total = (weights * seg).sum(-1).mean()
    else:
        total = seg.mean() + lam * group_term(seg, tau, through_weights=reading == "log-weights")
    if reading == "none":
        total = seg.mean()
    (gradient,) = torch.autograd.grad(total, seg)
    torch.testing.assert_close(gradient * len(seg), weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))


def test_log_weights_turn_negative_past_tau_over_lam_k_and_clamped_never_does():
    k, tau, lam = 3, 1.0, 1.0
    threshold = tau / (lam * k)
    for excess, sign in ((threshold * 0.99, 1), (threshold * 1.01, -1)):
        seg = torch.tensor([[1 + excess, 1 - excess / 2, 1 - excess / 2]])  # mean 1
        weight = effective_weights(seg, "log-weights", tau, lam)[0, 0]
        assert weight.sign() == sign
    assert effective_weights(torch.tensor([[9.0, 0.0, 0.0]]), "clamped", tau, lam).min() == 0


def test_log_weights_is_unbounded_below_and_clamped_is_not():
    worst = [torch.tensor([[scale, 0.0, 0.0]]) for scale in (1.0, 10.0, 100.0)]
    totals = [(seg.mean() + group_term(seg, 1.0, through_weights=True)).item() for seg in worst]
    assert totals[0] > totals[1] > totals[2] and totals[2] < -1000
    assert all((effective_weights(s, "clamped", 1.0, 1.0) * s).sum() >= 0 for s in worst)


def test_pairwise_consistency_equals_the_mean_over_all_ordered_pairs():
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    pairs = [(logits[:, i] - logits[:, j]).square().mean() for i in range(5) for j in range(5) if i != j]
    assert consistency_term(logits, "pairwise").item() == pytest.approx((sum(pairs) / len(pairs)).item())


def test_first_consistency_is_eq_8_per_pixel_and_leaves_the_first_phrasing_alone():
    logits = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    term = consistency_term(logits, "first")
    by_hand = sum((logits[0, i] - logits[0, 0]).square().sum() for i in (1, 2, 3)) / 3 / 9
    assert term.item() == pytest.approx(by_hand.item())
    term.backward()
    assert (logits.grad[0, 0] == 0).all() and (logits.grad[0, 1:] != 0).all()


def test_one_phrasing_has_nothing_to_be_consistent_with(group):
    logits, presence, mask = group
    terms = GroupLoss()(logits[:, :1], presence[:, :1], mask)
    assert terms.consistency == 0 and terms.group == 0
    assert terms.total.item() == pytest.approx(terms.seg.mean().item())


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda z, q: (z.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan")).double()), q), "mask"),
        (lambda z, q: (z, q.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("inf")).double())), "presence"),
    ],
)  # fmt: skip
def test_nan_and_inf_name_the_term_and_the_phrasing(group, spoil, named):
    logits, presence, mask = group
    logits, presence = spoil(logits, presence)
    terms = GroupLoss()(logits, presence, mask)
    texts = [["a", "b", "c"], ["nuclei", "all nuclei", "every nucleus"]]
    with pytest.raises(TrainingError, match=f"the {named} term .* for phrasing 'every nucleus'"):
        terms.check_finite(texts)
    GroupLoss()(*group).check_finite(texts)  # a healthy group passes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "median"}, "group reading 'median' is unknown; choose one of none, literal"),
        ({"consistency": "all"}, "consistency reading 'all' is unknown; choose one of none, first"),
        ({"tau": 0}, "tau is 0; a temperature must be above zero"),
        ({"lam": -1}, "lam is -1; a weight must be zero or more"),
        ({"lam": float("inf")}, "lam is inf; a weight must be zero or more, and finite"),
        ({"tau": float("inf")}, "tau is inf; a temperature must be above zero and finite"),
        ({"beta": float("nan")}, "beta is nan; a weight must be zero or more"),
        ({"dice_weight": -0.5}, "dice_weight is -0.5; a weight must be zero or more"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        GroupLoss(**settings)


def test_a_run_s_default_loss_is_the_default_loss():
    assert vars(TrainSettings().loss()) == vars(GroupLoss())


def test_shapes_that_do_not_fit():
    with pytest.raises(SettingsError, match=r"mask \[2, 4, 4\]; expected \[B, K, H, W\], \[B, K\], \[B, H, W\]"):
        GroupLoss()(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3), torch.zeros(2, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_have_the_loss_of_float32(dtype):
    """A sum over a large mask leaves fp16's range, and in bf16 it loses its digits."""
    logits = torch.full((1, 2, 512, 512), 4.0)
    presence, mask = torch.full((1, 2), 3.0), torch.ones(1, 512, 512, dtype=torch.bool)
    loss = GroupLoss()
    expected, found = loss(logits, presence, mask), loss(logits.to(dtype), presence.to(dtype), mask)
    torch.testing.assert_close(found.total, expected.total)
    assert found.total.dtype == torch.float32
