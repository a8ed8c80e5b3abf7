"""Every check of the linter finds its own kind of fault, and the bundled bank has no error."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pgseg_lite import lint as linter
from pgseg_lite.lint import COLUMNS, clip_counter, estimate_tokens, lint, normalise
from pgseg_lite.models.text import TextEncoder, find_encoder
from pgseg_lite.prompts import LEVELS, Foil, PromptBank

# Tokens with start and end, counted with the vocabulary that OpenAI published with CLIP.
CLIP_TOKENS = {
    "nuclei": 4,
    "segment nuclei": 5,
    "mask of lymphocyte/plasma cell nuclei": 13,
    "please outline every nucleus in this H&E tile": 13,
    "draw accurate contours around the haematoxylin-stained nuclei throughout the tissue section, "
    "following the nuclear membrane of each one closely": 29,
}


class Bags:
    """A stand-in for the sentence encoder: one direction a word, so that shared words mean closeness."""

    def __init__(self, bank):
        words = sorted({word for p in (*bank.phrasings, *bank.foils) for word in normalise(p.text).split()})
        self.index = {word: i for i, word in enumerate(words)}

    def encode(self, texts):
        vectors = np.zeros((len(texts), len(self.index)), dtype=np.float32)
        for i, text in enumerate(texts):
            for word in normalise(text).split():
                vectors[i, self.index[word]] += 1
        return vectors

    def token_lengths(self, texts):
        return [2 + len(text.split()) for text in texts]


@pytest.fixture(scope="module")
def bundled():
    return PromptBank.load("nuclei")


@pytest.fixture
def make(tmp_path):
    def make(body):
        path = tmp_path / "bank.yaml"
        path.write_text(body)
        return PromptBank.load(path)

    return make


@pytest.fixture
def listed(make):
    """A bank of one target, 'a', from what its three levels list."""

    def listed(**levels):
        return make(json.dumps({"targets": {"a": {"fixed": "glands", "phrasings": levels}}}))

    return listed


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield TextEncoder(find_encoder())


def rows(findings, check):
    return [tuple(row) for row in findings[findings.check == check][["severity", "phrasing", "detail"]].values]


def test_the_bundled_bank_has_no_error_and_keeps_its_levels(bundled):
    findings = lint(bundled, Bags(bundled))
    assert list(findings.columns) == COLUMNS
    assert findings[findings.severity == "error"].empty
    assert set(findings.check) <= {"cut", "near-duplicate", "not-equivalent", "foil"}  # a bag of words knows no kinship


def test_a_few_of_the_bundled_high_phrasings_are_cut_and_only_for_sam3(bundled, monkeypatch):
    monkeypatch.setattr(linter, "clip_counter", lambda: (estimate_tokens, " (estimated)"))
    cut = lint(bundled)
    cut = cut[cut.check == "cut"]
    high = bundled.select(levels="high")
    assert 0.02 < len(cut) / len(high) < 0.20  # 0.138 by the published vocabulary
    assert set(cut.severity) == {"warning"} and set(cut.phrasing) <= {p.text for p in high}
    assert cut.detail.str.contains(r"^CLIP of SAM3: \d\d tokens \(estimated\), limit 32; lost: '.+'$").all()
    for row in cut.itertuples():
        assert row.phrasing.endswith(row.detail.split("lost: '")[1][:-1])


def test_a_clean_bank_is_clean_and_says_what_was_not_checked(listed):
    bank = listed(
        low=["glands", "segment glands"],
        medium=["please outline the glands in this tile"],
        high=["carefully trace each of the glands in this tile up to its membrane, but leave out the lumen"],
    )
    assert rows(lint(bank), "meaning") == [("warning", "", "not checked: no sentence encoder was given")]
    assert len(lint(bank)) == 1 and lint(bank, Bags(bank)).empty
    assert list(lint(bank, Bags(bank)).columns) == COLUMNS


@pytest.mark.parametrize("same", ["Segment Glands.", "segment  glands", "ｓｅｇｍｅｎｔ glands", "“segment glands”"])
def test_duplicates_after_normalisation(listed, same):
    found = rows(lint(listed(low=["glands", "segment glands", same])), "duplicate")
    assert found == [("error", same, "reads like 'segment glands' of level low")]


def test_different_words_are_no_duplicates(listed):
    findings = lint(listed(low=["glands", "gland s", "drüsen", "drusen"]))
    assert rows(findings, "duplicate") == []


def test_empty_and_over_long(listed):
    long = "glands " * 60
    findings = lint(listed(low=["?!"], high=[long]))
    assert rows(findings, "empty") == [("error", "?!", "nothing is left without its punctuation")]
    assert rows(findings, "over-long") == [("warning", long, "420 characters, over 400")]


def test_one_text_under_two_targets(make):
    bank = make("targets: {a: {fixed: glands, phrasings: {low: [Tumour]}}, b: {fixed: tumour, phrasings: {low: [x]}}}")
    findings = lint(bank)
    assert rows(findings, "two-targets") == [("error", "tumour", "stands under 'a' too: one text, two masks")]
    assert findings.severity.tolist() == sorted(findings.severity) and findings.target[0] == "b"


@pytest.mark.parametrize(
    ("level", "text", "detail"),
    [
        ("low", "glands in the tile", "low, but has a clause that is spatial"),
        ("low", "glands without lumen", "low, but has a clause that is exclusion"),
        ("low", "please kindly segment all of the glands", "low, but has 7 words, not 1 to 6"),
        ("medium", "segment glands", "medium, but has 2 words, not 4 to 13"),
        ("medium", "segment all the glands", "medium, but has 4 words and no clause that is spatial"),
        (
            "medium",
            "the glands in this tile but not their lumen",
            "medium, but has a clause that is exclusion",
        ),
        ("high", "glands in this tile", "high, but has 4 words, not 14 to 60"),
        (
            "high",
            "please do carefully segment each and every one of the many glands that you see",
            "high, but has 15 words and no clause that is spatial or exclusion",
        ),
    ],
)
def test_a_level_that_breaks_its_own_definition(listed, level, text, detail):
    assert rows(lint(listed(**{level: [text]})), "level") == [("warning", text, detail)]


def test_cue_words_are_whole_words(listed):
    findings = lint(listed(low=["individual inner glands", "note notable glands"]))
    assert rows(findings, "level") == []


def test_a_heldout_noun_inside_a_train_phrasing_is_a_leak(make):
    bank = make(
        "levels: {low: {templates: ['{noun}']}}\n"
        "targets: {a: {fixed: duct glands, nouns: [duct glands, {text: glands, heldout: true}]}}"
    )
    assert rows(lint(bank), "split-leak") == [("error", "duct glands", "train, but holds the held-out noun 'glands'")]


def test_a_text_in_both_splits_is_a_leak(listed):
    findings = lint(listed(low=["segment glands", {"text": "Segment glands!", "heldout": True}]))
    assert rows(findings, "split-leak") == [("error", "Segment glands!", "held out, but train has 'segment glands'")]


def test_what_each_encoder_would_lose(listed, monkeypatch):
    monkeypatch.setattr(linter, "clip_counter", lambda: (lambda texts: [2 + len(text.split()) for text in texts], ""))
    text = " ".join(f"w{i}" for i in range(300))
    bank = listed(high=[text])
    found = [detail for _, _, detail in rows(lint(bank, Bags(bank)), "cut")]
    kept = {"MiniLM of lite": 254, "CLIP of SAM3": 30, "CLIP of CLIPSeg": 75, "BERT of Grounding DINO": 254}
    limit = {name: words + 2 for name, words in kept.items()}
    assert found == [
        f"{name}: 302 tokens, limit {limit[name]}; lost: '{' '.join(text.split()[words:])}'"
        for name, words in kept.items()
    ]


def test_without_clip_on_this_machine_tokens_are_estimated(tmp_path):
    count, note = clip_counter((str(tmp_path / "nowhere"), "nobody/no-such-tokenizer"))
    assert note == " (estimated)" and count is estimate_tokens


def test_clip_on_this_machine_is_used(tmp_path):
    from transformers import CLIPTokenizerFast

    signs = [chr(33 + i) for i in range(94)]
    words = [*signs, *(sign + "</w>" for sign in signs), "nu", "nuc", "clei</w>"]
    words += [f"filler{i}</w>" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nn u\nnu c\n")
    assert len(CLIPTokenizerFast.from_pretrained(tmp_path)) == 49408
    count, note = clip_counter((str(tmp_path / "nowhere"), str(tmp_path)))
    assert note == "" and count(["nuclei", "nuclei nuclei"]) == [6, 10]  # nuc l e i, start and end


def test_the_estimate_is_close_to_clip_and_rather_too_high():
    texts, tokens = list(CLIP_TOKENS), np.array(list(CLIP_TOKENS.values()))
    errors = np.array(estimate_tokens(texts)) - tokens
    assert errors.min() >= -4 and errors.max() <= 10
    assert estimate_tokens(["", "a b, 42!", "abcdefg", "abcdefghij"]) == [2, 8, 4, 5]


def test_near_duplicates_only_within_a_target(make):
    long = " ".join(f"word{i} word{i}" for i in range(60))  # one word more hardly moves so long a text
    bank = make(f"""
