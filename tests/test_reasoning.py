"""`seg-zero` and `vision-reasoner` on a tiny random Qwen2.5-VL and SAM2, loaded as the published ones are.

Random weights answer nonsense. For an answer that can be read, `teach` sets the weights of the language model so that
greedy decoding comes to it: one answer where the word "dead" was read, another where it was not.
"""

import json
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sam import save_sam, save_sam2
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import pgseg_lite as pg
from pgseg_lite.errors import ModelError, SettingsError
from pgseg_lite.metrics import pack
from pgseg_lite.models import reasoning
from pgseg_lite.models.base import THRESHOLD
from pgseg_lite.models.reasoning import SegZeroSegmenter, VisionReasonerSegmenter, place
from pgseg_lite.regression import adapt

NAMES = {"seg-zero": SegZeroSegmenter, "vision-reasoner": VisionReasonerSegmenter}
ANSWERS = {  # without "dead" in the phrasing, and with it
    "seg-zero": (
        '<think> dots </think><answer>{"bbox": [10, 20, 60, 80], "points_1": [30, 40], "points_2": [35, 60]}</answer>',
        "<answer>{'bbox': [50, 10, 110, 100], 'points_1': [80, 40], 'points_2': [85, 60]}</answer>",
    ),
    "vision-reasoner": (
        '<answer>[{"bbox_2d": [10, 20, 60, 80], "point_2d": [30, 40]}, '
        '{"bbox_2d": [50, 10, 110, 100], "point_2d": [80, 40]}]</answer>',
        "<think> none </think><answer>[]</answer>",
    ),
}
TINY_SIDE = 112
PROMPTS = ["Find all nuclei.", "dead nuclei", "cells", "every dead nucleus, and no other"]


def save_qwen(folder, name=None):
    """Byte-level tokens, Qwen's special ones, the word "dead", and as single tokens the answers of `name`."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["dead", *ANSWERS.get(name, ())])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in [*special, "<|endoftext|>"]}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "eos_token_id": ids["<|im_end|>"], "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    as_published = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05}
    model.generation_config.update(**as_published)
    if name:
        teach(model, tokenizer, *ANSWERS[name])
    else:
        with torch.no_grad():  # the initial weights are so small that the image would hardly matter
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_sam2(folder / "sam2")
    return folder


@torch.no_grad()
def teach(model, tokenizer, usual, dead):
    """Channel 0 marks a new line, the prompt's last token; 1 "dead", spread to all later tokens by an even attention;
    2 an answer that has been given."""
    row = tokenizer.convert_tokens_to_ids
    embedding, head, layer = (
        model.get_input_embeddings().weight,
        model.lm_head.weight,
        model.model.language_model.layers[0],
    )
    for weight in (embedding, head, layer.mlp.down_proj.weight, *layer.self_attn.parameters()):
        weight.zero_()
    model.model.visual.merger.mlp[2].weight[:3] = model.model.visual.merger.mlp[2].bias[:3] = 0
    layer.self_attn.v_proj.weight[1, 1], layer.self_attn.o_proj.weight[1, 1] = 1, 1000
    embedding[row(tokenizer.tokenize("\n")[0]), 0] = embedding[row("dead"), 1] = 1
    embedding[[row(usual), row(dead)], 2] = 1e4
    head[row(usual), 0], head[row(dead), 1], head[row("<|im_end|>"), 2] = 1, 100, 1000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reasoning")
    return {"random": save_qwen(root / "random"), **{name: save_qwen(root / name, name) for name in NAMES}}


@pytest.fixture
def load(folders, monkeypatch):
    monkeypatch.setattr(reasoning, "SIDE", TINY_SIDE)  # 16 tokens an image; one test takes the published 840
    return lambda name, folder=None, **o: pg.load_segmenter(name, folders[folder or name], "cpu", max_new_tokens=6, **o)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def assert_same(a, b):
    torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(a.presence_logits, b.presence_logits)


@pytest.mark.filterwarnings("ignore:.*answer to .* names nothing")
@pytest.mark.parametrize("name", NAMES)
def test_prompt_regression_asks_it_as_it_is_asked_here(load, image, name):
    model = load(name)
    asked = adapt(model)
    sample = pg.Sample(image, {}, "one", "noise")
    found = dict(asked.answers(sample, PROMPTS))
    expected = model.predict(image, PROMPTS)
    assert expected.masks.any() and [found[text].reason for text in PROMPTS] == [""] * len(PROMPTS)
    np.testing.assert_array_equal([found[text].packed for text in PROMPTS], pack(expected.masks[0].numpy()))
    assert adapt(load(name)).fingerprint == asked.fingerprint
    model.max_new_tokens = 5
    assert adapt(model).fingerprint != asked.fingerprint


# What the language model is shown


@pytest.mark.parametrize(
    ("shape", "differ"), [((840, 840), 0), ((1000, 1000), 0), ((256, 256), 0.02), ((90, 130), 0.02)]
)
def test_patches_are_those_of_the_published_processor(shape, differ):
    """Where Pillow makes an image larger it rounds a few bytes otherwise than torch, by one grey level."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    resized = Image.fromarray(image).resize((reasoning.SIDE, reasoning.SIDE), Image.BILINEAR)
    expected = Qwen2VLImageProcessorPil()(resized, return_tensors="pt")
    ours = reasoning.to_patches(torch.from_numpy(image).permute(2, 0, 1))
    assert expected["image_grid_thw"].tolist() == [[1, 60, 60]]
    assert ours.shape == expected["pixel_values"].shape == (3600, 1176)
    off = (ours - expected["pixel_values"]).abs()
    assert off.max() < (1.05 / 255 / 0.26 if differ else 1e-5) and (off > 1e-5).float().mean() <= differ


