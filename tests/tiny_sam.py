"""SAM, SAM2 and SAM2's video model with random weights and a third of a million parameters, saved to a folder."""

import torch
from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel, SamConfig, SamModel
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig

SIDE = 64  # of the images that they take
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
PROMPTS = {"hidden_size": 32, "image_size": SIDE}
HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [SIDE, SIDE],
    "window_positional_embedding_background_size": [4, 4], "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [4, 2, 2, 2], "global_attention_blocks": [3],
}  # fmt: skip
SAM2 = {
    "vision_config": {
        "backbone_config": HIERA, "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "prompt_encoder_config": PROMPTS, "mask_decoder_config": DECODER,
}  # fmt: skip
MEMORY = {
    "memory_attention_hidden_size": 32, "memory_attention_num_layers": 1, "memory_attention_rope_feat_sizes": [4, 4],
    "memory_attention_feed_forward_hidden_size": 64, "memory_encoder_hidden_size": 32, "memory_fuser_embed_dim": 32,
    "memory_encoder_output_channels": 16, "memory_fuser_intermediate_dim": 64, "mask_downsampler_embed_dim": 32,
}  # fmt: skip
SAM_VISION = {
    "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16, "initializer_range": 0.02,
}  # fmt: skip


def save_sam2(folder):
    return save(Sam2Model, Sam2Config(**SAM2), folder)


def save_sam2_video(folder):
    decoder = Sam2VideoMaskDecoderConfig(**DECODER)  # transformers 5.15 misreads a dictionary here
    return save(Sam2VideoModel, Sam2VideoConfig(**SAM2 | MEMORY | {"mask_decoder_config": decoder}), folder)


def save_sam(folder):
    config = SamConfig(vision_config=SAM_VISION, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    return save(SamModel, config, folder)


def each_mask(masks, embeddings, size, **prompts):
    """Mask logits [N, *size] and scores [N] of N prompts, of which the package wants only the union."""
    return [torch.cat(part) for part in zip(*masks.in_portions(embeddings, size, **prompts), strict=True)]


def save(kind, config, folder):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():  # the initial weights are so small that neither image nor prompt would hardly matter
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder
