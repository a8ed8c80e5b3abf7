"""A site's own phrasings: free text in a CSV file becomes a draft bank, with what a person must decide marked.

Targets are suggested by a linear reader of sentence vectors that learns from a reference bank, levels by the
definitions that the linter checks. What looks like personal data is left out: a help, and no guarantee.
"""

import csv
import hashlib
import io
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from ..errors import BankError
from ..files import whole
from ..lint import CLAUSES, FAR_COSINE, NEAR_COSINE, clauses, level_problems, normalise, unit_vectors
from ..prompts import LEVELS, PromptBank

TEXT_COLUMNS = ("text", "phrasing", "phrase", "prompt", "query")
REVIEW_BELOW = 0.8  # of held-out phrasings of the bundled bank with such a confidence, 98 in 100 are right
MAX_HEADER = 10_000  # characters; the names of columns are not longer
TEMPERATURE = 0.1  # of the softmax over scores; with it a confidence is about the share that is right
SPLIT, HELD_OUT = "a-quarter-by-text-hash-v1", 0.25  # of the phrasings of each target and level

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
PERSONAL = {  # what it may be -> how it looks; too often is better than too seldom
    "a name after a title": r"(?i:\b(?:dr|prof|professor|mr|mrs|ms|herr|frau|mme)\b\.?)\s+[^\W\d_]{2,}"
    r"|(?i:\b(?:patient|pt|doctor|nurse|miss|name)\b)[.:]?\s+[A-ZÀ-Þ][^\W\d_]+",
    "a date": rf"(?i)\b\d{{1,4}}[./-]\d{{1,2}}[./-]\d{{2,4}}\b|\b\d{{1,2}}(?:st|nd|rd|th|\.)? {_MONTH},? \d{{2,4}}\b"
    rf"|\b{_MONTH} \d{{1,2}},? \d{{4}}\b|\b(?:dob|born|date of birth)\b",
    "a record number": r"(?i)\b(?:mrn|pid|accession|acc|case|specimen|record|chart|ssn|nhs|id|patient|pt)\s*"
    r"(?:no|nr|number|id)?[.:#\s]*[a-z]{0,3}[-/]?\d[\w/-]*|\b[a-z]{1,3}\d{2}[-/]\d{2,}",
    "a telephone number": r"(?<![\w.])\+?\(?\d(?:[ ()/.-]*\d){6,}",
    "an e-mail address": r"\S+@\S+\.\w+",
    "a long number": r"\d{6,}",
}


class Row(NamedTuple):
    line: int
    text: str
    target: str  # "" where the file does not say
    level: str
    count: int


class Draft(NamedTuple):
    content: dict  # as it stands in the YAML file
    notes: list[str]  # what was done on the way, a sentence each
    report: dict[str, int]  # the same in numbers


def import_phrases(path, output, reference=None, keep_flagged=False, encoding=None, encoder=None):
    """Write the draft bank of a CSV file; `pgseg prompts review` decides what is undecided in it."""
    output, reference = Path(output), reference or PromptBank.load()
    if output.exists():
        raise BankError(f"{output} exists; choose another name, or move it away")
    if not output.absolute().parent.is_dir():
        raise BankError(f"{output.parent}: no such folder for the draft; create it first")
    rows, notes = read_phrases(path, reference.targets, encoding)
    draft = make_draft(rows, reference, output.stem, keep_flagged, encoder)
    write_draft(output, draft.content)
    return draft._replace(notes=notes + draft.notes)


# ---- the file ----


