"""What can be wrong with a prompt bank: one table, a row per finding.

An error makes numbers wrong (a leak, one text for two masks); a warning is for a person to judge.
"""

import math
import re
import unicodedata
from functools import lru_cache

import numpy as np
import pandas as pd

COLUMNS = ["severity", "check", "target", "phrasing", "detail"]
MAX_CHARACTERS = 400  # past this it is a paragraph, not a phrasing
NEAR_COSINE = 0.995  # for MiniLM, even "segment the nuclei" without its "the" is only at 0.93
FAR_COSINE = 0.45  # "elongated fibres" is at 0.49 from spindle-shaped nuclei, "segment the car" at 0.43 from all nuclei
MARGIN = 0.1  # of a reader whose scores are 1 for the right target and 0 for the others

# Table 3 of the paper made measurable: the fewest and the most words of a level, the kinds of clause it may have, and
# the number of words below which it must have one of them (a medium one as short as a low one is told by its place).
LEVEL_RULES = {
    "low": (1, 6, (), 0),  # "short and underspecified ... a single verb and object"
    "medium": (4, 13, ("spatial",), 7),  # "... partial specification, including optional spatial context"
    "high": (14, 60, ("spatial", "exclusion"), 61),  # "spatial constraints, and occasional exclusion clauses"
}
CLAUSES = {  # cue words are a rule of thumb, so what they find is a warning
    "spatial": r"in|on|at|within|inside|across|throughout|over|along|near|around|between|beside|from|where",
    "exclusion": r"not|no|without|except|excluding|ignoring|omitting|skipping|leaving out|instead of",
}
LIMITS = {  # encoder -> its tokens with start and end, its vocabulary; BERT and MiniLM have the same
    "MiniLM of lite": (256, "wordpiece"),
    "CLIP of SAM3": (32, "clip"),
    "CLIP of CLIPSeg": (77, "clip"),
    "BERT of Grounding DINO": (256, "wordpiece"),
}
CLIP_SOURCES = ("facebook/sam3", "CIDAS/clipseg-rd64-refined", "openai/clip-vit-base-patch32")
CLIP_VOCABULARY = 49408


def lint(bank, encoder=None):
    """All findings, errors first; without an encoder (`encode`, `token_lengths`) none about meaning."""
    found = [*check_text(bank), *check_levels(bank), *check_split(bank), *check_lengths(bank, encoder)]
    found += check_foils(bank, encoder)
    found += check_meaning(bank, encoder) if encoder else []
    rows = [(severity, check, p.target, p.text, detail) for severity, check, p, detail in found]
    if encoder is None:
        rows.append(("warning", "meaning", "", "", "not checked: no sentence encoder was given"))
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("severity", kind="stable", ignore_index=True)


def normalise(text):
    """What is left when case, punctuation, spaces and variants of a character do not count."""
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


def check_text(bank):
    """Empty, repeated and over-long texts, and texts that ask for two masks at once."""
    first = {}  # what a text reads like -> its first phrasing
    for p in bank.phrasings:
        same = first.setdefault(normalise(p.text), p)
        if not normalise(p.text):
            yield "error", "empty", p, "nothing is left without its punctuation"
        elif same.target != p.target:
            yield "error", "two-targets", p, f"stands under '{same.target}' too: one text, two masks"
        elif same is not p:
            yield "error", "duplicate", p, f"reads like '{same.text}' of level {same.level}"
        if len(p.text) > MAX_CHARACTERS:
            yield "warning", "over-long", p, f"{len(p.text)} characters, over {MAX_CHARACTERS}"


def check_levels(bank):
    for p in bank.phrasings:
        if problems := level_problems(p.text, p.level):
            yield "warning", "level", p, f"{p.level}, but {' and '.join(problems)}"


def level_problems(text, level):
    """What keeps a text from being of this level, a clause of a sentence each."""
    (fewest, most, allowed, needed_below), words, has = LEVEL_RULES[level], len(text.split()), clauses(text)
    problems = [f"has a clause that is {kind}" for kind in has if kind not in allowed]
    if not fewest <= words <= most:
        problems.append(f"has {words} words, not {fewest} to {most}")
    elif words < needed_below and not set(has) & set(allowed):
        problems.append(f"has {words} words and no clause that is {' or '.join(allowed)}")
    return problems


def clauses(text):
    """The kinds of clause whose cue words stand in the text."""
    return [kind for kind, cues in CLAUSES.items() if re.search(rf"\b({cues})\b", text.lower())]


def check_split(bank):
    for target in bank.targets:
        train = {f" {normalise(p.text)} ": p for p in bank.select(target, split="train")}
        heldout = bank.select(target, split="heldout")
        seen = {p.noun for p in train.values()}
        for noun in dict.fromkeys(p.noun for p in heldout if p.noun not in seen):
            for p in (p for text, p in train.items() if f" {normalise(noun)} " in text):
                yield "error", "split-leak", p, f"train, but holds the held-out noun '{noun}'"
        for p in heldout:
            if same := train.get(f" {normalise(p.text)} "):
                yield "error", "split-leak", p, f"held out, but train has '{same.text}'"


