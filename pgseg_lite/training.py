"""A bank, a dataset and a model become a checkpoint. Stands on `transformers.Trainer`.

What is ours is small: a dataset whose item i depends on (seed, i) alone, a collator, and `compute_loss`.
Resume, mixed precision, accumulation, schedules and several processes are the Trainer's.
"""

import json
import os
import time
from collections import namedtuple
from dataclasses import asdict, replace
from multiprocessing import current_process
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .augment import MOST, augment
from .errors import BankError, Diverged, ModelError, SettingsError, TrainingError
from .files import write_text
from .models.identity import fingerprint
from .models.lite import LiteSegmenter, to_pixel_values
from .settings import TrainSettings

TERMS = ("seg", "mask", "dice", "presence", "group", "consistency")

# What suits the machine and changes no gradient: a run may go on elsewhere with another.
HARDWARE = ("serial", "checkpointing", "workers", "save_every")

TrainResult = namedtuple("TrainResult", "model history folder wall_s cpu_s")


class GroupDataset(torch.utils.data.Dataset):
    """The whole run as one sequence of training views: item i is a function of (seed, i).

    No epoch counter and no global random state, so a resumed run sees exactly what it would have seen.
    """

    def __init__(self, data, bank, settings, length):
        missing = [target for target in data.targets if target not in bank.targets]
        if missing:
            raise BankError(
                f"bank {bank.name!r} has no phrasings for target {missing[0]!r} of dataset {data.name!r}; "
                f"it has {', '.join(bank.targets)}: add the target to the bank"
            )
        if not len(data):
            raise SettingsError(f"dataset {data.name!r} has no samples to train on")
        if len(data.targets) > MOST:
            raise SettingsError(f"dataset {data.name!r} has {len(data.targets)} targets; at most {MOST} can be trained")
        self.data, self.settings, self.length = data, settings, length
        self.groups = [bank.group(target, levels=settings.levels, split="train") for target in data.targets]
        self.fixed = [bank.fixed(target) for target in data.targets]
        for group in self.groups:
            if settings.wording == "groups":
                group.sample(settings.k, np.random.default_rng(0))  # too large a k fails here, not in a worker
        self.texts = sorted({p.text for group in self.groups for p in group.phrasings} | set(self.fixed))
        self.row = {text: i for i, text in enumerate(self.texts)}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        seed, n = self.settings.seed, len(self.data)
        order = np.random.default_rng([seed, 0, index // n]).permutation(n)  # each pass in its own order
        rng = np.random.default_rng([seed, 1, index])
        sample = self.data[int(order[index % n])]
        masks = np.stack([sample.masks[target] for target in self.data.targets])  # [G, H, W]
        image, masks = augment(sample.image, masks, self.settings.view, rng)
        return {"image": image, "masks": masks, "text_ids": self._phrasings(rng)}

    def _phrasings(self, rng):
        """[G, K] rows of the text table."""
        if self.settings.wording == "fixed":
            return [[self.row[text]] for text in self.fixed]
        return [[self.row[p.text] for p in group.sample(self.settings.k, rng)] for group in self.groups]


class Collator:
    """Items -> one batch. Text features come from a table made once, before the first step."""

    def __init__(self, table):
        self.table = table  # [N, ...], for lite sentence vectors [N, 384]

    def __call__(self, items):
        images = torch.from_numpy(np.stack([item["image"] for item in items])).permute(0, 3, 1, 2)
        text_ids = torch.tensor([item["text_ids"] for item in items])  # [B, G, K]
        return {
            "pixel_values": to_pixel_values(images).contiguous(memory_format=torch.channels_last),
            "text_features": self.table[text_ids.flatten(1)],  # [B, G * K, ...]
            "text_ids": text_ids,
            "masks": torch.from_numpy(np.stack([item["masks"] for item in items])),  # [B, G, H, W]
        }


class PromptGroupTrainer(Trainer):
    def __init__(self, *args, loss, texts, groups, **kwargs):
        super().__init__(*args, **kwargs)
        self.group_loss, self.texts, self.parameter_groups = loss, texts, groups
        self.model_accepts_loss_kwargs = False  # our loss is a mean: let the Trainer divide by accumulation
        self.sums, self.count = {}, 0

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args):
        if self.parameter_groups and self.optimizer is None:  # a model with rates of its own
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.parameter_groups, **options)
        return super().create_optimizer(*args)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(inputs["pixel_values"], inputs["text_features"])
        ids, masks = inputs["text_ids"], inputs["masks"]
        b, g, k = ids.shape
        terms = self.group_loss(
            output.mask_logits.reshape(b * g, k, *masks.shape[-2:]),
            output.presence_logits.reshape(b * g, k),
            masks.flatten(0, 1),
        )
        if not torch.isfinite(terms.total):
            terms.check_finite([[self.texts[i] for i in group] for group in ids.flatten(0, 1).tolist()])
        self._remember(terms)
        return (terms.total, output) if return_outputs else terms.total

    def _remember(self, terms):
        values = {name: getattr(terms, name).detach().mean() for name in TERMS}
        values["weight_min"] = terms.weights.min()
        self.sums = {name: self.sums.get(name, 0) + value for name, value in values.items()}
        self.count += 1

    def log(self, logs, *args):
        """Add the means of the loss terms since the last report."""
        if self.count:
            logs |= {name: float(total) / self.count for name, total in self.sums.items()}
            self.sums, self.count = {}, 0
        super().log(logs, *args)


