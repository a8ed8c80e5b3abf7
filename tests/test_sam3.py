"""`sam3` on a tiny random Sam3Model, saved to disk and loaded back through the calls that load the published one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from itertools import pairwise

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_sam3
from tiny_text import WORDS, short_bank
from transformers import CLIPTokenizerFast, Sam3Config, Sam3Model

import pgseg_lite as pg
from pgseg_lite.cli import main
from pgseg_lite.errors import ModelError, SettingsError
from pgseg_lite.models import access, finetune, sam3, tiles
from pgseg_lite.models.base import aggregate

LONG = "nuclei " * 29 + "see every cells"  # 32 words; start and end make 34 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sam3(tmp_path_factory.mktemp("sam3") / "tiny")


@pytest.fixture
def load(folder):
    return lambda **options: pg.load_segmenter("sam3", folder, "cpu", **options)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory):
    return short_bank(tmp_path_factory.mktemp("bank") / "short.yaml")


@pytest.fixture(scope="module")
def bank(bank_file):
    return pg.PromptBank.load(bank_file)


@pytest.fixture(scope="module")
def data():
    return pg.load_dataset("synthetic", split="train", size=3)


PROMPTS = ["nuclei", "find every inflammatory nuclei", "dead cells", "see nuclei"]
SETTINGS = pg.Sam3Settings(steps=4, accumulation=1, k=2, view=64, save_every=2, precision="fp32", checkpointing=False)


def assert_same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.presence_logits, b.presence_logits, atol=tolerance, rtol=tolerance)


# One image, many phrasings


def test_predict_gives_a_map_of_the_image_s_size_per_phrasing(load, image):
    model = load()
    out = model.predict(image, PROMPTS)
    assert out.mask_logits.shape == (1, 4, 90, 120) and out.presence_logits.shape == (1, 4)
    assert torch.isfinite(out.mask_logits).all() and isinstance(model, pg.Segmenter)
    assert out.mask_logits[0].std(0).mean() > 1e-3  # phrasings do matter in this tiny model


def test_an_image_is_encoded_once_and_batched_phrasings_equal_single_ones(load, image, monkeypatch):
    model, calls = load(), []
    encode = model.sam.vision_encoder.forward
    monkeypatch.setattr(model.sam.vision_encoder, "forward", lambda x: calls.append(len(x)) or encode(x))
    together = model.predict(image, PROMPTS)
    assert calls == [1]
    alone = [model.predict(image, prompt) for prompt in PROMPTS]
    joined = pg.SegmentationOutput(
        *(torch.cat(part, 1) for part in zip(*(vars(o).values() for o in alone), strict=True))
    )
    assert_same(together, joined)
    assert_same(load(serial=True).predict(image, PROMPTS), together)
    monkeypatch.setattr(sam3, "AT_ONCE", 3)
    assert_same(model.predict(image, PROMPTS), together)


def test_it_answers_as_transformers_does(folder, load, image):
    """The whole of Sam3Model in one call, on an image that needs no resizing."""
    model, square = load(presence_gate=False), np.ascontiguousarray(image[:84, :84])
    raw, tokenizer = Sam3Model.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(PROMPTS[1], padding="max_length", max_length=32, return_tensors="pt")
    pixels = access.to_square(torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255 * 2 - 1, model.input_size)
    with torch.no_grad():
        out = raw(pixel_values=pixels, **tokens)
    expected = aggregate(out.pred_masks, out.pred_logits, reading="max-score")
    expected = torch.nn.functional.interpolate(expected[None], (84, 84), mode="bilinear")
    ours = model.predict(square, PROMPTS[1])
    assert_same(ours, pg.SegmentationOutput(expected, out.presence_logits))


def test_two_images_equal_one_after_the_other(load, image):
    model, other = load(), np.ascontiguousarray(image[::-1])
    both = model.predict([image, other], PROMPTS)
    assert_same(pg.SegmentationOutput(both.mask_logits[1:], both.presence_logits[1:]), model.predict(other, PROMPTS))


def test_features_are_expanded_without_copies(load, image):
    view = load().encode_image(image).views[0][0]
    for one, many in zip(view.fpn_hidden_states, sam3.for_each(view, 6).fpn_hidden_states, strict=True):
        assert many.shape[0] == 6 and many.data_ptr() == one.data_ptr() and many.stride(0) == 0


def test_a_phrasing_is_embedded_once(load, image, monkeypatch):
    model = load()
    first = model.encode_text(PROMPTS)
    monkeypatch.setattr(model.text, "_embed", lambda *_: pytest.fail("the text encoder ran again"))
    assert torch.equal(model.encode_text(PROMPTS[::-1]), first.flip(0))


def test_padding_changes_nothing(load, image):
    model = load()
    features, text = model.encode_image(image), model.encode_text(["find nuclei"])  # start, two words, end
    assert text.shape[1:] == (32, 33) and text[..., -1].sum() == 4
    padded = model.decode(features, text)
    assert_same(model.decode(features, text[:, :4]), padded)
    noise = torch.where(text[..., -1:] > 0, text, torch.randn_like(text) * (torch.arange(33) < 32))
    assert_same(model.decode(features, noise), padded)


def test_phrasings_that_are_too_long_are_refused_or_cut_with_a_warning(load, image):
    with pytest.raises(ModelError, match=r"32 tokens, too few for 1 of 2 phrasings: .* loses 'every cells'; shorten"):
        load().predict(image, ["nuclei", LONG])
    for wrong in ({"truncate": "yes"}, {"tile": True}):
        with pytest.raises(
            ModelError, match=r"sam3: (truncate is 'yes'; give true or false|tile is True; give a number)"
        ):
            load(**wrong)
    model = load(truncate=True)
    with pytest.warns(UserWarning, match="loses 'every cells'"):
        cut = model.predict(image, [LONG])
    assert_same(cut, model.predict(image, [LONG.removesuffix(" every cells")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(image, [LONG, " ".join(["nuclei"] * 30)])  # said once; 30 words fit


# From queries to one map


@pytest.mark.parametrize("reading", pg.models.AGGREGATIONS)
@pytest.mark.parametrize("gate", [True, False])
def test_every_reading_is_that_of_aggregate(load, image, reading, gate):
    model = load(reading=reading, top_k=3, presence_gate=gate)
    view, text = model.encode_image(image).views[0][0], model.encode_text(PROMPTS)
    raw = []
    hook = model.sam.register_forward_hook(lambda *call: raw.append(call[-1]))
    with torch.no_grad():
        logits, presence = model.read(view, text, (32, 32))
    hook.remove()
    expected = aggregate(
        raw[0].pred_masks, raw[0].pred_logits, raw[0].presence_logits[:, 0] if gate else None,
        reading=reading, top_k=3, semantic_logits=raw[0].semantic_seg[:, 0],
    )  # fmt: skip
    torch.testing.assert_close(logits, expected)  # the tiny model's masks have 32 x 32 pixels
    torch.testing.assert_close(presence, raw[0].presence_logits[:, 0])


def test_absence_empties_a_gated_map(load, image):
    model = load()
    with torch.no_grad():
        model.sam.detr_decoder.presence_head.layer3.bias.fill_(-100)  # clamped to -10 by SAM3
    assert not model.predict(image, PROMPTS).masks.any()


# Tiles


@pytest.mark.parametrize(("height", "width", "tile"), [(100, 300, 64), (64, 65, 64), (40, 500, 128), (1000, 1000, 256)])
def test_tiles_cover_the_image_and_overlap_by_a_quarter(height, width, tile):
    boxes = tiles.tile_boxes(height, width, tile)
    seen = np.zeros((height, width), int)
    for y0, x0, y1, x1 in boxes:
        assert (y1 - y0, x1 - x0) == (min(tile, height), min(tile, width)) and y0 >= 0 and y1 <= height and x1 <= width
        seen[y0:y1, x0:x1] += 1
    assert seen.min() == 1
    columns = sorted({x for _, x, _, _ in boxes})
    assert all(b - a <= tile - tile // 4 + 1 for a, b in pairwise(columns))


def test_stitched_maps_have_no_seams():
    boxes, size = tiles.tile_boxes(100, 230, 64), (100, 230)
    whole = torch.randn(2, *size)
    cut = [whole[:, y0:y1, x0:x1] for y0, x0, y1, x1 in boxes]
    torch.testing.assert_close(tiles.stitch(cut, boxes, size), whole)
    disagreeing = [torch.full((1, y1 - y0, x1 - x0), 10.0 * (i % 2)) for i, (y0, x0, y1, x1) in enumerate(boxes)]
    out = tiles.stitch(disagreeing, boxes, size)
    steps = max(out.diff(dim=1).abs().max(), out.diff(dim=2).abs().max())
    assert out.min() < 1 and out.max() > 9 and steps < 10 / 8  # a seam would be a step of 10


def test_a_tiled_image_is_predicted_tile_by_tile(load, image):
    model = load(tile=64)
    out = model.predict(image, PROMPTS)
    whole = load()
    boxes = tiles.tile_boxes(90, 120, 64)
    parts = [whole.predict(np.ascontiguousarray(image[y0:y1, x0:x1]), PROMPTS) for y0, x0, y1, x1 in boxes]
    expected = tiles.stitch([part.mask_logits[0] for part in parts], boxes, (90, 120))
    torch.testing.assert_close(out.mask_logits[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.presence_logits[0], torch.stack([p.presence_logits[0] for p in parts]).amax(0))


# What is trained


def expected_parts(trainable, reading="max-score"):
    vision = r"vision_encoder\.(backbone\.|neck\.fpn_layers\.[012]\.)"
    decoder = (
        r"detr_encoder\.|detr_decoder\.(?!box_head)|mask_decoder\.(mask_embedder|instance_projection|prompt_cross)"
    )
    decoder += r"|mask_decoder\.pixel_decoder\.(conv_layers|norms)\.[01]\." + r"|dot_product_scoring\." * (
        reading == "max-score"
    )
    if reading == "semantic":
        decoder = decoder.replace("!box_head", "!box_head|output_layer_norm").replace(
            "mask_embedder|instance_", "semantic_"
        )
    return {"decoder": decoder, "full": f"{vision}|{decoder}", "lora": r".*[qkvo]_proj\.lora_"}[trainable]


def loss_of(model, bank, settings, presence_weight=0.1):
    """The loss of one batch of two images with two targets, as training computes it."""
    torch.manual_seed(1)
    texts = ["find all nuclei", "mark all cells", "dead nuclei", "segment every dead cells"]
    table = model.encode_text(texts).expand(2, -1, -1, -1)  # [B, G * K, L, D + 1]
    out = model(torch.rand(2, 3, 64, 64) * 2 - 1, table)
    masks = (torch.rand(4, 64, 64) < 0.3) & (torch.arange(4) < 3)[:, None, None]  # the last target is absent
    return settings.loss()(out.mask_logits.reshape(4, 2, 64, 64), out.presence_logits.reshape(4, 2), masks)


@pytest.mark.parametrize(
    ("trainable", "reading"),
    [
        ("decoder", "max-score"),
        ("full", "max-score"),
        ("lora", "max-score"),
        ("full", "semantic"),
        ("decoder", "max-logit"),
    ],
)
def test_exactly_the_expected_parameters_are_trained_and_all_get_gradients(load, bank, trainable, reading):
    model = load(reading=reading)
    settings = pg.Sam3Settings(trainable=trainable, lora_rank=2, group="none")
    groups = model.prepare_training(settings, ["nuclei"], phrasings=4)
    trained = {name: p for name, p in model.sam.named_parameters() if p.requires_grad}
    wanted = {name for name, _ in model.sam.named_parameters() if re.match(expected_parts(trainable, reading), name)}
    assert trained.keys() == wanted
    assert sum(len(group["params"]) for group in groups) == len(trained)
    if trainable == "lora":  # B starts at zero, so A would have no gradient in the first step
        for name, parameter in trained.items():
            torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
    loss_of(model.train(), bank, settings).total.backward()
    # A softmax does not see what is added to all its inputs, so biases of keys have gradients of zero.
    dead = [n for n, p in trained.items() if p.grad is None or not (p.grad.any() or n.endswith("k_proj.bias"))]
    assert not dead and all(torch.isfinite(p.grad).all() for p in trained.values())
    assert all(p.grad is None for name, p in model.sam.named_parameters() if name not in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_gradients_of_fp32(load, bank, dtype):
    """The arithmetic of a GPU in bf16, and of a T4 in fp16 with a scaled loss, done by the CPU."""
    gradients = []
    for enabled in (False, True):
        model = load()
        settings = pg.Sam3Settings(trainable="full", group="none")
        model.prepare_training(settings, ["nuclei"], phrasings=4)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled and dtype == torch.float16, init_scale=2.0**10)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            total = loss_of(model.eval(), bank, settings).total
        scaler.scale(total).backward()
        scale = scaler.get_scale() if scaler.is_enabled() else 1
        found = [p.grad.float().flatten() / scale for p in model.sam.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    assert gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("consistency", ["first", "pairwise"])
def test_serial_training_has_the_gradients_of_all_phrasings_at_once(load, bank, consistency):
    gradients = []
    for serial, checkpointing in ((False, False), (True, False), (True, True)):
        model = load()
        settings = pg.Sam3Settings(
            trainable="full", serial=serial, checkpointing=checkpointing, group="log-weights", consistency=consistency
        )
        model.prepare_training(settings, ["nuclei"], phrasings=4)
        loss_of(model.train(), bank, settings).total.backward()
        gradients.append({n: p.grad for n, p in model.sam.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_serial_training_keeps_the_memory_of_one_phrasing(load):
    """Bytes that wait for the backward pass: alive with K = 6, less what is alive with K = 1."""

    def kept(model, k):
        alive = {}
        text = model.encode_text([f"{word} nuclei" for word in WORDS[2:8]][:k])[None]

        def pack(tensor):
            alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.zeros(1, 3, 64, 64), text)
        del out
        return sum(alive.values())

    growth = []
    for serial in (False, True):
        model = load(serial=serial).train()
        growth.append(kept(model, 6) - kept(model, 1))
    assert growth[1] < growth[0] / 50


def test_equal_phrasings_stay_equal_in_training(load):
    model = load().train()
    out = model(torch.rand(1, 3, 64, 64), model.encode_text(["nuclei"] * 3)[None])
    torch.testing.assert_close(
        out.mask_logits[:, 1:], out.mask_logits[:, :1].expand(-1, 2, -1, -1), atol=1e-5, rtol=1e-5
    )


def test_layers_nearer_to_the_pixels_learn_slower(load):
    model, settings = load(), pg.Sam3Settings(trainable="full")
    groups = model.prepare_training(settings, ["nuclei"], phrasings=4)
    names = {id(p): name for name, p in model.sam.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    backbone = "vision_encoder.backbone"
    for name, layers_above in {
        f"{backbone}.embeddings.position_embeddings": 3, f"{backbone}.layers.0.mlp.fc1.weight": 2,
        f"{backbone}.layers.1.mlp.fc1.weight": 1, "vision_encoder.neck.fpn_layers.0.proj1.weight": 0,
    }.items():  # fmt: skip
        assert rates[name] == pytest.approx(2.5e-5 * 0.9**layers_above)
    assert rates["detr_decoder.query_embed.weight"] == 8e-5
    assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim == 1)


# Runs


@pytest.mark.parametrize("trainable", ["decoder", "lora", "full"])
def test_a_run_changes_what_is_trained_and_leaves_a_checkpoint(load, folder, data, bank, tmp_path, trainable):
    model, run = load(reading="union"), tmp_path / "run"
    full = trainable == "full"
    changes = {"trainable": trainable, "checkpointing": True, "serial": full, "precision": "bf16"}
    result = pg.train(data, bank, run, SETTINGS, model=model, device="cpu", quiet=True, **changes)
    assert np.isfinite(result.history["seg"]).all()
    first_group = 2.5e-5 * 0.9**3 if full else 2.5e-5 * 0.9**2 if trainable == "lora" else 8e-5
    assert result.history["learning_rate"].iloc[0] == pytest.approx(first_group, rel=1e-2)
    assert json.loads((run / "run.json").read_text())["reading"] == "union"
    before, after = load_file(folder / "model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()  # plain SAM3, LoRA folded in, text encoder back in its place
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith(("text_", "geometry_"))]
    assert any(name.startswith("detr_decoder") for name in changed)
    assert any(name.startswith("vision_encoder") for name in changed) == (trainable != "decoder")
    again = pg.load_segmenter("sam3", run, "cpu")
    assert again.options["reading"] == "union"  # it is read as it was trained
    assert_same(again.predict(data[0].image, PROMPTS), result.model.predict(data[0].image, PROMPTS))


def test_evaluation_gives_records_and_does_not_spoil_training_after_it(load, data, bank):
    model = load()
    records = pg.evaluate(model, data, bank, per_level=1, quiet=True)
    assert len(records) == 3 * 6 * 3 and set(records["segmenter"]) == {"sam3"}
    model.prepare_training(pg.Sam3Settings(trainable="full"), ["nuclei"], phrasings=4)
    loss_of(model.train(), bank, pg.Sam3Settings()).total.backward()


def test_kill_9_and_resume_from_the_command_line_gives_the_uninterrupted_run(folder, bank_file, tmp_path, capsys):
    run = [
        "train", "--segmenter", "sam3", "--start-from", folder, "--trainable", "lora", "--lora-rank", "2", "--size", "3",
        "--device", "cpu", "--profile", "smoke", "--steps", "6", "--save-every", "2", "--k", "2", "--view", "64",
        "--precision", "fp32", "--bank", bank_file, "--no-checkpointing", "--no-serial",
    ]  # fmt: skip
    run = [str(argument) for argument in run]
    assert main([*run, "--output", str(tmp_path / "straight")]) == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "pgseg_lite.cli", *run, "--output", broken],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # their number decides the last bits
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 200
    while not (broken / "checkpoint-2" / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (broken / "config.json").exists()
    assert main([*run, "--output", str(broken), "--resume"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()

    scored = [
        "evaluate",
        "--segmenter",
        "sam3",
        "--checkpoint",
        broken,
        "--size",
        "2",
        "--bank",
        bank_file,
        "--device",
        "cpu",
    ]
    assert main([*map(str, scored), "--records", str(tmp_path / "r.csv")]) == 0
    assert "worst for all: '" in capsys.readouterr().out and (tmp_path / "r.csv").exists()


# The published file's own shape, and what is said when something is in the way


def test_the_video_model_s_checkpoint_loads_as_its_detector(folder, load, image, tmp_path):
    """facebook/sam3 is of type sam3_video: the detector's config and weights stand under a prefix beside a tracker's."""
    shutil.copytree(folder, tmp_path / "video")
    config = json.loads((folder / "config.json").read_text())
    video = {
        "model_type": "sam3_video",
        "detector_config": config,
        "tracker_config": {"model_type": "sam3_tracker_video"},
    }
    (tmp_path / "video" / "config.json").write_text(json.dumps(video))
    state = {f"detector_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    state["tracker_model.memory"] = torch.zeros(3)
    save_file(state, tmp_path / "video" / "model.safetensors", metadata={"format": "pt"})
    assert_same(
        pg.load_segmenter("sam3", tmp_path / "video", "cpu").predict(image, PROMPTS), load().predict(image, PROMPTS)
    )


TOKENS = ("vocab", "merges", "tokenizer", "tokenizer_config", "special_tokens_map")


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    state.pop("detr_decoder.query_embed.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "not a checkpoint, config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "model_type is 'clip', not 'sam3'"),
        (lambda f: (f / "model.safetensors").unlink(), r"there are no weights \(\*.safetensors\) here; copy"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "Sam3Model cannot be read"),
        (lambda f: [path.unlink() for path in f.glob("*") if path.stem in TOKENS], "CLIPTokenizer.* cannot|the tokenizer has"),
        (drop_tensor, "1 tensors are missing, detr_decoder.query_embed.weight among them; this is not a whole"),
    ],
)  # fmt: skip
def test_bad_checkpoints(folder, tmp_path, spoil, message):
    shutil.copytree(folder, tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(ModelError, match=message):
        pg.load_segmenter("sam3", tmp_path / "bad", "cpu")


def refusal(kind, status):
    """The hub client's own error, as it raises it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:  # the response belongs to whichever HTTP client this version of the hub's client uses
        import httpx2 as http
    except ImportError:
        import httpx as http
    response = http.Response(status, request=http.Request("GET", "https://hub.example/x"))
    assert issubclass(kind, HfHubHTTPError)
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("error", "token", "message"),
    [
        (lambda e: refusal(e.GatedRepoError, 403), None, "licence must be accepted first; .* then run `hf auth login`"),
        (lambda e: refusal(e.GatedRepoError, 403), "abc", "licence must be accepted .* check that your token may read it"),
        (lambda e: refusal(e.RepositoryNotFoundError, 401), None, "shows no such repository; check the name, and run `hf auth"),
        (lambda e: refusal(e.HfHubHTTPError, 503), None, "the hub answers 503; run `hf auth login`, or try again later"),
        (lambda e: e.LocalEntryNotFoundError("no network"), None, "hub cannot be reached .LocalEntryNotFoundError.; connect"),
        (lambda e: ConnectionError("down"), None, "cannot be reached .ConnectionError.; connect, or give a folder"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_of_the_hub_s_weights(monkeypatch, error, token, message):
    def refuse(*_, **__):
        raise error(huggingface_hub.errors)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(ModelError, match=f"^facebook/sam3: .*{message}"):
        pg.load_segmenter("sam3", device="cpu")


def test_offline_without_a_copy_is_one_sentence_from_the_real_client(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"facebook/sam3: .* the hub cannot be reached"):
        access.fetch("facebook/sam3", ("sam3",))
    with pytest.raises(ModelError, match="no such checkpoint folder"):
        access.fetch(tmp_path / "absent", ("sam3",))


def test_an_old_transformers_is_told_to_upgrade(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    sys.modules["transformers"].__version__ = "4.57.1"
    with pytest.raises(
        ModelError,
        match=r"transformers 4.57.1 has no Sam3Model; run `pip install -U 'transformers>=5'`",
    ):
        access.of_transformers("Sam3Model")
    monkeypatch.undo()
    assert transformers.Sam3Model is Sam3Model

    def in_need(name):  # transformers itself imports a class when it is first asked for
        raise ModuleNotFoundError("Could not import module 'Sam3Model'. Are this object's requirements installed?")

    lazy = type(sys)("transformers")
    lazy.__version__, lazy.__getattr__ = "5.0.0", in_need
    monkeypatch.setitem(sys.modules, "transformers", lazy)
    with pytest.raises(ModelError, match=r"has no Sam3Model that can be imported \(Could not .* installed\?\); run"):
        access.of_transformers("Sam3Model")


def test_lora_without_peft_and_a_small_gpu_stop_before_anything_is_written(load, data, bank, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "gpu_memory", lambda _: 0.5)
    with pytest.raises(
        ModelError, match="full needs about 1 GiB of GPU memory and 0 are there; try checkpointing=True, train"
    ):
        pg.train(data, bank, tmp_path / "run", SETTINGS, model=load(), quiet=True, trainable="full")
    with pytest.raises(
        ModelError,
        match=r"SAM3 reads 32 tokens, too few for [0-9]+ of [0-9]+ phrasings: .* and [0-9]+ more; shorten them",
    ):
        pg.train(data, pg.PromptBank.load("nuclei"), tmp_path / "run", SETTINGS, model=load(), quiet=True)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs peft, which is not installed; run `pip install peft`"):
        pg.train(data, bank, tmp_path / "run", SETTINGS, model=load(), quiet=True, trainable="lora")
    assert not (tmp_path / "run").exists()


def test_the_published_shape_needs_what_was_computed_for_it():
    """Parameters of the full architecture on no device: the estimate beside the figures it stands on."""
    with torch.device("meta"):
        sam = Sam3Model(Sam3Config())
    sam.text_encoder = sam.text_projection = None
    needed = {
        (trainable, serial): finetune.memory_needed(sam, pg.Sam3Settings(trainable=trainable, serial=serial), 18)
        for trainable in ("decoder", "lora", "full") for serial in (True, False)
    }  # fmt: skip
    assert (
        10 < needed["full", True] < 14 and needed["lora", True] < 8 and needed["decoder", True] < needed["lora", True]
    )
    assert needed["full", False] - needed["full", True] == pytest.approx(17 * 0.93)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda load: load(reading="median"), "aggregation 'median' is unknown"),
        (lambda load: load(top_k=9), "top_k is 9; it must be 1 to 8, the number of queries"),
        (lambda load: load(tile=8), "tile is 8; a tile must have at least 32 pixels"),
        (
            lambda load: pg.Sam3Settings(trainable="text"),
            "trainable 'text' is unknown; choose one of decoder, lora, full",
        ),
        (lambda load: pg.Sam3Settings(schedule="flat"), "schedule 'flat' is unknown; choose one of inverse_sqrt"),
        (lambda load: pg.Sam3Settings(layer_decay=1.5), "layer_decay is 1.5; it is a factor above 0 and at most 1"),
        (lambda load: pg.Sam3Settings(lora_rank=0), "lora_rank is 0; it must be above zero"),
        (lambda load: load().prepare_training(pg.TrainSettings(), ["nuclei"], 2), "sam3 trains with Sam3Settings"),
    ],
)
def test_bad_settings(load, make, message):
    with pytest.raises(SettingsError, match=message):
        make(load)


def test_command_line_refuses_what_belongs_to_the_other_segmenter(capsys, tmp_path):
    assert main(["train", "--size", "2", "--output", str(tmp_path / "run"), "--trainable", "lora"]) == 2
    assert "trainable is a setting of sam3" in capsys.readouterr().err
    assert main(["evaluate", "--size", "2", "--option", "truncate=true"]) == 2
    assert "lite has no option 'truncate'" in capsys.readouterr().err
