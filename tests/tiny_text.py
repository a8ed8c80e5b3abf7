"""Tokenizers with the few words of the tests, and a bank of phrasings in these words."""

import json

from transformers import BertTokenizerFast, CLIPTokenizerFast

TARGETS = ("all", "inflammatory", "epithelial", "neoplastic", "connective", "dead")
WORDS = ("nuclei", "cells", "find", "segment", "mark", "every", "see", "show", *TARGETS)


def save_clip_tokenizer(folder):
    """CLIP's byte-level BPE with the words of the tests as whole tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        whole = word[0]
        for i, letter in enumerate(word[1:], 2):
            part = letter + "</w>" * (i == len(word))
            if f"{whole} {part}" not in merges:
                merges.append(f"{whole} {part}")
                vocabulary.append(whole + part)
            whole += part
    ids = {token: i for i, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return ids


def save_bert_tokenizer(folder):
    """WordPiece with the special tokens where BERT has them, since Grounding DINO knows those by number."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    lines = [special.get(i, f"[unused{i}]") for i in range(1030)] + list(WORDS)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return len(lines)


def short_bank(path):
    """Short phrasings of every target, two for training and one held out at each level."""
    lines = ["targets:"]
    for target in TARGETS:
        lines += [f"  {target}:", f"    fixed: {target} nuclei", "    phrasings:"]
        for level, verb in (("low", "find"), ("medium", "mark"), ("high", "segment")):
            texts = [f"{verb} {target} nuclei", f"{verb} {target} cells"]
            lines += [f"      {level}: [{', '.join(texts)}, {{text: {verb} every {target} nuclei, heldout: true}}]"]
    path.write_text("\n".join(lines) + "\n")
    return path
