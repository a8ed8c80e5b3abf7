"""`clipseg` on a tiny random model, saved to disk and loaded back through the calls that load the published one."""

import shutil
import sys
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import CLIPSEG_SIDE as SIDE
from tiny_models import save_tiny_clipseg
from tiny_text import short_bank
from transformers import CLIPSegForImageSegmentation, CLIPTokenizerFast

import pgseg_lite as pg
from pgseg_lite.errors import ModelError, SettingsError
from pgseg_lite.models import tiles

PROMPTS = ["nuclei", "find every inflammatory nuclei", "dead cells", "see nuclei"]
LONG = "nuclei " * 74 + "see every cells"  # 77 words; start and end make 79 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clipseg(tmp_path_factory.mktemp("clipseg") / "tiny")


@pytest.fixture
def load(folder):
    return lambda **options: pg.load_segmenter("clipseg", folder, "cpu", **options)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return pg.PromptBank.load(short_bank(tmp_path_factory.mktemp("bank") / "short.yaml"))


@pytest.fixture(scope="module")
def data():
    return pg.load_dataset("synthetic", split="train", size=3)


SETTINGS = pg.TrainSettings(steps=2, batch_size=2, k=2, view=64, save_every=1, learning_rate=1e-3, precision="fp32")


def assert_same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.presence_logits, b.presence_logits, atol=tolerance, rtol=tolerance)


def count(module, calls):
    module.register_forward_hook(lambda *_: calls.append(module))


# One image, many phrasings


def test_an_image_is_encoded_once_and_batched_phrasings_equal_single_ones(load, image):
    model, calls = load(), []
    count(model.clipseg.clip.vision_model, calls)
    together = model.predict(image, PROMPTS)
    assert len(calls) == 1 and isinstance(model, pg.Segmenter)
    assert together.mask_logits.shape == (1, 4, 90, 120) and together.presence_logits.shape == (1, 4)
    assert together.mask_logits[0].std(0).mean() > 1e-3  # phrasings do matter in this tiny model
    alone = [model.predict(image, prompt) for prompt in PROMPTS]
    joined = pg.SegmentationOutput(
        *(torch.cat(part, 1) for part in zip(*(vars(o).values() for o in alone), strict=True))
    )
    assert_same(together, joined)