targets:
  a:
    fixed: ducts
    phrasings: {{high: ['{long}', '{long} glands', {{text: '{long} crypts', heldout: true}}]}}
  b: {{fixed: veins, phrasings: {{high: ['{long} veins']}}}}
""")
    found = rows(lint(bank, Bags(bank)), "near-duplicate")
    assert [text for _, text, _ in found] == [f"{long} glands", f"{long} crypts", f"{long} crypts"]
    assert [detail.split("(cosine ")[1] for _, _, detail in found] == [
        "0.9979)",
        "0.9979), one train and one held out",
        "0.9959), one train and one held out",
    ]


FOILS = """
targets: {a: {fixed: glands, phrasings: {low: [glands, segment glands]}}, b: {fixed: veins, phrasings: {low: [veins]}}}
foils: [{text: lumen of glands, target: a}, {text: "Segment: glands!", target: a}, {text: red veins, target: a},
  {text: veins, target: a, asks_for: b}]
"""


def test_a_foil_that_is_no_foil(make):
    bank = make(FOILS)
    same = ("error", "Segment: glands!", "reads like 'segment glands' of its own target")
    assert rows(lint(bank), "foil") == [same]  # nearness is a matter of meaning
    far = [("warning", text, "too far from 'a' to be a foil (cosine 0.00)") for text in ("red veins", "veins")]
    assert rows(lint(bank, Bags(bank)), "foil") == [same, *far]


def test_minilm_finds_the_bundled_foils_near_and_other_subjects_far(bundled, minilm):
    assert list(linter.check_foils(bundled, minilm)) == []
    strangers = [Foil("segment the car", "all", None), Foil("a dog on the grass", "dead", None)]
    found = list(linter.check_foils(replace(bundled, foils=strangers), minilm))
    assert [(severity, foil) for severity, _, foil, _ in found] == [("warning", foil) for foil in strangers]


def test_minilm_finds_a_phrasing_under_the_wrong_target(make, minilm):
    bank = make("""
