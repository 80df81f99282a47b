# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Files to files: which pictures and videos to segment, where their masks and overlays go, and writing them whole."""

import contextlib
import glob
import hashlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from .checkpointing import atomic_file
from .export import GRAPH_FILES, MANIFEST
from .inference import Segmenter, find_model, read_picture
from .pictures import PICTURE_SUFFIXES, files_below
from .visualization import class_names, draw_segmentation, palette_of

if TYPE_CHECKING:
    import av

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    }
)

TARGETS = ("masks", "overlays")
"""What can be written of an input, and the folders that it goes to."""

RECORD = "predictions.json"


class UnreadableInputError(Exception):
    """A picture or a video that is damaged, is none, or that the network cannot take."""


def find_inputs(patterns: Sequence[str], output_dir: Path) -> dict[Path, Path]:
    """
    Collect pictures and videos.

    Args:
        patterns (`Sequence[str]`): Files, folders (searched with those below them) and glob patterns (`**` reaches
            into folders).
        output_dir (`Path`): Where results go; what lies in it is no input, unless it is named as a file.

    Returns:
        `dict[Path, Path]`: each input once, and the name that its results get: its path inside the folder named, or
        its file name.

    Raises:
        `FileNotFoundError`: for a pattern that nothing matches, or a folder without pictures and videos or in the output
            folder.
    """
    inputs: dict[Path, Path] = {}
    known: set[Path] = set()
    results = output_dir.resolve()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            if path.resolve().is_relative_to(results):
                raise FileNotFoundError(
                    f"{pattern!r} lies in the output folder {output_dir}, whose files are results."
                )
            files = files_below(path, PICTURE_SUFFIXES | VIDEO_SUFFIXES)
            found = {file: file.relative_to(path) for file in files if not file.resolve().is_relative_to(results)}
        elif path.is_file():
            found = {path: Path(path.name)}
        else:
            files = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
            files = (file for file in files if file.is_file() and not file.resolve().is_relative_to(results))
            found = {file: Path(file.name) for file in files}
        if not found:
            is_name = not path.exists() and glob.escape(pattern) == pattern
            raise FileNotFoundError(
                f"{pattern!r} names no pictures or videos{', it does not exist' if is_name else ''}: pass files, folders that hold some, or glob patterns. "
                f"Folders are searched for {', '.join(sorted(PICTURE_SUFFIXES | VIDEO_SUFFIXES))}."
            )
        for file, name in found.items():
            if file.resolve() not in known:  # the same by another name or a link
                known.add(file.resolve())
                inputs[file] = name
    return inputs


def target_files(inputs: dict[Path, Path], output_dir: Path, kinds: Sequence[str]) -> dict[Path, dict[str, Path]]:
    """
    The files to write for each input, by kind; names keep their suffix where that alone tells two inputs apart.

    Raises:
        `ValueError`: where the results of two inputs would be one file, or a result would take an input's place.
    """
    originals = {source.resolve() for source in inputs}
    shared = Counter((_folded(name.with_suffix("")), is_video(name)) for name in inputs.values())
    targets: dict[Path, dict[str, Path]] = {}
    sources: dict[str, Path] = {}
    for source, name in inputs.items():
        stem = name if shared[_folded(name.with_suffix("")), is_video(name)] > 1 else name.with_suffix("")
        suffixes = {"masks": ".mkv", "overlays": ".mp4"} if is_video(name) else dict.fromkeys(TARGETS, ".png")
        targets[source] = {kind: output_dir / kind / f"{stem}{suffixes[kind]}" for kind in kinds}
        for target in targets[source].values():
            if _folded(target) in sources:
                raise ValueError(
                    f"{sources[_folded(target)]} and {source} would both be written to {target}: pass the folder above them "
                    "both as input, which keeps their paths, or use two output folders."
                )
            if target.resolve() in originals:
                raise ValueError(
                    f"The results of {source} would replace the input {target}: use another output folder."
                )
            sources[_folded(target)] = source
    return targets


def _folded(path: Path) -> str:
    """What tells files apart where upper and lower case do not, as on macOS and Windows."""
    return path.as_posix().casefold()


