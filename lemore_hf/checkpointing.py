# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are either whole or not there, written aside and renamed; and training checkpoints made so.

A checkpoint is a folder `checkpoint-<step>` with `tensors.safetensors` (weights, averages, optimizer moments, random
states) and `state.json` (everything else, and the SHA-256 of the tensors). Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TENSORS_NAME = "tensors.safetensors"
STATE_NAME = "state.json"
LOCK_NAME = ".lock"
RUN_NAME = "run.json"  # of a training that has ended, beside its checkpoints
# Folders that are being written, replaced or deleted, behind a dot and the name.
_WRITING, _REPLACED, _DOOMED = ".writing", ".replaced", ".doomed"
_PICKLED_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. The message names the file, the reason and the way out."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what was written."""


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """
    A temporary folder that becomes `folder`, replacing what was there, once the block has ended well.

    Everything is on the disk before the name changes, so that a process killed at any moment leaves the old folder or
    the new one; between two renames the old one under a hidden name, from which `recover_folders` brings it back.

    Args:
        folder (`Path`): A link to a folder stays one.

    Raises:
        `CheckpointError`: if the disk is full or not writable; what was there before is kept.
    """
    folder = folder.resolve()
    temporary, replaced = (folder.with_name(f".{folder.name}{suffix}") for suffix in (_WRITING, _REPLACED))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _share(temporary.rglob("*"), temporary)
        _flush(temporary)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        _flush_entry(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        is_gone = isinstance(error, FileNotFoundError)
        advice = (
            "does another run write into its folder?"
            if is_gone
            else "free space on the disk or choose another folder."
        )
        raise CheckpointError(
            f"{folder} could not be written ({error}): {advice} What was saved before is still there."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A file beside the target, of the same suffix, that takes its place once the block has ended well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield part
        _share([part], part.parent)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _share(files: Iterable[Path], folder: Path) -> None:
    """Let those read files whom new ones in this folder are readable to. Safetensors writes its own for the user alone,
    who is another one where a container has trained."""
    probe = folder / f".{os.getpid()}.mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in files:
        if file.is_file() and file.stat().st_mode | mode != file.stat().st_mode:
            file.chmod(file.stat().st_mode | mode)


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Within `with`, no other process can claim the folder, however this one ends. Windows has no such locks.

    Raises:
        `CheckpointError`: if another process has claimed it.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            # A lock of the process, not of the file that is open: forked loaders, which outlive one that was killed by
            # seconds, do not hold it, so that the run can be resumed at once.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"Another process is training into {folder}: wait for its end, or choose another folder."
                ) from error
            # Else the file system has no locks.
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def recover_folders(parent: Path) -> None:
    """Bring back, in a folder, what `atomic_folder` was replacing when it was killed."""
    for replaced in parent.glob(f".*{_REPLACED}"):
        folder = parent / replaced.name[1:].removesuffix(_REPLACED)
        if not folder.exists():
            replaced.rename(folder)


def clear_unfinished(parent: Path) -> None:
    """Delete, in a folder, what killed processes have left half written, replaced or deleted; nobody may be writing there."""
    for leftover in [path for suffix in (_REPLACED, _WRITING, _DOOMED) for path in parent.glob(f".*{suffix}")]:
        shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """
    Write a checkpoint, atomically.

    Args:
        folder (`Path`): Its folder; see `checkpoint_folder`.
        tensors (`dict[str, torch.Tensor]`): Tensors by name.
        state (`dict[str, Any]`): What JSON can hold.

    Raises:
        `CheckpointError`: if the disk is full or not writable; no other checkpoint is touched.
    """
    with atomic_folder(folder) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS_NAME)
        checksum = sha256_of(temporary / TENSORS_NAME)
        (temporary / STATE_NAME).write_text(json.dumps({**state, "sha256": checksum}, indent=2), encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read a checkpoint that `save_checkpoint` has written.

    Returns:
        The tensors by name, on the CPU, and the state.

    Raises:
        `DamagedCheckpointError`: for a folder without checkpoint, or files that are not what was written.
        `CheckpointError`: for pickled files.
    """
    refuse_pickled(folder)
    for name in (TENSORS_NAME, STATE_NAME):
        if not (folder / name).is_file():
            raise DamagedCheckpointError(f"{folder} is no checkpoint: it has no {name}.")
    advice = "delete this checkpoint and resume from an earlier one."
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it holds no state")
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{folder / STATE_NAME} is damaged ({error}): {advice}") from error
    if sha256_of(folder / TENSORS_NAME) != state.get("sha256"):
        raise DamagedCheckpointError(
            f"{folder / TENSORS_NAME} is truncated or was changed after it was written, its SHA-256 is not the one "
            f"in {STATE_NAME}: {advice}"
        )
    try:
        return load_file(folder / TENSORS_NAME), state
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{folder / TENSORS_NAME} is damaged ({error}): {advice}") from error


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return output_dir / f"checkpoint-{step:07d}"


def read_run(output_dir: Path) -> dict[str, Any] | None:
    """`run.json` of the finished training in a folder; `None` where there is none.

    Raises:
        `CheckpointError`: if it is damaged.
    """
    path = output_dir / RUN_NAME
    try:
        run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it or bring back a copy.") from error
    if not isinstance(run, dict | None):
        raise CheckpointError(f"{path} is not what a training has written: move it away.")
    return run


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    whole = (folder for folder in folders if re.fullmatch(r"checkpoint-\d{7,}", folder.name))
    return sorted(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for folder in list_checkpoints(output_dir)[: -keep or None]:  # 0 keeps none
        # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
        doomed = folder.with_name(f".{folder.name}{_DOOMED}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)  # the next start of a run sweeps up what is left


def pickled_files(paths: Iterable[Path]) -> list[Path]:
    """Those of files that are pickled, by their names. OpenVINO's weights, which have their graph beside them, are not."""
    return sorted(
        path for path in paths if path.suffix in _PICKLED_SUFFIXES and not path.with_suffix(".xml").is_file()
    )


def refuse_pickled(folder: Path) -> None:
    """Raise `CheckpointError` if a folder holds pickled files, which run code of their author when they are read."""
    if pickled := pickled_files(folder.glob("*")):
        raise CheckpointError(
            f"{folder} holds pickled files ({_names(pickled)}), which can run code when they are loaded: only "
            "safetensors are read. Convert them where you trust them, or delete them."
        )


def require_safetensors(folder: Path) -> None:
    """Raise `CheckpointError` if a model's folder holds no safetensors, saying so where its weights are pickled."""
    if any(folder.glob("*.safetensors")):
        return
    if pickled := pickled_files(folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds pickled weights ({_names(pickled)}), which can run code when they are loaded: only "
            "safetensors are read. Where you trust them, load and save them with save_pretrained."
        )
    # As `--transformers-js` makes them; the name is that of `lemore_hf.export.MANIFEST`.
    export = next((f": name the export in it, {path.parent}" for path in folder.glob("*/lemore_export.json")), "")
    raise CheckpointError(f"{folder} is no model folder: it holds no model.safetensors{export}.")


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def sha256_of(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
