"""What K phrasings cost: a whole pass for each (naive), one pass of the image encoder for all of them (shared), the
same one by one (serial), and with the encoder's features made before (cached). For SAM3's shape and for `lite`, in
training and in evaluation, beside the bound that the arithmetic of the same model sets. Weights and pixels are random.

Without a GPU a vision-heavy small SAM3 is timed, and the published shape is only counted, on tensors without memory.
Everything is timed in turn, `ROUNDS` times over; a ratio is the median of the ratios of one turn, so that a busy moment
hits both sides. The table and its stamp go to results/.
"""

import argparse
import os
import statistics
import time
from collections import namedtuple
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pgseg_lite as pg
from pgseg_lite.models.lite import LiteSegmenter
from pgseg_lite.models.sam3 import ImageFeatures, Sam3Segmenter
from pgseg_lite.models.tiles import tile_boxes
from pgseg_lite.results import save_result, stamp

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROUNDS, PHRASINGS = 7, 30
# What is trained, how the phrasings are put, how many: `evaluated` trains nothing, `cached` has its features already.
CASES = [
    ("trained", "shared", 1), ("trained", "shared", 2), ("trained", "shared", 3), ("trained", "shared", 6),
    ("trained", "serial", 3), ("trained", "serial", 6), ("trained", "naive", 3),
    ("frozen", "shared", 1), ("frozen", "shared", 3), ("frozen", "shared", 6), ("frozen", "naive", 3),
    ("cached", "shared", 1), ("cached", "shared", 3), ("cached", "shared", 6),
    ("evaluated", "shared", 1), ("evaluated", "shared", PHRASINGS), ("evaluated", "naive", PHRASINGS),
]  # fmt: skip

# images [B, 3, H, W], texts [B, G, PHRASINGS, ...], masks [B, G, H, W]: B images, each with G targets
Subject = namedtuple("Subject", "name model images texts masks loss optimizer")


def small_config(tokenizer):
    """SAM3 in small: a phrasing's share of the work is about that of the published shape. Smaller would time Python."""
    side = {"hidden_size": 64, "num_attention_heads": 4}
    deep = side | {"num_layers": 2, "intermediate_size": 512}
    vision = {
        "model_type": "sam3_vit_model", "hidden_size": 256, "intermediate_size": 1184, "num_hidden_layers": 12,
        "num_attention_heads": 4, "image_size": 224, "pretrain_image_size": 224, "patch_size": 14, "window_size": 8,
        "global_attn_indexes": [2, 5, 8, 11],
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "projection_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return transformers.Sam3Config(
        vision_config={"fpn_hidden_size": 64, "backbone_config": vision}, text_config=text, mask_decoder_config=side,
        geometry_encoder_config=side | {"num_layers": 1}, detr_encoder_config=deep,
        detr_decoder_config=deep | {"num_queries": 16},
    )  # fmt: skip


def sam3_subject(name, config, tokenizer, trainable, texts=None):
    """One image with one target. `texts` given: only to be counted."""
    model = Sam3Segmenter(transformers.Sam3Model(config), tokenizer).train()
    settings = pg.Sam3Settings(trainable=trainable, checkpointing=False, serial=False)
    groups = model.prepare_training(settings, ["nuclei"], phrasings=1)
    if texts is None:
        found = [p.text for p in pg.PromptBank.load("nuclei").select("all")]
        short = [text for text in found if not model.text.what_is_lost([text])]
        texts = model.encode_text(short[:PHRASINGS])[None, None]
    side = model.input_size
    images, masks = torch.rand(1, 3, side, side) * 2 - 1, torch.rand(1, 1, side, side) > 0.8
    optimizer = torch.optim.AdamW(groups, fused=True)
    return Subject(name, model, images, texts, masks, settings.loss(), optimizer)


def lite_subject(trainable):
    """One image of 256 px with five targets, as `lite` is trained on."""
    model = LiteSegmenter().train()
    model.image_encoder.requires_grad_(trainable == "full")
    images = torch.randn(1, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    texts, masks = torch.randn(1, 5, PHRASINGS, 384) / 384**0.5, torch.rand(1, 5, 256, 256) > 0.8
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    return Subject("lite", model, images, texts, masks, pg.GroupLoss(), optimizer)


def encode(subject):
    """The image's features, as `encode_image` would give them."""
    model, images = subject.model, subject.images
    with torch.no_grad():
        if subject.name == "lite":
            return model.image_encoder(images)
        size = tuple(images.shape[-2:])
        return ImageFeatures([[model.sam.vision_encoder(images)]], tile_boxes(*size), size)


def answer(subject, way, k, features):
    """Mask logits [B, G, K, H, W] and presence logits [B, G, K]."""
    model, texts = subject.model, subject.texts[:, :, :k]
    model.serial = way == "serial"

    def ask(some):  # [B, G, K, ...]
        some = some.flatten(1, 2)
        return model(subject.images, some) if features is None else model.decode(features, some)

    outputs = [ask(texts[:, :, i : i + 1]) for i in range(k)] if way == "naive" else [ask(texts)]
    groups = texts.shape[1]
    parts = [(o.mask_logits.unflatten(1, (groups, -1)), o.presence_logits.unflatten(1, (groups, -1))) for o in outputs]
    return tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))


def case(subject, part, way, k):
    """A function that does it once: a training step, or an evaluation of k phrasings."""
    features = encode(subject) if part == "cached" else None

    def once(update=True):
        with torch.set_grad_enabled(part != "evaluated"), torch.autocast("cuda", torch.bfloat16, enabled=GPU):
            maps, presence = answer(subject, way, k, features)
        if part != "evaluated":
            maps, presence, masks = (tensor.flatten(0, 1) for tensor in (maps, presence, subject.masks))
            subject.loss(maps.float(), presence.float(), masks).total.backward()
            if update:
                subject.optimizer.step()
            subject.optimizer.zero_grad()
        if GPU:
            torch.cuda.synchronize()

    return once


