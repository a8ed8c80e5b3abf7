"""A small 3D network that is asked with a mask, a box or a point, and answers with a mask.

The prompt enters as three more channels beside the image, as in nnInteractive; 0.2 M weights, trained in minutes. Half
of the requests of a training are masks, the rest boxes and points, which cannot be copied and so teach it to look.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from ..errors import SettingsError, TrainingError
from .perturb import STUDY_MIX, bounds, perturb_boxes, perturb_mask, perturb_points

CHANNELS = ("mask", "box", "point")
POINT_RADIUS = 1  # a single voxel would drown
BATCH, RATE = 2, 4e-3  # of training
TOGETHER = 6  # prompts answered at a time; one by one, each takes five times as long on a CPU


class PromptNet(nn.Module):
    """[B, 1, D, H, W] in -1..1 and prompts [B, 3, D, H, W] of 0 and 1 -> logits [B, D, H, W], of any size."""

    def __init__(self, width=12):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList()
        for before, after in zip([1 + len(CHANNELS), *widths], widths, strict=False):
            self.down.append(nn.Sequential(block(before, after, stride=2), block(after, after)))
        self.up = nn.ModuleList(block(a + b, b) for a, b in ((widths[2], widths[1]), (widths[1], widths[0])))
        self.narrow = nn.Conv3d(width, 4, 1)  # before it is full size, where each channel costs most
        self.head = nn.Sequential(block(4 + 1 + len(CHANNELS), 8), nn.Conv3d(8, 1, 1))

    def forward(self, image, prompts):
        full = torch.cat([image, prompts], dim=1)  # [B, 4, D, H, W]
        levels = [full]
        for stage in self.down:
            levels.append(stage(levels[-1]))
        x = levels.pop()
        for stage in self.up:
            skip = levels.pop()
            x = stage(torch.cat([F.interpolate(x, skip.shape[2:], mode="trilinear"), skip], dim=1))
        x = F.interpolate(self.narrow(x), full.shape[2:], mode="trilinear")
        return self.head(torch.cat([x, full], dim=1))[:, 0]

    @torch.no_grad()
    def ask(self, image, prompts):
        """float32 [D, H, W] in -1..1 and prompts as in `as_channels` -> bool [N, D, H, W]."""
        self.eval()
        where = next(self.parameters()).device
        told = torch.from_numpy(np.stack([as_channels(prompt, image.shape) for prompt in prompts])).to(where)
        seen = torch.from_numpy(np.ascontiguousarray(image, np.float32)).to(where)[None, None]
        parts = [self(seen.expand(len(part), -1, -1, -1, -1), part) > 0 for part in told.split(TOGETHER)]
        return torch.cat(parts).cpu().numpy()


def block(before, after, stride=1):
    return nn.Sequential(
        nn.Conv3d(before, after, 3, stride, padding=1, bias=False),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


def as_channels(prompt, shape):
    """{"mask": bool [D, H, W]} or {"box": [2, 3]} or {"point": [3]}, or several of them -> float32 [3, D, H, W]."""
    if not prompt or set(prompt) - set(CHANNELS):
        raise SettingsError(f"a prompt of {', '.join(prompt) or 'nothing'}; give one or more of {', '.join(CHANNELS)}")
    channels = np.zeros((len(CHANNELS), *shape), np.float32)
    for kind, value in prompt.items():
        value = np.asarray(value)
        wanted = {"mask": tuple(shape), "box": (2, 3), "point": (3,)}[kind]
        if value.shape != wanted:
            raise SettingsError(f"the {kind} is {list(value.shape)}, not {list(wanted)}; give it for the same volume")
        place = channels[CHANNELS.index(kind)]
        if kind == "mask":
            place[:] = value
        else:
            low, high = value if kind == "box" else (value - POINT_RADIUS, value + POINT_RADIUS)
            # What lies outside the volume is not marked; a negative end would count from the other side.
            place[tuple(slice(max(int(a), 0), max(int(b) + 1, 0)) for a, b in zip(low, high, strict=True))] = 1
    return channels


def prompts_of(mask):
    """The exact prompts of a mask that is not empty: itself, the box around it, and its deepest voxel."""
    from scipy.ndimage import distance_transform_edt

    window = bounds(mask, 1)
    depth = distance_transform_edt(np.pad(mask[window], 1))[1:-1, 1:-1, 1:-1]
    deepest = np.array(np.unravel_index(depth.argmax(), depth.shape))
    box = np.array([(part.start, part.stop - 1) for part in bounds(mask)]).T
    return {"mask": mask, "box": box, "point": deepest + [part.start for part in window]}


def bend_prompt(kind_of_prompt, value, how, severity, seed, shape, others=None):
    """One prompt, bent as `how` says; the same for all three kinds."""
    if kind_of_prompt == "mask":
        return perturb_mask(value, how, severity, seed, others)
    bend = perturb_boxes if kind_of_prompt == "box" else perturb_points
    return bend(np.asarray(value)[None], how, severity, shape, seed)[0]


def train(volumes, seed=0, steps=400, bent=False, width=12, quiet=False):
    """A network that has seen exact prompts, or, with `bent`, prompts bent as the published study mixes them.

    Bent masks are dilated, eroded, hollowed or shifted (radius 0 to 4), boxes and points shifted by 0 to 4: the other
    kinds and larger radii remain unseen, as held-out wordings do.
    """
    if steps < 1 or not volumes:
        raise SettingsError(f"{steps} steps on {len(volumes)} volumes train nothing; give at least one of each")
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PromptNet(width).to(device).train()
    exact = {(i, organ): prompts_of(volume.mask(organ)) for i, volume in enumerate(volumes) for organ in volume.organs
             if volume.mask(organ).any()}  # fmt: skip
    keys = list(exact)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="training", disable=quiet):
        images, prompts, truths = [], [], []
        for place in rng.integers(len(keys), size=BATCH):
            i, organ = keys[place]
            kind = rng.choice(CHANNELS, p=(0.5, 0.25, 0.25))
            value, severity = exact[keys[place]][kind], int(rng.integers(STUDY_MIX + 1))
            if bent:
                how = "mix" if kind == "mask" else "shift"
                shown = bend_prompt(kind, value, how, severity, int(rng.integers(2**31)), volumes[i].labels.shape)
                value = shown if shown.any() else value  # an organ that is eroded away asks for nothing
            images.append(volumes[i].windowed * rng.uniform(0.9, 1.1) + rng.uniform(-0.1, 0.1))
            prompts.append(as_channels({kind: value}, volumes[i].labels.shape))
            truths.append(volumes[i].mask(organ))
        image, prompt, truth = (
            torch.from_numpy(np.stack(x).astype(np.float32)).to(device) for x in (images, prompts, truths)
        )
        loss = fit(model(image[:, None], prompt), truth)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {step}; look at the volumes for grey values that are no numbers"
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def fit(logits, truth):
    """Cross-entropy and soft Dice, both [B, D, H, W] -> a scalar."""
    axes = (1, 2, 3)
    share = logits.sigmoid()
    dice = 1 - (2 * (share * truth).sum(axes) + 1) / (share.sum(axes) + truth.sum(axes) + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + dice.mean()