def read_phrases(path, targets, encoding=None):
    """([Row], notes) from a CSV file with a column `text` and, where the site knows them, target, level and count."""
    text, notes = decode(path, encoding)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise BankError(f"{path}: the file is empty; give it a header line with a column 'text'")
    head = lines[0][:MAX_HEADER]
    options = {mark: next(csv.reader([head], delimiter=mark)) for mark in ",;\t|"}
    mark, columns = max(options.items(), key=lambda option: (bool(text_column(option[1])), len(option[1])))
    name, columns = text_column(columns), [column.strip().lower() for column in columns]
    if not name:
        raise BankError(f"{path}: no column holds the text; the first line is {head[:60]!r}, name a column 'text'")
    if len(set(columns)) < len(columns):
        raise BankError(f"{path}: a column stands twice in {', '.join(columns)}; rename one of them")
    if len(columns) == 1:
        mark = "\x1f"  # in a file of one column a comma is part of the text
    rows, reader = [], csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                rows.append((reader.line_num, fields))
    except csv.Error as error:
        raise BankError(f"{path}, line {reader.line_num}: {error}; check the quotes and the length") from error
    found = [read_row(f"{path}, line {line}", line, columns, fields, name, targets) for line, fields in rows[1:]]
    kept = [row for row in found if normalise(row.text)]
    if not kept:
        raise BankError(f"{path}: no row holds any words in the column {name!r}; there is nothing to collect")
    if len(kept) < len(found):
        notes.append(f"rows without any words, skipped: {len(found) - len(kept)}")
    return kept, notes


