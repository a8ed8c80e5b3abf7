"""Grounding DINO with random weights and a third of a million parameters, saved to a folder with its tokenizer."""

import json

import torch
from tiny_text import save_bert_tokenizer
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

SIDE = 96  # of the shorter side that the detector takes


def save_dino(folder):
    entries = save_bert_tokenizer(folder)
    swin = SwinConfig(
        image_size=SIDE, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    bert = BertConfig(
        vocab_size=entries, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    layers = {"layers": 2, "ffn_dim": 128, "attention_heads": 4}
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=64, num_queries=6, max_text_len=32,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in layers.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # the initial weights find the same boxes for all phrasings, and are sure of every one
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "backbone" not in name:
                parameter.mul_(2)
        for head in model.bbox_embed:
            torch.nn.init.normal_(head.layers[-1].weight, std=0.5)
        model.model.decoder.layer_norm.weight.mul_(0.15)
    model.save_pretrained(folder)
    processor = {"size": {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
