"""Presets: frozen, typed configuration. Torch-free.

One preset is a whole model and its recipes: networks, noise path, prediction target, sampling
defaults, training defaults. The resolved preset is what run folders, model files and pictures
carry. From values to a Preset, and back: validate.py; from names, files and overrides: layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from difftool.config.families import OWN
from difftool.config.kinds import CodecConfig, EncoderConfig, NetworkConfig
from difftool.config.networks import CODEC_KINDS, ENCODER_KINDS, NETWORK_KINDS, IdentityConfig
from difftool.config.numbers import (
    COUNT,
    INFINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SIDE,
    WIDTH,
    Within,
)

Options = dict[str, Any]


FitName = Literal["stretch", "crop", "pad"]
MaskContent = Literal["original", "fill", "noise", "nothing"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How a model is sampled when nothing is asked for."""

    size: Annotated[tuple[int, int], SIDE] = (64, 64)
    """Width and height in pixels."""
    steps: Annotated[int, Within(high=100_000)] = 20
    """Steps of the sampler."""
    sampler: str = "dpmpp_2m"
    """The method that steps from noise to a picture."""
    sampler_options: Annotated[Options, INFINITE] = field(default_factory=dict)
    """Options of the sampler, by name: eta, s_noise, order, ..."""
    schedule: str = "linspace"
    """The grid of levels that the sampler visits."""
    schedule_options: Options = field(default_factory=dict)
    """Options of the schedule, by name: rho, sigma_min, ..."""
    guidance: Annotated[float, NOT_NEGATIVE] = 1.0
    """Classifier-free guidance scale; 1 = off."""
    guidance_rescale: Annotated[float, SHARE] = 0.0
    """How far guided pictures get the unguided contrast back (2305.08891), 0 to 1; 0 = off."""
    guidance_interval: Annotated[tuple[float, float] | None, INFINITE] = None
    """Guidance only where log SNR lies in this range; None = everywhere."""
    clip: Literal["none", "static", "dynamic"] = "none"
    """Thresholding of the predicted x0: none, to [-1, 1], or dynamic (Imagen)."""
    clip_range: Annotated[float | None, Within(above=0)] = None
    """Bound of static thresholding, in place of 1; or the largest one of dynamic thresholding, in
    place of none."""
    clip_quantile: Annotated[float, Within(above=0, high=1)] = 0.995
    """Share of |x0| that dynamic thresholding leaves below its bound."""
    rederive_eps: bool | None = None
    """Whether eps follows a thresholded x0; None = as published: with every sampler but ddim."""
    start_noise: Literal["unit", "sigma", "hypot"] = "unit"
    """Amplitude of the start noise: 1, sigma_T, or alpha_T sqrt(rho_T^2 + 1)."""
    strength: Annotated[float, Within(above=0, high=1)] = 0.75
    """Share of the steps that are run on a picture to start from."""
    fit: FitName = "stretch"
    """How a picture to start from is fitted to another size: its shape not kept, cut, or filled up
    with its edges."""
    mask_grow: Annotated[int, Within(low=-512, high=512)] = 0
    """How many pixels further a mask reaches; less far below 0."""
    mask_blur: Annotated[float, Within(low=0, high=512)] = 0.0
    """Deviation in pixels of the Gaussian that softens a mask's edges."""
    mask_invert: bool = False
    """Whether black is repainted in place of white."""
    mask_content: MaskContent = "original"
    """What is below a mask when the steps begin: the picture, its surroundings' colours drawn in,
    the start noise, or a latent of zeros, as in A1111."""
    only_masked: bool = False
    """Whether only the masked region is drawn, at the whole size, and put back in its own."""
    mask_padding: Annotated[int, Within(low=0, high=4096)] = 32
    """So many pixels around the masked region are drawn with it."""
    outpaint: Annotated[tuple[int, int, int, int] | None, Within(low=0, high=16_384)] = None
    """Pixels that are drawn beyond the picture: left, top, right, bottom."""
    upscale: Annotated[float, Within(low=1, high=16)] = 1.0
    """How much larger than itself a picture to start from is drawn."""
    hires: Annotated[float, Within(low=1, high=16)] = 1.0
    """How much larger a picture is drawn in a second pass that starts from the first; 1 = none."""
    hires_strength: Annotated[float, Within(above=0, high=1)] = 0.7
    """Share of the steps that are run in the second pass."""
    hires_steps: Annotated[int | None, Within(low=1, high=100_000)] = None
    """Steps of the second pass, of which it runs that share; None = as many as of the first."""
    upscaler: str = "latent"
    """What makes pictures larger: a name, or the file of a network."""
    window: Annotated[int | None, Within(low=8, high=16_384)] = None
    """Side in pixels of the overlapping windows in which the network sees what is larger."""
    image_guidance: Annotated[float, Within(low=1)] = 1.5
    """How closely an edited picture is followed (InstructPix2Pix); 1 = off."""
    noise_level: Annotated[int, Within(low=0, high=999)] = 0
    """How much noise a picture's embedding gets before it is varied (unCLIP); 0 to 999."""
    prior_steps: Annotated[int | None, Within(low=1, high=100_000)] = None
    """Steps of the prior, which says what picture is varied (unCLIP); None = its own."""
    prior_guidance: Annotated[float | None, NOT_NEGATIVE] = None
    """Guidance scale of the prior; None = its own."""
    clip_skip: int | None = None
    """The hidden state of the text encoders that is told, counted from the end as A1111 does: 1 =
    the last one; None = the model's own."""
    prompt_syntax: str = "a1111"
    """Whose weights, breaks and schedules prompts have; none: every character is a word's."""
    prompt_weighting: str | None = None
    """By whose arithmetic the weights are applied; None = the syntax's own."""
    tile: Literal["none", "x", "y", "both"] = "none"
    """Whether a picture repeats without a seam: from left to right (x), from top to bottom (y)."""
    chaos: Annotated[float, Within(low=0, high=100)] = 0.0
    """How unlike pictures of a prompt are: percent of noise in what is told of it, at first."""
    rng: Literal["cpu", "gpu"] = "cpu"
    """Whose generator noise is of, for each picture: PyTorch's on a CPU, or on a GPU (CUDA's
    Philox)."""
    step_noise: Literal["continued", "comfyui", "comfyui-gpu", "invokeai", "invokeai-gpu"] = (
        "continued"
    )
    """What ancestral samplers draw: the generator of the start noise goes on, or, in some tools,
    another one is begun."""
    ensd: int = 0
    """A1111's "eta noise seed delta": begins another generator for steps, so far from the seed."""
    vary: Annotated[float, SHARE] = 0.0
    """How far start noise is turned to that of another seed, 0 to 1."""
    posterior: Literal["drawn", "mean"] = "drawn"
    """Whether the latent of a picture to start from is drawn, before the start noise, or the mean
    of what the autoencoder says."""
    strength_rule: Literal["diffusers", "a1111", "comfyui", "invokeai"] = "diffusers"
    """How many steps a strength is, as that tool counts them."""
    rounding: Literal["nearest", "down"] = "nearest"
    """Which of 256 shades a pixel becomes: the nearest, or the one below."""
    stop: Annotated[int, Within(low=1, high=100)] = 100
    """Percent of the steps after which the picture is taken as it is then predicted."""
    deepcache: Annotated[int, Within(low=1, high=1000)] = 1
    """At every so many-th step the whole U-Net is computed, and between its first and last layers
    (2312.00858); 1 = at every step all of it."""
    tome: Annotated[float, Within(low=0, high=0.75)] = 0.0
    """Share of the tokens that join others alike where most attend to each other (2303.17604)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a part of a model is trained when nothing is asked for; None = chosen from data and
    device."""

    size: Annotated[int | None, SIDE] = None
    """Side of the square training pictures, in pixels."""
    steps: Annotated[int | None, POSITIVE] = None
    """Steps of the optimiser."""
    batch_size: Annotated[int | None, COUNT] = None
    """Pictures a batch, on each device."""
    accumulate: Annotated[int, COUNT] = 1
    """Batches whose gradients make one step of the optimiser."""
    optimizer: str = "adamw"
    """A name from training's OPTIMIZERS: adamw, or muon for the hidden matrices and AdamW for the
    rest, with the same learning rate."""
    lr: Annotated[float, POSITIVE] = 1e-3
    """The highest learning rate."""
    betas: Annotated[tuple[float, float], Within(low=0, below=1)] = (0.9, 0.99)
    """Adam's decays of the means of gradients and of their squares."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Pull of the weights to zero a step, times the learning rate."""
    warmup: Annotated[int, NOT_NEGATIVE] = 300
    """Steps over which the learning rate rises from zero."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """How the learning rate falls to zero after the warm-up."""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest norm of the gradient; 0 = not clipped."""
    flip: bool | None = None
    """Random horizontal flips; None = only for unconditional and class-conditional photos."""
    ema: Annotated[float, Within(low=0, below=1)] = 0.9995
    """Decay of the moving average of the weights; 0 = none. Early steps use a shorter one."""
    ema_profile: Literal["decay", "power"] = "decay"
    """power: averages over a share of the run; its length can be chosen after the run."""
    ema_lengths: tuple[float, ...] = (0.05, 0.1)
    """Lengths of the power profiles that are tracked, relative to the run; the last is the run's
    own."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; auto = what the device is fast and safe in."""
    seed: Annotated[int, SEED] = 0
    """Seed of everything random in a run, the first weights included."""
    validation: Annotated[float | None, NOT_NEGATIVE] = None
    """Pictures that are never trained on but measured: below 1 a share of the set, else how many;
    0 = none."""

    stop_when_worse: bool = False
    """Stop where held-out pictures get worse, each noise level counting alike, and keep the weights
    by which they were best."""

    def __post_init__(self) -> None:
        if not self.ema_lengths or not all(0 < n <= 0.28 for n in self.ema_lengths):
            raise ValueError("ema_lengths are shares of the run, above 0 and at most 0.28")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a model is distilled into one that needs few steps."""

    method: Literal["none", "lcm", "turbo", "ect"] = "none"
    """Not at all; to agree along the steps of its teacher's ODE (lcm); to draw what its teacher's
    features do not tell from pictures (turbo); to agree along the pictures' own noise (ect)."""
    teacher: str | None = None
    """The model that is distilled."""
    samples: Annotated[int, NOT_NEGATIVE] = 0
    """Pictures that the teacher draws to learn from, in place of the data's; 0 = the data's."""
    guidance: Annotated[tuple[float, float], Within(low=1)] = (1.0, 1.0)
    """Range of the teacher's guidance scale; a network that is told its scale is told it."""
    ode_steps: Annotated[int, COUNT] = 50
    """Steps of the teacher's ODE, each of as many entries of the noise path (lcm, turbo); on their
    levels the student is sampled."""
    target_ema: Annotated[float, Within(low=0, below=1)] = 0.95
    """Decay of the moving average that the student is to agree with (lcm); 0 = itself."""
    student_steps: Annotated[int, COUNT] = 4
    """Levels that the student is trained at (turbo)."""
    consistency: Annotated[float, SHARE] = 0.4
    """Share of the steps in which the student learns consistency (lcm) before anything else
    (turbo)."""
    adversarial: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight of fooling the heads on the teacher's features (turbo)."""
    matching: Annotated[float, NOT_NEGATIVE] = 2.5
    """Weight of agreeing with what the teacher makes of the student's pictures (turbo)."""
    head_lr: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of the heads (turbo)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimConfig):
    """How the U-Net is trained, and with it any text encoder with a vocabulary of its own."""

    time: str = "uniform"
    """Distribution of the training times: a name from diffusion.TIMES."""
    time_options: Options = field(default_factory=dict)
    """Options of the distribution, by name."""
    weight: str = "uniform"
    """Loss weighting by noise level: a name from diffusion.WEIGHTS."""
    weight_options: Options = field(default_factory=dict)
    """Options of the weighting, by name."""
    loss: str = "mse"
    """What an error of the output costs: a name from diffusion.LOSSES."""
    augment: Annotated[float, SHARE] = 0.0
    """How often a picture is mirrored, scaled, turned, stretched or moved, each by itself, and the
    network told so (EDM, 2206.00364, appendix F): 0.12 for small sets; 0 = never."""
    drop: Annotated[float, SHARE] = 0.1
    """Share of captions or labels left out, which is what guidance needs."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Of the matrices that are trained in place of the model's weights; 0 = the weights are."""
    lora_alpha: Annotated[float | None, POSITIVE] = None
    """What they add is scaled by this over the rank; None = the rank."""
    lora_base: str | None = None
    """The model whose LoRA it is."""
    distill: DistillConfig = DistillConfig()
    checkpointing: bool = False
    """Compute what a block put out again on the way back instead of keeping it: much less memory,
    about a third more time."""