def claim_results(
    output_dir: Path, model: Path, targets: dict[Path, dict[str, Path]], alpha: float, overwrite: bool = False
) -> None:
    """
    Note in the output folder what its results are of, and refuse those that are there but of something else.

    Args:
        output_dir (`Path`): Where results go; its `predictions.json` is read and written.
        model (`Path`): Folder or graph of the network, known by the hash of its files.
        targets (`dict[Path, dict[str, Path]]`): The files of each input, from [`target_files`].
        alpha (`float`): Opacity of the overlays.
        overwrite (`bool`): Whether what is there will be written anew. What is of something else is deleted first: were
            it left for later, a run that is interrupted before would leave it under this run's name.

    Raises:
        `ValueError`: where a file that would be kept is of another input, another model or another opacity, or of
            nobody knows what.
    """
    path = output_dir / RECORD
    identity = _hash_of(model)
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / f".{RECORD}.lock"):  # another run may be started into the same folder
        record = _read_record(path)
        for source, files in targets.items():
            for kind, file in files.items():
                origin = {"input": _describe_input(source), "model": identity}
                origin |= {"alpha": alpha} if kind == "overlays" else {}
                name = file.relative_to(output_dir).as_posix()
                if file.is_file() and record.get(name) != origin:
                    if not overwrite:
                        raise ValueError(
                            f"{file} {_other_origin(record.get(name), origin)}: pass --overwrite to write it anew, or "
                            "another --output."
                        )
                    file.unlink()
                record[name] = origin
        with atomic_file(path) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or give another --output.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not what this program has written: move it away, or give another --output.")
    return record


def _describe_input(source: Path) -> str:
    """A file by its name, size and time, so that it may be moved, but not replaced, between two runs."""
    status = source.stat()
    moment = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(sep=" ", timespec="microseconds")
    return f"{source.name}, {status.st_size} bytes of {moment}"


def _other_origin(before: dict[str, Any] | None, origin: dict[str, Any]) -> str:
    """What a file is of, which is not what it would be."""
    if before is None:
        return f"is there, and not from here ({RECORD} does not know it)"
    other = next(key for key in origin if before.get(key) != origin[key])
    return f"is the result of another {other} ({before.get(other)}, now {origin[other]})"


def _hash_of(model: Path) -> str:
    """Sixteen digits for the network in a folder: its weights or graph, configuration and processor. What else lies
    there, such as its scores, is not of it."""
    digest = hashlib.sha256()
    for path in sorted(find_model(model).iterdir()):
        is_network = path.suffix == ".safetensors" or path.name in GRAPH_FILES
        if is_network or path.name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME, MANIFEST):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def require_video_package() -> None:
    """Refuse to go on without PyAV.

    Raises:
        `ImportError`: naming the extra that installs it.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError(
            "Videos need PyAV: install the package with the extra, in its checkout pip install -e '.[video]'"
        )


def predict_file(
    segmenter: Segmenter, source: Path, targets: dict[str, Path], alpha: float = 0.5, progress: bool = False
) -> None:
    """
    Segment a picture or a video and write what `targets` names, each file whole or not at all.

    Args:
        segmenter ([`Segmenter`]): The network.
        source (`Path`): The input.
        targets (`dict[str, Path]`): The file for `"masks"`, `"overlays"` or both.
        alpha (`float`): Opacity of the overlays.
        progress (`bool`): Show a progress bar over the frames of a video.

    Raises:
        `UnreadableInputError`: for an input that is damaged, is no picture or video, or that the network does not take,
            also for want of memory.
        `OSError`: where writing fails.
    """
    with contextlib.ExitStack() as stack:
        parts = {kind: stack.enter_context(atomic_file(target)) for kind, target in targets.items()}
        if is_video(source):
            _predict_video(segmenter, source, parts, alpha, progress)
        else:
            _predict_picture(segmenter, source, parts, alpha)


@contextlib.contextmanager
def _refusing(*errors: type[Exception]) -> Iterator[None]:
    """Report errors that only this input is to blame for."""
    try:
        yield
    except errors as error:
        raise UnreadableInputError(_cause(error)) from error


def _cause(error: Exception) -> str:
    """What an error says; of FFmpeg's without their numbers."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _predict_picture(segmenter: Segmenter, source: Path, targets: dict[str, Path], alpha: float) -> None:
    with _refusing(Exception):  # decoders raise errors of every kind on damaged data
        image = read_picture(source)
        with Image.open(source) as file:
            pages = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a photo and its second view
    if pages > 1:
        logger.warning(f"{source}: the first of its {pages} pictures is segmented, the others are not.")
    with _refusing(Exception):  # so do the runtimes where memory runs out
        labels = segmenter(image)
    if "masks" in targets:
        mask_image(labels, segmenter.config).save(targets["masks"])
    if "overlays" in targets:
        overlay_image(image, labels, segmenter.config, alpha).save(targets["overlays"])