class Progress(TrainerCallback):
    """One plain tqdm line with the loss terms."""

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "seg" in logs:
            self.bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("seg", "group", "consistency")})

    def on_train_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar.close()


def train(data, bank, output, settings=None, *, model=None, resume=False, device=None, quiet=False, **changes):
    """Train `model` (a new `lite` by default) on every target of `data` with the bank's train phrasings.

    Writes config.json, model.safetensors, history.csv and run.json to the folder `output`, and checkpoints
    on the way; `resume=True` goes on from the newest whole one. `changes` replace single settings.
    A model with `default_settings` brings its own; one with `prepare_training` chooses what is trained and returns
    the optimiser's parameter groups.
    """
    check_trainable(model)
    settings = settings or getattr(model, "default_settings", TrainSettings())
    try:
        settings = replace(settings, **changes)
    except TypeError as error:
        said = str(error).split(") ")[-1]
        raise SettingsError(f"{said}; the settings are {', '.join(asdict(settings))}") from error
    loss, output = settings.loss(), Path(output)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    views = settings.steps * settings.batch_size * settings.accumulation * processes
    dataset = GroupDataset(data, bank, settings, views)
    args = training_arguments(output, settings, device)
    run = describe_run(data, bank, settings, processes, model)

    torch.manual_seed(settings.seed)
    model = (model or LiteSegmenter()).train()
    groups = None
    if hasattr(model, "prepare_training"):
        groups = model.prepare_training(settings, dataset.texts, phrasings=len(dataset.groups) * settings.k)
    if "serial" in run:  # what was decided, for the record
        run["serial"] = model.serial
    checkpoint = prepare_output(output, run, resume)
    table = model.encode_text(dataset.texts).cpu()  # [N, ...], a row per phrasing
    trainer = PromptGroupTrainer(
        model, args, Collator(table), dataset, loss=loss, texts=dataset.texts, groups=groups,
        callbacks=[] if quiet else [Progress()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        from .models.finetune import lighter

        error.__traceback__ = None  # whoever keeps it would keep the model
        raise ModelError(f"the GPU's memory is too small for this run; {lighter(settings)}") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):  # by the very last step
        raise Diverged("the weights became NaN or infinite; lower the learning rate")
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu

    import pandas as pd

    history = pd.DataFrame([row for row in trainer.state.log_history if "seg" in row])
    if trainer.is_world_process_zero():
        history.to_csv(output / "history.csv", index=False)
        model.save_pretrained(output)  # config.json last: a folder that has it is a finished run
    return TrainResult(model.eval(), history, output, wall_s, cpu_s)


def check_trainable(model):
    if hasattr(model, "why_not_trained"):
        raise SettingsError(f"{model.name} cannot be trained here: {model.why_not_trained}")
    for name in ("forward", "encode_text", "save_pretrained"):
        if model and not hasattr(model, name):
            raise SettingsError(f"{type(model).__name__} has no {name}, so it cannot be trained here; add it")


def training_arguments(output, settings, device=None):
    if device not in (None, "cpu", "cuda"):
        raise SettingsError(f"device is {device!r}; choose cpu or cuda, and the GPU itself by CUDA_VISIBLE_DEVICES")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda, but PyTorch finds no GPU here; use cpu")
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    precision = best_precision(use_cpu) if settings.precision == "auto" else settings.precision
    if precision == "fp16" and use_cpu:
        raise SettingsError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    args = TrainingArguments(
        output_dir=str(output), max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, lr_scheduler_type=settings.schedule, max_grad_norm=settings.clip,
        warmup_steps=int(settings.warmup * settings.steps), seed=settings.seed,
        bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=use_cpu,
        dataloader_num_workers=0 if current_process().daemon else settings.workers,  # Dask's process may have none
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False, label_names=["masks"], report_to="none", disable_tqdm=True,
        logging_steps=min(10, settings.steps), logging_nan_inf_filter=False,
        save_steps=settings.save_every, save_total_limit=2,
        ddp_find_unused_parameters=False, ddp_backend="gloo" if use_cpu and "WORLD_SIZE" in os.environ else None,
    )  # fmt: skip
    if args.n_gpu > 1:
        args._n_gpu = 1  # else nn.DataParallel, which knows no SegmentationOutput; torchrun is what uses several
    return args


def best_precision(use_cpu):
    """bf16 where the hardware multiplies in it (recent GPUs, CPUs with AMX or AVX-512 BF16), otherwise fp32."""
    if not use_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in asks) else "fp32"


