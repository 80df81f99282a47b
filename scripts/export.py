# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Export a trained model for ONNX Runtime, OpenVINO, ExecuTorch, LiteRT (TensorFlow Lite) or `torch.export`.

    python scripts/export.py --model CHECKPOINT --format onnx --output DIR
    python scripts/export.py --model CHECKPOINT --format onnx --output DIR --with-postprocessing --int8 PICTURES

One graph serves every batch size, height and width; with `--image-size`, and in LiteRT, it takes one image of one size.
`scripts/predict.py --model DIR` runs the result; with `--transformers-js`, which wraps it for Transformers.js,
`scripts/predict.py --model DIR/onnx`. With `--compare` the export is run in its own runtime on real pictures,
and the labels are held against PyTorch's.
"""

import argparse
import shlex
import sys
from pathlib import Path

import transformers
from transformers import AutoImageProcessor

import lemore_hf  # noqa: F401 (registers LeMoRe with the Auto classes)
from lemore_hf.checkpointing import CheckpointError
from lemore_hf.command_line import at_least, run_script
from lemore_hf.evaluation import load_trained_model
from lemore_hf.export import FILES, export_model
from lemore_hf.inference import Segmenter, comparison_sizes, label_agreement, read_pictures
from lemore_hf.transformers_js import GRAPH_FOLDER, export_for_transformers_js

ENOUGH_AGREEMENT = 0.999


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FILES)}")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; an export in it is replaced")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--int8",
        metavar="CALIBRATION_FOLDER",
        type=Path,
        help="quantize to int8 (ONNX, OpenVINO, LiteRT), with the ranges that the pictures of this folder have",
    )
    precision.add_argument(
        "--fp16", action="store_true", help="store the weights in half the space (ONNX, OpenVINO, LiteRT)"
    )
    parser.add_argument(
        "--with-postprocessing",
        action="store_true",
        help="put normalisation, upsampling and argmax into the graph: uint8 image in, uint8 label map out",
    )
    parser.add_argument(
        "--browser-page",
        action="store_true",
        help="write a page beside the graph that labels pictures, films and the camera in a browser "
        "(--format onnx --with-postprocessing)",
    )
    parser.add_argument(
        "--transformers-js",
        action="store_true",
        help='write a folder that `pipeline("image-segmentation", ...)` of Transformers.js takes (--format onnx, without '
        "post-processing)",
    )
    parser.add_argument(
        "--max-size",
        type=int,
        help="largest height and width (default: none; ExecuTorch: 1024, or the native or the processor's size if larger)",
    )
    parser.add_argument("--max-batch-size", type=int, help="most images at once (default: any; ExecuTorch: 4)")
    parser.add_argument(
        "--image-size",
        metavar=("HEIGHT", "WIDTH"),
        type=int,
        nargs=2,
        help="make a graph for one image of this size alone, without branches and free axes (ONNX, OpenVINO, LiteRT; "
        "LiteRT's default: the image processor's, or the native size)",
    )
    parser.add_argument(
        "--calibration-images", type=at_least(1), help="how many pictures of CALIBRATION_FOLDER to use (default: 64)"
    )
    parser.add_argument(
        "--compare", metavar="FOLDER", type=Path, help="compare with PyTorch on this folder's pictures"
    )
    arguments = parser.parse_args()
    if arguments.calibration_images is None:
        arguments.calibration_images = 64
    elif arguments.int8 is None:
        parser.error("--calibration-images is for --int8: leave it out, or give the folder of the pictures")
    if arguments.transformers_js and (arguments.format != "onnx" or arguments.with_postprocessing):
        parser.error("--transformers-js is for --format onnx without --with-postprocessing")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    transformers.utils.logging.disable_progress_bar()  # of loading, over within a second
    images = list(read_pictures(arguments.compare, 6)) if arguments.compare else []
    precision = "int8" if arguments.int8 else "float16" if arguments.fp16 else "float32"
    model = load_trained_model(arguments.model)
    image_processor = AutoImageProcessor.from_pretrained(arguments.model)
    calibration_images = read_pictures(arguments.int8, arguments.calibration_images) if arguments.int8 else []

    # Either takes a minute, with large networks several.
    print(f"Exporting to {arguments.format} in {precision} ...", file=sys.stderr)
    options = {
        "with_postprocessing": arguments.with_postprocessing,
        "precision": precision,
        "calibration_images": calibration_images,
        "max_size": arguments.max_size,
        "max_batch_size": arguments.max_batch_size,
        "image_size": tuple(arguments.image_size) if arguments.image_size else None,
        "browser_page": arguments.browser_page,
    }
    if arguments.transformers_js:
        manifest = export_for_transformers_js(model, image_processor, arguments.output, **options)
        folder = arguments.output / GRAPH_FOLDER
    else:
        manifest = export_model(model, image_processor, arguments.output, arguments.format, **options)
        folder = arguments.output
    graph = folder / manifest.file
    size = sum(file.stat().st_size for file in folder.glob(f"{graph.stem}.*"))
    print(f"{graph}: {precision}, {size / 1e6:.1f} MB")
    if arguments.browser_page:
        print(f"To open its page: python scripts/serve_page.py {shlex.quote(str(arguments.output))}")

    if arguments.compare:
        print(f"Comparing on {len(images)} pictures ...", file=sys.stderr)
        exported, reference = Segmenter(folder), Segmenter(arguments.model)
        agreements = []
        for height, width in comparison_sizes(model.config, manifest):
            for batch_size in sorted({1, min(3, len(images), manifest.max_batch_size or 3)}):
                agreement = label_agreement(exported, reference, images, (height, width), batch_size)
                print(f"{height}×{width}, batch {batch_size}: {agreement:.4%} of the labels are PyTorch's")
                agreements.append(agreement)
        if precision == "float32" and min(agreements) < ENOUGH_AGREEMENT:
            sys.exit(f"Fewer than {ENOUGH_AGREEMENT:.1%} of the labels agree: do not use this export.")


if __name__ == "__main__":
    run_script(main, CheckpointError)
