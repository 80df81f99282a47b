# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tensor operations of LeMoRe in the forms that are fast: resizing, depthwise convolution, products along an axis.

None holds weights or knows the network; `modeling_lemore` says what they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor

# The largest intermediate tensors are made in strips of this size, which stay in the caches.
STRIP_BYTES = 2**24
# About what a core of a CPU has for itself.
CORE_CACHE_BYTES = 2**21


# What a tensor is


def is_channels_last(hidden_state: torch.Tensor) -> bool:
    """Whether products along the axes can take the memory as it lies; graphs for other runtimes are all contiguous."""
    if torch.compiler.is_exporting() or is_transformed():
        return False
    return hidden_state.is_contiguous(memory_format=torch.channels_last) and not hidden_state.is_contiguous()


def is_same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, both alive, are the same memory."""
    return (one.data_ptr(), one.dtype, one.device) == (other.data_ptr(), other.dtype, other.device)


def is_transformed() -> bool:
    """Whether `torch.func` (`vmap`, `grad`, ...) is active: its tensors have no address in memory."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def trains_on_gpu(hidden_state: torch.Tensor) -> bool:
    """Whether an eager tensor on a GPU, in channels-last, may need gradients."""
    return (
        hidden_state.is_cuda
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and is_channels_last(hidden_state)
    )


def hides_values(tensor: torch.Tensor) -> bool:
    """Whether the values cannot be looked at: in graphs that are being made, on the meta device, and in fake tensors, by
    which memory is planned."""
    return torch.compiler.is_compiling() or is_transformed() or tensor.is_meta or isinstance(tensor, FakeTensor)


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Products in the precision of their factors: under autocast the tents of a few positions would be rounded too."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


# Resizing


def resize_bilinear(hidden_state: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear interpolation of `(B, C, H, W)` at another size, with `align_corners=False`."""
    # In this order: in an exported graph the sizes are symbols, which no branch may look at.
    if trains_on_gpu(hidden_state) and all(of <= to for of, to in zip(hidden_state.shape[-2:], size, strict=True)):
        return _EnlargeBilinear.apply(hidden_state, tuple(size))
    return F.interpolate(hidden_state, size=size, mode="bilinear", align_corners=False)


class _EnlargeBilinear(torch.autograd.Function):
    """`F.interpolate` to no smaller a size, with a gradient that takes two matrix products: PyTorch's own adds up pixel by
    pixel on a GPU, and many pixels wait for one another where a small map was enlarged a lot."""

    @staticmethod
    def forward(ctx: Any, hidden_state: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        ctx.native = hidden_state.shape[-2:]
        with without_autocast(hidden_state):
            return F.interpolate(hidden_state, size=size, mode="bilinear", align_corners=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows, columns = (
            tent_filter(native, length, gradient).to(gradient.dtype).t()
            for native, length in zip(ctx.native, gradient.shape[-2:], strict=True)
        )
        return multiply_axis(columns, multiply_axis(rows, gradient, 2), 3), None


def tent_filter(native: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """
    Linear interpolation of `native` positions at `size` of them as a `(size, native)` matrix, as `F.interpolate` does
    it with `align_corners=False` and `antialias=True`; in single precision for half-precision weights.
    """
    # No branch on the sizes, which may be symbols of an exported graph. Half precision could not count positions.
    dtype = torch.promote_types(like.dtype, torch.float32)
    # In units of 1 / (2 · size) of a native position the centres of both axes are whole numbers: no rounding yet.
    centres = (2 * torch.arange(size, device=like.device, dtype=dtype) + 1)[:, None] * native
    native_centres = (2 * torch.arange(native, device=like.device, dtype=dtype) + 1) * size
    # They begin with `native` and `size`. A maximum of plain numbers would be frozen in ExecuTorch.
    reach = 2 * torch.maximum(centres[0], native_centres[0])
    weights = (reach - (centres - native_centres).abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


# Products


def multiply_axis(weight: torch.Tensor, hidden_state: torch.Tensor, axis: int) -> torch.Tensor:
    """The product of a matrix `(n, m)` and the axis 2 or 3, of `m` positions, of a channels-last tensor `(B, C, H, W)`."""
    batch_size, _, height, width = hidden_state.shape
    volume = hidden_state.permute(0, 2, 3, 1)  # (B, H, W, C) as it lies in memory
    if axis == 2:
        product = torch.bmm(weight.expand(batch_size, -1, -1), volume.flatten(2)).unflatten(2, (width, -1))
    else:
        product = torch.bmm(weight.expand(batch_size * height, -1, -1), volume.flatten(0, 1))
        product = product.unflatten(0, (batch_size, height))
    return product.permute(0, 3, 1, 2)


class DepthwiseByShifts(torch.autograd.Function):
    """A depthwise convolution of three taps along one axis as three products with shifted inputs."""

    @staticmethod
    def forward(ctx: Any, hidden_state: torch.Tensor, weight: torch.Tensor, axis: int, dilation: int) -> torch.Tensor:
        """Inputs (B, C, H, W), and weights (C, 1, 3, 1) or (C, 1, 1, 3) in any precision, without a bias."""
        ctx.save_for_backward(hidden_state, weight)
        ctx.place = axis, dilation
        taps = weight.to(hidden_state.dtype).flatten(1)[..., None, None].unbind(1)
        return _sum_of_products(_shifted(hidden_state, axis, dilation), taps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_state, weight = ctx.saved_tensors
        taps = weight.to(gradient.dtype).flatten(1)[..., None, None].unbind(1)
        to_input = _sum_of_products(_shifted(gradient, *ctx.place), taps[::-1])
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        to_taps = [(shifted * gradient).sum((0, 2, 3), dtype=dtype) for shifted in _shifted(hidden_state, *ctx.place)]
        return to_input, torch.stack(to_taps, 1).view(weight.shape).to(weight.dtype), None, None


def _shifted(hidden_state: torch.Tensor, axis: int, dilation: int) -> list[torch.Tensor]:
    """The tensor (B, C, H, W) as the three taps see it, zeros beyond its border."""
    padded = F.pad(hidden_state, (0, 0, dilation, dilation) if axis == 2 else (dilation, dilation))
    return [padded.narrow(axis, tap * dilation, hidden_state.shape[axis]) for tap in range(3)]


def _sum_of_products(tensors: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0] * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total = total.addcmul_(tensor, factor)
    return total
