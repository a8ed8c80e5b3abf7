"""`grounded-sam2` on two tiny random models, saved to disk and loaded back through the calls that load the published."""

import json
import shutil
import sys
import warnings
from collections import Counter

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_dino import SIDE, save_dino
from tiny_sam import each_mask, save_sam2
from tiny_text import short_bank
from transformers import BertTokenizerFast, GroundingDinoForObjectDetection, Sam2Model

import pgseg_lite as pg
from pgseg_lite.errors import ModelError, SettingsError
from pgseg_lite.metrics import iou
from pgseg_lite.models import grounding_dino, tiles
from pgseg_lite.models.base import THRESHOLD
from pgseg_lite.models.sam2 import EMPTY
from pgseg_lite.regression import adapt

PROMPTS = ["nuclei", "find every inflammatory nuclei", "dead cells", "see nuclei"]
NEVER = 0.9999  # a threshold that no box of the tiny detector reaches; nearly all reach EASY
EASY = 0.1
LONG = "nuclei " * 27 + "see every cells"  # 30 words; start, full stop and end make 33 tokens of the tiny model's 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounded") / "tiny"
    folder.mkdir()
    save_dino(folder / "detector")
    save_sam2(folder / "masks")
    return folder


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scores(folder, image):
    """Of the tiny detector's boxes for each of the prompts, logits [4, 6]."""
    model = pg.load_segmenter("grounded-sam2", folder, "cpu")
    with torch.no_grad():
        view, text = model.encode_image(image).views[0][0], model.encode_text(PROMPTS)
        return model.detector.ask(view[0], text).logits.amax(-1)


@pytest.fixture
def load(folder, scores):
    """With a threshold that half of the boxes pass."""
    options = {"box_threshold": between(scores)}
    return lambda **changes: pg.load_segmenter("grounded-sam2", folder, "cpu", **options | changes)


def between(logits):
    """The probability in the middle: half of the logits are above it, and none is near."""
    ordered = logits.flatten().sort().values
    half = len(ordered) // 2
    return ordered[half - 1 : half + 1].mean().sigmoid().item()


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return pg.PromptBank.load(short_bank(tmp_path_factory.mktemp("bank") / "short.yaml"))


@pytest.fixture(scope="module")
def data():
    return pg.load_dataset("synthetic", split="train", size=2)


SETTINGS = pg.TrainSettings(steps=2, batch_size=1, k=2, view=64, save_every=1, learning_rate=1e-3, precision="fp32")


def assert_same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.presence_logits, b.presence_logits, atol=tolerance, rtol=tolerance)


def joined(outputs):
    return pg.SegmentationOutput(*(torch.cat(p, 1) for p in zip(*(vars(o).values() for o in outputs), strict=True)))


# One image, many phrasings


def test_each_image_encoder_runs_once_and_batched_phrasings_equal_single_ones(load, image, monkeypatch):
    model, calls = load(), Counter()
    encoders = {"swin": model.detector.backbone.conv_encoder.model, "hiera": model.masks.sam.vision_encoder}
    for name, encoder in encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.update([name]))
    together = model.predict(image, PROMPTS)
    assert calls == {"swin": 1, "hiera": 1} and isinstance(model, pg.Segmenter)
    assert together.mask_logits.shape == (1, 4, 90, 120) and together.presence_logits.shape == (1, 4)
    assert together.mask_logits[0].std(0).mean() > 1e-3  # phrasings do matter in these tiny models
    assert_same(joined([model.predict(image, prompt) for prompt in PROMPTS]), together)
    monkeypatch.setattr(grounding_dino, "AT_ONCE", 3)
    assert_same(model.predict(image, PROMPTS), together)


