# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of a model, as papers report them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_multiply_accumulates(model: nn.Module, pixel_values: torch.Tensor) -> int:
    """
    Multiply-accumulates of one forward pass: half of what torch's flop counter has for it.

    Convolutions and matrix products are counted; norms, activations and interpolation are not.

    Args:
        model (`nn.Module`):
            A model in evaluation mode. On the `"meta"` device counting takes no memory and next to no time.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Its input, on the same device.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values)
    return counter.get_total_flops() // 2
