# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The table of trainings, from the lines that `evaluate.py --runs` keeps."""

import functools
import json
from pathlib import Path

import pytest
from launching import run_here

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "list_runs.py"
RUNS = ROOT / "model_cards" / "runs.jsonl"


@pytest.fixture
def list_runs(monkeypatch):
    return functools.partial(run_here, monkeypatch, SCRIPT, "--runs", RUNS)


def test_a_stage_says_what_it_began_with_and_scored(list_runs, capsys):
    list_runs("--names", "lemore-camvid-twenty-[fs]*")
    header, _, *rows, _, total = capsys.readouterr().out.splitlines()
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ") for row in rows}
    assert header.split(" | ")[1] == "begins with"
    assert cells["lemore-camvid-twenty-sixth"][1:] == [
        *("lemore-camvid-twenty-fifth", "2300", "16", "0.002", "900×1200"),
        *("CutMix, ClassMix", "8", "1.56", "67.13 |"),
    ]
    hours = sum(float(row[8]) for row in cells.values())
    assert total.startswith(f"{len(cells)} runs, ")
    assert float(total.split()[2]) == pytest.approx(hours, abs=0.1)
    assert cells["lemore-camvid-twenty-first"][1] == "mean of lemore-camvid-sixteenth, lemore-camvid-twentieth"


def test_the_table_of_camvid_s_stages_has_every_run(list_runs, tmp_path):
    list_runs("--names", "lemore-camvid*", "--table", tmp_path / "table.md")
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    kept = (ROOT / "model_cards" / "camvid_stages.md").read_text().splitlines()
    assert rows == [line for line in kept if line.startswith("| ")], "run the command in its last line again"
    (total,) = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.endswith(" hours.")]
    assert total in kept
    with pytest.raises(SystemExit, match=r"--names nothing: none of the \d+ runs"):
        list_runs("--names", "nothing")


def test_a_run_says_who_taught_it(list_runs, tmp_path, capsys):
    run = json.loads(RUNS.read_text(encoding="utf-8").splitlines()[0])
    taught = {
        **run["settings"],
        "init_from": "runs/one/final",
        "teacher": ["runs/one/final", "runs/two/final", "org/b5"],
    }
    (tmp_path / "runs.jsonl").write_text(json.dumps({**run, "name": "three", "settings": taught}), encoding="utf-8")
    list_runs("--runs", tmp_path / "runs.jsonl", "--names", "three")
    assert "| three | one; taught by one, two, org/b5 | " in capsys.readouterr().out


def test_a_rate_that_is_muons_says_so(list_runs, tmp_path, capsys):
    run = json.loads(RUNS.read_text(encoding="utf-8").splitlines()[0])
    settings = {**run["settings"], "recipe.learning_rate": 0.004, "recipe.optimizer": "muon"}
    (tmp_path / "runs.jsonl").write_text(json.dumps({**run, "settings": settings}), encoding="utf-8")
    list_runs("--runs", tmp_path / "runs.jsonl", "--names", "*")
    assert " | 0.004, Muon | " in capsys.readouterr().out