def test_the_question_is_the_published_one(load):
    assert load("seg-zero").ask("Nuclei.") == (
        "Please find 'nuclei' with bbox and points.Compare the difference between objects and find the most closely "
        "matched one.Output the thinking process in <think> </think> and final answer in <answer> </answer> tags.Output "
        "the one bbox and points of two largest inscribed circles inside the interested object in JSON format.i.e., "
        "<think> thinking process here </think><answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': "
        "[35,180]}</answer>"
    )
    assert load("vision-reasoner").ask('Is it "dead"?').startswith('Please find "is it "dead" with bboxs and points.Co')


def test_it_generates_as_transformers_does_with_image_and_question(folders, load, image):
    """The whole model in one call, pixels and all, against tokens of the image that were made once."""
    model = load("seg-zero", "random")
    model.max_new_tokens = 40
    patches = reasoning.to_patches(torch.from_numpy(image).permute(2, 0, 1))
    chat = reasoning.CHAT.format(image="<|image_pad|>" * 16, question=model.ask("nuclei"))
    ids = model.tokenizer(chat, return_tensors="pt").input_ids
    raw = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders["random"])
    said = raw.generate(
        input_ids=ids, pixel_values=patches, image_grid_thw=torch.tensor([[1, 8, 8]]), do_sample=False,
        mm_token_type_ids=(ids == raw.config.image_token_id).int(), max_new_tokens=40,
    )  # fmt: skip
    expected = model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    tokens = model.encode_image(image)[0].tokens
    assert tokens.shape == (16, 32) and len(expected) > 3
    assert model.answer(tokens, ["nuclei"]) == [expected]


def test_it_looks_at_the_image(load, image):
    """Tokens of the image that look like the word "dead" to the language model."""
    model = load("seg-zero")
    tokens = model.encode_image(image)[0].tokens.clone()
    assert model.answer(tokens, ["nuclei"]) == [ANSWERS["seg-zero"][0]]
    tokens[:, 1] = 100
    assert model.answer(tokens, ["nuclei"]) == [ANSWERS["seg-zero"][1]]


# One image, many phrasings


