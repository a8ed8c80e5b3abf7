"""SAM2 as a tool, on a tiny random model saved to disk and loaded back through the call that loads the published one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sam import SIDE, each_mask, save_sam, save_sam2, save_sam2_video
from transformers import Sam2Model

from pgseg_lite.errors import ModelError
from pgseg_lite.models import sam2
from pgseg_lite.models.access import LIKE_IMAGENET
from pgseg_lite.models.sam2 import Sam2Masks, one_view

SIZE = (50, 70)
BOXES = torch.tensor([[3.0, 4, 20, 30], [10, 10, 40, 40], [0, 0, 69, 49], [30, 5, 60, 9], [1, 2, 3, 4]])
POINTS = torch.tensor([[[8.0, 9]], [[30, 10]], [[69, 49]]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sam2(tmp_path_factory.mktemp("sam2") / "tiny")


@pytest.fixture(scope="module")
def masks(folder):
    return Sam2Masks.from_pretrained(folder)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_it_answers_as_transformers_does(folder, masks):
    """The whole of Sam2Model in one call, on an image that needs no resizing."""
    image = torch.rand(1, 3, SIDE, SIDE)
    mean, std = (torch.tensor(LIKE_IMAGENET[name])[:, None, None] for name in ("image_mean", "image_std"))
    normalised = (image - mean) / std
    raw, embeddings = Sam2Model.from_pretrained(folder), masks.encode(image * 2 - 1)
    expected = raw(pixel_values=normalised, input_boxes=BOXES[None], multimask_output=False)
    ours, scores = each_mask(masks, embeddings, (SIDE, SIDE), boxes=BOXES)
    assert ours.std(0).mean() > 1e-3  # the prompts do matter in this tiny model
    resized = torch.nn.functional.interpolate(expected.pred_masks[0], (SIDE, SIDE), mode="bilinear")[:, 0]
    torch.testing.assert_close(ours, resized, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, expected.iou_scores[0, :, 0])

    expected = raw(pixel_values=normalised, input_points=POINTS[None], multimask_output=True)
    best = expected.iou_scores[0].argmax(-1)
    ours, scores = each_mask(masks, embeddings, (SIDE, SIDE), points=POINTS)
    chosen = expected.pred_masks[0][torch.arange(3), best][:, None]
    resized = torch.nn.functional.interpolate(chosen, (SIDE, SIDE), mode="bilinear")[:, 0]
    torch.testing.assert_close(ours, resized, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, expected.iou_scores[0].amax(-1))


@torch.no_grad()
def test_many_prompts_equal_one_at_a_time_and_portions(masks, pixels, monkeypatch):
    embeddings = one_view(masks.encode(pixels), 1)
    points = {"points": POINTS.expand(3, 2, 2), "labels": torch.tensor([[1, 0]] * 3)}
    for known in ({"boxes": BOXES}, points, {"boxes": BOXES[:3], "points": POINTS}):
        together, scores = each_mask(masks, embeddings, SIZE, **known)
        prompts = next(iter(known.values()))
        assert together.shape == (len(prompts), *SIZE) and scores.shape == (len(prompts),)
        alone = [
            each_mask(masks, embeddings, SIZE, **{k: v[i : i + 1] for k, v in known.items()})
            for i in range(len(prompts))
        ]
        torch.testing.assert_close(together, torch.cat([mask for mask, _ in alone]), atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(sam2, "AT_ONCE", 2)
        assert len(list(masks.in_portions(embeddings, SIZE, **known))) == -(-len(prompts) // 2)
        torch.testing.assert_close(each_mask(masks, embeddings, SIZE, **known)[0], together, atol=1e-5, rtol=1e-5)
        union, in_portions = masks.union(embeddings, SIZE, **known)
        torch.testing.assert_close(union, together.amax(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_portions, scores)
        monkeypatch.undo()


@torch.no_grad()
def test_a_batch_s_views_equal_single_ones_and_boxes_are_in_pixels_of_the_view(masks, pixels):
    alone, batch = masks.encode(pixels[1:]), one_view(masks.encode(pixels), 1)
    for a, b in zip(alone, batch, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    same = each_mask(masks, alone, (100, 140), boxes=BOXES * 2)[0]
    half = torch.nn.functional.interpolate(same[:, None], SIZE, mode="area")[:, 0]
    assert (half - each_mask(masks, alone, SIZE, boxes=BOXES)[0]).abs().mean() < 0.02 * same.abs().mean()


def test_gradients_reach_the_mask_decoder_and_the_encoder(folder, pixels):
    masks = Sam2Masks.from_pretrained(folder).train()
    embeddings = one_view(masks.encode(pixels), 0)
    each_mask(masks, embeddings, SIZE, boxes=BOXES)[0].mean().backward()
    reached = {name for name, p in masks.sam.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("mask_decoder.transformer.", "mask_decoder.conv_s0.", "no_memory_embedding", "vision_encoder."):
        assert any(name.startswith(part) for name in reached), part
    assert all(p.grad.isfinite().all() for p in masks.sam.parameters() if p.grad is not None)


@torch.no_grad()
def test_half_precision_leaves_boxes_where_they_are(masks, pixels):
    """bf16 has no numbers between 256 and 258: coordinates must not pass through it."""
    embeddings = one_view(masks.encode(pixels), 0)
    exact = each_mask(masks, embeddings, SIZE, boxes=BOXES)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(each_mask(masks, embeddings, SIZE, boxes=BOXES)[0], exact)


@torch.no_grad()
def test_saves_and_loads_back_and_the_video_model_s_checkpoint_loads_too(masks, pixels, tmp_path):
    masks.save_pretrained(tmp_path / "again")
    embeddings = masks.encode(pixels[:1])
    again = Sam2Masks.from_pretrained(tmp_path / "again")
    assert torch.equal(
        each_mask(again, again.encode(pixels[:1]), SIZE, boxes=BOXES)[0],
        each_mask(masks, embeddings, SIZE, boxes=BOXES)[0],
    )
    video = Sam2Masks.from_pretrained(save_sam2_video(tmp_path / "video"))
    assert json.loads((tmp_path / "video" / "config.json").read_text())["model_type"] == "sam2_video"
    stored = load_file(tmp_path / "video" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in video.sam.state_dict().items())
    assert each_mask(video, video.encode(pixels[:1]), SIZE, boxes=BOXES)[0].isfinite().all()


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    state.pop("no_memory_embedding")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ModelError, match="model_type is 'sam', not 'sam2', so this is another model's"):
        Sam2Masks.from_pretrained(save_sam(tmp_path / "sam"))
    save_sam2(tmp_path / "bad")
    drop_tensor(tmp_path / "bad")
    with pytest.raises(ModelError, match="1 tensors are missing, no_memory_embedding among them"):
        Sam2Masks.from_pretrained(tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="there are no weights"):
        Sam2Masks.from_pretrained(tmp_path / "bad")
