"""A bank's phrasings, each worded worse by degrees: small pure functions (text, severity, context) -> text.

Severity 0 is the text itself. From 1 to 5 more is changed, and what a lower severity changes a higher one changes too;
a text that has no more to change stays as it is. Most kinds leave what is asked for as it was, so the mask should stay;
`negation` and `foil` ask for something else, so it must move.
"""

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml

from ..errors import SettingsError
from ..lint import normalise

WORDS = Path(__file__).parent / "words.yaml"
SEVERITIES = (1, 2, 3, 4, 5)
COLUMNS = ("target", "level", "kind", "severity", "must_move", "asks_for", "source", "text")
NEIGHBOURS = dict(zip("abcdefghijklmnopqrstuvwxyz", "svxfrdghojkjnbpoqedrycezhx", strict=True))  # on a keyboard
ENDS_CLAUSE = re.compile(r"[,;:.?!]$")
OPENS_CLAUSE = re.compile(r"(?i)but|not|no|without|except|excluding|ignoring|leaving|instead|rather")
THE = r"(?:(?:each and every|every one of|each of|all of|all|every|each) )?(?:the )?"


@dataclass(frozen=True)
class Context:
    """What a perturbation may know beside the text."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    target: str = ""
    name: str = ""  # the words of the text that name the target; "" where that is not known
    other: str = ""  # how another target is called, for a foil


@cache
def word_lists():
    return yaml.safe_load(WORDS.read_text(encoding="utf-8"))


# ---- kinds that leave the meaning as it was ----


def typos(text, severity, context):
    """That many letters of longer words left out, doubled, exchanged with the next, or hit beside."""
    letters = [m.start() + i for m in re.finditer(r"[^\W\d_]{4,}", text) for i in range(1, len(m[0]) - 1)]
    places, ways = context.rng.permutation(letters).astype(int), context.rng.integers(4, size=len(letters))
    chosen = []
    for at, way in zip(places.tolist(), ways.tolist(), strict=True):
        if all(abs(at - other) > 2 for other, _ in chosen):  # so that none undoes another
            chosen.append((at, way))
    for at, way in sorted(chosen[:severity], reverse=True):
        this, following = text[at], text[at + 1]
        if way == 2 and this == following:
            way = 0
        beside = NEIGHBOURS.get(this, this + this)
        text = text[:at] + ("", this + this, following + this, beside)[way] + text[at + 1 + (way == 2) :]
    return text


def case(text, severity, context):
    """1 the first letter is a capital, 2 each word's, 3 every other word in capitals, 4 all, 5 letters at random."""
    if severity == 5:
        return "".join(letter.upper() if context.rng.random() < 0.5 else letter.lower() for letter in text)
    words = text.split(" ")
    if severity == 2:
        words = [word[:1].upper() + word[1:] for word in words]
    elif severity == 3:
        words = [word if i % 2 else word.upper() for i, word in enumerate(words)]
    text = " ".join(words)
    return (text, text[:1].upper() + text[1:], text, text, text.upper())[severity]


def punctuation(text, severity, context):
    """1 another mark at the end, from 2 on a stray one after that many words less one too."""
    marks = context.rng.permutation(["!", "...", ";", " -", ","])
    words = text.rstrip(".?! ").split(" ")
    last, places = len(words) - 1, context.rng.permutation(len(words) - 1)
    if severity:
        words[last] += "." if words[last] + "." != text.split(" ")[-1] else " !"
    for place, mark in zip(places[: max(0, severity - 1)].tolist(), marks.tolist(), strict=False):
        words[place] += mark
    return " ".join(words) if severity else text


def number(text, severity, context):
    """That many plurals made singular, or the known singulars plural."""
    known = word_lists()
    irregular = known["plurals"] | {one: many for many, one in known["plurals"].items()}
    table = {}
    for word in set(re.findall(r"[a-z]+", text.lower())):
        if other := irregular.get(word) or singular(word, known["singular"]):
            table[word] = [other]
    return exchange(text, table, severity, context.rng)


def singular(word, exceptions=()):
    """The singular of an English plural by rule, or None."""
    if len(word) < 4 or word in exceptions or not re.search(r"[^sui]s$", word):
        return None
    for ending, short in (("ies", "y"), ("(?<=ch|sh)es", ""), ("(?<=x)es", ""), ("(?<=ss)es", "")):
        if re.search(ending + "$", word):
            return re.sub(ending + "$", short, word)
    return word[:-1]


def synonyms(text, severity, context):
    """That many words exchanged for others of the same meaning."""
    return exchange(text, word_lists()["synonyms"], severity, context.rng)


