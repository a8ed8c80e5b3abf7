"""The modified DPO loss: four candidate masks of one request, graded, against a frozen reference.

    L = -log sigmoid( b1 r(Y1) + b2 r(Y2) - b2 r(Y3) - b1 r(Y4) ),  r(Y) = log pi(Y | I) - log pi_ref(Y | I)

Y1 is the best candidate and Y4 the worst; pi(Y | I) is the chance of the mask Y if every pixel is drawn by itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import SettingsError

GRADINGS = ("ranking", "rating")
READINGS = ("sum", "mean", "region")  # of the log-likelihood of a mask
EDGES = (0.4, 0.55, 0.7)  # IoU at which a rating rises from 1 to 2, to 3, to 4


def log_likelihood(logits, masks):
    """sum_u log sigmoid(+-z_u): the chance of a mask under independent pixels. [N, H, W], [N, C, H, W] -> [N, C].

    log p^y (1 - p)^(1 - y) = y z - softplus(z), so all masks of a request share the second part.
    """
    shared = F.softplus(logits).sum((-2, -1))  # [N]
    return torch.einsum("nhw,nchw->nc", logits, masks.to(logits.dtype)) - shared[:, None]


def ratings(scores):
    """Scores from 0 to 1 -> the annotator's scale of 1 to 4. [N, C]"""
    return 1 + torch.bucketize(scores, scores.new_tensor(EDGES), right=True)


def coefficients(scores, grading="ranking", beta1=1.0, beta2=0.5):
    """The factor of each candidate's log ratio, [N, C] from scores [N, C]: above zero for what is wanted.

    ranking  by place: the best quarter b1, the next b2, then -b2, the last -b1; they sum to zero. Equals share theirs.
    rating   by the candidate's own grade 4, 3, 2, 1, whatever the others got; they need not sum to zero.
    """
    steps = scores.new_tensor([beta1, beta2, -beta2, -beta1])
    if grading == "rating":
        return steps[4 - ratings(scores)]
    count = scores.shape[-1]
    if count % 4:
        raise SettingsError(f"{count} candidates cannot be ranked in quarters; give 4, 8, 12 ... thresholds")
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # [N, C], 0 is the best
    by_place = steps[place * 4 // count] * 4 / count
    equal = (scores[:, :, None] == scores[:, None, :]).to(scores.dtype)  # [N, C, C]
    return (equal * by_place[:, None, :]).sum(-1) / equal.sum(-1)


@dataclass
class PreferenceTerms:
    total: torch.Tensor  # what is minimised
    margin: torch.Tensor  # [N] what stands inside the sigmoid: zero where policy and reference agree
    ratios: torch.Tensor  # [N, C] log pi(Y) - log pi_ref(Y)


class PreferenceLoss:
    """`reading` says what the log-likelihood of a mask is: the paper prints no pixels.

    sum     over all pixels, as independent pixels have it: a hair's breadth on each decides the sigmoid
    mean    over all pixels, as a cross-entropy has it: the sigmoid hardly notices anything
    region  the sum over the number of pixels on which the candidates differ
    """

    def __init__(self, beta1=1.0, beta2=0.5, grading="ranking", reading="mean"):
        for name, value, known in (("grading", grading, GRADINGS), ("reading", reading, READINGS)):
            if value not in known:
                raise SettingsError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        if not 0 <= beta2 <= beta1 or not beta1 > 0:
            raise SettingsError(f"beta1 is {beta1} and beta2 {beta2}; give beta1 > 0 and beta2 from 0 to beta1")
        self.beta1, self.beta2, self.grading, self.reading = beta1, beta2, grading, reading

    def grade(self, scores):
        """[N, C] scores -> [N, C] coefficients, as this loss's grading has them."""
        return coefficients(scores, self.grading, self.beta1, self.beta2)

    def __call__(self, logits, reference, candidates, grades):
        """logits, reference [N, H, W], candidates bool [N, C, H, W], grades [N, C] -> PreferenceTerms."""
        if logits.shape != reference.shape or candidates.shape != (*grades.shape, *logits.shape[-2:]):
            raise SettingsError(
                f"shapes do not fit: logits {list(logits.shape)}, reference {list(reference.shape)}, candidates "
                f"{list(candidates.shape)}, grades {list(grades.shape)}; expected [N, H, W] twice, [N, C, H, W], [N, C]"
            )
        ratios = log_likelihood(logits, candidates) - log_likelihood(reference.detach(), candidates)  # [N, C]
        ratios = ratios / self.pixels(candidates)[:, None]
        margin = (grades * ratios).sum(-1)
        return PreferenceTerms(-F.logsigmoid(margin).mean(), margin, ratios)

    def pixels(self, candidates):
        """What the sum over pixels is divided by, [N]."""
        if self.reading == "sum":
            return torch.ones(len(candidates), device=candidates.device)
        if self.reading == "mean":
            return torch.full((len(candidates),), float(candidates[0, 0].numel()), device=candidates.device)
        differ = candidates.any(1) & ~candidates.all(1)  # [N, H, W]
        return differ.sum((-2, -1)).clamp_min(1).float()
