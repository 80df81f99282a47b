# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""A few seconds of training, so that labels vary within an image and comparing them means something."""

import torch

from lemore_hf import LeMoReForSemanticSegmentation


def quick_fit(
    model: LeMoReForSemanticSegmentation, pixel_values: torch.Tensor, labels: torch.Tensor, steps: int = 40
) -> LeMoReForSemanticSegmentation:
    """Overfit a handful of images; the model comes back in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        model(pixel_values, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()
