"""One U-Net for DDPM, ADM, Stable Diffusion 1/2/XL and their relatives; the config says which.

Parameter names are those of diffusers' UNet2DConditionModel and UNet2DModel, so that a state dict
of either loads strictly.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from difftool.config.networks import UNetConfig
from difftool.networks.base import Network
from difftool.networks.layers import (
    Downsample,
    PlainAttention,
    ResBlock,
    TimeEmbedding,
    Transformer,
    Upsample,
    guidance_sinusoids,
    silu,
    sinusoids,
)


class UNetLevel(nn.Module):
    """Residual blocks at one resolution, each followed by its attention if the level has any."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.checkpointing = False

    def layer(self, index: int, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """One residual block and its attention."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._layer, index, x, emb, context, use_reentrant=False)
        return self._layer(index, x, emb, context)

    def _layer(self, index: int, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.resnets[index](x, emb)
        return self.attentions[index](x, context) if index < len(self.attentions) else x


class Down(UNetLevel):
    """A level of the way down; what each layer puts out is piled on `skips`."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], *then: nn.Module):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList(then)

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, skips: list[Tensor]
    ) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb)
            skips.append(x)
        return x


class Middle(UNetLevel):
    """The blocks between the ways down and up."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb, context)
        return x


class Up(UNetLevel):
    """A level of the way up; each layer takes one of the `skips`, the last piled first."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], *then: nn.Module):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList(then)

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, skips: list[Tensor]
    ) -> Tensor:
        x = self.layers(x, emb, context, skips, 0, len(self.resnets))
        for upsample in self.upsamplers:
            x = upsample(x, emb, skips[-1].shape[2:])  # not always twice: odd sizes were rounded
        return x

    def layers(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None,
        skips: list[Tensor],
        first: int,
        end: int,
    ) -> Tensor:
        """Some of its layers, one after the other."""
        for index in range(first, end):
            x = torch.cat([x, skips.pop()], dim=1)  # lets go of what it is made of
            x = self.layer(index, x, emb, context)
        return x


class Deep:
    """What the last layers of a U-Net start from, [B,C,h,w], which changes little from step to step
    (DeepCache, 2312.00858). A forward pass that is given none puts its own here."""

    features: Tensor | None = None


SHALLOW = 2
"""So many layers are computed where the deep features are given, on the way up."""