def gflop(subject, once):
    """Products of matrices and convolutions, forward and backward."""
    attention = getattr(getattr(subject.model, "sam", None), "set_attn_implementation", lambda kind: None)
    attention("eager")  # the counter does not know the fused attention of a CPU
    with FlopCounterMode(display=False) as counter:
        once(update=False)
    attention("sdpa")
    return counter.get_total_flops() / 1e9


def saved_mib(subject, once):
    """What autograd keeps for the backward pass, each memory once, less the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in subject.model.parameters()}
    kept = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        once(update=False)
    return sum(kept.values()) / 2**20


def peak_mib(once):
    """The most that a step takes from the allocator at any moment, gradients and all, above what it found taken."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        taken = torch.cuda.memory_allocated()
        once(update=False)
        return (torch.cuda.max_memory_allocated() - taken) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        once(update=False)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**20


def cases(subjects):
    """Every case that a subject has, as (row, subject, function)."""
    for (name, how), subject in subjects.items():
        for part, way, k in CASES:
            if (part == "trained") == (how == "full") and not (name == "lite" and way == "serial"):
                yield {"model": name, "part": part, "way": way, "k": k}, subject, case(subject, part, way, k)


def count(subjects):
    """A row a case with its arithmetic; that of K whole passes needs no counting."""
    return [row | {"gflop": gflop(subject, once)} for row, subject, once in cases(subjects) if row["way"] != "naive"]


def measure(subjects):
    """A row a case: arithmetic, memory, and seconds by both clocks, a list with one for each round."""
    found = list(cases(subjects))
    for row, subject, once in tqdm(found, desc="counting"):
        if row["way"] != "naive":
            row["gflop"] = gflop(subject, once)
        if row["part"] != "evaluated":
            row |= {"saved_mib": saved_mib(subject, once), "peak_mib": peak_mib(once)}
        row |= {"cpu_s": [], "wall_s": []}
    for _ in tqdm(range(ROUNDS), desc="timing", unit="round"):
        for row, _, once in found:
            cpu, wall = time.process_time(), time.perf_counter()
            once()
            row["cpu_s"].append(time.process_time() - cpu)
            row["wall_s"].append(time.perf_counter() - wall)
    return [row for row, _, _ in found]


def with_ratios(rows):
    """`bound`, `cpu_ratio`, `wall_ratio`: over the same model and part with K = 1, in arithmetic and by each clock.

    `naive_bound` and `naive_over`: K whole passes over this way of asking, in arithmetic and in seconds of CPU.
    """
    by_case = {tuple(row[name] for name in ("model", "part", "way", "k")): row for row in rows}
    for (model, part, way, k), row in by_case.items():
        one, naive = by_case[model, part, "shared", 1], by_case.get((model, part, "naive", k))
        row.setdefault("gflop", k * one["gflop"])  # naive: whole passes
        row |= {"bound": row["gflop"] / one["gflop"], "naive_bound": k * one["gflop"] / row["gflop"]}
        if "cpu_s" in row:
            row |= {"cpu_ratio": over(row, one, "cpu_s"), "wall_ratio": over(row, one, "wall_s")}
            if naive and way == "shared":
                row["naive_over"] = over(naive, row, "cpu_s")
    for row in rows:
        row |= {clock: statistics.median(row[clock]) for clock in ("cpu_s", "wall_s") if clock in row}
    return pd.DataFrame(rows)


def over(row, other, clock):
    return statistics.median(a / b for a, b in zip(row[clock], other[clock], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the table and its stamp")
    output, started = parser.parse_args().output, time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, used for its memory events, talks otherwise
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = [phrasing.text for phrasing in pg.PromptBank.load("nuclei").phrasings]
    tokenizer = transformers.CLIPTokenizerFast().train_new_from_iterator(texts, 1500, show_progress=False)
    published = transformers.Sam3Config()
    name, config = ("sam3 published", published) if GPU else ("sam3 small", small_config(tokenizer))
    with torch.device(DEVICE):
        timed = {("lite", how): lite_subject(how) for how in ("full", "decoder")}
        timed |= {(name, how): sam3_subject(name, config, tokenizer, how) for how in ("full", "decoder")}
    rows = measure(timed)
    if not GPU:
        with FakeTensorMode():
            texts = torch.rand(1, 1, PHRASINGS, 32, 257)
            counted = {("sam3 published", how): sam3_subject("sam3 published", published, tokenizer, how, texts)
                       for how in ("full", "decoder")}  # fmt: skip
            for subject in counted.values():  # its decoder asks a tensor for two numbers, and these hold none
                side = published.vision_config.backbone_config
                shape = {"spatial_shapes": np.array([[side.image_size // side.patch_size] * 2])}
                subject.model.sam.detr_decoder.register_forward_pre_hook(
                    lambda module, args, kwargs, shape=shape: (args, kwargs | shape), with_kwargs=True
                )
            rows += count(counted)
    frame = with_ratios(rows)
    print(frame.round(3).to_string(index=False))
    clock = "GPU, synchronised wall clock" if GPU else "CPU seconds of one thread"
    record = stamp(
        profile="full" if GPU else "lite", datasets=[], seeds=[0], wall_s=round(time.perf_counter() - started),
        settings={"rounds": ROUNDS, "clock of ratio": clock, "precision": "bf16" if GPU else "fp32"},
    )  # fmt: skip
    print(save_result("sam3_steps", frame.round(4), record, output))


if __name__ == "__main__":
    main()
