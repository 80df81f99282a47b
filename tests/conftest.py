# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test asks the Hub (two ask package registries, for the suites that they run); two cores are shared by all.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CAMVID_DIR = Path(os.environ.get("LEMORE_CAMVID", Path(__file__).resolve().parents[2] / "shared" / "camvid"))

# Modules go to the processes as they come: what takes longest first, so that none ends long after the others.
LONGEST = (
    "test_export",
    "test_train",
    "test_workflow",
    "test_released",
    "test_evaluate",
    "test_predict",
    "test_loading",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """No test finds what another has set for the whole process."""
    import transformers  # the first time here, with what is set above
    from accelerate.state import AcceleratorState

    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _data_sets_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `datasets` keeps of the tests' files, which are others each time, is not the user's to store."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)  # for processes that tests start


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
