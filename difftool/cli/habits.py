"""Flags that other tools have taught: answered with the flag that does the same here.

The tables below are for all commands: each answers where it has the flag that is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from difftool.config.options import Option
from difftool.errors import UsageError

COUNTERPARTS = {
    # sample
    "PROMPT": "prompt p text",
    "--negative": "negative-prompt neg neg-prompt no uncond-prompt",
    "--num": "count batch-count n-iter num-images num-images-per-prompt n-samples num-samples "
        "num-outputs",
    "--size": "width height W H w h resolution res image-size img-size",
    "--steps": "num-inference-steps ddim-steps sampling-steps num-steps inference-steps "
        "max-train-steps num-train-steps max-steps iterations train-steps",
    "--sampler": "sampler-name sampling-method sample-method method solver",
    "--schedule": "schedule-type sigmas noise-schedule timestep-spacing sigma-schedule "
        "scheduler-type",
    "--ar": "aspect-ratio aspect",
    "--tile": "tiling seamless",
    "--guidance": "cfg cfg-scale guidance-scale scale true-cfg-scale",
    "--guidance-rescale": "cfg-rescale rescale-cfg",
    "--eta": "ddim-eta",
    "--seed": "random-seed manual-seed noise-seed",
    "--model": "ckpt checkpoint ckpt-path model-path model-id model-name sd-model base-model",
    "--init": "init-img init-image input-image img2img i2i image i I",
    "--strength": "denoising-strength denoise denoise-strength img-strength init-strength "
        "image-strength prompt-strength",
    "--mask": "mask-image inpaint-mask",
    "--image-guidance": "image-guidance-scale image-cfg-scale",
    "--vary": "variation-strength variation-amount subseed-strength vary-strength",
    "--vary-seed": "variation-seed subseed",
    "--hires": "hires-fix enable-hr hr hr-scale hires-scale hires-upscale highres-fix",
    "--hires-strength": "hr-denoise hires-denoise hires-denoising-strength",
    "--hires-steps": "hr-second-pass-steps hr-steps",
    "--upscaler": "hr-upscaler hires-upscaler upscale-model",
    "--upscale": "upscale-by upscale-factor resize-by",
    "--mask-content": "inpainting-fill inpaint-fill masked-content mask-fill",
    "--mask-invert": "inpainting-mask-invert invert-mask",
    "--mask-padding": "inpaint-full-res-padding only-masked-padding",
    "--only-masked": "inpaint-full-res inpaint-only-masked",
    "--fit": "resize-mode fit-mode",
    "--gif": "save-intermediates save-steps save-each-step animation",
    "--guidance-interval": "cfg-end cfg-start guidance-start guidance-end skip-cfg cfg-interval",
    "--no-metadata": "no-exif no-pnginfo disable-metadata",
    "--print-config": "dry-run show-config",
    "--rng": "randomness-source randn-source noise-source noise-device rand-device",
    "--ensd": "eta-noise-seed-delta",
    "--window": "tiled-diffusion multidiffusion tile-size",
    "--prompt-weighting": "emphasis prompt-arithmetic",
    "--from-latents": "decode-latents",
    "--wildcard-dir": "wildcards wildcard-path wildcards-dir",
    "--skip-existing": "skip resume no-clobber",
    "--grid": "xy-plot xyz-plot xyz contact-sheet make-grid montage",
    "--preview": "live-preview show-progress preview-method",
    "--lora": "lora-path lora-model lora-weights loras",
    "--embedding": "textual-inversion embeddings ti",
    "--embedding-dir": "embeddings-dir textual-inversion-dir embd-dir",
    "--lora-dir": "lora-model-dir loras-dir",
    "--vae": "vae-path vae-model",
    "--clip-skip": "clipskip",
    "--prompts": "prompt-file prompts-file from-file",
    "--batch-size": "train-batch-size batch bs micro-batch-size",
    "--low-memory": "lowvram medvram low-vram cpu-offload offload enable-model-cpu-offload",
    "--deepcache": "cache-interval deep-cache cache-mode",
    "--tome": "tome-ratio token-merging token-merging-ratio",
    "--refiner": "refiner-model refiner-checkpoint",
    "--refiner-start": "refiner-switch-at switch-at denoising-start high-noise-frac",
    "--format": "image-format output-format ext extension",
    "--output": "out outdir out-dir output-dir output-path outputs save-path save-dir",
    "--dtype": "precision half fp16 bf16 fp32 float16 bfloat16 full-precision no-half variant "
        "torch-dtype",
    "--device": "gpu cpu cuda mps use-cpu device-id",
    "--offline": "local-files-only no-download",
    "--overwrite": "force f yes y",
    "--quiet": "silent",
    # train
    "DATA": "data dataset data-dir train-data-dir dataset-name instance-data-dir input",
    "--from": "pretrained-model-name-or-path pretrained finetune init-from model m ckpt checkpoint "
        "base-model",
    "--out": "output-dir out-dir outdir output o save-dir results-dir logging-dir logdir run-dir",
    "--lr": "learning-rate unet-lr",
    "--accumulate": "gradient-accumulation-steps grad-accum accumulate-grad-batches accum-iter",
    "--rank": "network-dim lora-rank lora-r",
    "--precision": "mixed-precision dtype amp fp16 bf16 half",
    "--optimizer": "optimizer-type optim opt",
    "--ema": "use-ema",
    "--workers": "num-workers dataloader-num-workers max-data-loader-n-workers",
    "--save-every": "checkpointing-steps save-every-n-steps save-interval save-steps",
    "--keep": "checkpoints-total-limit save-total-limit",
    "--sample-every": "validation-steps sample-every-n-steps sample-interval",
    "--sample-prompt": "validation-prompt sample-prompts",
    "--resume": "continue resume-from-checkpoint auto-resume",
    "--buckets": "enable-bucket aspect-ratio-buckets bucketing",
    "--crop": "random-crop center-crop centre-crop",
    "--caption-column": "caption-key text-column",
    "--shuffle-captions": "shuffle-caption shuffle-tags",
    "--compile": "torch-compile use-compile",
    "--validation": "val-split val-fraction validation-split",
    # convert
    "SRC": "src source input in i from checkpoint-path model-path model m",
    "DST": "dst dest target output dump-path out o out-path save-path",
    "--to": "to-format output-format target-format format type",
    "--weights": "extract-ema use-ema ema",
    "--prediction": "prediction-type parameterization",
    "--strip-metadata": "no-metadata",
    "--report": "ledger",
    # noise
    "IMAGE": "image picture input init",
    "--path": "noise-path beta-schedule noise-schedule",
}  # fmt: skip
"""A flag, or an argument, and what other tools call it."""

ANSWERS = {
    "--sampler": {
        "scheduler": "--sampler names the method, --schedule the levels that it visits",
        "watermark no-watermark": "no mark is put into pictures",
        "lora-scale lora-strength lora-weight": "--lora FILE:0.8",
        "order solver-order": "--set sample.sampler_options.order=3",
        "sigma-min sigma-max": "--set sample.schedule_options.sigma_max=10",
        "shift flow-shift prediction-type v-prediction zsnr zero-snr beta-schedule":
            "that is the model's own, which its file or its scheduler's says",
        "dynamic-thresholding mimic-scale thresholding": "--set sample.clip=dynamic",
        "web webui api listen port share gradio server": "there is no server; programs read what "
            "--json prints, or import difftool",
        "show open display": "--preview shows pictures in the terminal",
        "interrogate caption": "pictures are not described in words",
        "threads num-threads": "OMP_NUM_THREADS=4 before the command",
        "log log-file logfile": "what is said goes to stderr: 2> log.txt",
        "negative-prompt-file negative-file": "a line of a file has its own: a fox --n bad",
        "list-samplers help-samplers list-schedulers": "difftool sample --list samplers",
        "script scripts": "lists are tried in turn: --steps 10,20 --guidance 4,7 --grid",
        "skip-grid no-grid skip-save": "a grid is drawn with --grid alone",
        "fixed-code": "--seed 7 begins each prompt with the same noise",
        "karras-sigmas use-karras-sigmas": "--schedule karras",
        "s-churn s-tmin s-tmax s-noise churn": "--set sample.sampler_options.s_churn=5, or s_noise",
        "quality jpeg-quality": "JPEG and WebP are written at quality 95",
        "jpeg jpg png webp": "--format jpg, or -o NAME.jpg",
        "freeu pag-scale perturbed-attention-guidance sag-scale hypertile":
            "no such change of the network is offered",
        "controlnet control control-image controlnet-model": "ControlNets are not read",
        "ip-adapter ip-adapter-scale": "IP-Adapters are not read",
        "hypernetwork hypernetworks": "hypernetworks are not read; LoRAs are, by --lora",
        "restore-faces face-restoration codeformer gfpgan": "faces are not mended afterwards",
        "styles style": "write the style into the prompt",
        "xformers enable-xformers opt-sdp-attention attention-slicing flash-attention":
            "attention is torch's own, which needs no flag",
        "safety-checker no-safety-checker skip-safety-checker safety nsfw":
            "there is no filter to turn off",
    },
    "DATA": {
        "epochs num-train-epochs max-train-epochs num-epochs":
            "--steps counts optimiser steps; an epoch is the pictures over --batch-size",
        "lr-scheduler lr-schedule": "--set train.decay=cosine",
        "lr-warmup-steps warmup warmup-steps lr-warmup": "--set train.warmup=300",
        "gradient-checkpointing grad-checkpointing": "--set train.checkpointing=true",
        "max-grad-norm clip-grad-norm gradient-clip": "--set train.clip_norm=1",
        "weight-decay wd adam-weight-decay": "--set train.weight_decay=0.01",
        "snr-gamma min-snr-gamma": "--set train.weight=min_snr",
        "flip random-flip flip-aug hflip": "--set train.flip=true",
        "network-alpha lora-alpha alpha": "--set train.lora_alpha=8",
        "zero-terminal-snr rescale-betas-zero-snr zero-snr": "--set path.zero_snr=true",
        "use-8bit-adam 8bit-adam": "there is no optimiser of 8 bits; less memory: --set "
            "train.checkpointing=true",
        "report-to wandb tensorboard log-with": "a run has metrics.jsonl and report.html",
        "num-processes num-gpus gpus devices": "torchrun --nproc-per-node 8 -m difftool train ...",
    },
    "SRC": {
        "original-config-file config original-config": "configurations come from the file itself",
        "safe-serialization use-safetensors safetensors": "files are safetensors always",
    },
}  # fmt: skip
"""What other tools have and no flag does here, and what is said of it; by a flag, or an argument,
of the command that it is said in."""


def answer(flag: str, rows: Sequence[Option], command: str) -> UsageError:
    """What is said of a flag that none of these rows has: what other tools mean by it, else the
    nearest flag. `command` is how the command is called."""
    from difftool.diffusion.grids import GRIDS
    from difftool.diffusion.samplers import SAMPLERS
    from difftool.text.midjourney import OTHERS

    what = f"there is no {flag} here"
    word = _word(flag)
    for row in rows:
        if word in COUNTERPARTS.get(_name(row), "").split():
            return UsageError(what, hint=_use(row))
    for row in rows:
        for words, said in ANSWERS.get(_name(row), {}).items():
            if word in words.split():
                return UsageError(what, hint=said)
    for name, registry in (("--sampler", SAMPLERS), ("--schedule", GRIDS)):
        if word in registry and name in map(_name, rows):
            return UsageError(what, hint=f"use {name} {word}")
    if flag.startswith("--") and word in OTHERS and "--ar" in map(_name, rows):
        return UsageError(what, hint="this parameter of Midjourney's has no counterpart")
    near = get_close_matches(flag, [name for row in rows for name in row.spellings], n=1)
    return UsageError(what, hint=f'did you mean "{near[0]}"?' if near else f"see {command} --help")


def _word(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")


def _name(row: Option) -> str:
    return row.flag.strip("[].")


def _use(row: Option) -> str:
    if row.argument:
        return f"{_name(row)} is given without a flag"
    values = list(row.choices()) if row.choices else []
    of = f": {', '.join(values)}" if 0 < len(values) <= 6 else ""
    return f"use {row.flag} {row.metavar}" if row.metavar else f"use {row.flag}{of}"