@pytest.mark.parametrize("name", NAMES)
def test_phrasings_get_their_own_answers_and_each_encoder_runs_once(load, image, name, monkeypatch):
    model, seen = load(name), []
    model.qwen.model.visual.register_forward_hook(lambda *_: seen.append("qwen"))
    model.sam2.sam.vision_encoder.register_forward_hook(lambda *_: seen.append("sam2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = model.predict(image, PROMPTS)
        assert sorted(seen) == ["qwen", "sam2"]
        assert together.mask_logits.shape == (1, 4, 90, 120)
        alone = [model.predict(image, text) for text in PROMPTS]
        parts = (torch.cat(part, 1) for part in zip(*(vars(out).values() for out in alone), strict=True))
        assert_same(together, pg.SegmentationOutput(*parts))
        monkeypatch.setattr(reasoning, "AT_ONCE", 3)
        assert_same(model.predict(image, PROMPTS), together)
    assert isinstance(model, pg.Segmenter)
    usual, dead = (model.read(answer) for answer in ANSWERS[name])
    for i, objects in enumerate((usual, dead, usual, dead)):
        assert (together.presence_logits[0, i] > 0) == bool(objects)
        if objects:
            boxes, points = zip(*(place(found, (90, 120)) for found in objects), strict=True)
            with torch.inference_mode():
                expected, _ = model.sam2.union(
                    model.encode_image(image)[0].embeddings,
                    (90, 120),
                    boxes=torch.tensor(boxes),
                    points=torch.tensor(points),
                )
            torch.testing.assert_close(together.mask_logits[0, i] - THRESHOLD, expected, atol=1e-5, rtol=1e-5)
        else:
            assert not together.masks[0, i].any()


def test_two_images_equal_one_after_the_other(load, image):
    model, other = load("seg-zero"), np.ascontiguousarray(image[::-1])
    both = model.predict([image, other], PROMPTS[:2])
    assert_same(
        pg.SegmentationOutput(both.mask_logits[1:], both.presence_logits[1:]), model.predict(other, PROMPTS[:2])
    )


def test_evaluation_gives_records_at_the_published_size(folders):
    """900 tokens of an image, through the 840 pixels a side of the published models."""
    data, bank = pg.load_dataset("synthetic", split="test", size=1), pg.PromptBank.load("nuclei")
    model = pg.load_segmenter("seg-zero", folders["seg-zero"], "cpu", max_new_tokens=3)
    seen = []
    model.qwen.model.visual.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    records = pg.evaluate(model, data, bank, levels=("low",), per_level=1, quiet=True)
    assert seen == [3600] and len(records) == len(data.targets) and records["presence"].eq(1).all()
    assert records["area_pred"].gt(0).any()


# Answers


WELL = '{"bbox": [10, 100, 200, 210], "points_1": [30, 110], "points_2": [35.5, 180]}'
MANY = '[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}]'


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("seg-zero", f"<think>a</think><answer>{WELL}</answer>", [([10, 100, 200, 210], [[30, 110], [35.5, 180]])]),
        ("seg-zero", WELL, [([10, 100, 200, 210], [[30, 110], [35.5, 180]])]),
        ("seg-zero", WELL.replace('"', "'"), [([10, 100, 200, 210], [[30, 110], [35.5, 180]])]),
        ("seg-zero", f"<answer>{WELL[:-1]}", None),  # truncated
        ("seg-zero", "the nuclei are everywhere", None),
        ("seg-zero", "", None),
        ("seg-zero", "<answer>[1, 2, 3, 4]</answer>", None),
        ("seg-zero", '{"bbox": [1, 2, 3], "points_1": [1, 2], "points_2": [1, 2]}', None),
        ("seg-zero", '{"bbox": [1, 2, 3, 4], "points_1": [1, 2]}', None),
        ("seg-zero", '{"bbox": [1, 2, NaN, 4], "points_1": [1, 2], "points_2": [1, 2]}', None),
        ("seg-zero", '{"bbox": [1, 2, 1e999, 4], "points_1": [1, 2], "points_2": [1, 2]}', None),
        ("seg-zero", '{"bbox": "1234", "points_1": [1, 2], "points_2": [1, 2]}', None),
        ("seg-zero", '{"bbox": [1, 2, 3, 4], "points_1": [1, "2"], "points_2": [1, 2]}', None),
        ("seg-zero", "{1: 2, 3: 4}", None),
        ("seg-zero", "{[1]: 2}", None),
        ("seg-zero", '{"bbox": [1, 2, 3, ' + "9" * 999 + '], "points_1": [1, 2], "points_2": [1, 2]}', None),
        ("seg-zero", '{"bbox": [1, 2, 3, ' + "9" * 9999 + '], "points_1": [1, 2], "points_2": [1, 2]}', None),
        ("seg-zero", "{__import__('os').getcwd()}", None),
        ("vision-reasoner", f"<answer> {MANY}\n</answer>", [([10, 100, 200, 210], [[30, 110]])]),
        ("vision-reasoner", f"<answer>{MANY[:-1]}, {MANY[1:]}</answer>", [([10, 100, 200, 210], [[30, 110]])] * 2),
        ("vision-reasoner", "<answer>[]</answer>", []),
        ("vision-reasoner", MANY, None),  # without the tags
        ("vision-reasoner", f"<answer>{MANY}", None),
        ("vision-reasoner", f"<answer>{MANY[:-2]}</answer>", None),
        ("vision-reasoner", "<answer>none</answer>", None),
        ("vision-reasoner", "<answer>[[1, 2, 3, 4]]</answer>", None),
        ("vision-reasoner", '<answer>[{"bbox_2d": [1, 2, 3, 4]}]</answer>', None),
        ("vision-reasoner", '<answer>{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}</answer>', None),
        ("vision-reasoner", f"<answer>{'[' * 5000}</answer>", None),
    ],
)  # fmt: skip
def test_answers_are_read_or_refused(name, answer, expected):
    assert NAMES[name].read(answer) == expected