def describe_run(data, bank, settings, processes, model):
    """Everything that must be equal for a run to be the same run, one flat entry each."""
    settings = asdict(settings) | {"levels": list(settings.levels)}
    return (
        settings
        | {
            "processes": processes,
            "data": f"{data.name} {data.digest}",
            "bank": f"{bank.name} {bank.digest}",
            "start": fingerprint(model) if model else "new weights",
        }
        | getattr(model, "options", {})
    )


def prepare_output(output, run, resume):
    """Refuse to mix two runs in one folder. Returns the checkpoint to resume from, or None."""
    record = output / "run.json"
    if os.environ.get("RANK", "0") != "0":  # the first process checks and writes for all
        return newest_whole_checkpoint(output) if resume else None
    if record.is_file():
        if not resume:
            raise SettingsError(f"{output} already holds a run; resume it, or choose another output folder")
        try:
            stored = json.loads(record.read_text())
        except ValueError as error:
            raise TrainingError(f"{record}: damaged ({error}); start in another folder") from error
        changed = [
            f"{name} was {stored.get(name)} and is now {run[name]}"
            for name in run
            if stored.get(name) != run[name] and name not in HARDWARE
        ]
        if changed:
            raise SettingsError(f"{record}: cannot resume, {changed[0]}; use the same")
        return newest_whole_checkpoint(output)
    if resume:
        raise SettingsError(f"{output}: there is no run to resume here; start one without resume")
    output.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(run, indent=2) + "\n")
    return None


def newest_whole_checkpoint(output):
    """A kill can leave the newest checkpoint half written: take the newest that loads."""
    from safetensors import SafetensorError, safe_open

    numbers = {folder: folder.name.split("-")[1] for folder in output.glob("checkpoint-*")}
    folders = sorted((f for f, number in numbers.items() if number.isdigit()), key=lambda f: -int(numbers[f]))
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())
            safe_open(folder / "model.safetensors", "pt")
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(folder / name, weights_only=True, map_location="cpu", mmap=True)
            if not list(folder.glob("rng_state*.pth")):
                continue
            return folder
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError):
            continue
    if folders:
        raise TrainingError(f"{output}: none of the {len(folders)} checkpoints can be read; start in another folder")
    return None  # killed before the first checkpoint: start over