def decode(path, encoding=None):
    """(text, notes): UTF-8 or UTF-16 by its mark, otherwise UTF-8, otherwise the encoding of Western spreadsheets."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BankError(f"{path}: cannot be read ({error.strerror}); give a CSV file") from error
    if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise BankError(f"{path}: a spreadsheet, not a text file; save it as 'CSV UTF-8' and give that")
    marked = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else None
    if not encoding and not marked and re.search(rb"[\x00-\x08\x0e-\x1a]", data):
        raise BankError(f"{path}: holds bytes that no text file has; give a CSV file, or its encoding with --encoding")
    sure = encoding or marked
    for name in (sure,) if sure else ("utf-8-sig", "cp1252"):
        try:
            text = data.decode(name)
        except LookupError:
            raise BankError(f"there is no encoding {name!r}; try utf-8, cp1252, latin-1 or utf-16") from None
        except UnicodeError:
            continue
        return text, [f"read as {name}, since it is not UTF-8"] if name == "cp1252" and not sure else []
    raise BankError(f"{path}: cannot be decoded as {sure or 'UTF-8 or cp1252'}; say which with --encoding")


def text_column(columns):
    names = [column.strip().lower() for column in columns]
    return next((name for name in TEXT_COLUMNS if name in names), None)


def read_row(here, line, columns, fields, name, targets):
    if len(fields) > len(columns):
        raise BankError(f"{here}: {len(fields)} fields for {len(columns)} columns; put the text in double quotes")
    row = dict(zip(columns, [*fields, *[""] * (len(columns) - len(fields))], strict=True))
    target, level, count = (row.get(key, "").strip().lower() for key in ("target", "level", "count"))
    for kind, value, known in (("target", target, targets), ("level", level, LEVELS)):
        if value and value not in known:
            raise BankError(f"{here}: unknown {kind} {value!r}; use one of {', '.join(known)}, or leave it empty")
    if count and not (count.isdecimal() and int(count)):
        raise BankError(f"{here}: count is {count!r}; write a whole number of at least 1, or leave it empty")
    shown = "".join(letter for letter in row[name] if letter.isspace() or unicodedata.category(letter)[0] != "C")
    return Row(line, " ".join(shown.split()), target, level, int(count or 1))


# ---- what the draft holds ----


def personal(text):
    """What in a text may be personal data: a help, and no guarantee."""
    text = unicodedata.normalize("NFKC", text)
    return [kind for kind, pattern in PERSONAL.items() if re.search(pattern, text)]


def make_draft(rows, reference, name, keep_flagged=False, encoder=None):
    if encoder is None:
        from ..models.text import load_text_encoder

        encoder = load_text_encoder()
    flagged = {row: found for row in rows if (found := personal(row.text))}
    notes, report = [], {"rows": len(rows), "flagged": len(flagged)}
    if flagged:
        said = ", ".join(f"line {row.line} ({' and '.join(kinds)})" for row, kinds in [*flagged.items()][:10])
        done = "kept and marked for review" if keep_flagged else "left out"
        notes.append(f"rows that may hold personal data, {done}: {len(flagged)}, the first in {said}")
    kept = [row for row in rows if keep_flagged or row not in flagged]
    if not kept:
        raise BankError("every row may hold personal data; look at them, then keep them with --keep-flagged")
    items = fold_same(kept)
    vectors = unit_vectors(encoder, [Row(0, item["text"], "", "", 0) for item in items])  # [N, D]
    items, vectors = fold_alike(items, vectors)
    report |= {"phrasings": len(items), "same": len(kept) - sum(1 + len(item["alike"]) for item in items)}
    report["alike"] = sum(len(item["alike"]) for item in items)
    suggest(items, vectors, reference, encoder)
    for item in items:
        if found := personal(item["text"]):
            item["why"].append(f"may hold {' and '.join(found)}")
    items.sort(key=lambda item: -item["count"])  # a stable sort
    undecided = [item for item in items if item["why"]]
    report["undecided"] = len(undecided)
    notes.append(f"repeated texts folded into one: {report['same']}; near-duplicates: {report['alike']}")
    canonical = {target: reference.fixed(target) for target in reference.targets}
    decided = [{key: item[key] for key in ("text", "target", "level", "count")} for item in items if not item["why"]]
    return Draft(as_content(name, canonical, undecided, decided), notes, report)


def fold_same(rows):
    """One item for each text that reads the same, by its most frequent spelling; a target given twice is a question."""
    same = {}
    for row in rows:
        same.setdefault(normalise(row.text), []).append(row)
    items = []
    for group in same.values():
        spellings, given = {}, {kind: {getattr(row, kind) for row in group} - {""} for kind in ("target", "level")}
        for row in group:
            spellings[row.text] = spellings.get(row.text, 0) + row.count
        item = {"text": max(spellings, key=spellings.get), "count": sum(spellings.values()), "alike": [], "why": []}
        for kind, values in given.items():
            item[kind] = values.pop() if len(values) == 1 else ""
            if values:
                item["why"].append(f"the file gives it two {kind}s")
        items.append(item)
    return items


def fold_alike(items, vectors):
    """Items and vectors without near-duplicates of earlier ones, which list them under `alike`."""
    near, kept, block = {}, {}, 512  # item -> earlier ones that it is nearly like; the ones that stay
    for start in range(0, len(items), block):
        for i, j in np.argwhere(vectors[start : start + block] @ vectors.T > NEAR_COSINE).tolist():
            if j < start + i:
                near.setdefault(start + i, []).append(j)
    for i, item in enumerate(items):
        same = (kept[j] for j in near.get(i, ()) if j in kept and may_be_one(item, kept[j]))
        if other := next(same, None):
            other["alike"].append(item["text"])
            other["count"] += item["count"]
        else:
            kept[i] = item
    return list(kept.values()), vectors[list(kept)]


def may_be_one(item, other):
    """Sentence vectors hardly see a negation, so the clauses must be of the same kinds too."""
    same = all(item[key] == other[key] for key in ("target", "level"))
    return same and clauses(item["text"]) == clauses(other["text"])


def suggest(items, vectors, reference, encoder):
    """Fill in target and level with a confidence each, and say `why` an item needs a person."""
    fit, known, train = read_targets(reference, encoder)
    scores, levels = fit(vectors), level_confidence(reference)  # [N, T]
    near = (vectors @ known.T).max(axis=1)  # [N]
    foils = unit_vectors(encoder, reference.foils) if reference.foils else np.zeros((1, vectors.shape[1]))
    to_foil = (vectors @ foils.T).max(axis=1)  # [N]
    for item, share, cosine, foil in zip(items, scores, near, to_foil, strict=True):
        best = int(share.argmax())
        suggested, sure = reference.targets[best], float(share[best]) if cosine > FAR_COSINE else 0.0
        why = item["why"]
        if item["target"] and item["target"] != suggested and sure > REVIEW_BELOW:
            why.append(f"given as {item['target']}, reads like {suggested} ({sure:.2f})")
        elif not item["target"] and cosine <= FAR_COSINE:
            why.append(f"reads like nothing in the bank {reference.name!r}")
        elif not item["target"] and sure < REVIEW_BELOW:
            second = reference.targets[int(np.argsort(share)[-2])]
            why.append(f"the target is uncertain: {suggested} ({sure:.2f}) or {second}")
        if not item["target"] and normalise(item["text"]) not in train:
            if foil > cosine:
                why.append("nearer to a foil than to a phrasing")
            if re.search(rf"(?i)\bnon-|\b(?:but|{CLAUSES['exclusion']})\b", item["text"]):
                why.append("may leave out what it names")
        item["target_confidence"] = 1.0 if item["target"] else round(sure, 2)
        item["target"] = item["target"] or suggested
        level, sure = suggest_level(item["text"], levels)
        if not item["level"] and sure < REVIEW_BELOW:
            why.append(f"the level is uncertain: {level} ({sure:.2f})")
        item["level_confidence"] = 1.0 if item["level"] else round(sure, 2)
        item["level"] = item["level"] or level


def read_targets(reference, encoder):
    """(vectors -> share of each target [N, T], the vectors that it learnt from, their texts)."""
    train = reference.select(split="train")
    vectors = unit_vectors(encoder, train)  # [M, D]
    y = np.eye(len(reference.targets))[[reference.targets.index(p.target) for p in train]]  # [M, T]
    x = np.column_stack([vectors, np.ones(len(vectors))])
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)  # ridge regression, as in the linter

    def shares(vectors):
        scores = np.column_stack([vectors, np.ones(len(vectors))]) @ weights / TEMPERATURE
        power = np.exp(scores - scores.max(axis=1, keepdims=True))
        return power / power.sum(axis=1, keepdims=True)

    return shares, vectors, {normalise(p.text) for p in train}


def suggest_level(text, confidence):
    """(level, confidence): the one whose definition the text fits, or by its length alone."""
    fits = [level for level in LEVELS if not level_problems(text, level)]
    if len(fits) == 1:
        return fits[0], confidence.get(fits[0], 0.5)
    words = len(text.split())
    return LEVELS[(words > 6) + (words > 13)], 0.5


def level_confidence(reference):
    """Of the reference's phrasings that fit one level alone, the share that is of it."""
    right = {}
    for p in reference.phrasings:
        fits = [level for level in LEVELS if not level_problems(p.text, level)]
        if len(fits) == 1:
            right.setdefault(fits[0], []).append(p.level == fits[0])
    return {level: float(np.mean(found)) for level, found in right.items()}