def test_coordinates_come_back_from_the_square_and_stay_in_the_image():
    size = (420, 210)  # height, width: half and a quarter of the square
    assert place(([100, 100, 200, 300], [[120, 200]]), size) == ([25, 50, 50, 150], [[30, 100]])
    assert place(([-50, 0, 9999, 80], [[-1, 900]]), size) == ([0, 0, 210, 40], [[0, 420]])
    for outside in ([840, 0, 900, 100], [-90, 0, -1, 100], [200, 0, 100, 100], [5, 5, 5, 5]):
        assert place((outside, [[1, 1]]), size) is None


def test_useless_answers_give_empty_masks_a_count_and_one_warning(load, image, monkeypatch):
    model = load("vision-reasoner", "random")
    with pytest.warns(
        UserWarning, match=r"answer to 'Find all nuclei.' cannot be read, so its mask is empty; said once"
    ):
        out = model.predict(image, PROMPTS)
    assert not out.masks.any() and (out.presence_logits < 0).all() and out.mask_logits.isfinite().all()
    assert model.unusable == {"cannot be read": 4}
    answers = ["<answer>[]</answer>", '<answer>[{"bbox_2d": [900, 0, 990, 9], "point_2d": [1, 2]}]</answer>', "?", "?"]
    features = model.encode_image(image)[0]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        drawn = [model.draw(features, text, answer) for text, answer in zip(PROMPTS, answers, strict=True)]
    assert all((logits < 0).all() and there < 0 for logits, there in drawn)
    assert model.unusable == {"cannot be read": 6, "names nothing": 1, "is outside": 1}


# Loading, saving, refusing


def test_it_saves_with_its_sam2_and_loads_back(load, image, tmp_path):
    model = load("seg-zero")
    model.save_pretrained(tmp_path / "again")
    again = pg.load_segmenter("seg-zero", tmp_path / "again", "cpu")
    assert again.max_new_tokens == 1024
    assert_same(again.predict(image, PROMPTS[:2]), model.predict(image, PROMPTS[:2]))


def test_the_layout_of_the_published_weights_loads(folders, load, image, tmp_path):
    """They were written by an older transformers: visual.* and model.layers.* at the top."""
    old = shutil.copytree(folders["seg-zero"], tmp_path / "old")
    state = load_file(old / "model.safetensors")
    renamed = {
        re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name)): tensor
        for name, tensor in state.items()
    }
    assert any(name.startswith("visual.") for name in renamed) and any(n.startswith("model.layers") for n in renamed)
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    again = pg.load_segmenter("seg-zero", old, "cpu", max_new_tokens=6)
    assert_same(again.predict(image, PROMPTS[:2]), load("seg-zero").predict(image, PROMPTS[:2]))


def test_what_it_refuses(folders, load, tmp_path, monkeypatch):
    data, bank = pg.load_dataset("synthetic", split="train", size=1), pg.PromptBank.load("nuclei")
    with pytest.raises(SettingsError, match="seg-zero cannot be trained here: as in the paper it is only tested"):
        pg.train(data, bank, tmp_path / "run", model=load("seg-zero"), device="cpu", quiet=True)
    with pytest.raises(ModelError, match="model_type is 'sam2', not 'qwen2_5_vl'"):
        pg.load_segmenter("seg-zero", folders["seg-zero"] / "sam2", "cpu", sam2=folders["seg-zero"] / "sam2")
    with pytest.raises(ModelError, match="model_type is 'sam', not 'sam2'"):
        load("seg-zero", sam2=save_sam(tmp_path / "sam"))
    with pytest.raises(SettingsError, match="max_new_tokens is 0; an answer takes at least 1, published 1024"):
        pg.load_segmenter("seg-zero", folders["seg-zero"], "cpu", max_new_tokens=0)
    bad = shutil.copytree(folders["seg-zero"], tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))
    with pytest.raises(ModelError, match=r"the tokenizer does not know <.image_pad.>; fetch its files again"):
        pg.load_segmenter("seg-zero", bad, "cpu")
    (bad / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="there are no weights"):
        pg.load_segmenter("seg-zero", bad, "cpu")
    monkeypatch.setattr(reasoning, "gpu_memory", lambda _: 2.0)
    with pytest.raises(ModelError, match="seg-zero needs about 3 GiB of GPU memory and 2 are there; take a larger"):
        load("seg-zero")
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    sys.modules["transformers"].__version__ = "4.40.0"
    with pytest.raises(ModelError, match=r"transformers 4.40.0 has no Qwen2_5_VLForConditionalGeneration; run `pip"):
        load("seg-zero")
