# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the tests share."""

import os
from pathlib import Path

import pytest

# No test asks the Hub (two ask package registries, for the suites that they run); two cores are shared by all.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CAMVID_DIR = Path(os.environ.get("LEMORE_CAMVID", Path(__file__).resolve().parents[2] / "shared" / "camvid"))


@pytest.fixture(scope="session")
def camvid_dir_if_there() -> Path | None:
    """Folder of the CamVid parquet files, beside the checkout or where LEMORE_CAMVID says."""
    return CAMVID_DIR if (CAMVID_DIR / "test.parquet").is_file() else None


@pytest.fixture(scope="session")
def camvid_dir(camvid_dir_if_there: Path | None) -> Path:
    """The same, for tests that are about CamVid itself."""
    # Its terms keep the data out of the repository: who has it not can run all the other tests.
    if camvid_dir_if_there is None:
        pytest.skip(f"CamVid is not at {CAMVID_DIR}; set LEMORE_CAMVID to its folder")
    return camvid_dir_if_there
