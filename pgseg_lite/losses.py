"""The three terms of the paper, for one prompt group: an image, K phrasings, one mask.

    L = 1/K sum_i L_seg(i)  +  lam * L_group  +  beta * L_cons                               (eq. 9)

Every group of a batch has one mask [H, W] and K predicted maps. `B` counts groups here: an image with
five targets is five of them. All batch terms are means over B.
"""

from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F

from .errors import Diverged, SettingsError

GROUP_READINGS = ("none", "literal", "log-weights", "clamped", "soft")
CONSISTENCY_READINGS = ("none", "first", "pairwise", "mean")
FOCAL_ALPHA = 0.25  # of pixels inside the mask; gamma is 2, a square


def focal_loss(logits, p, target):
    """Mean over pixels of -alpha_t (1 - p_t)^2 log p_t. logits and p = sigmoid [B, K, H, W], target [B, 1, H, W]."""
    cross_entropy = F.softplus(logits) - logits * target  # -log p_t
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return (alpha * (p - target).square() * cross_entropy).mean((-2, -1))  # [B, K], |p - target| is 1 - p_t


def dice_loss(p, target):
    """1 - (2 sum py + 1) / (sum p + sum y + 1). The ones keep an empty mask's loss defined and smooth."""
    overlap = (p * target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (p.sum((-2, -1)) + target.sum((-2, -1)) + 1)  # [B, K]


def presence_loss(presence_logits, target):
    """Cross-entropy of "the target is in this image". presence_logits [B, K], target [B, 1, H, W]."""
    present = is_present(target).expand_as(presence_logits)
    return F.binary_cross_entropy_with_logits(presence_logits, present, reduction="none")  # [B, K]


def is_present(target):
    """1 where a mask has a pixel, else 0. [B, 1, H, W] -> [B, 1]"""
    return target.flatten(1).amax(1, keepdim=True)


def relative_quality(seg):
    """Eq. 4 and 5: q_i = -L_seg(i), less its mean over the group. seg [B, K], detached."""
    quality = -seg.detach()
    return quality - quality.mean(-1, keepdim=True)


def group_term(seg, tau, through_weights=False):
    """Eq. 6 and 7: -sum_i q~_i log w_i. As printed w is detached and the term is a constant, -(K/tau) Var(L)."""
    log_weights = F.log_softmax(-seg / tau, dim=-1)  # [B, K]
    if not through_weights:
        log_weights = log_weights.detach()
    return -(relative_quality(seg) * log_weights).sum(-1).mean()


def effective_weights(seg, reading, tau, lam):
    """The weight with which each phrasing's L_seg is really trained, [B, K], detached.

    Through log w the log-sum-exp drops out, because the relative qualities sum to zero, and what is left
    is 1/K + lam q~_i / tau: negative, so ascent, for a phrasing much worse than its group.
    """
    seg = seg.detach()
    uniform = torch.full_like(seg, 1 / seg.shape[-1])
    if reading in ("none", "literal"):
        return uniform
    if reading == "soft":
        return F.softmax(-seg / tau, dim=-1)
    weights = uniform + lam * relative_quality(seg) / tau
    if reading == "log-weights":
        return weights
    weights = weights.clamp_min(0)  # clamped: never ascend
    return weights / weights.sum(-1, keepdim=True)


def consistency_term(logits, reading):
    """Eq. 8 as a mean over pixels: squared distance of the K logit maps [B, K, H, W] from a reference.

    first     the group's first phrasing, behind a stop-gradient (the paper); phrasings come shuffled
    pairwise  every other phrasing, gradients both ways
    mean      the mean map of the group, behind a stop-gradient
    """
    if reading == "none" or logits.shape[1] == 1:
        return logits.new_zeros(())
    if reading == "first":
        return (logits[:, 1:] - logits[:, :1].detach()).square().mean()
    mean = logits.mean(1, keepdim=True)
    if reading == "mean":
        return (logits - mean.detach()).square().mean()
    # The mean over ordered pairs i != j of |Z_i - Z_j|^2 is 2 K / (K - 1) times the variance about the mean.
    k = logits.shape[1]
    return 2 * k / (k - 1) * (logits - mean).square().mean()


@dataclass
class LossTerms:
    total: torch.Tensor  # what is minimised
    seg: torch.Tensor  # [B, K] L_seg of each phrasing
    mask: torch.Tensor  # [B, K] its focal part, before its weight
    dice: torch.Tensor  # [B, K], zero where the target is absent
    presence: torch.Tensor  # [B, K]
    group: torch.Tensor  # L_group as printed (eq. 7), also where the reading does not add it
    consistency: torch.Tensor
    weights: torch.Tensor  # [B, K] effective weight of each phrasing in the gradient

    def check_finite(self, phrasings=None):
        """Stop on NaN or infinity, naming the term and, given texts as [B][K], the phrasing."""
        if torch.isfinite(self.total):
            return
        for name in ("mask", "dice", "presence", "seg", "group", "consistency", "total"):
            bad = (~torch.isfinite(getattr(self, name))).nonzero()
            if len(bad):
                where = ""
                if bad.shape[1] == 2:
                    group, i = bad[0].tolist()
                    where = f" for phrasing {repr(phrasings[group][i]) if phrasings else (group, i)}"
                raise Diverged(
                    f"the {name} term became NaN or infinite{where}; lower the learning rate or lam, "
                    "or choose a group reading other than 'log-weights'"
                )


class GroupLoss:
    """L_seg per phrasing, the quality-guided group term and the consistency term, in every reading."""

    def __init__(
        self, tau=1.0, lam=1.0, beta=0.1, group="clamped", consistency="first",
        mask_weight=1.0, dice_weight=1.0, presence_weight=0.1,
    ):  # fmt: skip
        if group not in GROUP_READINGS:
            raise SettingsError(f"group reading {group!r} is unknown; choose one of {', '.join(GROUP_READINGS)}")
        if consistency not in CONSISTENCY_READINGS:
            raise SettingsError(
                f"consistency reading {consistency!r} is unknown; choose one of {', '.join(CONSISTENCY_READINGS)}"
            )
        if not 0 < tau < inf:
            raise SettingsError(f"tau is {tau}; a temperature must be above zero and finite")
        weights = dict(lam=lam, beta=beta, mask_weight=mask_weight, dice_weight=dice_weight,
                       presence_weight=presence_weight)  # fmt: skip
        for name, value in weights.items():
            if not 0 <= value < inf:
                raise SettingsError(f"{name} is {value}; a weight must be zero or more, and finite")
        self.tau, self.lam, self.beta, self.group, self.consistency = tau, lam, beta, group, consistency
        self.mask_weight, self.dice_weight, self.presence_weight = mask_weight, dice_weight, presence_weight

    def __call__(self, mask_logits, presence_logits, mask):
        """mask_logits [B, K, H, W], presence_logits [B, K], mask [B, H, W] -> LossTerms."""
        if mask_logits.shape[:2] != presence_logits.shape or mask_logits[:, 0].shape != mask.shape:
            raise SettingsError(
                f"shapes do not fit: mask_logits {list(mask_logits.shape)}, presence_logits "
                f"{list(presence_logits.shape)}, mask {list(mask.shape)}; expected [B, K, H, W], [B, K], [B, H, W]"
            )
        # A sum over pixels leaves half precision's range, and loses its digits, so a loss is never computed in it.
        wide = torch.promote_types(mask_logits.dtype, torch.float32)
        mask_logits, presence_logits = mask_logits.to(wide), presence_logits.to(wide)
        target = mask.to(wide)[:, None]  # [B, 1, H, W]
        p = mask_logits.sigmoid()
        focal = focal_loss(mask_logits, p, target)
        # Only where the target is: an absent one would pay for empty masks, and a model that answers nothing at all
        # would have half its groups right and hardly a gradient to leave that state by. SAM3 too trains no mask there.
        dice = is_present(target) * dice_loss(p, target)
        presence = presence_loss(presence_logits, target)
        seg = self.mask_weight * focal + self.dice_weight * dice + self.presence_weight * presence  # [B, K]

        weights = effective_weights(seg, self.group, self.tau, self.lam)
        group = group_term(seg, self.tau, through_weights=self.group == "log-weights")
        consistency = consistency_term(mask_logits, self.consistency)
        if self.group in ("clamped", "soft"):
            total = (weights * seg).sum(-1).mean()
        else:
            total = seg.mean() + (self.lam * group if self.group != "none" else 0)
        total = total + self.beta * consistency
        return LossTerms(total, seg, focal, dice, presence, group, consistency, weights)