def shorthand(text, severity, context):
    """That many words cut down or left out as on a request form."""
    return exchange(text, word_lists()["shorthand"], severity, context.rng)


def order(text, severity, context):
    """That many words exchanged with their neighbour, never across a comma or into an exclusion."""
    words, free = text.split(" "), []
    for i, (word, following) in enumerate(pairwise(words)):
        apart = ENDS_CLAUSE.search(word) or OPENS_CLAUSE.fullmatch(following)
        if not apart and word.lower() != following.lower():
            free.append(i)
    chosen = []
    for i in context.rng.permutation(free).astype(int).tolist():
        if all(abs(i - other) > 1 for other in chosen):
            chosen.append(i)
    for i in chosen[:severity]:
        here, there = words[i], words[i + 1].rstrip(",;:.?!")
        words[i], words[i + 1] = there, here + words[i + 1][len(there) :]
    return " ".join(words)


def verbosity(text, severity, context):
    """That many polite or idle remarks around the request."""
    fillers = [(where, filler) for where, listed in word_lists()["fillers"].items() for filler in listed]
    for i in context.rng.permutation(len(fillers))[:severity]:
        where, filler = fillers[i]
        text = f"{filler} {text}" if where == "before" else text.rstrip(".") + filler
    return text


def truncation(text, severity, context):
    """That many tenths of the text cut off at its end, but of the target's name at most half of its last word."""
    last = (context.name or text).split()[-1]
    keep = text.find(context.name) + len(context.name) if context.name else len(text)
    keep -= len(last) // 2
    return text[: max(keep, round(len(text) * (1 - severity / 10)))].rstrip(" ,;:-") if severity else text


def foreign(language, text, severity, context):
    """1 to 4 that many words in the language, 5 the whole request in it."""
    known = word_lists()["languages"][language]
    if severity == 5 and context.target in known["names"]:
        return known["request"].format(name=known["names"][context.target])
    return exchange(text, known["words"], severity, context.rng)


# ---- kinds that ask for something else: from the least plain way of saying it to the plainest ----


def negation(text, severity, context):
    """1 'non-' before the target's name, 2 'everything but', 3 said twice, 4 and 5 the whole request is a refusal."""
    name = context.name
    if not severity or not name:
        return f"do not do this: {text}" if severity else text
    if severity == 1:
        return in_place(text, name, f"non-{name}", article="")
    if severity < 4:
        text = in_place(text, name, f"everything but {name}")
        return text if severity == 2 else f"{text.rstrip('.?')}, so no {name}"
    refusal = f"do not mark the {name}"
    return f"{refusal}, mark the rest" if severity == 4 else f"{refusal}: leave every one of the {name} out"


def foil(text, severity, context):
    """1 another target beside this one, 2 instead of it, 3 and none of it, 4 alone in the same words, 5 alone."""
    name, other = context.name, context.other
    if not severity or not other:
        return text
    if severity == 5 or not name:
        return other
    said = (f"{other} beside the {name}", f"{other} instead of {name}", f"{other} and no {name}", other)
    return in_place(text, name, said[severity - 1], article=THE if severity < 4 else "")


# ---- what they share ----


def exchange(text, table, count, rng):
    """`count` of the words that stand in the table (phrase -> alternatives), each for one of its alternatives."""
    if not count:
        return text
    asked = text  # all of it may be words that are dropped
    table = {phrase.lower(): words for phrase, words in table.items()}
    found = find_phrases(text, tuple(sorted(table, key=len, reverse=True)))
    alternatives = [[word for word in table[m[0].lower()] if word != m[0].lower()] for m in found]
    found = [(m, listed[rng.integers(len(listed))]) for m, listed in zip(found, alternatives, strict=True) if listed]
    ranked = [found[i] for i in rng.permutation(len(found))]
    for match, word in sorted(ranked[:count], key=lambda pair: -pair[0].start()):
        word = word[:1].upper() + word[1:] if match[0][0].isupper() else word
        text = text[: match.start()] + word + text[match.end() :]
    return " ".join(text.split()) or asked


def find_phrases(text, phrases):
    """Where the phrases stand as whole words, the first listed first; 'viable' does not stand in 'non-viable'."""
    if not phrases:
        return []
    return list(re.finditer(rf"(?i)(?<![\w-])(?:{'|'.join(map(re.escape, phrases))})(?![\w-])", text))


def in_place(text, name, instead, article=THE):
    """The text with its first `name`, and with the article before it, exchanged."""
    return re.sub(rf"(?<![\w-]){article}{re.escape(name)}(?![\w-])", lambda _: instead, text, count=1)


# ---- the table ----