def mask_image(labels: np.ndarray, config: PreTrainedConfig) -> Image.Image:
    """A label map `(height, width)` as a picture whose values are the labels: with a palette up to 256 labels, in 16
    bits beyond."""
    image = Image.fromarray(_narrow(labels, config))
    if image.mode == "L":
        image.putpalette(np.asarray(palette_of(config), np.uint8).tobytes())
    return image


def overlay_image(
    image: Image.Image, labels: np.ndarray, config: PreTrainedConfig, alpha: float = 0.5, legend: bool = True
) -> Image.Image:
    """A label map over its picture."""
    # No prediction is void: of many classes, one may have the number that stands for it in label maps.
    return draw_segmentation(
        image, labels, class_names(config), palette_of(config), alpha=alpha, legend=legend, ignore_index=-1
    )


def _narrow(labels: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    return labels.astype(np.uint8 if config.num_labels <= 256 else np.uint16)


def _predict_video(segmenter: Segmenter, source: Path, targets: dict[str, Path], alpha: float, progress: bool) -> None:
    writers: dict[str, _VideoWriter] = {}
    total = _length(source) if progress else None
    frames = tqdm(_frames(source), source.name, total, unit="frame", leave=False, disable=not progress)
    with contextlib.ExitStack() as stack, frames:
        for image, moment, rate, aspect_ratio in frames:
            with _refusing(Exception):
                labels = segmenter(image)
            pictures = {"masks": _narrow(labels, segmenter.config)}
            if "overlays" in targets:
                pictures["overlays"] = np.asarray(overlay_image(image, labels, segmenter.config, alpha, legend=False))
            for kind, target in targets.items():
                if kind not in writers:
                    writers[kind] = stack.enter_context(_VideoWriter(target, kind, rate, aspect_ratio))
                writers[kind].add(pictures[kind], moment)
    if not writers:
        raise UnreadableInputError("it has no frames")


def _length(source: Path) -> int | None:
    """How many frames a video says that it has, if it does."""
    import av

    with _refusing(Exception), av.open(str(source)) as container:
        if not container.streams.video:  # which is told when its frames are read
            return None
        stream = container.streams.video[0]
        if stream.frames:
            return stream.frames
        if stream.duration and stream.average_rate:
            return round(stream.duration * stream.time_base * stream.average_rate)
    return None


def _frames(source: Path) -> Iterator[tuple[Image.Image, Fraction, Fraction, Fraction]]:
    """The upright frames of a video, each with its time in seconds from the first one's, the video's frame rate, and
    the width of a pixel over its height. Frames that are damaged are left out, with a warning.

    Raises:
        `UnreadableInputError`: for a file that is no video, or that ends long before its header says.
    """
    import av

    _refuse_cut_off(source)
    with _refusing(Exception):
        container = av.open(str(source))
    with container:
        with _refusing(Exception):
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
        rate = stream.average_rate or Fraction(25)
        start, number, damaged = None, 0, 0
        packets = container.demux(stream)
        while True:
            with _refusing(Exception):
                packet = next(packets, None)
            if packet is None:
                break
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
                continue
            except Exception as error:
                raise UnreadableInputError(_cause(error)) from error
            for frame in frames:
                with _refusing(Exception):
                    image, is_turned = _upright_frame(frame)
                aspect_ratio = stream.sample_aspect_ratio or Fraction(1)
                # Phones film at rates that vary, and recordings of a stream begin at any time.
                moment = number / rate if frame.pts is None else frame.pts * frame.time_base
                start = moment if start is None else start
                yield image, moment - start, rate, 1 / aspect_ratio if is_turned else aspect_ratio
                number += 1
        if damaged:
            logger.warning(f"{source}: {damaged} damaged packets were left out, and the frames in them.")


def _refuse_cut_off(source: Path) -> None:
    """Decoders end a film that was cut off as if that were its end; its packets tell before anything is computed, where
    the format says how long it is."""
    import av

    with _refusing(Exception), av.open(str(source)) as container:
        if not container.streams.video:
            raise UnreadableInputError("it has sound, but no pictures")
        stream = container.streams.video[0]
        if not stream.duration:
            return
        first = last = None
        with contextlib.suppress(av.error.FFmpegError):  # where it breaks off
            for packet in container.demux(stream):
                moment = packet.dts if packet.pts is None else packet.pts  # AVI has no others
                if moment is not None:
                    first = moment if first is None else min(first, moment)
                    last = max(last or 0, moment + (packet.duration or 0))
        length, rate = float(stream.duration * stream.time_base), stream.average_rate or Fraction(25)
        if first is None:  # nothing tells
            return
        # Some formats count the length from the first frame, some from 0, and the start they tell may be a guess.
        end = float((last - min(first, stream.start_time or 0)) * stream.time_base + 1 / rate)
    if end < 0.95 * length:
        raise UnreadableInputError(f"it ends after {end:.1f} of {length:.1f} seconds: the file is not whole")


def _upright_frame(frame: "av.VideoFrame") -> tuple[Image.Image, bool]:
    """A frame as players show it, turned and mirrored as its display matrix says, and whether its axes changed places."""
    from av.sidedata.sidedata import Type

    image, matrix = frame.to_image(), frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return image, False
    # x' = a x + c y, y' = b x + d y; the matrix is a b u, c d v, x y w.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    is_turned = abs(b) > abs(a)
    if is_turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if (c if is_turned else a) < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if (b if is_turned else d) < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image, is_turned


class _VideoWriter:
    """Masks without loss as FFV1 in Matroska, overlays as H.264 in MP4."""

    CLOCK = Fraction(1, 90_000)  # in seconds; MPEG's

    def __init__(self, path: Path, kind: str, rate: Fraction, aspect_ratio: Fraction = Fraction(1)):
        import av

        self.is_mask = kind == "masks"
        self.container = av.open(str(path), "w", format="matroska" if self.is_mask else "mp4")
        self.stream = self.container.add_stream("ffv1" if self.is_mask else "libx264", rate=rate)
        context = self.stream.codec_context
        context.time_base = self.CLOCK
        if not self.is_mask:
            context.sample_aspect_ratio = aspect_ratio
            # Said, since players guess by the size where nothing is: 1 is BT.709, and the narrow range, in ITU-T H.273.
            context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        self.size: tuple[int, int] | None = None
        self.last = -1

    def __enter__(self) -> "_VideoWriter":
        return self

    def add(self, picture: np.ndarray, moment: Fraction) -> None:
        import av

        if not self.is_mask:
            # H.264 stores colours at half the size: odd sides lose a row or a column.
            if min(picture.shape[:2]) < 2:
                raise UnreadableInputError(
                    f"overlays are films in H.264, which has no {picture.shape[0]}×{picture.shape[1]} pixels: write masks "
                    "alone"
                )
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
        pixel_format = "rgb24" if picture.ndim == 3 else "gray" if picture.dtype == np.uint8 else "gray16le"
        if self.size is None:
            self.size = self.stream.height, self.stream.width = picture.shape[:2]
            self.stream.pix_fmt = pixel_format if self.is_mask else "yuv420p"
        elif picture.shape[:2] != self.size:
            # The encoder would interpolate between labels.
            raise UnreadableInputError(
                f"its frames change from {self.size[0]}×{self.size[1]} to {picture.shape[0]}×{picture.shape[1]} pixels: "
                "split it where they do"
            )
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=pixel_format)
        # Some films have two frames at one time, which MP4 does not take.
        self.last = max(self.last + 1, round(moment / self.CLOCK))
        frame.pts, frame.time_base = self.last, self.CLOCK
        if not self.is_mask:
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        self.container.mux(self.stream.encode(frame))

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None and self.size is not None:
                self.container.mux(self.stream.encode())
        finally:
            self.container.close()
