"""nnInteractive and SAM-Med3D, asked as the small network is: `ask(image, prompts)` with arrays [D, H, W] = z, y, x.

Both come from their publishers' own packages, which are installed beside this one where they are wanted. Their weights
are pickles. Each is first read by torch's restricted unpickler, which runs no code, and refused if it holds anything
but numbers, texts and containers of them.
"""

import argparse
import os
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ModelError, SettingsError, first_line
from ..models.access import download

HARMLESS = [argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType,
            np._core.multiarray.scalar, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")]  # fmt: skip


def read_checkpoint(path):
    """What a .pth file holds, without running anything that is in it."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such checkpoint; give the file or folder that was downloaded") from error
    except Exception as error:  # whatever a damaged or unexpected pickle makes of itself
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {found[1]}" if found else type(error).__name__
        raise ModelError(f"{path}: not plain weights ({reason}); fetch it again from its publisher") from error


def package(name, install):
    try:
        return import_module(name)
    except ImportError as error:
        said = f"{name.split('.')[0]} cannot be imported ({error})"
        raise ModelError(f"{said}; run `pip install {install}` in an environment of its own") from error


class Asked:
    """What the two have in common: raw grey values in, one mask for each prompt out."""

    raw = True  # both normalise by themselves, and ask for Hounsfield units
    takes = ()

    def ask(self, image, prompts):
        """float32 [D, H, W] and prompts, each {"mask": ...}, {"box": ...} or {"point": ...} -> bool [N, D, H, W]."""
        image = np.ascontiguousarray(image, np.float32)
        for prompt in prompts:
            if len(prompt) != 1 or not set(prompt) <= set(self.takes):
                given = ", ".join(prompt) or "nothing"
                raise SettingsError(f"{self.name} was given {given}; give one of {', '.join(self.takes)} at a time")
        self.look(image)
        # An empty mask asks for nothing and gets nothing, as in the published study.
        return np.stack([self.answer(prompt) if np.any(prompt.get("mask", True)) else np.zeros(image.shape, bool)
                         for prompt in prompts])  # fmt: skip


class NnInteractive(Asked):
    """folder: a trained model folder (plans.json, dataset.json, fold_*/checkpoint_final.pth); by default the hub's.

    The published weights are for non-commercial use (CC BY-NC-SA 4.0). They know boxes in one slice only, so a box is
    drawn in the middle one.
    """

    name, takes = "nnInteractive", ("mask", "box", "point")
    hub_name, hub_folder = "nnInteractive/nnInteractive", "nnInteractive_v1.0"

    def __init__(self, folder=None, device=None):
        session = package("nnInteractive.inference.inference_session", "nninteractive")
        folder = Path(folder or download(self.hub_name, [f"{self.hub_folder}/*"]) / self.hub_folder)
        checkpoints = sorted(folder.glob("fold_*/checkpoint_final.pth"))
        if not checkpoints or not (folder / "plans.json").is_file():
            raise ModelError(f"{folder}: not a trained nnInteractive model; give the folder that holds its plans.json")
        for checkpoint in checkpoints:
            read_checkpoint(checkpoint)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.session = session.nnInteractiveInferenceSession(
            device=device, use_torch_compile=False, verbose=False, torch_n_threads=os.cpu_count(), do_autozoom=True
        )
        try:
            self.session.initialize_from_trained_model_folder(str(folder))
        except Exception as error:  # it raises whatever is wrong with its files
            reason = first_line(error)
            raise ModelError(f"{folder}: nnInteractive cannot read it ({reason}); download it again") from error

    def look(self, image):
        self.session.set_image(image[None])
        self.found = torch.zeros(image.shape, dtype=torch.uint8)
        self.session.set_target_buffer(self.found)

    def answer(self, prompt):
        ((kind, value),) = prompt.items()
        self.session.reset_interactions()
        if kind == "mask":
            self.session.add_initial_seg_interaction(np.ascontiguousarray(value, np.uint8), run_prediction=True)
        elif kind == "point":
            self.session.add_point_interaction(tuple(int(v) for v in np.asarray(value)), include_interaction=True)
        else:
            low, high = np.round(value).astype(int)
            middle = int(low[0] + high[0]) // 2
            sides = [[middle, middle + 1], *([int(a), int(b) + 1] for a, b in zip(low[1:], high[1:], strict=True))]
            self.session.add_bbox_interaction(sides, include_interaction=True)
        return self.found.numpy() > 0


class SamMed3D(Asked):
    """checkpoint: sam_med3d_turbo.pth or one like it; by default the hub's. `sizes` are for models that are not ViT-B.

    As in the published study: a cube of 128 voxels around the object, positive grey values set to mean 0 and deviation
    1, a mask as logits of 10 and -20. Give scans of 1.5 mm, as it was trained on. The cube is laid around the prompt
    that was given; the study lays it around the true mask, and so tells where the organ is even with an empty prompt.
    """

    name, takes = "SAM-Med3D", ("mask", "point")
    hub_name, hub_file = "blueyo0/SAM-Med3D", "sam_med3d_turbo.pth"

    def __init__(self, checkpoint=None, device=None, **sizes):
        medim = package("medim", "medim")
        path = Path(checkpoint or download(self.hub_name, [self.hub_file]) / self.hub_file)
        held = read_checkpoint(path)
        if "model_state_dict" not in held:
            raise ModelError(f"{path}: no model_state_dict in it, so this is no checkpoint of SAM-Med3D; give another")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = medim.create_model("SAM-Med3D", **sizes).to(self.device).eval()
        try:
            self.model.load_state_dict(held["model_state_dict"])
        except RuntimeError as error:
            raise ModelError(f"{path}: weights of another architecture; give those of SAM-Med3D's ViT-B") from error
        self.side = self.model.image_encoder.img_size

    def look(self, image):
        self.image = torch.from_numpy(image).permute(2, 1, 0)  # it was trained on x, y, z

    @torch.no_grad()
    def answer(self, prompt):
        ((kind, value),) = prompt.items()
        value = torch.as_tensor(np.asarray(value))
        value = value.permute(2, 1, 0) if kind == "mask" else value.flip(-1)  # both x, y, z
        middle = value if kind == "point" else value.nonzero().float().aminmax(dim=0)
        middle = middle if kind == "point" else (middle.min + middle.max) / 2
        corner = (middle.round().long() - self.side // 2).tolist()
        seen = self.cut(self.image, corner)
        known = seen[seen > 0]
        if len(known) > 1:
            seen = (seen - known.mean()) / known.std().clamp(min=1e-6)
        embedding = self.model.image_encoder(seen[None, None].to(self.device))  # [1, C, n, n, n]
        points = masks = None
        if kind == "point":
            place = (value - torch.tensor(corner)).float()
            points = [place[None, None].to(self.device), torch.ones(1, 1, device=self.device)]
        else:
            logits = self.cut(value.float(), corner)[None, None] * 30 - 20
            masks = F.interpolate(logits, size=[self.side // 4] * 3).to(self.device)
        sparse, dense = self.model.prompt_encoder(points=points, boxes=None, masks=masks)
        small, _ = self.model.mask_decoder(
            image_embeddings=embedding, image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse.to(self.device), dense_prompt_embeddings=dense, multimask_output=False,
        )  # fmt: skip
        cube = F.interpolate(small, size=[self.side] * 3, mode="trilinear")[0, 0].cpu() > 0
        whole = torch.zeros(self.image.shape, dtype=torch.bool)
        inside, of_cube = overlapping(corner, self.side, whole.shape)
        whole[inside] = cube[of_cube]
        return whole.permute(2, 1, 0).numpy()

    def cut(self, volume, corner):
        """The cube from `corner` on, 0 where the volume ends."""
        cube = torch.zeros([self.side] * 3)
        inside, of_cube = overlapping(corner, self.side, volume.shape)
        cube[of_cube] = volume[inside]
        return cube


def overlapping(corner, side, shape):
    """Where a cube and a volume overlap, in the coordinates of the volume and of the cube."""
    spans = [(max(c, 0), min(c + side, n)) for c, n in zip(corner, shape, strict=True)]
    return tuple(slice(a, b) for a, b in spans), tuple(
        slice(a - c, b - c) for (a, b), c in zip(spans, corner, strict=True)
    )