@dataclass(frozen=True, kw_only=True)
class VaeTrainConfig(OptimConfig):
    """How the autoencoder is trained."""

    kl: Annotated[float, NOT_NEGATIVE] = 1e-4
    """Weight of the latent's divergence from a unit normal, of its share a picture value."""
    structure: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the Laplacian pyramid distance beside the mean absolute error."""
    adversarial: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of a patch discriminator's opinion; 0 = there is none."""
    adversarial_from: Annotated[int, NOT_NEGATIVE] = 0
    """The step from which it has a say."""


@dataclass(frozen=True, kw_only=True)
class ClipTrainConfig(OptimConfig):
    """How the text encoders are trained beforehand, against a picture encoder."""

    width: Annotated[int, WIDTH] = 32
    """Width of the picture encoder's first layer."""


Labels = Literal["auto", "none", "text", "folders", "prefix"]
"""Where labels come from: found out, nowhere, captions, folder names, or the part of a file name
before its first "_" (OpenAI's guided-diffusion)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a folder of pictures is read."""

    labels: Labels = "auto"
    """What pictures are conditioned on: found out, nothing, captions, folder names, or the part of
    a file name before its first "_"."""
    caption_column: str | None = None
    """The column of the metadata that captions are in; None = text, caption, prompt, ..."""
    wildcards: bool = True
    """Of {a|b} in a caption one is drawn each time; {{ and }} are braces."""
    shuffle_captions: bool = False
    """Captions that are tags between commas have them in another order each time."""
    keep_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Of shuffled tags, the first so many stay in front."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of a picture is used where its shape is not the frame's."""
    buckets: bool | None = None
    """Train in frames of the pictures' own shapes, a batch of one shape each, and not in squares;
    None = where squares would lose much."""
    bucket_step: Annotated[int | None, COUNT] = None
    """What the sides of those frames are multiples of; None = as the model needs it."""
    background: str = "white"
    """What shows through transparent pixels: a colour's name, or #rrggbb."""
    own_pictures: bool = False
    """Train on pictures that difftool made and on those of run folders too, where others are
    there."""
    allow_bad: bool = False
    """Go on where many of the pictures are unusable."""
    allow_uncaptioned: bool = False
    """Go on where many of the pictures have no caption while others do."""


