# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""PyTorch LeMoRe: three Cartesian views, nested attention over a token pyramid, gated fusion (arXiv 2505.23093).

Where a docstring says "our choice", the paper is silent and this implementation decides.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_lemore import STAGE_STRIDES, LeMoReConfig
from .loss_lemore import check_label_values, is_invalid_label, raise_for_invalid_labels, segmentation_loss
from .operations_lemore import (
    CORE_CACHE_BYTES,
    STRIP_BYTES,
    DepthwiseByShifts,
    hides_values,
    is_channels_last,
    is_same_tensor,
    is_transformed,
    multiply_axis,
    resize_bilinear,
    tent_filter,
    trains_on_gpu,
    without_autocast,
)

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on

# Below "transformers", so that its verbosity settings hold wherever this file is imported from.
logger = logging.get_logger("transformers.models.lemore")

MINIMUM_SIZE = STAGE_STRIDES[-1]
# In bytes, as PyTorch allocates memory on a CPU.
WEIGHT_ALIGNMENT = 64
# Training steps on a GPU from one look at what their labels were to the next.
LABEL_CHECK_STEPS = 50


@dataclass
class LeMoReModelOutput(ModelOutput):
    r"""
    Output of [`LeMoReModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, config.hidden_size, height / 64, width / 64)`):
            The global features δ: the token pyramid after nested attention, at `config.token_stride`, which is 64 by
            default. Sizes are rounded up.
        local_features (`tuple(torch.Tensor)`):
            The local features ξ₁..ξ₄, each of shape `(batch_size, hidden_sizes[i], height / stride, width / stride)`
            with strides 4, 8, 16, 32. Sizes are rounded up.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned when `output_hidden_states=True`):
            The stem's output (stride 2), then ξ₁..ξ₄.
        attentions (`tuple(torch.Tensor)`, *optional*, returned when `output_attentions=True`):
            The combined map ψ of nested attention, one tensor of shape
            `(batch_size, num_attention_heads, num_tokens, num_tokens)` whose rows sum to one; an empty tuple where
            `config.use_nested_attention` is off. Tokens are counted row by row.
    """

    last_hidden_state: torch.FloatTensor | None = None
    local_features: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LeMoReDepthwiseConv2d(nn.Conv2d):
    """Depthwise 3×1 or 1×3 convolution of stride 1 without bias, which libraries train slowly in half precision. On a GPU,
    in channels-last, a sum of shifted inputs is far faster. On a CPU a dilated one is computed in single precision or more:
    oneDNN 3.12 (PyTorch 2.14) returns wrong weight gradients in bfloat16 and channels-last."""

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        if not self._trains_in_half_precision(hidden_state):
            return super().forward(hidden_state)
        if trains_on_gpu(hidden_state):
            kind = hidden_state.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_state.dtype
            axis = 2 if self.kernel_size[0] > 1 else 3
            return DepthwiseByShifts.apply(hidden_state.to(dtype), self.weight, axis, self.dilation[0])
        if hidden_state.device.type != "cpu" or self.dilation == (1, 1):
            return super().forward(hidden_state)
        dtype, compute_dtype = hidden_state.dtype, torch.promote_types(hidden_state.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.to(compute_dtype)
            return self._conv_forward(hidden_state.to(compute_dtype), self.weight.to(compute_dtype), bias).to(dtype)

    @staticmethod
    def _trains_in_half_precision(hidden_state: torch.Tensor) -> bool:
        if hidden_state.is_meta or not torch.is_grad_enabled():
            return False
        half = (torch.bfloat16, torch.float16)
        return torch.is_autocast_enabled(hidden_state.device.type) or hidden_state.dtype in half


class LeMoReConvLayer(nn.Module):
    """Convolution without bias, batch norm and, unless `activation` is off, the activation. Fused: no batch norm."""

    is_fused = False

    def __init__(
        self,
        config: LeMoReConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: bool = True,
    ):
        super().__init__()
        kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        convolution_class = LeMoReDepthwiseConv2d if groups > 1 else nn.Conv2d
        self.convolution = convolution_class(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=tuple(dilation * (side // 2) for side in kernel_size),
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.normalization = _batch_norm(config, out_channels)
        self.activation = ACT2FN[config.hidden_act] if activation else nn.Identity()

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return self.activation(self.normalization(self.convolution(hidden_state)))

    def fuse_(self) -> None:
        scale, bias = _scale_and_bias(self.normalization)
        self.convolution = _with_weight(self.convolution, self.convolution.weight * scale[:, None, None, None], bias)
        self.normalization = nn.Identity()
        _activate_in_place(self.activation)


def _activate_in_place(activation: nn.Module) -> None:
    """Let the activation overwrite its input. Only where nothing else reads that input."""
    if hasattr(activation, "inplace"):
        activation.inplace = True


def _scale_and_bias(normalization: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch norm does in evaluation: a factor and an offset for each channel, at least in single precision."""
    dtype = torch.promote_types(normalization.weight.dtype, torch.float32)
    variance, mean = normalization.running_var.to(dtype), normalization.running_mean.to(dtype)
    scale = normalization.weight.to(dtype) / (variance + normalization.eps).sqrt()
    return scale, normalization.bias.to(dtype) - mean * scale


def _with_weight(convolution: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """The convolution with another weight, which may have other channels, and a bias."""
    original, groups = convolution.weight, convolution.groups
    fused = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        groups,
        device="meta",
    )
    fused.weight = nn.Parameter(weight.to(original))
    fused.bias = nn.Parameter(bias.to(original))
    return fused


def _batch_norm(config: LeMoReConfig, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)


def _drop_path(rate: float) -> nn.Module:
    return LeMoReDropPath(rate) if rate > 0 else nn.Identity()


class LeMoReDropPath(nn.Module):
    """
    Stochastic depth (Huang et al., ECCV 2016): in training a branch is left out of a share of the images, and scaled up
    in the others. The same as torchvision's `StochasticDepth`, which this file must not require.

    Args:
        rate (`float`): The share, in `[0, 1)`.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden_state
        kept = hidden_state.new_empty(hidden_state.shape[0], 1, 1, 1).bernoulli_(1 - self.rate)
        return hidden_state * kept.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


# Axis weights at any size


def resample_axis_weight(weight: torch.Tensor, size: int) -> torch.Tensor:
    r"""
    Resample the weights of a frontal or lateral view from their native size to another (our choice).

    `A' = (n₀ / n) · resize(A, n × n)`, bilinear, antialiased when shrinking: an axis of `n` positions is read down to
    `n₀` with a tent filter, mixed there, and interpolated back.

    Args:
        weight (`torch.Tensor` of shape `(n₀, n₀)`):
            The native weights `A`.
        size (`int`):
            The axis length `n`.

    Returns:
        `torch.Tensor` of shape `(n, n)`, equal to `weight` where that is its size. Differentiable.
    """
    native = weight.shape[0]
    tent = tent_filter(native, size, weight)
    with without_autocast(weight):
        return (tent @ weight.to(tent.dtype) @ tent.t() * (native / size)).to(weight.dtype)


class LeMoReAxisView(nn.Module):
    """
    A spatial view of the feature volume: the 1×1 convolution along one axis, whose weights all channels share.

    The frontal view permutes the volume so that height is the convolved axis, the lateral view width. A matrix product
    along that axis is the same without the permutation.

    Args:
        size (`int`): Native length of the axis.
        axis (`int`): The axis in `(B, C, H, W)`: 2 for the frontal view, 3 for the lateral one.
        drop_rate (`float`): Share of the training images that are seen without this view.
    """

    is_fused = False
    MAX_SIZES = 8  # whose factors a fused view caches
    # Of an axis over its native size n₀. From about 2.4 up, reading down, mixing and interpolating back (2 n n₀ + n₀²)
    # costs less than the resampled weights (n²): the cost of a pixel stays flat as images grow.
    MAX_RESAMPLED = 2.5

    def __init__(self, size: int, axis: int, drop_rate: float = 0.0):
        super().__init__()
        self.axis = axis
        self.drop_path = _drop_path(drop_rate)
        self._factors = {}
        self.weight = nn.Parameter(torch.empty(size, size))

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        for factor in self.factors(hidden_state.shape[self.axis]):
            hidden_state = self._along_axis(factor, hidden_state)
        return self.drop_path(hidden_state)

    def factors(self, size: int) -> tuple[torch.Tensor, ...]:
        """Matrices whose products with an axis of `size` positions, one after another, are the view."""
        # A graph exported for any size (there the size is a symbol) cannot choose by it: it always resamples.
        if not isinstance(size, int):
            return (resample_axis_weight(self.weight, size),)
        if size == self.weight.shape[0]:
            return (self.weight,)
        weight = self.weight
        needs_gradient = torch.is_grad_enabled() and weight.requires_grad
        is_traced = torch.compiler.is_compiling() or is_transformed()
        if not self.is_fused or is_traced or needs_gradient or weight.is_inference():
            return self._make_factors(size)
        known, version, factors = self._factors.get(size, (None, None, ()))
        if known is None or version != weight._version or not is_same_tensor(known, weight):
            # What inference mode makes could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                factors = self._make_factors(size)
            self._factors.pop(size, None)
            for oldest in list(self._factors)[: 1 - self.MAX_SIZES]:
                self._factors.pop(oldest, None)  # other threads may forget what this one remembers
            # Holding the weight keeps another from taking its place in memory, which could not be told from it.
            self._factors[size] = (weight.detach(), weight._version, factors)
        return factors

    def _make_factors(self, size: int) -> tuple[torch.Tensor, ...]:
        if size > self.MAX_RESAMPLED * self.weight.shape[0]:
            return self.native_factors(size)
        return (resample_axis_weight(self.weight, size),)

    def native_factors(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The resampled weights in two steps: read down to the native size and mix, then interpolate back."""
        native = self.weight.shape[0]
        tent = tent_filter(native, size, self.weight).to(self.weight.dtype)
        with without_autocast(tent):
            return self.weight @ tent.t() * (native / size), tent

    def _along_axis(self, weight: torch.Tensor, hidden_state: torch.Tensor) -> torch.Tensor:
        if self.is_fused and is_channels_last(hidden_state):
            return multiply_axis(weight, hidden_state, self.axis)
        return torch.matmul(weight, hidden_state) if self.axis == 2 else F.linear(hidden_state, weight)


class ResampleAxisWeights(ConversionOps):
    """
    Loading step that resamples a checkpoint's axis weights to the native size of the model they are loaded into.

    So that a checkpoint can be fine-tuned at another `image_size` through the ordinary `from_pretrained`.
    """

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str, model: PreTrainedModel, **kwargs
    ) -> dict[str, torch.Tensor]:
        ((pattern, tensors),) = input_dict.items()
        weight = tensors[0] if isinstance(tensors, list) else tensors
        size = model.get_parameter(full_layer_name).shape[-1]
        if size != weight.shape[-1]:
            if not getattr(model, "_axis_weights_were_resampled", False):  # any model with a LeMoRe backbone
                logger.info(
                    "The checkpoint's axis weights were made for another `image_size`: they are resampled to the model's."
                )
                model._axis_weights_were_resampled = True
            weight = resample_axis_weight(weight, size)
        return {pattern: weight}

    @property
    def reverse_op(self) -> ConversionOps:
        # Saving writes the weights at the size they have, which `convert` leaves alone.
        return ResampleAxisWeights()


register_checkpoint_conversion_mapping(
    LeMoReConfig.model_type,
    [
        WeightConverter(f"views.{view}.weight", f"views.{view}.weight", operations=[ResampleAxisWeights()])
        for view in ("frontal", "lateral")
    ],
    # A second copy of this file, loaded as remote code, registers the same again.
    overwrite=True,
)


# Encoder


class LeMoReChannelAttention(nn.Module):
    """Channel attention as squeeze-and-excitation (our choice; its parameters match the paper's table)."""

    def __init__(self, config: LeMoReConfig, channels: int):
        super().__init__()
        hidden_channels = channels // config.channel_attention_reduction
        self.squeeze = nn.Conv2d(channels, hidden_channels, 1)
        self.excite = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return hidden_state * self.weights(hidden_state)

    def weights(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """The factor of each channel: (B, C, H, W) → (B, C, 1, 1)."""
        mean = hidden_state.mean((2, 3), keepdim=True)
        return self.excite(F.relu(self.squeeze(mean))).sigmoid()


class LeMoReCartesianEncoder(nn.Module):
    """
    Cartesian encoder: sum of the views → depthwise 3×1, 1×3 → dilated depthwise 3×1, 1×3 → channel attention.

    Norms, activations, dilation and the residual around it are our choice.
    """

    is_fused = False

    def __init__(self, config: LeMoReConfig, stage_index: int, drop_path_rate: float = 0.0):
        super().__init__()
        channels = config.hidden_sizes[stage_index]
        height, width = config.native_grids[stage_index]
        views = {
            "transverse": lambda: nn.Conv2d(channels, channels, 1, bias=False),
            "frontal": lambda: LeMoReAxisView(height, 2, config.drop_view_rate),
            "lateral": lambda: LeMoReAxisView(width, 3, config.drop_view_rate),
        }
        self.views = nn.ModuleDict({name: views[name]() for name in config.views})
        self.normalization = _batch_norm(config, channels)
        self.activation = ACT2FN[config.hidden_act]
        self.depthwise = nn.Sequential(
            *(
                LeMoReConvLayer(
                    config,
                    channels,
                    channels,
                    kernel_size,
                    dilation=dilation,
                    groups=channels,
                    activation=kernel_size == (1, 3),
                )
                for dilation in (1, config.dilation)
                for kernel_size in ((3, 1), (1, 3))
            )
        )
        self.channel_attention = (
            LeMoReChannelAttention(config, channels) if config.use_channel_attention else nn.Identity()
        )
        self.use_channel_attention = config.use_channel_attention
        self.use_residual = config.use_residual
        self.drop_path = _drop_path(drop_path_rate)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        residual = hidden_state
        hidden_state = self.activation(self.mix(hidden_state))
        hidden_state = self.depthwise(hidden_state)
        if self.is_fused and self.use_channel_attention and self.use_residual:
            return torch.addcmul(residual, hidden_state, self.channel_attention.weights(hidden_state))
        hidden_state = self.channel_attention(hidden_state)
        return residual + self.drop_path(hidden_state) if self.use_residual else hidden_state

    def mix(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """The normalized sum of the views."""
        if not self.is_fused:
            return self.normalization(sum(view(hidden_state) for view in self.views.values()))
        # The transverse view has its share of the norm in its weights.
        transverse = self.views["transverse"](hidden_state) if "transverse" in self.views else self.axis_bias
        if not self.axis_views:
            return transverse
        return torch.addcmul(transverse, self.sum_of_axis_views(hidden_state), self.axis_scale)

    @property
    def axis_views(self) -> list[LeMoReAxisView]:
        """The frontal and the lateral view, as far as the configuration has them."""
        return [view for name, view in self.views.items() if name != "transverse"]

    def sum_of_axis_views(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return functools.reduce(torch.add, (view(hidden_state) for view in self.axis_views))

    def fuse_(self) -> None:
        scale, bias = _scale_and_bias(self.normalization)
        dtype, device = self.normalization.weight.dtype, self.normalization.weight.device
        if "transverse" in self.views:
            weight = self.views["transverse"].weight * scale[:, None, None, None]
            self.views["transverse"] = _with_weight(self.views["transverse"], weight, bias)
        else:
            self.axis_bias = nn.Parameter(bias[:, None, None].to(device, dtype))
        if self.axis_views:
            self.axis_scale = nn.Parameter(scale[:, None, None].to(device, dtype))
        self.normalization = nn.Identity()
        _activate_in_place(self.activation)


class LeMoReStage(GradientCheckpointingLayer):
    """Downsampling 3×3 convolution of stride 2 → Cartesian encoder."""

    def __init__(self, config: LeMoReConfig, stage_index: int, drop_path_rate: float = 0.0):
        super().__init__()
        channels = [config.stem_sizes[-1], *config.hidden_sizes]
        self.downsampling = LeMoReConvLayer(
            config, channels[stage_index], channels[stage_index + 1], kernel_size=3, stride=2
        )
        self.cartesian_encoder = LeMoReCartesianEncoder(config, stage_index, drop_path_rate)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return self.cartesian_encoder(self.downsampling(hidden_state))


class LeMoReEncoder(nn.Module):
    """Stem of stride 2 → four stages at strides 4, 8, 16 and 32."""

    is_fused = False

    def __init__(self, config: LeMoReConfig):
        super().__init__()
        channels = [config.num_channels, *config.stem_sizes]
        self.stem = nn.Sequential(
            *(
                LeMoReConvLayer(config, channels[index], channels[index + 1], kernel_size=3, stride=2 - (index > 0))
                for index in range(len(config.stem_sizes))
            )
        )
        drop_path_rates = _drop_path_rates(config)
        self.stages = nn.ModuleList(
            LeMoReStage(config, index, drop_path_rates[index]) for index in range(len(config.hidden_sizes))
        )

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stem's output, then the local features ξ₁..ξ₄."""
        if self.is_fused and self.training:
            raise RuntimeError(
                "This model is fused, for inference only: switch it to evaluation with `model.eval()`, or train the "
                "model that it was made of and call its `fuse()` again."
            )
        if self.is_fused and not torch.compiler.is_exporting() and not is_transformed():
            # On CPUs and GPUs the faster layout of every convolution, interpolation and product along an axis.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        hidden_state = self.stem(pixel_values)
        features = [hidden_state]
        for stage in self.stages:
            hidden_state = stage(hidden_state)
            features.append(hidden_state)
        return tuple(features)


def check_pixel_values(pixel_values: torch.Tensor, num_channels: int) -> None:
    """Refuse what is no batch of normalised images.

    Raises:
        `TypeError`: for what is no tensor, or not of floats.
        `ValueError`: for another number of dimensions or channels, and for sides below 32 pixels.
    """
    if not isinstance(pixel_values, torch.Tensor):
        raise TypeError(
            f"`pixel_values` must be a tensor, got {type(pixel_values).__name__}: call the image processor with "
            '`return_tensors="pt"`.'
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"`pixel_values` must hold floats, got {pixel_values.dtype}: let the image processor rescale and normalise "
            "the images, or convert them with `pixel_values.float()`."
        )
    if pixel_values.ndim != 4:
        raise ValueError(
            "`pixel_values` must have shape (batch_size, num_channels, height, width), got "
            f"{tuple(pixel_values.shape)}; add a batch dimension to a single image with `pixel_values[None]`."
        )
    if pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` has {pixel_values.shape[1]} channels, but `config.num_channels` is "
            f"{num_channels}: channels are the second dimension of shape {tuple(pixel_values.shape)}."
        )
    if any(side < MINIMUM_SIZE for side in pixel_values.shape[2:]):
        raise ValueError(
            f"Images must be at least {MINIMUM_SIZE}×{MINIMUM_SIZE} pixels, the stride of the last stage, got "
            f"{pixel_values.shape[2]}×{pixel_values.shape[3]}: resize or pad them."
        )


def _drop_path_rates(config: LeMoReConfig) -> list[float]:
    """Stochastic depth of the four Cartesian encoders, then of the global block where there is one: linear in depth."""
    last = len(config.hidden_sizes) - (0 if config.use_nested_attention else 1)
    return [config.drop_path_rate * index / last for index in range(last + 1)]


class LeMoReTokenPyramid(nn.Module):
    """
    ξ₁..ξ₄, average-pooled to the token stride and concatenated: `(B, S, H / 64, W / 64)` at the default 64, rounded up.

    Each token averages a square of its own of that side; at the lower and right borders, what of it lies inside the
    image (our choice).
    """

    def __init__(self, config: LeMoReConfig):
        super().__init__()
        self.kernel_sizes = [config.token_stride // stride for stride in STAGE_STRIDES]

    def forward(self, local_features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat(
            [
                F.avg_pool2d(feature, kernel_size, ceil_mode=True)
                for feature, kernel_size in zip(local_features, self.kernel_sizes, strict=True)
            ],
            dim=1,
        )


class LeMoReNestedAttention(nn.Module):
    """
    Nested attention: all products Qᵢ⊗Kⱼ become one map ψ, which multiplies each value Vₜ; the results are summed.

    How the maps are combined is our choice, named by `config.nested_attention_softmax`: `"per_map"` takes the mean of
    each map's own softmax; `"sum"` takes one softmax of the summed products, which equals one ordinary attention
    with ΣQᵢ and ΣKⱼ.
    """

    is_fused = False

    def __init__(self, config: LeMoReConfig):
        super().__init__()
        self.num_projections = config.num_nested_projections
        self.num_heads = config.num_attention_heads
        self.key_dim, self.value_dim = config.attention_key_dim, config.attention_value_dim
        self.softmax_per_map = config.nested_attention_softmax == "per_map"
        key_channels = self.num_projections * self.num_heads * self.key_dim
        value_channels = self.num_projections * self.num_heads * self.value_dim
        self.query = LeMoReConvLayer(config, config.hidden_size, key_channels, activation=False)
        self.key = LeMoReConvLayer(config, config.hidden_size, key_channels, activation=False)
        self.value = LeMoReConvLayer(config, config.hidden_size, value_channels, activation=False)
        self.activation = ACT2FN[config.hidden_act]
        self.projection = LeMoReConvLayer(
            config, self.num_heads * self.value_dim, config.hidden_size, activation=False
        )

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The attended tokens `(B, S, H, W)`, and ψ `(B, heads, H·W, H·W)`."""
        attention = self.combined_map(tokens)
        # ψV₁ + ψV₂ + ψV₃ = ψ(V₁ + V₂ + V₃)
        value = self.value(tokens).unflatten(1, (-1, self.num_heads, self.value_dim)).sum(1)
        context = value.flatten(3) @ attention.transpose(-2, -1)  # (B, heads, value_dim, H·W)
        context = context.flatten(1, 2).unflatten(2, tokens.shape[2:])
        return self.projection(self.activation(context)), attention

    def combined_map(self, tokens: torch.Tensor) -> torch.Tensor:
        """ψ, of shape `(B, heads, H·W, H·W)`; its rows are the queries and sum to one."""
        query, key = self._per_head(self.query(tokens)), self._per_head(self.key(tokens))
        scale = self.key_dim**-0.5
        if not self.softmax_per_map:
            return (query.sum(2) @ key.sum(2).transpose(-2, -1) * scale).softmax(-1)
        if torch.compiler.is_compiling():  # one product, of any number of tokens
            return self._mean_of_maps(query * scale, key)
        strips = (query * scale).split(self._queries_at_once(query), dim=3)
        return torch.cat([self._mean_of_maps(strip, key) for strip in strips], dim=2)

    def _queries_at_once(self, query: torch.Tensor) -> int:
        """Positions whose maps make a strip. All maps of a large image at once would be by far its largest tensor: nine
        times the square of the tokens."""
        num_tokens = query.shape[3]
        num_maps = query.shape[:2].numel() * self.num_projections**2
        bytes_of_a_query = max(1, num_maps * num_tokens * query.element_size())  # 0 for an empty batch
        strip_bytes = min(STRIP_BYTES, CORE_CACHE_BYTES) if query.device.type == "cpu" else STRIP_BYTES
        return max(1, strip_bytes // bytes_of_a_query)

    def _mean_of_maps(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        maps = self.nested_maps(query, key)
        return maps.mean(3).unflatten(2, (self.num_projections, -1)).mean(2)

    def nested_maps(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The maps of all pairs (i, j), each with its own softmax: `(B, heads, i·H·W, j, H·W)`."""
        products = query.flatten(2, 3) @ key.flatten(2, 3).transpose(-2, -1)
        return products.unflatten(3, (self.num_projections, -1)).softmax(-1)

    def _per_head(self, hidden_state: torch.Tensor) -> torch.Tensor:
        # (B, i·heads·key_dim, H, W) → (B, heads, i, H·W, key_dim)
        hidden_state = hidden_state.flatten(2).unflatten(1, (-1, self.num_heads, self.key_dim))
        return hidden_state.permute(0, 2, 1, 4, 3)

    def fuse_(self) -> None:
        """Add the values' projections up, and where the maps are summed those of the queries and of the keys."""
        for layer in (self.value,) if self.softmax_per_map else (self.query, self.key, self.value):
            weight, bias = (
                parameter.unflatten(0, (self.num_projections, -1)).sum(0)
                for parameter in layer.convolution.parameters()
            )
            layer.convolution = _with_weight(layer.convolution, weight, bias)


class LeMoReFeedForward(nn.Module):
    """1×1 expansion → depthwise 3×3 → 1×1 projection, as in TopFormer's blocks (our choice)."""

    def __init__(self, config: LeMoReConfig):
        super().__init__()
        hidden_channels = int(config.mlp_ratio * config.hidden_size)
        self.expansion = LeMoReConvLayer(config, config.hidden_size, hidden_channels, activation=False)
        self.depthwise = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, groups=hidden_channels)
        self.activation = ACT2FN[config.hidden_act]
        self.projection = LeMoReConvLayer(config, hidden_channels, config.hidden_size, activation=False)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        hidden_state = self.activation(self.depthwise(self.expansion(hidden_state)))
        return self.projection(hidden_state)


class LeMoReGlobalBlock(GradientCheckpointingLayer):
    """Nested attention → feed-forward network, each with a residual connection."""

    def __init__(self, config: LeMoReConfig):
        super().__init__()
        self.attention = LeMoReNestedAttention(config)
        self.feed_forward = LeMoReFeedForward(config)
        self.drop_path = _drop_path(_drop_path_rates(config)[-1])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.drop_path(self.attention(tokens)[0])
        return tokens + self.drop_path(self.feed_forward(tokens))


def keep_freed_memory() -> None:
    """
    Let the C library keep the buffers that a forward pass frees, for the next one.

    Without it most of a pass on a CPU may go into page faults: glibc returns blocks above M_MMAP_THRESHOLD to the system
    as soon as they are freed, and what is free at the end of its heap above M_TRIM_THRESHOLD (see mallopt(3)). Here blocks
    of up to 32 MiB, the most that it takes, and 512 MiB of free heap stay with the process, unless the environment has
    settings of its own (`MALLOC_TRIM_THRESHOLD_`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**29)  # M_TRIM_THRESHOLD


def _align_weights(model: nn.Module) -> None:
    """Copy weights that a memory-mapped file leaves unaligned: on some processors the rounding of matrix products depends
    on alignment."""
    for parameter in model.parameters():
        is_plain = (
            type(parameter) is nn.Parameter and parameter.device.type == "cpu"
        )  # neither quantized nor offloaded
        if is_plain and parameter.data_ptr() % WEIGHT_ALIGNMENT:
            parameter.data = parameter.data.clone()


def _checkpoint_once(layer: nn.Module, checkpointing_func: Callable, function: Callable, *inputs: Any) -> Any:
    """Gradient checkpointing whose recomputation leaves the norms' running statistics alone."""
    if torch.compiler.is_compiling():  # there each batch is counted once
        return checkpointing_func(function, *inputs)
    runs = itertools.count()

    def run(*inputs: Any) -> Any:
        with contextlib.nullcontext() if next(runs) == 0 else _running_statistics_kept(layer):
            return function(*inputs)

    return checkpointing_func(run, *inputs)


@contextlib.contextmanager
def _running_statistics_kept(layer: nn.Module) -> Iterator[None]:
    norms = [module for module in layer.modules() if getattr(module, "track_running_stats", False)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            # Counted in a copy, since SyncBatchNorm needs a counter.
            count = norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class LeMoRePreTrainedModel(PreTrainedModel):
    """Weights initialization, and what the LeMoRe models have in common with all of Transformers."""

    config: LeMoReConfig
    config_class = LeMoReConfig
    base_model_prefix = "lemore"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LeMoReStage", "LeMoReGlobalBlock", "LeMoReDecodeHead"]
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LeMoReStage,
        "attentions": OutputRecorder(LeMoReNestedAttention, index=1),
    }

    def __init__(self, config: LeMoReConfig, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)  # which refuses what is no configuration
        config = self.config
        config.validate_architecture()  # again: `from_pretrained(..., field=value)` sets fields of a finished config
        config.id2label = {int(index): name for index, name in config.id2label.items()}  # JSON has words for keys
        # A single label tells two classes apart, which may have a colour each.
        if config.palette is not None and len(config.palette) not in {config.num_labels, max(config.num_labels, 2)}:
            logger.warning(
                f"`palette` has {len(config.palette)} colours for {config.num_labels} classes, as of a checkpoint for "
                "others: it is left out. Give `palette=` to choose colours."
            )
            config.palette = None

    def _check_batch(self, pixel_values: torch.Tensor, stride: int) -> None:
        """Refuse what is no batch of images, and in training one image of a single position of `stride`: batch norms cannot
        be trained on one value a channel."""
        check_pixel_values(pixel_values, self.config.num_channels)
        if not self.training or pixel_values.shape[0] != 1 or max(pixel_values.shape[2:], default=0) > stride:
            return
        if any(module.training for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(
                f"A training batch of one image needs more than {stride} pixels on a side, since batch norms need more "
                f"than one value; got shape {tuple(pixel_values.shape)}. Take more images in a batch (and leave out a "
                "last one alone, with `drop_last`) or larger ones."
            )

    def get_input_embeddings(self) -> None:
        """There are none. Quantization by Transformers asks every model."""

    def fuse(self) -> Self:
        """
        A copy for inference, faster and with the same outputs up to rounding; the model itself is left as it is.

        Batch norms are folded into convolutions, and projections of the same input are joined. The copy is in
        evaluation mode and refuses to be trained. It is saved, loaded and exported as any model: `config.is_fused`
        says what its weights are.

        On a CPU the copy works in channels-last layout, whatever the layout of the images. It also lets the process
        keep up to 512 MiB that it has freed, in buffers of up to 32 MiB, those of images up to about 1400×1400 pixels;
        for larger ones set `MALLOC_MMAP_MAX_=0` and `MALLOC_TRIM_THRESHOLD_=17179869184` in the environment (glibc).

        The copy remembers axis weights that it resampled: change its weights by `load_state_dict` or under
        `torch.no_grad()`, which it notices, not in place through `.data`.

        Returns:
            [`LeMoRePreTrainedModel`] of the same class; of a fused model an equal copy.

        Raises:
            `ValueError`: while adapters wrap its layers, masks prune its weights, or weights are offloaded from memory.
        """
        if any(hasattr(module, "base_layer") for module in self.modules()):
            raise ValueError("Layers are wrapped by adapters: merge these first, with peft's `merge_and_unload()`.")
        pruned = [name for name, _ in self.named_buffers() if name.endswith("_mask")]
        if pruned:
            raise ValueError(
                f"Weights are pruned by masks ({pruned[0]}): make the zeros permanent first, with "
                "`torch.nn.utils.prune.remove`."
            )
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(
                "Weights are on the meta device, as after offloading: load the model without `device_map`."
            )
        fused = copy.deepcopy(self)
        fused.config.is_fused = True
        fused._fuse_parts()
        return fused

    def train(self, mode: bool = True) -> Self:
        """
        As in PyTorch, but for frozen batch norms: where `requires_grad` of their weights is off, as under adapters or in
        an encoder below a head that is trained alone, they stay in evaluation mode. Otherwise what is frozen would give
        other features after training, and an adapter's file would lack the statistics it was trained with (our choice).
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._gradient_checkpointing_func = functools.partial(
                    _checkpoint_once, module, gradient_checkpointing_func
                )

    def post_init(self) -> None:
        if self.config.is_fused:
            self._fuse_parts()
        super().post_init()

    def _fuse_parts(self) -> None:
        # Innermost first: a part fuses convolutions that have already absorbed their norms. In a model within this one
        # the parts are fused already.
        for module in reversed(list(self.modules())):
            if getattr(module, "is_fused", True):
                continue
            if hasattr(module, "fuse_"):  # others do the same with other steps
                module.fuse_()
            module.is_fused = True
        self.eval()
        keep_freed_memory()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: LeMoReConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Self:
        """As in all of Transformers; on a CPU, in the same precision, size and memory layout, the outputs are,
        bit for bit, those of the model that was saved.

        Raises:
            `ValueError`: where `is_fused` is asked to be what the checkpoint is not.
        """
        wanted = kwargs.get("is_fused", getattr(config, "is_fused", None))
        stored = wanted
        if pretrained_model_name_or_path is not None and wanted is not None:
            with contextlib.suppress(OSError):  # weights without a configuration
                stored = LeMoReConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)[0].get(
                    "is_fused", False
                )
        if wanted != stored:
            advice = "and call `fuse()` on it" if wanted else "or, for training, the one that it was made of"
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path} is {'' if stored else 'not '}fused, so that it "
                f"cannot be loaded with `is_fused={wanted}`: load it as it is, {advice}."
            )
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        _align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)  # with `output_loading_info` a pair
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        # Any class of the family loads what another one saved, also as remote code.
        self.config.auto_map = {
            auto_class: f"modeling_lemore.{model_class.__name__}" for auto_class, model_class in AUTO_CLASSES.items()
        }
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All convolutions and classifiers normal with `initializer_range`, norms as identity, as Transformers does it (our
        choice; Kaiming's standard deviations by fan-out did no better in short trainings), and the axis views."""
        super()._init_weights(module)
        # What has no weights of its own is not asked for here: Transformers takes it for initialized.
        if isinstance(module, LeMoReAxisView):
            self._init_axis_view(module)
        elif isinstance(module, LeMoReCartesianEncoder):
            if hasattr(module, "axis_scale"):
                init.ones_(module.axis_scale)
            if hasattr(module, "axis_bias"):
                init.zeros_(module.axis_bias)

    def _init_axis_view(self, view: LeMoReAxisView) -> None:
        if self.config.axis_initialization == "normal":
            init.normal_(view.weight, std=view.weight.shape[0] ** -0.5)
        elif self.config.axis_initialization == "identity":
            init.eye_(view.weight)
        else:
            init.zeros_(view.weight)


class LeMoReModel(LeMoRePreTrainedModel):
    """The LeMoRe encoder and its global features, without a head: local features ξ₁..ξ₄ and global features δ."""

    def __init__(self, config: LeMoReConfig):
        super().__init__(config)
        self.encoder = LeMoReEncoder(config)
        self.token_pyramid = LeMoReTokenPyramid(config)
        self.global_block = LeMoReGlobalBlock(config) if config.use_nested_attention else nn.Identity()
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> LeMoReModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, at least 32×32 pixels. Exact at the native size `config.image_size`; at other sizes
                the frontal and lateral weights are resampled.

        Returns:
            [`LeMoReModelOutput`].

        Raises:
            `ValueError`: for pixel values that are not 4-D, have another channel count, or are smaller than 32×32; in
            training also for a single image of a single token (of 32×32 pixels without `use_nested_attention`).
            `TypeError`: for pixel values that are no tensor of floats.
            `RuntimeError`: for a fused model in training mode.
        """
        self._check_batch(pixel_values, self.config.token_stride if self.config.use_nested_attention else MINIMUM_SIZE)
        _, *local_features = self.encoder(pixel_values)
        tokens = self.token_pyramid(local_features)
        global_features = self.global_block(tokens)
        return LeMoReModelOutput(last_hidden_state=global_features, local_features=tuple(local_features))


class LeMoReBackbone(BackboneMixin, LeMoRePreTrainedModel):
    """The LeMoRe encoder as a backbone for other frameworks: the stem's output and the local features ξ₁..ξ₄."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"global_block\.", r"decode_head\.", r"classifier\."]

    def __init__(self, config: LeMoReConfig):
        super().__init__(config)
        self.num_features = [config.stem_sizes[-1], *config.hidden_sizes]
        self.encoder = LeMoReEncoder(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, at least 32×32 pixels.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`] with `feature_maps` of the stages in `out_features`:
            `"stem"` at stride 2, `"stage1"`..`"stage4"` at strides 4 to 32.

        Raises:
            `ValueError`: for pixel values that are not 4-D, have another channel count, or are smaller than 32×32; in
            training also for a single image of 32×32 pixels.
            `TypeError`: for pixel values that are no tensor of floats.
            `RuntimeError`: for a fused model in training mode.

        Example:

        ```python
        >>> import torch
        >>> from lemore_hf import LeMoReBackbone, LeMoReConfig

        >>> backbone = LeMoReBackbone(LeMoReConfig(out_features=["stage2", "stage4"]))
        >>> feature_maps = backbone(torch.randn(1, 3, 512, 512)).feature_maps
        >>> [tuple(feature_map.shape) for feature_map in feature_maps]
        [(1, 48, 64, 64), (1, 176, 16, 16)]
        ```
        """
        self._check_batch(pixel_values, MINIMUM_SIZE)
        features = self.encoder(pixel_values)
        feature_maps = tuple(
            feature for name, feature in zip(self.stage_names, features, strict=True) if name in self.out_features
        )
        return BackboneOutput(feature_maps=feature_maps, hidden_states=features)


# Segmentation


class LeMoReGatedFusion(nn.Module):
    """
    Gated fusion module: `local(ξᵢ) · up(sigmoid(gate(δ))) + up(value(δ))`.

    Gate and value see all channels of δ (our choice).
    """

    def __init__(self, config: LeMoReConfig, stage_index: int):
        super().__init__()
        channels = config.decoder_hidden_size
        self.local = LeMoReConvLayer(config, config.hidden_sizes[stage_index], channels, activation=False)
        self.gate = LeMoReConvLayer(config, config.hidden_size, channels, activation=False)
        self.value = LeMoReConvLayer(config, config.hidden_size, channels, activation=False)

    def forward(self, local_feature: torch.Tensor, global_features: torch.Tensor) -> torch.Tensor:
        return self.combine(local_feature, self.gate(global_features).sigmoid(), self.value(global_features))

    def combine(
        self, local_feature: torch.Tensor, gate: torch.Tensor, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Local features times the gate, plus the value, both given at the tokens' size. In a fused head the scales up to the
        output stride share one value."""
        local = self.local(local_feature)
        gate = resize_bilinear(gate, local.shape[-2:])
        return local * gate if value is None else torch.addcmul(resize_bilinear(value, local.shape[-2:]), local, gate)


class LeMoReDecodeHead(nn.Module):
    """Four gated fusion modules → sum at the output stride → classifier."""

    is_fused = False

    def __init__(self, config: LeMoReConfig):
        super().__init__()
        self.output_stage = STAGE_STRIDES.index(config.output_stride)
        self.fusions = nn.ModuleList(LeMoReGatedFusion(config, index) for index in range(len(config.hidden_sizes)))
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout2d(config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(config.decoder_hidden_size, config.num_labels, 1)

    def forward(self, local_features: tuple[torch.Tensor, ...], global_features: torch.Tensor) -> torch.Tensor:
        size = local_features[self.output_stage].shape[-2:]
        # Finer scales are brought to the output stride before fusion, not after: fusing the decoder's many channels at
        # stride 4 would take half of the network's time (our choice).
        finer = [resize_bilinear(feature, size) for feature in local_features[: self.output_stage]]
        fused = self.fuse_scales([*finer, *local_features[self.output_stage :]], global_features)
        coarser = [resize_bilinear(feature, size) for feature in fused[self.output_stage + 1 :]]
        total = functools.reduce(torch.add, fused[: self.output_stage + 1] + coarser)
        return self.classifier(self.dropout(self.activation(total)))

    def fuse_scales(self, local_features: list[torch.Tensor], global_features: torch.Tensor) -> list[torch.Tensor]:
        if not self.is_fused:
            return [fusion(local, global_features) for fusion, local in zip(self.fusions, local_features, strict=True)]
        scales = zip(self.fusions, local_features, *self.gates_and_values(global_features), strict=True)
        return [fusion.combine(*inputs) for fusion, *inputs in scales]

    def gates_and_values(
        self, global_features: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        """The gates and the values of all scales, at the tokens' size; of a fused head."""
        projected = self.projection(global_features).split(self.classifier.in_channels, dim=1)
        gates, values = projected[: len(self.fusions)], projected[len(self.fusions) :]
        return tuple(gate.sigmoid() for gate in gates), (None,) * self.output_stage + values

    def fuse_(self) -> None:
        """One product for all gates and values. Values that go to the same size, the output's, are added up before."""
        gates = [fusion.gate.convolution for fusion in self.fusions]
        values = [fusion.value.convolution for fusion in self.fusions]
        same_size = self.output_stage + 1
        weight, bias = (
            torch.cat(
                [
                    *(getattr(gate, name) for gate in gates),
                    sum(getattr(value, name) for value in values[:same_size]),
                    *(getattr(value, name) for value in values[same_size:]),
                ]
            )
            for name in ("weight", "bias")
        )
        self.projection = _with_weight(gates[0], weight, bias)
        for fusion in self.fusions:
            del fusion.gate, fusion.value


class LeMoReForSemanticSegmentation(LeMoRePreTrainedModel):
    """LeMoRe with its segmentation head of gated fusion modules, e.g. for ADE20K, Cityscapes, CamVid."""

    # The loss is a mean over pixels: `Trainer` is to average it over accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: LeMoReConfig):
        super().__init__(config)
        num_values = max(config.num_labels, 2)  # a binary task has the labels 0 and 1
        if 0 <= config.semantic_loss_ignore_index < num_values:
            raise ValueError(
                f"`semantic_loss_ignore_index`={config.semantic_loss_ignore_index} is one of the {num_values} labels: "
                "choose a value outside of them, for example -1."
            )
        self.lemore = LeMoReModel(config)
        self.decode_head = LeMoReDecodeHead(config)
        self._labels_were_checked = False
        self._unread_steps, self._found_invalid = 0, False
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, at least 32×32 pixels.
            labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`, *optional*):
                Ground truth in `[0, num_labels)` (`{0, 1}` where `num_labels` is 1, of any dtype) or
                `config.semantic_loss_ignore_index`. The logits are upsampled to its size for the loss: cross-entropy,
                or binary cross-entropy where `num_labels` is 1, averaged over the pixels that are not void; 0 where
                all are.

                Labels out of range raise an error: on the CPU, in evaluation and in the first training step of a model
                at once; in later training steps on other devices, where looking would wait for them, within
                `LABEL_CHECK_STEPS` steps. Until then, in compiled graphs and under `torch.func`, they make the loss and
                its gradients NaN.

        Returns:
            [`~transformers.modeling_outputs.SemanticSegmenterOutput`] with `logits` of shape
            `(batch_size, num_labels, height / output_stride, width / output_stride)`, rounded up; `hidden_states` and
            `attentions` as [`LeMoReModelOutput`] has them.

        Raises:
            `ValueError`: for pixel values that are not 4-D, have another channel count, or are smaller than 32×32; in
            training also for a single image of a single token; for labels that are not 3-D, have another batch size, or
            name a class that is not there.
            `TypeError`: for pixel values that are no tensor of floats, and labels that are none of integers.
            `RuntimeError`: for a fused model in training mode.

        Example:

        ```python
        >>> import torch
        >>> from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation

        >>> model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=11, image_size=(360, 480))).eval()
        >>> tuple(model(torch.randn(1, 3, 360, 480)).logits.shape)
        (1, 11, 45, 60)
        ```
        """
        self._check_batch(pixel_values, self.config.token_stride)
        if labels is not None:
            self._check_labels(labels, pixel_values)
        outputs = self.lemore(pixel_values, return_dict=True, **kwargs)
        logits = self.decode_head(outputs.local_features, outputs.last_hidden_state)
        return SemanticSegmenterOutput(
            loss=None if labels is None else segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor) -> None:
        if not isinstance(labels, torch.Tensor):
            raise TypeError(
                f"`labels` must be a tensor, got {type(labels).__name__}: call the image processor with "
                '`return_tensors="pt"`.'
            )
        if labels.ndim != 3 or labels.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                "`labels` must have shape (batch_size, height, width) with the batch size of `pixel_values` "
                f"({pixel_values.shape[0]}), got {tuple(labels.shape)}."
            )
        # Masks of a single label are often booleans, or floats as binary cross-entropy takes them.
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not is_integer and (self.config.num_labels > 1 or labels.is_complex()):
            raise TypeError(f"`labels` must hold integers, got {labels.dtype}: convert them with `labels.long()`.")
        if hides_values(labels):
            return
        num_labels, ignore_index = self.config.num_labels, self.config.semantic_loss_ignore_index
        # Looking at values waits for the device. On a GPU that would stall every training step.
        if labels.device.type == "cpu" or not self.training or not self._labels_were_checked:
            check_label_values(labels, num_labels, ignore_index)
            self._labels_were_checked = True
            return
        self._found_invalid = is_invalid_label(labels, num_labels, ignore_index).any() | self._found_invalid
        self._unread_steps += 1
        if self._unread_steps >= LABEL_CHECK_STEPS:
            found, steps = bool(self._found_invalid), self._unread_steps
            self._unread_steps, self._found_invalid = 0, False
            if found:
                raise ValueError(
                    f"`labels` of the last {steps} steps held values that are no class, which made the loss and the "
                    f"weights NaN. Expected 0 to {max(num_labels, 2) - 1} or {ignore_index} for void: go on from a "
                    "checkpoint of before, once `check_label_values` has found the images in the data."
                )


# Classification


class LeMoReForImageClassification(LeMoRePreTrainedModel):
    """LeMoRe with a linear classifier on the average of its global features, e.g. for pretraining on ImageNet."""

    # The loss is a mean over images: `Trainer` is to average it over accumulation steps, whatever the problem type.
    accepts_loss_kwargs = False

    def __init__(self, config: LeMoReConfig):
        super().__init__(config)
        self.lemore = LeMoReModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, at least 32×32 pixels.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Classes in `[0, num_labels)`, or -100 for images that the loss leaves out (it is NaN where all are); the
                loss follows `config.problem_type`, as everywhere in Transformers.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`] with `logits` of shape `(batch_size, num_labels)`;
            `hidden_states` and `attentions` as [`LeMoReModelOutput`] has them.

        Raises:
            `ValueError`: for pixel values as in [`LeMoReModel`]; for labels that name a class that is not there.
            `TypeError`: for pixel values that are no tensor of floats, and labels that are no tensor.
            `RuntimeError`: for a fused model in training mode.
        """
        if labels is not None:
            self._check_classes(labels)
        outputs = self.lemore(pixel_values, return_dict=True, **kwargs)
        pooled = outputs.last_hidden_state.mean((2, 3))  # (B, S, H, W) → (B, S)
        logits = self.classifier(self.dropout(pooled))
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_classes(self, labels: torch.Tensor) -> None:
        """On a GPU what is no class would end the process in an assertion of the device."""
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"`labels` must be a tensor, got {type(labels).__name__}: pass `torch.tensor(labels)`.")
        num_labels, problem_type = self.config.num_labels, self.config.problem_type
        are_classes = problem_type in (None, "single_label_classification") and not labels.is_floating_point()
        if num_labels > 1 and are_classes and not hides_values(labels):
            advice = "for none. Count classes from 0, or set `num_labels` of the configuration to what the data has."
            raise_for_invalid_labels(labels, num_labels, -100, advice)


AUTO_CLASSES = {
    "AutoModel": LeMoReModel,
    "AutoModelForSemanticSegmentation": LeMoReForSemanticSegmentation,
    "AutoModelForImageClassification": LeMoReForImageClassification,
    "AutoBackbone": LeMoReBackbone,
}
"""The family's members by the name of the Auto class that makes them."""

# Pipelines look here, not at what is registered, before they say that a model is not supported.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[LeMoReConfig.model_type] = LeMoReForSemanticSegmentation.__name__
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[LeMoReConfig.model_type] = LeMoReForImageClassification.__name__

__all__ = [
    "AUTO_CLASSES",
    "LeMoReBackbone",
    "LeMoReForImageClassification",
    "LeMoReForSemanticSegmentation",
    "LeMoReModel",
    "LeMoReModelOutput",
    "LeMoRePreTrainedModel",
    "resample_axis_weight",
]