class UNet(Network):
    """The network F(x, t, conditioning) of any of the families."""

    neutral = ("time_embedding.cond_proj.weight",)

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, emb_dim, last = config.channels, 4 * config.channels[0], len(config.channels) - 1
        resblock = partial(
            ResBlock,
            emb_dim=emb_dim,
            groups=config.groups,
            eps=config.norm_eps,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
        )
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], emb_dim, config.guidance_dim)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes, emb_dim)
        if config.vector_dim is not None:
            self.add_module(config.vector_name, TimeEmbedding(config.vector_dim, emb_dim))

        def down(width: int) -> nn.Module:
            if config.resblock_updown:
                return resblock(width, width, resample="down")
            return Downsample(width, config.downsample_padding)

        def up(width: int) -> nn.Module:
            return (
                resblock(width, width, resample="up") if config.resblock_updown else Upsample(width)
            )

        before, skips = channels[0], [channels[0]]  # widths of x, and of the pile of skips
        self.down_blocks = nn.ModuleList()
        for i, (width, depths) in enumerate(zip(channels, config.down_depths, strict=True)):
            inputs = [before] + [width] * (len(depths) - 1)
            resnets: list[nn.Module] = [resblock(inner, width) for inner in inputs]
            then = [down(width)] if i < last else []
            self.down_blocks.append(Down(resnets, self._attentions(i, depths), *then))
            skips += [width] * (len(resnets) + len(then))
            before = width

        if config.mid_blocks:
            depths = (config.mid_depth,) * (config.mid_blocks - 1)
            resnets = [resblock(before, before) for _ in range(config.mid_blocks)]
            self.mid_block = Middle(resnets, self._attentions(last, depths, middle=True))

        self.up_blocks = nn.ModuleList()
        for i in range(last, -1, -1):
            width, depths = channels[i], config.up_depths[i]
            inputs = [before] + [width] * (len(depths) - 1)
            resnets = [resblock(inner + skips.pop(), width) for inner in inputs]
            then = [up(width)] if i > 0 else []
            self.up_blocks.append(Up(resnets, self._attentions(i, depths), *then))
            before = width

        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def _attentions(self, i: int, depths: tuple[int, ...], middle: bool = False) -> list[nn.Module]:
        """The attention layers of level i, or of the middle at its width."""
        config = self.config
        width, heads, groups = config.channels[i], config.level_heads[i], config.groups
        if not any(depths):
            return []
        if config.attention == "plain":
            return [PlainAttention(width, heads, groups, config.norm_eps) for _ in depths]
        return [
            Transformer(
                width,
                heads,
                depth,
                context_dim=config.context_dim,
                only_cross=i in config.only_cross and not middle,
                linear=config.linear_projection,
                groups=groups,
            )
            for depth in depths
        ]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        augment: Tensor | None = None,
        deep: Deep | None = None,
    ) -> Tensor:
        """x [B,C,H,W], odd sizes too, and t [B] -> [B,C',H,W].

        context [B,L,D], vector [B,V], label [B] int, guidance [B] (LCM's w, which is the usual
        scale minus 1): each is given exactly if the config has it, else ValueError. augment [B,E]
        joins the time embedding. deep: takes the deep features, or gives them.
        """
        emb, context = self._told(x, t, context, vector, label, guidance, augment)
        last = self.up_blocks[len(self.up_blocks) - 1]
        assert isinstance(last, Up)
        first = max(len(last.resnets) - SHALLOW, 0)
        if deep is None or deep.features is None:
            x, skips, _ = self._down(x, emb, context)
            for index in range(len(self.up_blocks) - 1):
                x = self.up_blocks[index](x, emb, context, skips)
            x = last.layers(x, emb, context, skips, 0, first)
            if deep is not None:
                deep.features = x
        else:
            skips = [self.conv_in(x)]
            for index in range(SHALLOW - 1):
                level = self.down_blocks[0]
                assert isinstance(level, Down)
                skips.append(level.layer(index, skips[-1], emb, context))
            x = deep.features
        x = last.layers(x, emb, context, skips, first, len(last.resnets))
        return self.conv_out(silu(self.conv_norm_out(x)))

    @property
    def embedding_width(self) -> int:
        return 4 * self.config.channels[0]

    @property
    def feature_widths(self) -> tuple[int, ...]:
        widths = self.config.channels
        return (*widths, widths[-1]) if self.config.mid_blocks else widths

    def features(self, x: Tensor, t: Tensor, **told: Tensor | None) -> list[Tensor]:
        """Of each level on the way down, the first the finest, and of the middle."""
        names = ("context", "vector", "label", "guidance")
        emb, context = self._told(x, t, *(told.get(name) for name in names))
        return self._down(x, emb, context)[2]

    def _told(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None,
        vector: Tensor | None,
        label: Tensor | None,
        guidance: Tensor | None,
        augment: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The embedding [B,E] of the time and of what is told with it, and the context."""
        self._check(x, context=context, vector=vector, label=label, guidance=guidance)
        emb = self._embed(t, x.dtype, vector, label, guidance)
        emb = F.silu(emb if augment is None else emb + augment.to(emb.dtype))
        return emb, None if context is None else context.to(x.dtype)

    def _down(
        self, x: Tensor, emb: Tensor, context: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x after the middle, the pile of skips, and the features."""
        x = self.conv_in(x)
        skips, seen = [x], []
        for level in self.down_blocks:
            x = level(x, emb, context, skips)
            seen.append(skips[-1 - len(level.downsamplers)])  # type: ignore[arg-type]
        if self.config.mid_blocks:
            x = self.mid_block(x, emb, context)
            seen.append(x)
        return x, skips, seen

    def checkpoint(self, on: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, UNetLevel):
                module.checkpointing = on

    def _embed(
        self,
        t: Tensor,
        dtype: torch.dtype,
        vector: Tensor | None,
        label: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """The embedding [B,E] of the time and of all that is told with it."""
        config = self.config
        waves = sinusoids(
            t, config.channels[0], cosines_first=config.flip_sin_to_cos, shift=config.freq_shift
        )
        scale = None
        if guidance is not None and config.guidance_dim is not None:
            scale = guidance_sinusoids(guidance, config.guidance_dim).to(dtype)
        emb = self.time_embedding(waves.to(dtype), scale)
        if label is not None:
            emb = emb + self.class_embedding(label)
        if vector is not None:
            emb = emb + getattr(self, config.vector_name)(vector.to(dtype))
        return emb

    def _check(self, x: Tensor, **given: Tensor | None) -> None:
        """ValueError unless the input and its conditioning are what the config says."""
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ValueError(f"x has {x.shape[1]} channels, this U-Net takes {config.in_channels}")
        for name, wanted in (
            ("context", config.context_dim),
            ("vector", config.vector_dim),
            ("label", config.num_classes),
            ("guidance", config.guidance_dim),
        ):
            value = given[name]
            if (value is None) != (wanted is None):
                raise ValueError(f"this U-Net {'needs a' if wanted else 'takes no'} {name}")
            if value is not None and value.dim() > 1 and value.shape[-1] != wanted:
                raise ValueError(f"{name} is {value.shape[-1]} wide, this U-Net takes {wanted}")

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, a function of the generator's state alone.

        Uniform of variance 2 / (fan-in + fan-out), biases zero; the output and the last layer of
        every residual branch start at zero (DDPM, ADM).
        """
        for module in self.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fans = sum(module.weight.shape[:2]) * module.weight[0, 0].numel()
                bound = (6 / fans) ** 0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
        for module in self.modules():
            if isinstance(module, ResBlock | PlainAttention | Transformer):
                module.get_parameter(f"{module.last}.weight").zero_()
        self.conv_out.weight.zero_()
