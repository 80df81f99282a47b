# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole or not there, whatever happens while they are written."""

import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation, checkpointing
from lemore_hf.checkpointing import (
    CheckpointError,
    atomic_file,
    atomic_folder,
    checkpoint_folder,
    claimed_folder,
    clear_unfinished,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_run,
    recover_folders,
    save_checkpoint,
)
from lemore_hf.training_state import TrainingState

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}


def save_and_die(folder: Path, count: int) -> bool:
    """Save a second checkpoint in a process that dies at its `count`-th call that changes the disk; whether it ended."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def dying(call):
            return lambda *args, **kwargs: os._exit(9) if next(calls) == count else call(*args, **kwargs)

        for name in ("fsync", "open", "mkdir", "rename", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        checkpointing.save_file = dying(checkpointing.save_file)
        save_checkpoint(folder, {"weight": torch.full((3,), 2.0)}, {"step": 2})
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_round_trip(tmp_path):
    folder = checkpoint_folder(tmp_path, 12)
    save_checkpoint(folder, TENSORS, {"step": 12, "best": None})
    tensors, state = load_checkpoint(folder)
    assert state["step"] == 12
    assert state["best"] is None
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert list_checkpoints(tmp_path) == [folder]


def test_a_writer_that_dies_at_any_moment_leaves_the_old_checkpoint_or_the_new(tmp_path):
    outcomes = []
    for count in range(1, 200):
        folder = tmp_path / str(count) / "checkpoint-0000001"
        save_checkpoint(folder, {"weight": torch.full((3,), 1.0)}, {"step": 1})
        finished = save_and_die(folder, count)
        recover_folders(folder.parent)
        clear_unfinished(folder.parent)
        tensors, state = load_checkpoint(folder)
        assert torch.equal(tensors["weight"], torch.full((3,), float(state["step"])))
        assert not list(folder.parent.glob(".*")), "something unfinished was left behind"
        outcomes.append(state["step"])
        if finished:
            break
    assert finished
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize("damage", ["truncated", "tampered", "no tensors", "state"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    folder = checkpoint_folder(tmp_path, 1)
    save_checkpoint(folder, TENSORS, {"step": 1})
    path = folder / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-4])
    elif damage == "tampered":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "no tensors":
        path.unlink()
    else:
        (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="checkpoint-0000001"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["5", "null", "[]", "[" * 100_000])
def test_a_state_that_is_none_is_refused_by_name(tmp_path, content):
    folder = checkpoint_folder(tmp_path, 1)
    save_checkpoint(folder, TENSORS, {"step": 1})
    (folder / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_checkpoint(folder)


def test_pickled_checkpoints_are_refused(tmp_path):
    folder = checkpoint_folder(tmp_path, 1)
    save_checkpoint(folder, TENSORS, {"step": 1})
    (folder / "optimizer.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        load_checkpoint(folder)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    save_checkpoint(checkpoint_folder(tmp_path, 1), TENSORS, {"step": 1})
    # The limit on the size of a file stands for a disk without room for it.
    program = f"""
import resource, torch
from pathlib import Path
from lemore_hf.checkpointing import *
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_checkpoint(checkpoint_folder(Path({str(tmp_path)!r}), 2), {{"weight": torch.ones(1 << 20)}}, {{"step": 2}})
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "checkpoint-0000002 could not be written" in result.stdout
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, 1)]
    assert load_checkpoint(checkpoint_folder(tmp_path, 1))[1]["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0000001"]


def test_an_error_inside_the_block_leaves_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "final"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")

    def interrupted() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_what_they_may_by_default(tmp_path, umask, mode):
    """Safetensors writes for the user alone, and a robot's programs run as another one."""
    before = os.umask(umask)
    try:
        save_checkpoint(checkpoint_folder(tmp_path, 1), TENSORS, {"step": 1})
        with atomic_file(tmp_path / "weights.safetensors") as part:
            save_file(TENSORS, part)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "export").symlink_to(tmp_path / "disk" / "export", target_is_directory=True)
    for content in ("old", "new", "newest"):
        with atomic_folder(tmp_path / "export") as temporary:
            (temporary / "a").write_text(content)
    assert (tmp_path / "export").is_symlink()
    assert (tmp_path / "disk" / "export" / "a").read_text() == "newest"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "disk", "export", "export"]


def test_pruning_keeps_the_last(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(checkpoint_folder(tmp_path, step), TENSORS, {"step": step})
    prune_checkpoints(tmp_path, keep=2)
    steps = [json.loads((folder / "state.json").read_text())["step"] for folder in list_checkpoints(tmp_path)]
    assert steps == [4, 5]
    for step in (9_999_999, 10_000_000):
        save_checkpoint(checkpoint_folder(tmp_path, step), TENSORS, {"step": step})
    prune_checkpoints(tmp_path, keep=3)
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, step) for step in (5, 9_999_999, 10_000_000)]


def test_pruning_may_keep_none(tmp_path):
    save_checkpoint(checkpoint_folder(tmp_path, 1), TENSORS, {"step": 1})
    prune_checkpoints(tmp_path, keep=0)
    assert list_checkpoints(tmp_path) == []


def test_a_resumed_run_does_not_hang_on_to_the_files_of_its_checkpoint(tmp_path):
    """What is read from safetensors stays mapped, and Windows and NFS do not delete a file that is."""

    def state_of(steps: int) -> TrainingState:
        model = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=2, hidden_sizes=(8, 8, 8, 8), stem_sizes=(8,)))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return TrainingState(Accelerator(cpu=True), model, optimizer, None, {}, {})

    state_of(3).save(folder := checkpoint_folder(tmp_path, 3))
    resumed = state_of(0)
    resumed.load(folder)
    tensors = folder / checkpointing.TENSORS_NAME
    with tensors.open("r+b") as file:  # in place: a map of the file would show it
        file.write(bytes(tensors.stat().st_size))
    steps = [moments["step"].item() for moments in resumed.optimizer.state.values()]
    assert set(steps) == {3.0}
    assert len(steps) == len(list(resumed.model.parameters()))


@pytest.mark.skipif(sys.platform != "linux", reason="the name of an open file is read from Linux's /proc")
def test_what_is_written_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """Or a power cut leaves a name without its content."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_flush(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "rename", note_rename)
    save_checkpoint(checkpoint_folder(tmp_path, 1), TENSORS, {})
    renamed = events.index("rename")
    assert {"tensors.safetensors", "state.json", ".checkpoint-0000001.writing"} <= set(events[:renamed])
    assert tmp_path.name in events[renamed:]


def test_a_folder_is_claimed_by_one_process_and_free_when_that_is_killed(tmp_path):
    """Although its loaders, forked from it, live on for seconds."""
    code = f"""
import os, time
from pathlib import Path
from lemore_hf.checkpointing import claimed_folder
with claimed_folder(Path({str(tmp_path)!r})):
    if loader := os.fork():
        print(loader, flush=True)
    time.sleep(60)
"""
    refusal = re.escape(f"Another process is training into {tmp_path}")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        loader = int(other.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match=refusal), claimed_folder(tmp_path):
                pass
            other.kill()
            other.wait()
            with claimed_folder(tmp_path):
                assert list(tmp_path.iterdir())
            assert not list(tmp_path.iterdir())
        finally:
            os.kill(loader, signal.SIGKILL)
            other.kill()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]", "\udc00"])
def test_a_damaged_summary_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError, match=r"run\.json is"):
        read_run(tmp_path)