Part = Literal["vae", "clip", "unet", "prior"]
"""What can be trained by itself."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model family or recipe, whole."""

    name: str
    """What it is called; a file's is its own name."""
    about: str
    """One line for lists and help."""
    family: str = OWN
    """The family id that `convert --inspect` prints."""
    codec: Annotated[CodecConfig, CODEC_KINDS] = field(default_factory=IdentityConfig)
    """Between pictures and x0."""
    unet: Annotated[NetworkConfig, NETWORK_KINDS]
    """The denoising network, of whichever kind."""
    text: tuple[Annotated[EncoderConfig, ENCODER_KINDS], ...] = ()
    """Text encoders; their contexts are concatenated along the width."""
    size_numbers: Annotated[int, NOT_NEGATIVE] = 0
    """Size numbers that join the conditioning vector, 256 sinusoids each (SDXL 6, refiner 5)."""
    path: Options
    """The noise path: {kind: NAME, option: value, ...}, NAME from diffusion.PATHS."""
    target: str
    """What the network predicts: a name from diffusion.TARGETS."""
    scheduler: Annotated[Options, INFINITE] = field(default_factory=dict)
    """Fields of diffusers' scheduler_config.json, but for path and target, from which every sampler
    is built as diffusers builds it; empty: samplers are built as they stand here."""
    zero_negative: bool = False
    """Whether an empty negative prompt is told as zeros and not read (SDXL)."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a class-conditional model, by label."""
    sample: SampleConfig = SampleConfig()
    parts: tuple[Part, ...] = ("unet",)
    """What `train` trains, one after the other."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    train_vae: VaeTrainConfig = VaeTrainConfig()
    train_clip: ClipTrainConfig = ClipTrainConfig()

    def recipe(self, part: Part) -> OptimConfig:
        """How that part is trained."""
        return getattr(self, RECIPES[part])

    @property
    def side_multiple(self) -> int:
        """What the sides of its pictures must be multiples of."""
        return self.codec.factor * self.unet.patch


RECIPES: dict[Part, str] = {
    "vae": "train_vae", "clip": "train_clip", "unet": "train", "prior": "train"
}  # fmt: skip
"""The key of a preset that holds each part's recipe. A model has a U-Net or is a prior."""
DENOISING: tuple[Part, ...] = ("unet", "prior")
"""Parts that are denoising networks, of which a model has one."""
