"""Learning from preferences: the loss beside autograd and brute force, the annotator, sources, stages and the study."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_text import save_bert_tokenizer, save_clip_tokenizer

import pgseg_lite as pg
from pgseg_lite import paper, studies
from pgseg_lite.errors import ModelError, ResultError, SettingsError
from pgseg_lite.models.lite import LiteConfig, LiteSegmenter
from pgseg_lite.preferences import candidates, group, outcome, sources, stages, study
from pgseg_lite.preferences.loss import GRADINGS, READINGS, PreferenceLoss, coefficients, log_likelihood, ratings
from pgseg_lite.preferences.stages import Asked, Preferences, StageSettings


@pytest.fixture
def maps():
    """Reference logits [3, 12, 12], a policy that has moved, candidates and their scores."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 12, 12, generator=generator)
    policy = reference + 0.3 * torch.randn(3, 12, 12, generator=generator)
    masks = candidates.by_threshold(reference)
    return policy, reference, masks, torch.rand(3, 4, generator=generator)


# ---- the loss ----


def test_log_likelihood_is_that_of_independent_pixels():
    """The chances of all 16 masks of four pixels sum to one."""
    logits = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(1))
    every = torch.tensor(list(itertools.product([False, True], repeat=4))).reshape(1, 16, 2, 2)
    assert log_likelihood(logits, every).exp().sum() == pytest.approx(1, abs=1e-6)
    slow = -F.binary_cross_entropy_with_logits(logits.expand(16, -1, -1), every[0].float(), reduction="none")
    torch.testing.assert_close(log_likelihood(logits, every)[0], slow.sum((-2, -1)))


@pytest.mark.parametrize("reading", ["sum", "mean", "region"])
def test_margin_is_zero_at_the_reference_and_the_gradient_is_not(maps, reading):
    _, reference, masks, scores = maps
    logits, loss = reference.clone().requires_grad_(), PreferenceLoss(reading=reading)
    terms = loss(logits, reference, masks, loss.grade(scores))
    assert terms.margin.abs().max() == 0 and terms.total.item() == pytest.approx(np.log(2))
    (slope,) = torch.autograd.grad(terms.total, logits)
    differ = masks.any(1) & ~masks.all(1)
    assert slope.abs().sum() > 0 and (slope[~differ].abs() < 1e-7).all()


def test_gradient_raises_the_best_and_lowers_the_worst(maps):
    _, reference, masks, scores = maps
    logits, loss = reference.clone().requires_grad_(), PreferenceLoss()
    grades = loss.grade(scores)
    (slope,) = torch.autograd.grad(loss(logits, reference, masks, grades).total, logits)
    after = loss((logits - 0.1 * slope).detach(), reference, masks, grades)
    gain = after.ratios.gather(1, scores.argmax(1, keepdim=True)) - after.ratios.gather(
        1, scores.argmin(1, keepdim=True)
    )
    assert (gain > 0).all() and (after.margin > 0).all()
    by_hand = -0.5 * (grades[..., None, None] * masks).sum(1) / (3 * 144)  # sigmoid(0) = 1/2, mean over 3 and 144
    torch.testing.assert_close(slope, by_hand)


def test_under_ranking_the_margin_is_linear_in_the_logits(maps):
    policy, reference, masks, scores = maps
    loss = PreferenceLoss(reading="sum")
    grades = loss.grade(scores)
    push = (grades[..., None, None] * masks).sum(1)  # [N, H, W]
    expected = (push * (policy - reference)).sum((-2, -1))
    torch.testing.assert_close(loss(policy, reference, masks, grades).margin, expected, rtol=1e-4, atol=1e-4)


def test_with_two_of_four_it_is_dpo(maps):
    policy, reference, masks, scores = maps
    loss = PreferenceLoss(beta1=0.7, beta2=0, reading="sum")
    margin = loss(policy, reference, masks, loss.grade(scores)).margin
    ratio = log_likelihood(policy, masks) - log_likelihood(reference, masks)
    best, worst = (ratio.gather(1, at[:, None])[:, 0] for at in (scores.argmax(1), scores.argmin(1)))
    torch.testing.assert_close(margin, 0.7 * best - 0.7 * worst)