def check_lengths(bank, encoder=None):
    """Which phrasings an encoder would cut, and the words that it would never see."""
    texts = [p.text for p in bank.phrasings]
    pieces = (encoder.token_lengths, "") if encoder else (estimate_tokens, " (estimated)")
    counters = {"clip": clip_counter(), "wordpiece": pieces}
    for name, (limit, vocabulary) in LIMITS.items():
        count, note = counters[vocabulary]
        for p, tokens in zip(bank.phrasings, count(texts), strict=True):
            if tokens > limit:
                words = p.text.split()
                starts = count([" ".join(words[:i]) for i in range(len(words))])
                lost = " ".join(words[sum(start <= limit for start in starts) - 1 :])
                yield "warning", "cut", p, f"{name}: {tokens} tokens{note}, limit {limit}; lost: '{lost}'"


@lru_cache
def clip_counter(sources=CLIP_SOURCES):
    """(texts -> token counts, note): CLIP's own vocabulary if one is on this machine, or an estimate."""
    from transformers import CLIPTokenizerFast

    for source in sources:
        try:
            read = CLIPTokenizerFast.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError, ImportError):  # older releases ask for protobuf when files are missing
            continue
        if len(read) == CLIP_VOCABULARY:  # without its files it may load, with next to no words
            return lambda texts, read=read: [len(ids) for ids in read(texts)["input_ids"]], ""
    return estimate_tokens, " (estimated)"


def estimate_tokens(texts):
    """A word costs 1 token up to 6 letters and 1 for each 3 begun beyond; a digit or a run of signs, 1.

    Against CLIP's vocabulary, on the bundled bank: 0.3 tokens too many on average, from 4 too few to 10
    too many; of the 106 phrasings over 32 tokens it misses 3, and it adds 37.
    """
    pieces = [re.findall(r"[^\W\d_]+|\d|[^\w\s]+|_", text) for text in texts]
    return [2 + sum(1 + max(0, math.ceil((len(word) - 6) / 3)) for word in words) for words in pieces]


def check_foils(bank, encoder=None):
    """A foil must not read like its target, yet be near enough to be taken for it."""
    for target in dict.fromkeys(foil.target for foil in bank.foils):
        foils, own = [foil for foil in bank.foils if foil.target == target], bank.select(target)
        reads = {normalise(p.text): p for p in reversed(own)}  # the first phrasing of each
        nearest = np.ones(len(foils))
        if encoder:
            nearest = (unit_vectors(encoder, foils) @ unit_vectors(encoder, own).T).max(axis=1)
        for foil, cosine in zip(foils, nearest, strict=True):
            if same := reads.get(normalise(foil.text)):
                yield "error", "foil", foil, f"reads like '{same.text}' of its own target"
            elif cosine < FAR_COSINE:
                yield "warning", "foil", foil, f"too far from '{target}' to be a foil (cosine {cosine:.2f})"


def unit_vectors(encoder, phrasings):
    """[N, D], one vector of length 1 a phrasing."""
    vectors = np.asarray(encoder.encode([p.text for p in phrasings]), dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def check_meaning(bank, encoder):
    """Near-duplicates within a target, and phrasings that read like another target than their own."""
    vectors = unit_vectors(encoder, bank.phrasings)  # [N, D]
    targets = np.array([bank.targets.index(p.target) for p in bank.phrasings])  # [N]
    alike = np.triu(vectors @ vectors.T, k=1) * (targets[:, None] == targets)  # [N, N]
    for i, j in np.argwhere(alike > NEAR_COSINE):
        one, other = bank.phrasings[i], bank.phrasings[j]
        if normalise(one.text) != normalise(other.text):
            across = "" if one.split == other.split else ", one train and one held out"
            yield "warning", "near-duplicate", other, f"nearly '{one.text}' (cosine {alike[i, j]:.4f}){across}"
    # A linear reader of targets (ridge regression) scores each phrasing as if it had not learnt from it:
    # the leave-one-out prediction has a closed form. Nearest centroids would flag a sixth of our bank.
    x = np.column_stack([vectors, np.ones(len(vectors))])  # [N, D + 1]
    y = np.eye(len(bank.targets))[targets]  # [N, T]
    gain = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T)  # [D + 1, N]
    leverage = (x * gain.T).sum(1, keepdims=True)  # [N, 1]
    scores = (x @ (gain @ y) - leverage * y) / (1 - leverage)  # [N, T]
    for p, t, row in zip(bank.phrasings, targets, scores, strict=True):
        if row.max() - row[t] > MARGIN:
            other = bank.targets[row.argmax()]
            yield "warning", "not-equivalent", p, f"reads like '{other}' ({row.max():.2f}, own {row[t]:.2f})"