@torch.no_grad()
def test_the_detector_answers_as_transformers_does(folder, load):
    """The whole of the class in one call, an image a phrasing, on pixels that need no resizing."""
    square = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    raw = GroundingDinoForObjectDetection.from_pretrained(folder / "detector").eval()
    tokens = BertTokenizerFast.from_pretrained(folder / "detector")
    tokens = tokens([prompt + "." for prompt in PROMPTS], padding=True, return_tensors="pt")
    pixels = (square / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(pixels).float().permute(2, 0, 1).expand(4, -1, -1, -1)
    expected, model = raw(pixel_values=pixels, **tokens), load()
    view, text = model.encode_image(square).views[0][0], model.encode_text(PROMPTS)
    ours = model.detector.ask(view[0], text)
    torch.testing.assert_close(ours.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert ours.pred_boxes.std(0).mean() > 1e-2  # phrasings find boxes of their own


@torch.no_grad()
def test_the_answer_is_the_union_of_sam2_s_masks_in_the_boxes_that_are_sure(load, image):
    model = load()
    view, text = model.encode_image(image).views[0][0], model.encode_text(PROMPTS)
    out, raw = model.predict(image, PROMPTS), model.detector.ask(view[0], text)
    threshold = model.options["box_threshold"]
    boxes, _ = model.detector.find(view[0], text, (90, 120), threshold)
    assert sum(map(len, boxes)) == 12  # of 24
    for k, of_one in enumerate(boxes):
        sure = raw.logits[k].amax(-1).sigmoid() > threshold
        x, y, w, h = raw.pred_boxes[k][sure].T
        corners = torch.stack([(x - w / 2) * 120, (y - h / 2) * 90, (x + w / 2) * 120, (y + h / 2) * 90], 1)
        torch.testing.assert_close(of_one, corners, atol=1e-3, rtol=1e-4)
        if not len(of_one):
            continue
        masks, _ = each_mask(model.masks, view[1], (90, 120), boxes=of_one)
        assert torch.equal(out.masks[0, k], (masks > 0).any(0))  # SAM2's own threshold is one half
        torch.testing.assert_close(out.mask_logits[0, k], masks.amax(0) + THRESHOLD, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.presence_logits[0], raw.logits.amax((1, 2)))


def test_phrasings_encoded_at_different_times_share_one_encoding_of_the_image(load, image, monkeypatch):
    model, encoded = load(), []
    real = type(model).encode_image
    monkeypatch.setattr(type(model), "encode_image", lambda self, images: encoded.append(1) or real(self, images))
    sample = pg.Sample(image, {}, "a", "test")
    asked, at_once = adapt(model), dict(adapt(model).answers(sample, PROMPTS))
    for text in PROMPTS[:2]:  # of different lengths
        list(asked.answers(sample, [text]))
    encoded.clear()
    for text, answer in asked.answers(sample, PROMPTS):
        assert iou(answer.packed, at_once[text].packed) > 0.99  # other company in a batch moves the last bits
    assert len(encoded) == 1


def test_without_a_box_the_mask_is_empty_and_presence_low(load, image, scores):
    out, sure = load(box_threshold=NEVER).predict(image, PROMPTS), load().predict(image, PROMPTS)
    assert not out.masks.any() and (out.mask_logits < EMPTY + 1).all()
    assert (out.presence_logits.sigmoid() < NEVER).all() and torch.equal(out.presence_logits, sure.presence_logits)
    best = scores.amax(1)
    some = load(box_threshold=between(best)).predict(image, PROMPTS)  # half of the phrasings find boxes
    assert [(m > EMPTY + 1).any().item() for m in some.mask_logits[0]] == (best.sigmoid() > between(best)).tolist()


def test_two_images_equal_one_after_the_other(load, image):
    model, other = load(), np.ascontiguousarray(image[::-1])
    both = model.predict([image, other], PROMPTS)
    assert_same(pg.SegmentationOutput(both.mask_logits[1:], both.presence_logits[1:]), model.predict(other, PROMPTS))


def test_the_backbone_sees_the_shape_of_the_image_and_its_features_are_not_copied(load, image):
    detector = load().detector
    seen = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    for height, width in ((90, 120), (60, 400), (10, 400)):
        answer, sides = detector.encode(torch.zeros(1, 3, height, width))
        assert seen[-1] == tuple(sides)
    assert seen == [(96, 128), (64, 192), (64, 192)]  # 96 to 192 pixels; never so thin that a level would be lost
    for (feature, mask), (many, masks) in zip(answer[0], grounding_dino.for_each(answer, 5)[0], strict=True):
        assert many.shape[0] == 5 and many.data_ptr() == feature.data_ptr() and masks.data_ptr() == mask.data_ptr()


def test_a_tiled_image_is_predicted_tile_by_tile(load, image):
    out, whole = load(tile=64).predict(image, PROMPTS), load()
    boxes = tiles.tile_boxes(90, 120, 64)
    parts = [whole.predict(np.ascontiguousarray(image[y0:y1, x0:x1]), PROMPTS) for y0, x0, y1, x1 in boxes]
    expected = tiles.stitch([part.mask_logits[0] for part in parts], boxes, (90, 120))
    torch.testing.assert_close(out.mask_logits[0], expected, atol=1e-4, rtol=1e-4)


# Phrasings


def test_a_phrasing_is_embedded_once_and_padding_changes_nothing(load, image, monkeypatch):
    model = load()
    first = model.encode_text(PROMPTS)
    assert first.shape == (4, 7, 65)
    monkeypatch.setattr(model.detector.text, "_embed", lambda *_: pytest.fail("the text encoder ran again"))
    assert torch.equal(model.encode_text(PROMPTS[::-1]), first.flip(0))
    alone = model.encode_text(PROMPTS[:1])  # start, a word, full stop, end
    assert alone.shape == (1, 4, 65) and torch.equal(first[:1, :4], alone) and not first[0, 4:].any()
    features = model.encode_image(image)
    assert_same(model.decode(features, F.pad(alone, (0, 0, 0, 9))), model.decode(features, alone))


def test_phrasings_are_written_as_the_detector_was_trained(load, image):
    model = load()
    plain = model.encode_text(["see nuclei"])
    for variant in ("See NUCLEI", " see nuclei. ", "see nuclei .", "see nuclei\n"):
        assert torch.equal(model.encode_text([variant]), plain)
    sentences = model.encode_text(["see nuclei. dead cells"])[0, :, -1]
    assert sentences.tolist() == [101, 1036, 1030, 1012, 1043, 1031, 1012, 102]  # each sentence by itself


def test_phrasings_that_are_too_long_are_refused_or_cut_with_a_warning(load, image):
    with pytest.raises(
        ModelError, match=r"Grounding DINO reads 32 tokens, too few for 1 of 2 .* loses 'cells.'; short"
    ):
        load().predict(image, ["nuclei", LONG])
    model = load(truncate=True)
    with pytest.warns(UserWarning, match=r"loses 'cells\.'"):
        cut = model.predict(image, [LONG])
    assert_same(cut, model.predict(image, [LONG.removesuffix(" cells")]))  # and the full stop is in its place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(image, [LONG, " ".join(["nuclei"] * 29)])  # said once; 29 words fit


# Training and evaluation


def loss_of(model, prompts=PROMPTS[:2]):
    out = model(
        torch.rand(2, 3, 64, 64, generator=torch.manual_seed(0)) * 2 - 1,
        model.encode_text(prompts)[None].expand(2, -1, -1, -1),
    )
    masks = torch.rand(2, 64, 64) < 0.3
    return SETTINGS.loss()(out.mask_logits, out.presence_logits, masks).total


def test_sam2_s_mask_decoder_and_nothing_else_gets_gradients(load):
    model = load(box_threshold=EASY)
    groups = model.prepare_training(SETTINGS, ["nuclei"], phrasings=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("masks.sam.mask_decoder.") for name in trained)
    assert sum(len(group["params"]) for group in groups) == len(trained) and {g["lr"] for g in groups} == {1e-3}
    loss_of(model.train()).backward()
    # A softmax does not see what is added to all its inputs, so biases of keys have gradients of zero.
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained:
            assert parameter.grad.isfinite().all() and (parameter.grad.any() or name.endswith("k_proj.bias")), name
    frozen = [*model.detector.dino.parameters(), *model.detector.backbone.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    assert not model.detector.dino.training  # its dropout would move the boxes


def test_a_batch_without_boxes_is_a_step_that_teaches_nothing(load):
    model = load(box_threshold=NEVER)
    model.prepare_training(SETTINGS, ["nuclei"], phrasings=2)
    loss_of(model.train()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_training_in_half_precision_finds_the_boxes_of_prediction(load):
    model, pixels = load(box_threshold=EASY), torch.rand(1, 3, 64, 64) * 2 - 1
    text = model.encode_text(PROMPTS)
    exact = model.detector.find(model.detector.encode(pixels), text, (64, 64), EASY)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.detector.find(model.detector.encode(pixels), text, (64, 64), EASY)[0]
        out = model(pixels, text[None])
    assert all(map(torch.equal, exact, half)) and sum(map(len, exact))
    assert out.mask_logits.dtype == torch.float32 and out.mask_logits.isfinite().all()


def test_a_run_changes_the_mask_decoder_and_leaves_a_checkpoint_that_reads_back(load, folder, data, bank, tmp_path):
    run = tmp_path / "run"
    result = pg.train(data, bank, run, SETTINGS, model=load(box_threshold=EASY), device="cpu", quiet=True)
    assert np.isfinite(result.history["seg"]).all()
    assert json.loads((run / "run.json").read_text())["box_threshold"] == EASY
    changed = {}
    for part in ("detector", "masks"):
        before, after = (load_file(where / part / "model.safetensors") for where in (folder, run))
        assert before.keys() == after.keys()  # plain checkpoints, every encoder back in its place
        changed[part] = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed["detector"] and changed["masks"]
    assert all(name.startswith("mask_decoder.") for name in changed["masks"])
    again, sample = pg.load_segmenter("grounded-sam2", run, "cpu"), data[0].image
    assert again.options == {"box_threshold": EASY}  # it is read as it was trained
    assert_same(again.predict(sample, PROMPTS), result.model.predict(sample, PROMPTS))
    assert not list(run.glob("saving-*")) and (run / "config.json").exists()
    GroundingDinoForObjectDetection.from_pretrained(run / "detector")
    Sam2Model.from_pretrained(run / "masks")
    other = load(box_threshold=EASY)
    next(other.detector.dino.bbox_embed.parameters()).add_(0.1)  # frozen, so no state dict of a run has it
    with pytest.raises(SettingsError, match="cannot resume, start was"):
        pg.train(data, bank, run, SETTINGS, model=other, resume=True, device="cpu", quiet=True)


def test_evaluation_gives_records(load, data, bank):
    records = pg.evaluate(load(), data, bank, per_level=1, quiet=True)
    assert len(records) == 2 * 6 * 3 and set(records["segmenter"]) == {"grounded-sam2"}
    assert records["dice"].between(0, 1).all()


# What is said when something is in the way


def drop_tensor(folder):
    state = load_file(folder / "detector" / "model.safetensors")
    state.pop("model.level_embed")
    save_file(state, folder / "detector" / "model.safetensors", metadata={"format": "pt"})


def drop_words(folder):
    for path in (folder / "detector").glob("*"):
        if path.stem in ("vocab", "tokenizer", "tokenizer_config", "special_tokens_map"):
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "masks"), "checkpoint of grounded-sam2, the folder masks in it is missing; give"),
        (lambda f: (f / "config.json").write_text('{"model_type": "sam3"}'), "'sam3', not 'grounded-sam2'"),
        (lambda f: shutil.copy(f / "masks" / "config.json", f / "detector"), "'sam2', not 'grounding-dino', so"),
        (lambda f: shutil.copy(f / "detector" / "config.json", f / "masks"), "'grounding-dino', not 'sam2', so"),
        (lambda f: (f / "masks" / "model.safetensors").unlink(), r"masks: there are no weights \(\*.safetensors\)"),
        (lambda f: (f / "detector" / "model.safetensors").unlink(), r"detector: there are no weights"),
        (drop_words, "BertTokenizer.* cannot|the tokenizer has"),
        (drop_tensor, r"1 tensors are missing, model.level_embed among them; this is not a whole"),
    ],
)
def test_bad_checkpoints(folder, tmp_path, spoil, message):
    shutil.copytree(folder, tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(ModelError, match=message):
        pg.load_segmenter("grounded-sam2", tmp_path / "bad", "cpu")


def test_no_network_and_an_old_transformers_are_one_sentence(monkeypatch, load, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^IDEA-Research/grounding-dino-tiny: .* the hub cannot be reached"):
        pg.load_segmenter("grounded-sam2", device="cpu")
    with pytest.raises(ModelError, match="no such checkpoint folder; give the folder that training wrote"):
        pg.load_segmenter("grounded-sam2", tmp_path / "absent", "cpu")
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    sys.modules["transformers"].__version__ = "4.45.0"
    sys.modules["transformers"].GroundingDinoForObjectDetection = GroundingDinoForObjectDetection
    with pytest.raises(ModelError, match=r"transformers 4\.45\.0 has no Sam2Model; run `pip install -U"):
        load()


def test_bad_options(load):
    with pytest.raises(SettingsError, match="tile is 8; a tile must have at least 32 pixels"):
        load(tile=8)
    with pytest.raises(SettingsError, match=r"box_threshold is 35; it is a probability, above 0 and below 1"):
        load(box_threshold=35)
    with pytest.raises(ModelError, match="has no option 'text_threshold'; it has box_threshold, tile, truncate"):
        load(text_threshold=0.25)
    with pytest.raises(SettingsError, match="grounded-sam2 trains with TrainSettings, not Sam3Settings; leave"):
        load().prepare_training(pg.Sam3Settings(trainable="full"), ["nuclei"], phrasings=2)
