"""What K phrasings cost in a training step of `lite`, side by side in one run: K = 1, 2, 3, 6 at batch 4, 256 px,
five targets. The image passes the network once, so a step with K = 3 should take well under 3 times K = 1."""

import statistics
import time

import torch

import pgseg_lite as pg
from pgseg_lite.models.lite import LiteSegmenter
from pgseg_lite.training import best_precision

BATCH, TARGETS, SIZE, ROUNDS = 4, 5, 256, 9


def step(model, optimizer, loss, images, texts, masks, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(images, texts)
    k = texts.shape[1] // TARGETS
    groups = BATCH * TARGETS
    terms = loss(
        out.mask_logits.reshape(groups, k, SIZE, SIZE), out.presence_logits.reshape(groups, k), masks.flatten(0, 1)
    )
    terms.total.backward()
    optimizer.step()
    optimizer.zero_grad()


def main():
    torch.manual_seed(0)
    model, loss = LiteSegmenter().train(), pg.GroupLoss()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    masks = torch.rand(BATCH, TARGETS, SIZE, SIZE) > 0.8
    for precision in dict.fromkeys(("fp32", best_precision(use_cpu=True))):
        seconds = {k: [] for k in (1, 2, 3, 6)}
        for _ in range(ROUNDS):  # interleaved, so that a busy moment hits every K alike
            for k, times in seconds.items():
                texts = torch.randn(BATCH, TARGETS * k, 384) / 384**0.5
                start = time.perf_counter()
                step(model, optimizer, loss, images, texts, masks, precision == "bf16")
                times.append(time.perf_counter() - start)
        base = statistics.median(seconds[1])
        print(f"{precision}, {torch.get_num_threads()} threads: K=1 {base * 1000:.0f} ms a step")
        for k, times in seconds.items():
            print(f"  K={k}: {statistics.median(times) / base:.2f} x K=1")


if __name__ == "__main__":
    main()
