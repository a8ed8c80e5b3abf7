"""Which parts of SAM3 are trained, how fast each of them learns, and whether that fits the GPU."""

import os
import re
from dataclasses import replace

import torch

from ..errors import ModelError, SettingsError
from ..settings import Sam3Settings

DECODERS = ("detr_encoder.", "detr_decoder.", "mask_decoder.", "dot_product_scoring.")
LORA_TARGETS = r"(vision_encoder|detr_encoder|detr_decoder|mask_decoder)\..*\.[qkvo]_proj"


def idle_parts(sam, options, settings):
    """Prefixes of parameters that no term of the loss reaches: left trainable, they would stop several processes."""
    levels = len(sam.config.vision_config.scale_factors) - 1  # of the pyramid; the last one is made and not used
    idle = ["geometry_encoder.", f"vision_encoder.neck.fpn_layers.{levels}.", "detr_decoder.box_head."]  # boxes
    stages = sam.config.mask_decoder_config.num_upsampling_stages
    for i in range(levels - 1, stages):
        idle += [f"mask_decoder.pixel_decoder.conv_layers.{i}.", f"mask_decoder.pixel_decoder.norms.{i}."]
    if options["reading"] == "semantic":
        idle += ["mask_decoder.mask_embedder.", "mask_decoder.instance_projection.", "detr_decoder.output_layer_norm."]
    else:
        idle += ["mask_decoder.semantic_projection."]
    if options["reading"] != "max-score":  # elsewhere scores only choose
        idle += ["dot_product_scoring."]
    if not options["presence_gate"] and not settings.presence_weight:
        idle += ["detr_decoder.presence_head.", "detr_decoder.presence_layer_norm."]
    return tuple(idle)


def choose_parts(model, settings):
    """Freeze what is not asked for. The text encoder is not in `model.sam`, so it is frozen in every case."""
    sam, idle = model.sam, idle_parts(model.sam, model.options, settings)
    if settings.trainable == "lora":
        add_lora(sam, settings.lora_rank)
    for name, parameter in sam.named_parameters():
        wanted = {"full": True, "decoder": name.startswith(DECODERS), "lora": ".lora_" in name}[settings.trainable]
        parameter.requires_grad_(wanted and not name.startswith(idle))
    if settings.checkpointing and settings.trainable != "decoder":  # a frozen encoder keeps nothing anyway
        sam.supports_gradient_checkpointing = True  # Sam3Model has the layers for it and does not say so
        later = getattr(sam, "activation_checkpointing_enable", None)  # its name in newer releases
        (later or sam.gradient_checkpointing_enable)({"use_reentrant": False})


def add_lora(sam, rank):
    """Low-rank additions to every attention projection outside the text encoder, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, sam)


def fold_lora(sam):
    """Add what LoRA learned to the weights themselves: what is saved is then plain SAM3, without peft."""
    for name, module in list(sam.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            sam.set_submodule(name, module.get_base_layer())


def parameter_groups(sam, settings):
    """AdamW's groups, one per rate: decoders at `learning_rate`, the vision encoder slower the nearer to the pixels."""
    groups = {}
    for name, parameter in sam.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0  # not for biases and norms
            groups.setdefault((rate(name, sam, settings), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def train_only(model, settings, wanted):
    """Freeze all parameters of a baseline but those whose name is `wanted`, and return AdamW's groups."""
    if isinstance(settings, Sam3Settings):
        said = f"{model.name} trains with TrainSettings, not Sam3Settings"
        raise SettingsError(f"{said}; leave settings out, or pass those")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    return parameter_groups(model, settings)


def rate(name, sam, settings):
    if not name.startswith("vision_encoder."):
        return settings.learning_rate
    above = len(sam.vision_encoder.backbone.layers) + 1  # layers between the embeddings and the neck
    if layer := re.match(r"vision_encoder\.backbone\.layers\.(\d+)\.", name):
        above -= int(layer[1]) + 1
    elif name.startswith("vision_encoder.neck."):
        above = 0
    return settings.vision_rate * settings.layer_decay**above


# ---- before anything long starts ----


def check(model, settings, phrasings):
    """Stop here on what would stop the run later; returns the settings with `serial` decided.

    phrasings: of one image, all its targets together.
    """
    if not isinstance(settings, Sam3Settings):
        raise SettingsError("sam3 trains with Sam3Settings, not TrainSettings; leave settings out, or pass those")
    if settings.trainable == "lora":
        try:
            import peft  # noqa: F401
        except ImportError as error:
            said = "trainable 'lora' needs peft, which is not installed"
            raise ModelError(f"{said}; run `pip install peft`, or train the decoder") from error
    there = gpu_memory(model.device)
    settings = choose_serial(model.sam, settings, phrasings, there)
    if there is not None:
        needed = memory_needed(model.sam, settings, phrasings)
        if needed > there:
            said = f"training {settings.trainable} needs about {needed:.0f} GiB of GPU memory and {there:.0f} are there"
            raise ModelError(f"{said}; {lighter(settings)}")
    return settings


def choose_serial(sam, settings, phrasings, memory):
    """`serial` where the settings leave it open. memory: the GPU's GiB, None on a CPU."""
    if settings.serial is not None:
        return settings
    at_once = replace(settings, serial=False)
    fits = memory is not None and memory_needed(sam, at_once, phrasings) <= memory
    return at_once if fits else replace(settings, serial=True)


LIGHTER = {"serial": True, "checkpointing": True, "batch_size": 1, "trainable": "decoder"}


def lighter(settings):
    """What to change where memory is short."""
    ways = [f"{name}={value!r}" for name, value in LIGHTER.items() if getattr(settings, name, value) != value]
    return f"try {', '.join(ways)}" if ways else "take a larger GPU"


# What the published shape at 1008 px keeps for the backward pass in half precision, counted in GiB: the vision encoder,
# the same with checkpointing, and a phrasing. In fp32 it is 1.7 times that.
ENCODER, ENCODER_CHECKPOINTED, PHRASING, FP32 = 7.9, 1.0, 0.93, 1.7
RUNTIME = 0.8  # GiB of CUDA itself and of what its allocator cannot hand out, a guess


def memory_needed(sam, settings, phrasings):
    """GiB, an estimate: weights, gradients and AdamW's two moments, and what is kept for the backward pass."""
    total = sum(parameter.numel() for name, parameter in sam.named_parameters())
    if settings.trainable == "lora":
        # rank x (inputs + outputs) for each of the square projections
        sides = (m.in_features for name, m in sam.named_modules() if re.fullmatch(LORA_TARGETS, name))
        trained = sum(2 * settings.lora_rank * side for side in sides)
    else:
        parts = ("",) if settings.trainable == "full" else DECODERS
        trained = sum(parameter.numel() for name, parameter in sam.named_parameters() if name.startswith(parts))
    half = settings.precision != "fp32"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # then gradients are also kept in the form they travel in
    states = (4 + 2 * half) * total + (12 + 4 * several) * trained  # autocast keeps half copies of the weights
    kept = PHRASING * (1 if settings.serial else phrasings * settings.batch_size)
    if settings.trainable != "decoder":
        kept += settings.batch_size * (ENCODER_CHECKPOINTED if settings.checkpointing else ENCODER)
    area = (sam.config.vision_config.backbone_config.image_size / 1008) ** 2
    return states / 2**30 + kept * area * (1 if half else FP32) + RUNTIME


def gpu_memory(device):
    """GiB that this process may use on the model's device, None on a CPU."""
    if device.type != "cuda":
        return None
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**30