targets:
  immune: {fixed: lymphocytes, phrasings: {low: [immune cells, segment the leukocytes, inflammatory cells,
    show the lymphocytes, find cancer cells, plasma cells, white blood cells]}}
  tumour: {fixed: tumour cells, phrasings: {low: [cancer cells, malignant cells, neoplastic cells,
    outline the tumour, mask carcinoma cells, cancerous nuclei]}}
""")
    found = rows(lint(bank, minilm), "not-equivalent")
    assert [text for _, text, _ in found] == ["find cancer cells"]
    assert found[0][2].startswith("reads like 'tumour' (")


def test_unseen_wordings_of_the_bundled_bank_can_be_told_apart(bundled, minilm):
    """A linear reader of MiniLM vectors, taught on low train phrasings, names the target of unseen ones."""
    low = bundled.select(levels=LEVELS[0])
    x = minilm.encode([p.text for p in low]).double().numpy()  # [N, 384]
    y = np.array([bundled.targets.index(p.target) for p in low])  # [N]
    train = np.array([p.split == "train" for p in low])
    gram = x[train].T @ x[train] + 0.1 * np.eye(x.shape[1])
    right = (x @ np.linalg.solve(gram, x[train].T @ np.eye(len(bundled.targets))[y[train]])).argmax(1) == y
    assert right[train].mean() > 0.98
    assert 0.9 <= right[~train].mean() < 1  # honest: neither lost nor trivial
