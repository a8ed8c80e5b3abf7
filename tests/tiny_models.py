"""Tiny models with random weights, saved to disk so that tests load them through the calls that load published ones."""

import json

import torch
from tiny_text import save_clip_tokenizer
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, Sam3Config, Sam3Model

CLIPSEG_SIDE = 64  # of the images that the tiny CLIPSeg takes


def tiny_config(ids):
    side = {"hidden_size": 32, "num_attention_heads": 4}
    deep = {**side, "num_layers": 2, "intermediate_size": 64}
    vit = {
        "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 112, "patch_size": 14, "window_size": 4, "global_attn_indexes": [1],
        "pretrain_image_size": 112,
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "vocab_size": len(ids), "hidden_size": 64, "intermediate_size": 128,
        "projection_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
        "bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    return Sam3Config(
        vision_config={"fpn_hidden_size": 32, "backbone_config": vit}, text_config=text, mask_decoder_config=side,
        geometry_encoder_config={**side, "num_layers": 1, "intermediate_size": 64}, detr_encoder_config=deep,
        detr_decoder_config={**deep, "num_queries": 8},
    )  # fmt: skip


def save_tiny_sam3(folder):
    """A Sam3Model of half a million weights, with its tokenizer."""
    ids = save_clip_tokenizer(folder)
    torch.manual_seed(0)
    model = Sam3Model(tiny_config(ids))
    with torch.no_grad():  # the initial weights are so small that phrasings would hardly matter
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def save_tiny_clipseg(folder):
    """A CLIPSeg for images of CLIPSEG_SIDE; its position embeddings are those of 32, smaller as the published ones."""
    ids = save_clip_tokenizer(folder)
    deep = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"]}
    config = CLIPSegConfig(
        text_config={**deep, "vocab_size": len(ids), "max_position_embeddings": 77, **ends},
        vision_config={**deep, "image_size": 32, "patch_size": 16},
        projection_dim=16, extract_layers=[0, 1, 2], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, use_complex_transposed_convolution=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPSegForImageSegmentation(config)
    with torch.no_grad():  # initial logits are in the hundreds, which makes rounding errors of this size too
        for parameter in model.decoder.transposed_convolution.parameters():
            parameter.mul_(0.4)
    model.save_pretrained(folder)
    size = {"height": CLIPSEG_SIDE, "width": CLIPSEG_SIDE}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