def test_ranking_and_rating_differ_where_all_are_good_or_all_are_bad():
    good, bad = torch.tensor([[0.9, 0.8, 0.75, 0.71]]), torch.tensor([[0.1, 0.2, 0.05, 0.0]])
    assert coefficients(good, "ranking").tolist() == [[1, 0.5, -0.5, -1]]
    assert coefficients(bad, "ranking").tolist() == [[0.5, 1, -0.5, -1]]
    assert coefficients(good, "rating").tolist() == [[1, 1, 1, 1]]
    assert coefficients(bad, "rating").tolist() == [[-1, -1, -1, -1]]
    assert ratings(torch.tensor([[0.39, 0.4, 0.55, 0.7]])).tolist() == [[1, 2, 3, 4]]
    assert coefficients(torch.tensor([[0.5, 0.5, 0.5, 0.5]])).tolist() == [[0, 0, 0, 0]], "equals are not ranked"
    assert coefficients(torch.linspace(1, 0, 8)[None]).tolist() == [[0.5, 0.5, 0.25, 0.25, -0.25, -0.25, -0.5, -0.5]]


def test_candidates_may_be_those_of_the_model_as_it_changes(maps):
    policy, reference, _, _ = maps
    asked = asked_of(reference[:, None])
    asked.logits = policy[:, None].requires_grad_()
    totals = [Preferences(own=own)(asked).item() for own in (False, True)]
    assert totals[0] != totals[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PreferenceLoss(beta2=2), "beta1 is 1.0 and beta2 2; give"),
        (lambda: PreferenceLoss(reading="median"), "reading 'median' is unknown; choose one of sum, mean, region"),
        (lambda: coefficients(torch.rand(1, 3)), "3 candidates cannot be ranked in quarters"),
        (lambda: PreferenceLoss()(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.ones(1, 4, 5, 5).bool(),
                                  torch.zeros(1, 4)), "shapes do not fit"),
        (lambda: candidates.by_threshold(torch.zeros(1, 4, 4), (0.5, 0.3)), "give rising probabilities"),
        (lambda: candidates.flip(torch.zeros(1, 4), 2, np.random.default_rng(0)), "share of flipped verdicts is 2"),
        (lambda: StageSettings(steps=0), "steps is 0; it must be at least 1"),
        (lambda: stages.divide(None, 1.0), "labelled share is 1.0"),
        (lambda: sources.Fused(description=False), "a prompt needs words"),
        (lambda: sources.refine(np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4))), "resize it first"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, said):
    with pytest.raises(SettingsError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- candidates and annotators ----


def test_candidates_are_nested_and_overlap_is_that_of_the_metrics(maps):
    _, reference, masks, _ = maps
    assert (masks[:, 1:] <= masks[:, :-1]).all()
    truth = reference > 0.2
    packed = pg.metrics.pack(masks.numpy()), pg.metrics.pack(truth.numpy())
    np.testing.assert_allclose(
        candidates.overlap(masks, truth), pg.metrics.iou(packed[0], packed[1][:, None]), atol=1e-6
    )
    nothing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    assert candidates.overlap(nothing, nothing[:, 0]).item() == 1


def test_a_flipped_verdict_is_the_opposite_one():
    scores = torch.rand(400, 4, generator=torch.Generator().manual_seed(2))
    for grading in ("ranking", "rating"):
        grades = coefficients(scores, grading)
        flipped = candidates.flip(grades, 0.2, np.random.default_rng(0))
        same, other = (flipped == grades).all(1), (flipped == -grades).all(1)
        assert (same | other).all() and 40 < (~same).sum() < 120
    torch.testing.assert_close(coefficients(-scores), -coefficients(scores))


def asked_of(reference, truth=None):
    """Groups [M, K, H, W] of one image each."""
    images = [np.full((*reference.shape[-2:], 3), i, np.uint8) for i in range(len(reference))]
    truth = reference[:, 0] > 0 if truth is None else truth
    return Asked(
        images, truth, reference.clone().requires_grad_(), reference[..., 0, 0], reference, np.random.default_rng(0)
    )


def test_any_function_of_image_and_mask_may_rate(maps):
    _, reference, masks, _ = maps
    asked, seen = asked_of(reference[:, None]), []
    scores = candidates.with_rater(lambda image, mask: seen.append(image[0, 0, 0]) or mask.mean())(asked, masks)
    torch.testing.assert_close(scores, masks.float().mean((-2, -1)))
    assert [int(value) for value in seen] == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(SettingsError, match="not a number"):
        candidates.with_rater(lambda image, mask: np.nan)(asked, masks)


def test_group_prefers_the_mask_that_most_share():
    disc = torch.full((1, 4, 8, 8), -3.0)
    disc[:, :, 2:6, 2:6] = 3.0
    disc[:, 3] = -disc[:, 3]  # one phrasing says the opposite
    shares = group.agreement(disc > 0)
    assert shares[0].argmin() == 3 and shares[0, 3] == 0
    asked, loss = asked_of(disc), PreferenceLoss()
    group.GroupPreferences(loss)(asked).backward()
    slope = asked.logits.grad
    assert (slope[:, :, 2:6, 2:6] < 0).all() and (slope[:, :, :2] > 0).all(), "each phrasing is drawn to the many"
    scores = group.with_group(asked, candidates.by_threshold(disc.flatten(0, 1)))
    assert scores.shape == (4, 4) and scores[:3].min() > scores[3].max()


# ---- sources ----


@pytest.fixture(scope="module")
def tile():
    return pg.load_dataset("synthetic", split="test", size=1)[0]


def test_statistics_find_nuclei_and_say_a_known_sentence(tile):
    saliency = sources.stain_saliency(tile.image)
    truth = tile.masks["all"]
    assert saliency[truth].mean() > saliency[~truth].mean() + 0.1
    region = sources.refine(tile.image, saliency)
    speckled = (saliency + 0.4 * np.random.default_rng(0).standard_normal(saliency.shape)).clip(0, 1)
    edges = [
        np.abs(np.diff(mask.astype(int), axis=0)).sum()
        for mask in (speckled > 0.5, sources.refine(tile.image, speckled))
    ]
    assert edges[1] < edges[0] / 3, "the refinement removes speckles"
    assert sources.measured_answer(tile.image, region) in sources.possible_answers()
    assert sources.measured_answer(tile.image, region & False) == "there are none in this image"
    assert sources.box_of(region & False) is None
    dot = np.zeros((20, 20), bool)
    dot[8:10, 3:5] = True
    assert sources.box_of(dot) == (4, 0, 14, 9)


def test_sources_fuse_into_one_vector_and_a_box(tile):
    features = F.normalize(torch.randn(1, 3, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    same, none = sources.Fused()(features, [tile.image])
    assert same is features and none is None
    fused, boxes = sources.Fused(answers=True, box=True)(features, [tile.image])
    assert fused.shape == features.shape and torch.allclose(fused.norm(dim=-1), torch.ones(1, 3), atol=1e-5)
    cut = stages.inside(torch.ones(1, 3, 256, 256), [(10, 20, 30, 40)])
    assert (cut > 0).sum() == 3 * 20 * 20 and len(boxes) == 1
    told = sources.Fused(description=False, answers=True, answer=lambda image, region: "one large nucleus")
    assert told(features, [tile.image])[0].unique(dim=1).shape[1] == 1


def test_saliency_of_a_clip_through_the_real_loading_calls(tmp_path, tile):
    from transformers import CLIPConfig, CLIPModel

    from pgseg_lite.preferences.pretrained import ClipSaliency, ClipTowers

    ids = save_clip_tokenizer(tmp_path)
    deep = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=16)
    ends = dict(bos_token_id=ids["<|startoftext|>"], eos_token_id=ids["<|endoftext|>"], pad_token_id=0)
    config = CLIPConfig(
        text_config={**deep, "vocab_size": len(ids), "max_position_embeddings": 77, **ends},
        vision_config={**deep, "image_size": 64, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    source = ClipSaliency.from_pretrained(tmp_path)
    saliency = source(tile.image, "nuclei")
    assert saliency.shape == (256, 256) and saliency.min() == 0 and saliency.max() == 1
    pixels, towers = torch.randn(2, 3, 64, 64), ClipTowers(model)
    whole = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(towers.image(towers.tokens(pixels)), whole)
    assert sources.box_of(sources.refine(tile.image, saliency)) is not None


def biomed_clip(folder, **spoilt):
    """Tensors under open_clip's names, as a ViT of timm and a BERT have them."""
    torch.manual_seed(0)
    width, inner, out, depth, words = 64, 96, 32, 2, save_bert_tokenizer(folder)
    shapes = {"visual.trunk.cls_token": (1, 1, width), "visual.trunk.pos_embed": (1, 17, width),
              "visual.trunk.patch_embed.proj.weight": (width, 3, 8, 8), "visual.trunk.patch_embed.proj.bias": (width,),
              "visual.trunk.norm.weight": (width,), "visual.trunk.norm.bias": (width,),
              "visual.head.proj.weight": (out, width), "text.proj.0.weight": (48, width), "text.proj.2.weight": (out, 48),
              "logit_scale": ()}  # fmt: skip
    for i in range(depth):
        parts = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
                 "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}  # fmt: skip
        for name, shape in parts.items():
            shapes |= {
                f"visual.trunk.blocks.{i}.{name}.weight": shape,
                f"visual.trunk.blocks.{i}.{name}.bias": shape[:1],
            }
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=inner
        ),
        add_pooling_layer=False,
    )
    tensors = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    tensors |= {f"text.transformer.{name}": tensor for name, tensor in bert.state_dict().items()}
    save_file({name: tensor for name, tensor in tensors.items() if name not in spoilt.get("without", ())},
              folder / "open_clip_model.safetensors")  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    return tensors, bert.eval()


def test_saliency_of_biomed_clip_from_its_tensors(tmp_path, tile):
    from pgseg_lite.preferences.pretrained import ClipSaliency

    tensors, bert = biomed_clip(tmp_path)
    source = ClipSaliency.from_pretrained(tmp_path)
    assert source.preprocessing["image_mean"] == [0.5] * 3 and source(tile.image, "nuclei").max() == 1
    asked = source.tokenizer(["nuclei"], return_tensors="pt")
    spoken = bert(**asked).last_hidden_state[:, 0] @ tensors["text.proj.0.weight"].T
    torch.testing.assert_close(source.towers.text(asked), F.gelu(spoken) @ tensors["text.proj.2.weight"].T)
    x = torch.randn(1, 17, 64)  # one block of the ViT, written out
    block = {n[28:] if n.startswith("visual.trunk.blocks.1.") else n: t for n, t in tensors.items()}
    block = {n.removeprefix("visual.trunk.blocks.1."): t for n, t in tensors.items() if ".blocks.1." in n}
    y = F.layer_norm(x, (64,), block["norm1.weight"], block["norm1.bias"], 1e-6)
    q, k, v = (y @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]).chunk(3, dim=-1)
    y = x + F.linear(F.scaled_dot_product_attention(q, k, v), block["attn.proj.weight"], block["attn.proj.bias"])
    z = F.layer_norm(y, (64,), block["norm2.weight"], block["norm2.bias"], 1e-6)
    z = F.gelu(F.linear(z, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
    expected = y + F.linear(z, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    torch.testing.assert_close(source.towers.blocks[1](x), expected, atol=1e-5, rtol=1e-4)


def test_answers_of_a_vqa_model_through_the_real_loading_calls(tmp_path, tile):
    from transformers import BlipConfig, BlipForQuestionAnswering

    from pgseg_lite.preferences.pretrained import VqaAnswers

    words = save_bert_tokenizer(tmp_path)
    deep = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    text = {**deep, "vocab_size": words, "encoder_hidden_size": 32, "max_position_embeddings": 32, "bos_token_id": 101,
            "sep_token_id": 102, "eos_token_id": 102, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    BlipForQuestionAnswering(
        BlipConfig(text_config=text, vision_config={**deep, "image_size": 32, "patch_size": 8})
    ).save_pretrained(tmp_path)
    source = VqaAnswers.from_pretrained(tmp_path)
    assert isinstance(said := source(tile.image), str) and said and source(tile.image) == said


def test_missing_weights_get_one_sentence(tmp_path, monkeypatch):
    from pgseg_lite.preferences.pretrained import BIOMED_CLIP, ClipSaliency, VqaAnswers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no such checkpoint folder"):
        VqaAnswers.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="published as a pickle, which is not loaded here: write its tensors"):
        ClipSaliency.from_pretrained(BIOMED_CLIP)
    biomed_clip(tmp_path, without=["visual.head.proj.weight"])
    with pytest.raises(ModelError, match=r"visual\.head\.proj\.weight' is missing; this is not BiomedCLIP"):
        ClipSaliency.from_pretrained(tmp_path)


# ---- the stages and the study ----


@pytest.fixture(scope="module")
def small():
    bank, data = pg.PromptBank.load("nuclei"), pg.load_dataset("synthetic", split="train", size=10, tile=64)
    return bank, *stages.divide(data, 0.3)


def tiny():
    torch.manual_seed(0)
    return LiteSegmenter(LiteConfig(widths=[8, 16], dim=8, text_hidden=16))


def test_labels_are_divided_by_image_and_nested():
    data = pg.load_dataset("synthetic", split="train", size=10, tile=64)
    shares = [stages.divide(data, share) for share in (0.1, 0.3, 0.5)]
    images = [{name.split("@")[0] for name in labelled.ids} for labelled, _ in shares]
    assert [len(i) for i in images] == [1, 3, 5] and images[0] < images[1] < images[2]
    assert all(not i & {name.split("@")[0] for name in rest.ids} for i, (_, rest) in zip(images, shares, strict=True))


def test_rate_halves_every_ten_epochs():
    settings = StageSettings(steps=60, epochs=30, halve_every=10)
    assert [settings.rate(step) for step in (0, 19, 20, 39, 40, 59)] == [1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5, 2.5e-5]


def test_second_stage_moves_the_decoder_alone_and_starts_at_the_reference(small):
    bank, _, rest = small
    model, seen = tiny(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def lesson(asked):
        seen.append((asked.logits - asked.reference).abs().max().item())
        return Preferences()(asked)

    stages.second_stage(model, rest, bank, StageSettings(steps=3, batch_size=1, view=32, learning_rate=1e-2), lesson)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert seen[0] == 0 and seen[-1] > 0
    assert not [name for name in moved if ".stem." in name or ".down." in name or ".to_image." in name]
    assert {"image_encoder.to_pixels.weight", "query_head.queries.weight"} <= moved
    assert all(parameter.grad is None for parameter in model.image_encoder.stem.parameters())  # no work for nothing
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_preferences_move_a_model_towards_what_is_preferred(small):
    """A rater that likes large masks makes masks large, one that likes small ones small."""
    bank, _, rest = small
    areas = {}
    for name, rater in (("large", lambda image, mask: mask.mean()), ("small", lambda image, mask: 1 - mask.mean())):
        model = tiny()
        with torch.no_grad():
            model.query_head.queries.weight.mul_(0.05)
            model.query_head.queries.bias.zero_()  # logits spread about zero: all candidates differ
        settings = StageSettings(steps=10, batch_size=1, view=32, learning_rate=1e-2)
        stages.second_stage(model, rest, bank, settings, Preferences(score=candidates.with_rater(rater)))
        areas[name] = model.predict(rest[0].image, ["nuclei"]).mask_logits.sigmoid().mean().item()
    assert areas["large"] > areas["small"] + 0.05


def test_study_measures_its_cells_at_smoke_and_repeats_none(tmp_path, monkeypatch):
    chosen = [
        "10 %",
        "10 % + preferences",
        "rating",
        "rated by the group",
        "rated by a regressor",
        "preferences in the group",
        "with answers and box",
    ]
    monkeypatch.setattr(study, "STUDY", study.replace(study.STUDY, cells={name: study.CELLS[name] for name in chosen}))
    said = []
    table = studies.run_study("preferences", "smoke", tmp_path, said.append)
    assert list(table["cell"].unique()) == chosen and set(table["target"]) >= {"all"}
    scores = table.filter(like="dice_")
    assert ((scores >= 0) & (scores <= 1)).all(axis=None)
    assert len(list((tmp_path / "preferences").glob("first-*"))) == 2, "cells share the first stage"
    studies.run_study("preferences", "smoke", tmp_path, said.append)
    assert said[-1] == "preferences: 7 cells, 7 of them measured before"
    for name in set(study.CELLS) - set(chosen):  # what is not run here is at least well formed
        cell = study.CELLS[name]
        assert cell.get("second") is None or study.lesson_of(cell, None, None, None, study.SECOND["smoke"], "smoke")


def test_cells_are_compared_in_pairs_and_an_unknown_one_is_refused():
    rows = [
        dict(cell=cell, seed=seed, image=f"i{image}", target=target, dice_50=0.5 + 0.01 * image + gain)
        for cell, gain in (("a", 0.0), ("b", 0.1))
        for seed, image, target in itertools.product(range(3), range(8), ("all", "dead"))
    ]
    table = pd.DataFrame(rows)
    found = outcome.compared(table, [("b", "a")]).set_index("task")
    assert found["difference"].round(6).tolist() == [10, 10] and (found["verdict"] == "better").all()
    assert outcome.scores(table).loc[("a", 0), "T1"] == pytest.approx(53.5)
    with pytest.raises(ResultError, match="no cell 'c' here; choose one of a, b"):
        outcome.compared(table, [("c", "a")])


def test_the_paper_s_figures_are_data():
    frame = paper.preference_optimisation()
    assert {"table", "setting", "dice"} <= {*frame} and frame.attrs["source"]
    by = frame.set_index("setting")["dice"]
    assert by["ranking"] > by["rating"] > by["best candidate only"]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("grading", GRADINGS)
def test_the_loss_makes_every_tensor_where_its_input_is(reading, grading):
    """Without a GPU the device that holds no numbers shows it: whatever is made elsewhere does not fit."""
    meta = dict(device="meta")
    logits, scores = torch.zeros(2, 8, 8, **meta), torch.zeros(2, 4, **meta)
    loss = PreferenceLoss(reading=reading, grading=grading)
    grades = candidates.flip(loss.grade(scores), 0.5, np.random.default_rng(0))
    assert loss(logits, logits, candidates.by_threshold(logits), grades).total.device.type == "meta"
    assert stages.inside(torch.zeros(2, 3, 8, 8, **meta), [None, (1, 2, 3, 4)]).device.type == "meta"