# ---- the YAML ----


def as_content(name, canonical, undecided, decided):
    """The draft as it stands in its file: a bank once nothing is undecided, the items with a `review` until then."""
    if undecided:
        review = {"canonical": canonical, "undecided": undecided, "decided": decided}
        return {"name": name, "split": SPLIT, "review": review}
    targets = {}
    for target, fixed in canonical.items():
        own = [item for item in decided if item["target"] == target and not item.get("dropped")]
        if not own:
            continue
        same = [item for item in own if normalise(item["text"]) == normalise(fixed)]
        low = [item["text"] for item in (*same, *own) if item in same or item["level"] == "low"]
        fixed = low[0] if low else fixed
        by_level = {"low": list(dict.fromkeys(low))}
        for level in LEVELS[1:]:
            by_level[level] = [item["text"] for item in own if item["level"] == level and item not in same]
        entries = {level: with_split(texts, fixed) for level, texts in by_level.items() if texts}
        targets[target] = {"fixed": fixed, "phrasings": entries}
    return {"name": name, "split": SPLIT, "targets": targets}


def with_split(texts, fixed):
    """The texts as entries; a quarter held out, one of two at least, chosen by what they read like alone."""
    ranked = sorted(set(texts) - {fixed}, key=lambda text: hashlib.sha256(normalise(text).encode()).hexdigest())
    held = set(ranked[: max(len(texts) > 1, round(HELD_OUT * len(texts)))])
    return [{"text": text, "heldout": True} if text in held else text for text in texts]


def write_draft(path, content):
    """All or nothing; what claims to be a whole bank is loaded before it takes its place."""
    head = "# A draft bank, collected from free text. Look for personal data before you pass it on.\n"
    try:
        with whole(path) as partial:
            partial.write_text(head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110), "utf-8")
            if content.get("targets"):
                PromptBank.load(partial)
    except OSError as error:
        raise BankError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
