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
def camvid_dir() -> Path:
    """Folder of the CamVid parquet files, beside the checkout or where LEMORE_CAMVID says."""
    # Its terms keep the data out of the repository: who has it not can run all the other tests.
    if not (CAMVID_DIR / "test.parquet").is_file():
        pytest.skip(f"CamVid is not at {CAMVID_DIR}; set LEMORE_CAMVID to its folder")
    return CAMVID_DIR