@dataclass(frozen=True)
class Kind:
    function: callable
    must_move: bool = False
    language: str = "en"


KINDS = {f.__name__: Kind(f) for f in (typos, case, punctuation, number, synonyms, order, verbosity, truncation)}
KINDS |= {"shorthand": Kind(shorthand)}
KINDS |= {name: Kind(partial(foreign, name), False, said["code"]) for name, said in word_lists()["languages"].items()}
KINDS |= {f.__name__: Kind(f, must_move=True) for f in (negation, foil)}


def describe_kinds():
    """A line for each kind: what its severities mean, and what is special about it."""
    lines = []
    for name, kind in KINDS.items():
        said = getattr(kind.function, "func", kind.function).__doc__
        note = " (must move the mask)" if kind.must_move else f" ({kind.language})" if kind.language != "en" else ""
        lines.append(f"{name:<12} {said}{note}")
    return "\n".join(lines)


def claimed(languages=("en",)):
    """The kinds in languages that an encoder claims. all-MiniLM-L6-v2 and CLIP claim English alone."""
    return tuple(name for name, kind in KINDS.items() if kind.language in languages)


def perturb(bank, kinds=None, severities=SEVERITIES, seed=0, phrasings=None):
    """A table with a row a phrasing, kind and severity; `phrasings` of the bank, by default all.

    A kind that has nothing to change in a phrasing has no rows for it. Nor has a perturbed text that ought to mean the
    same and reads like a phrasing of another target, or like a foil. `asks_for` is what a foil asks for, else "".
    The kinds are by default those that need no more than English; a seed gives the same texts whatever else is asked.
    """
    import pandas as pd

    kinds = check_kinds(kinds, severities)
    phrasings = bank.phrasings if phrasings is None else phrasings
    reads = {}  # what a text reads like -> the targets that it stands for; None for a foil
    for p in bank.phrasings:
        reads.setdefault(normalise(p.text), set()).add(p.target)
    for f in bank.foils:
        reads.setdefault(normalise(f.text), set()).add(f.asks_for)
    names = {target: names_of(bank, target) for target in bank.targets}
    asked = [target for target in bank.targets if any(p.target == target for p in phrasings)]
    asked = asked if len(asked) > 1 else bank.targets
    rows = []
    for p in phrasings:
        name = next((m[0] for m in find_phrases(p.text, (p.noun,) if p.noun else names[p.target])), "")
        other = other_target(p, asked, seed)
        called = bank.fixed(other) if other else ""
        for kind in kinds:
            for severity, text in change(p, kind, (0, *severities, max(SEVERITIES)), seed, name, called)[1:-1]:
                must_move = KINDS[kind].must_move
                if must_move or reads.get(normalise(text), {p.target}) == {p.target}:
                    asks_for = other if severity and kind == "foil" else ""
                    rows.append((p.target, p.level, kind, severity, must_move, asks_for, p.text, text))
    return pd.DataFrame(rows, columns=COLUMNS)


def change(p, kind, severities, seed, name, called):
    """(severity, text) for each severity; nothing where the most severe change is none."""
    texts = [
        KINDS[kind].function(p.text, severity, Context(generator(seed, kind, p), p.target, name, called))
        for severity in severities
    ]
    return list(zip(severities, texts, strict=True)) if texts[-1] != p.text else []


def check_kinds(kinds, severities):
    kinds = claimed() if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise SettingsError(f"there is no perturbation {kind!r}; choose from {', '.join(KINDS)}")
    for severity in severities:
        if severity not in (0, *SEVERITIES):
            raise SettingsError(f"severity {severity!r} is unknown; give whole numbers from 0 (as it is) to 5")
    if not kinds or not severities:
        raise SettingsError("there is nothing to perturb; give at least one kind and one severity")
    return kinds


def generator(seed, kind, p):
    """Random numbers that hang on this phrasing and kind alone."""
    key = hashlib.sha256(f"{seed}|{kind}|{p.target}|{p.text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:8], "little"))


def names_of(bank, target):
    """How the bank calls a target, the longest first, in plural and singular."""
    names = {p.noun for p in bank.select(target) if p.noun} | {bank.fixed(target)}
    ends = {name: name.split()[-1] for name in names}
    plurals = word_lists()["plurals"]
    names |= {name[: -len(end)] + plurals[end] for name, end in ends.items() if end in plurals}
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


def other_target(p, targets, seed):
    """The target that a foil of this phrasing asks for: a category where there is another one, "" without any."""
    others = [target for target in targets if target != p.target]
    others = [target for target in others if target != "all"] or others
    return others[generator(seed, "other", p).integers(len(others))] if others else ""
