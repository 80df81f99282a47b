# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Prints LeMoRe's parameters and multiply-accumulates beside the paper's: its ablation, then other input sizes.

    python scripts/complexity.py [--markdown]

Multiply-accumulates are torch's flop counter, halved (the paper's "FLOPs" count them, too). Nothing is computed with
values, so that it takes seconds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import transformers

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation
from lemore_hf.command_line import markdown_table
from lemore_hf.complexity import count_multiply_accumulates


@dataclass(frozen=True)
class PaperRow:
    """A network of the paper's tables, with the parameters and multiply-accumulates that it reports."""

    views: tuple[str, ...] = ("transverse", "frontal", "lateral")
    channel_attention: bool = True
    nested_attention: bool = True
    size: tuple[int, int] = (512, 512)
    num_labels: int = 150
    data: str = "ADE20K"
    parameters: str = "–"
    multiply_accumulates: str = "–"

    @property
    def config(self) -> LeMoReConfig:
        return LeMoReConfig(
            image_size=self.size,
            num_labels=self.num_labels,
            views=self.views,
            use_channel_attention=self.channel_attention,
            use_nested_attention=self.nested_attention,
        )


T, TF, TFL = ("transverse",), ("transverse", "frontal"), ("transverse", "frontal", "lateral")

ABLATION = (
    PaperRow(T, False, False, parameters="1.12 M", multiply_accumulates="0.68 G"),
    PaperRow(TF, False, False, parameters="1.14 M", multiply_accumulates="0.74 G"),
    PaperRow(TFL, False, False, parameters="1.16 M", multiply_accumulates="0.78 G"),
    PaperRow(TFL, True, False, parameters="1.22 M", multiply_accumulates="0.79 G"),
    PaperRow(T, False, True, parameters="1.50 M", multiply_accumulates="0.70 G"),
    PaperRow(TF, False, True, parameters="1.52 M", multiply_accumulates="0.76 G"),
    PaperRow(TFL, False, True, parameters="1.54 M", multiply_accumulates="0.80 G"),
    PaperRow(TFL, True, True, parameters="1.60 M", multiply_accumulates="0.81 G"),
)

INPUT_SIZES = (
    PaperRow(size=(448, 448), num_labels=150, data="ADE20K", multiply_accumulates="0.6 G"),
    PaperRow(size=(480, 480), num_labels=60, data="PASCAL Context", multiply_accumulates="0.68 G"),
    PaperRow(size=(512, 512), num_labels=171, data="COCO-Stuff", multiply_accumulates="0.8 G"),
    PaperRow(size=(512, 1024), num_labels=19, data="Cityscapes", multiply_accumulates="1.7 G"),
    PaperRow(size=(360, 480), num_labels=11, data="CamVid"),
    PaperRow(size=(900, 1200), num_labels=11, data="CamVid"),
)


def count(config: LeMoReConfig) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image of the native size."""
    with torch.device("meta"):
        model = LeMoReForSemanticSegmentation(config).eval()
        pixel_values = torch.empty(1, config.num_channels, *config.native_size)
        return model.num_parameters(), count_multiply_accumulates(model, pixel_values)


def counted(row: PaperRow) -> tuple[str, str]:
    parameters, multiply_accumulates = count(row.config)
    return f"{parameters:,}", f"{multiply_accumulates / 1e6:,.2f}"


def ablation_table() -> list[list[str]]:
    table = [["views", "CA", "NA", "parameters", "paper", "M MACs", "paper"]]
    for row in ABLATION:
        parameters, multiply_accumulates = counted(row)
        views = " ".join(view[0].upper() for view in row.views)
        marks = ["✓" if used else "" for used in (row.channel_attention, row.nested_attention)]
        table.append([views, *marks, parameters, row.parameters, multiply_accumulates, row.multiply_accumulates])
    return table


def input_size_table() -> list[list[str]]:
    table = [["input", "data set", "labels", "parameters", "M MACs", "paper"]]
    for row in INPUT_SIZES:
        size = "×".join(map(str, row.size))
        table.append([size, row.data, str(row.num_labels), *counted(row), row.multiply_accumulates])
    return table


def render(table: list[list[str]], markdown: bool) -> str:
    """Columns of text, the numbers to the right, as plain text or Markdown."""
    num_texts = sum(title not in ("parameters", "paper", "M MACs", "labels") for title in table[0])
    text = markdown_table(table, num_texts)
    if markdown:
        return text
    lines = [line.removeprefix("| ").removesuffix(" |").replace(" | ", "  ") for line in text.splitlines()]
    return "\n".join(line.rstrip().replace(":", "-") for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables, for a README")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()

    print(
        "Ablation at 512×512 with 150 labels (T transverse, F frontal, L lateral view; CA channel, NA nested attention)\n"
    )
    print(render(ablation_table(), arguments.markdown))
    print("\nThe full network at other input sizes, each its native size\n")
    print(render(input_size_table(), arguments.markdown))


if __name__ == "__main__":
    main()
