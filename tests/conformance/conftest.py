# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Makes Transformers' own common tests importable: `from tests.test_modeling_common import ModelTesterMixin`.

They are not part of its wheel, so that the source distribution of the installed version is fetched once with pip into
`.cache/` (or the folder that LEMORE_CONFORMANCE_CACHE names). Three modules that the mixins import are missing from it and get
stand-ins. Without the sources the tests of this folder fail, saying why; all others run.
"""

import importlib.machinery
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import transformers
from filelock import FileLock
from PIL import Image

VERSION = transformers.__version__
CACHE = Path(os.environ.get("LEMORE_CONFORMANCE_CACHE", Path(__file__).parents[2] / ".cache"))
SOURCES = CACHE / f"transformers-{VERSION}"


def fetch_sources() -> None:
    """Puts the `tests` folder of the source distribution into `SOURCES`, whole or not at all."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{SOURCES.name}.lock"), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        if SOURCES.is_dir():
            return
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # The project's own setuptools reads the metadata; an isolated build would fetch one more package.
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", scratch, f"transformers=={VERSION}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if "/tests/" in member.name]
            tar.extractall(scratch, members, filter="data")
        (Path(scratch) / archive.name.removesuffix(".tar.gz")).rename(SOURCES)


def test_picture(url: str) -> str:
    """Stands for the pictures that the mixins take from the Hub: a path to a generated one of the same kind."""
    path = SOURCES / "picture.png"
    if not path.exists():
        rows, columns = np.mgrid[:480, :640]
        waves = [
            np.sin(rows / 31) + np.cos(columns / 17),
            np.sin((rows + columns) / 45),
            np.cos(rows * columns / 9000),
        ]
        values = 128 + 50 * np.stack(waves, axis=-1) + np.random.default_rng(0).normal(0, 8, (480, 640, 3))
        partial = path.with_suffix(f".{os.getpid()}.png")
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(partial)
        partial.replace(path)
    return str(path)


def add_module(name: str, path: Path | None = None, **attributes: object) -> None:
    """Adds a module of `attributes`, or a package where `path` says where its modules lie."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=path is not None)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(attributes)
    sys.modules[name] = module


def add_modules() -> None:
    # By name, not through `sys.path`, so that no other folder called `tests` can come first.
    root = SOURCES / "tests"
    add_module("tests", root)
    add_module("tests.exporters", root / "exporters")
    add_module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add_module("tests.generation", root / "generation")
    add_module("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    add_module("fetch_hub_objects_for_ci", url_to_local_path=test_picture)


try:
    fetch_sources()
    add_modules()
    MISSING = None
except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
    MISSING = (
        f"Transformers' common tests need the source distribution of transformers {VERSION} in {SOURCES}. Fetching it "
        f"failed, so that nothing is known about conformance. Connect to a package index, or unpack "
        f"transformers-{VERSION}.tar.gz there yourself.\n{error}"
    )


class MissingSources(pytest.Item):
    """A test that fails in the place of a module whose sources could not be fetched."""

    def runtest(self) -> None:
        pytest.fail(MISSING, pytrace=False)


class ModuleWithoutSources(pytest.File):
    def collect(self) -> list[pytest.Item]:
        return [MissingSources.from_parent(self, name="transformers_sources")]


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return ModuleWithoutSources.from_parent(parent, path=module_path) if MISSING else None


def pytest_configure(config: pytest.Config) -> None:
    for name in (
        "slow",
        "torch_compile_test",
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
    ):
        config.addinivalue_line("markers", f"{name}: of Transformers' own tests")