def test_it_answers_as_transformers_does(folder, load, image):
    """The whole of the class in one call, an image a phrasing, on pixels that need no resizing."""
    square = np.ascontiguousarray(image[:SIDE, :SIDE])
    raw, tokenizer = CLIPSegForImageSegmentation.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixels = (square / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(pixels).float().permute(2, 0, 1).expand(4, -1, -1, -1)
    with torch.no_grad():
        logits = raw.eval()(pixel_values=pixels, **tokens).logits
    expected = pg.SegmentationOutput(logits[None], logits.amax((1, 2))[None])
    assert_same(load().predict(square, PROMPTS), expected, 1e-4)


def test_an_image_of_another_size_is_resized_and_its_map_too(load, image):
    model = load()
    square = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    square = F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1
    expected = F.interpolate(model(square, model.encode_text(PROMPTS)).mask_logits, (90, 120), mode="bilinear")
    torch.testing.assert_close(model.predict(image, PROMPTS).mask_logits, expected, atol=1e-4, rtol=1e-4)


def test_two_images_equal_one_after_the_other(load, image):
    model, other = load(), np.ascontiguousarray(image[::-1])
    both = model.predict([image, other], PROMPTS)
    assert_same(pg.SegmentationOutput(both.mask_logits[1:], both.presence_logits[1:]), model.predict(other, PROMPTS))


def test_presence_is_that_of_the_likeliest_pixel(load, image):
    model = load()
    features, text = model.encode_image(image), model.encode_text(PROMPTS)
    out = model.decode(features, text)
    assert torch.equal(out.presence_logits, out.mask_logits.amax((2, 3)))
    assert torch.equal(model.decode(features, text[None]).mask_logits, out.mask_logits)


def test_a_phrasing_is_embedded_once(load, monkeypatch):
    model = load()
    first = model.encode_text(PROMPTS)
    monkeypatch.setattr(model.text, "_embed", lambda *_: pytest.fail("the text encoder ran again"))
    assert torch.equal(model.encode_text(PROMPTS[::-1]), first.flip(0)) and first.shape == (4, 16)


def test_phrasings_that_are_too_long_are_refused_or_cut_with_a_warning(load, image):
    with pytest.raises(ModelError, match=r"CLIPSeg reads 77 tokens, too few for 1 of 2 .* loses 'every cells'; short"):
        load().predict(image, ["nuclei", LONG])
    model = load(truncate=True)
    with pytest.warns(UserWarning, match="loses 'every cells'"):
        cut = model.predict(image, [LONG])
    assert_same(cut, model.predict(image, [LONG.removesuffix(" every cells")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(image, [LONG, " ".join(["nuclei"] * 75)])  # said once; 75 words fit


def test_a_tiled_image_is_predicted_tile_by_tile(load, image):
    out, whole = load(tile=64).predict(image, PROMPTS), load()
    boxes = tiles.tile_boxes(90, 120, 64)
    parts = [whole.predict(np.ascontiguousarray(image[y0:y1, x0:x1]), PROMPTS) for y0, x0, y1, x1 in boxes]
    expected = tiles.stitch([part.mask_logits[0] for part in parts], boxes, (90, 120))
    torch.testing.assert_close(out.mask_logits[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.presence_logits[0], torch.stack([p.presence_logits[0] for p in parts]).amax(0))


# Training and evaluation


def test_the_decoder_and_nothing_else_gets_gradients(load):
    model = load()
    groups = model.prepare_training(SETTINGS, ["nuclei"], phrasings=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("clipseg.decoder.")}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert {group["lr"] for group in groups} == {1e-3}
    assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim == 1)
    model.train()
    out = model(torch.rand(2, 3, 64, 64) * 2 - 1, model.encode_text(PROMPTS[:2]).expand(2, -1, -1))
    masks = torch.rand(2, 64, 64) < 0.3
    SETTINGS.loss()(out.mask_logits, out.presence_logits, masks).total.backward()
    # A softmax does not see what is added to all its inputs, so biases of keys have gradients of zero.
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained:
            assert parameter.grad.isfinite().all() and (parameter.grad.any() or name.endswith("k_proj.bias")), name


def test_a_run_changes_the_decoder_and_leaves_a_checkpoint_that_reads_back(load, folder, data, bank, tmp_path):
    run = tmp_path / "run"
    result = pg.train(data, bank, run, SETTINGS, model=load(), device="cpu", quiet=True)
    assert np.isfinite(result.history["seg"]).all()
    before, after = load_file(folder / "model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()  # plain CLIPSeg, text encoder back in its place
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    again, sample = pg.load_segmenter("clipseg", run, "cpu"), data[0].image
    assert again.input_size == SIDE
    assert_same(again.predict(sample, PROMPTS), result.model.predict(sample, PROMPTS))
    assert not list(run.glob("saving-*"))
    CLIPSegForImageSegmentation.from_pretrained(run)


def test_a_model_brings_the_settings_of_the_baselines():
    from pgseg_lite.models.clipseg import ClipSegSegmenter
    from pgseg_lite.settings import BASELINE_PROFILES

    assert ClipSegSegmenter.default_settings is BASELINE_PROFILES["lite"] and set(BASELINE_PROFILES) == set(pg.PROFILES)


def test_evaluation_gives_records(load, data, bank):
    records = pg.evaluate(load(), data, bank, per_level=1, quiet=True)
    assert len(records) == 3 * 6 * 3 and set(records["segmenter"]) == {"clipseg"}
    assert records["dice"].between(0, 1).all()


# What is said when something is in the way


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    state.pop("decoder.film_mul.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drop_words(folder):
    for path in folder.glob("*"):
        if path.stem in ("vocab", "merges", "tokenizer", "tokenizer_config", "special_tokens_map"):
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "model_type is 'clip', not 'clipseg'"),
        (lambda f: (f / "model.safetensors").unlink(), r"there are no weights \(\*.safetensors\) here; copy"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), "preprocessor_config.json: not valid JSON"),
        (lambda f: (f / "preprocessor_config.json").write_text("[]"), "holds no entries, only list; restore"),
        (drop_words, "CLIPTokenizer.* cannot|the tokenizer has"),
        (drop_tensor, "1 tensors are missing, decoder.film_mul.weight among them; this is not a whole"),
    ],
)
def test_bad_checkpoints(folder, tmp_path, spoil, message):
    shutil.copytree(folder, tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(ModelError, match=message):
        pg.load_segmenter("clipseg", tmp_path / "bad", "cpu")


def test_no_network_and_an_old_transformers_are_one_sentence(monkeypatch, load, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^CIDAS/clipseg-rd64-refined: .* the hub cannot be reached"):
        pg.load_segmenter("clipseg", device="cpu")
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    sys.modules["transformers"].__version__ = "4.20.0"
    with pytest.raises(
        ModelError, match=r"transformers 4.20.0 has no CLIPSegForImageSegmentation; run `pip install -U"
    ):
        load()


def test_bad_options(load):
    with pytest.raises(SettingsError, match="tile is 8; a tile must have at least 32 pixels"):
        load(tile=8)
    with pytest.raises(ModelError, match="clipseg has no option 'top_k'; it has tile, truncate"):
        load(top_k=3)
    with pytest.raises(SettingsError, match="clipseg trains with TrainSettings, not Sam3Settings; leave"):
        load().prepare_training(pg.Sam3Settings(trainable="full"), ["nuclei"], phrasings=2)
