# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""`scripts/compare.py`: a plan is trained, scored and tabulated once, and goes on where it was stopped."""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lemore_hf.checkpointing import list_checkpoints
from lemore_hf.data.scenes import load_scenes

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = {"stem_sizes": [8], "hidden_sizes": [8, 8, 8, 16], "decoder_hidden_size": 8}
RECIPE = {"num_classes": 9, "image_size": [64, 64], "crop_size": [64, 64], "batch_size": 2, "model_config": TINY_MODEL}
PLAN = {
    "title": "Two variants",
    "notes": "A note.",
    "splits": ["validation"],
    "options": {
        "max_steps": 2,
        "warmup_steps": 0,
        "eval_every": 0,
        "save_every": 0,
        "num_workers": 0,
        "cache": "memory",
    },
    "variants": {
        "first": None,
        # Scored with the recipe's own mean, a network that was trained with another would be refused.
        "no residual": {
            "paper": 27.2,
            "model_config": {**TINY_MODEL, "use_residual": False},
            "image_mean": [0.5, 0.5, 0.5],
            "image_size": [96, 64],
            "cache": False,
        },
    },
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_script", ROOT / "scripts" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compare(script, tmp_path, monkeypatch):
    """Runs the script's `main` in this process, over a plan of which it returns the table."""
    for split, samples in load_scenes(4, 2, 2, size=(64, 96)).items():
        samples.to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML.

    def run(plan: dict, *words: str) -> str:
        path = tmp_path / "plan.yaml"
        path.write_text(json.dumps({"recipe": str(tmp_path / "recipe.yaml"), **plan}))
        places = [("--plan", path), ("--data_dir", tmp_path), ("--output_dir", tmp_path / "out")]
        places += [("--runs", tmp_path / "runs.jsonl"), ("--table", tmp_path / "table.md")]
        monkeypatch.setattr(sys, "argv", ["compare.py", *(str(word) for pair in places for word in pair), *words])
        script.main()
        return (tmp_path / "table.md").read_text()

    return run


def cells(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_plan_is_run_once_and_tabulated(compare, script, tmp_path, monkeypatch):
    first = compare(PLAN, "--only", "no residual")
    assert "| first |" not in first, "a variant that was not run has no row"
    (run,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert run["settings"]["recipe.model_config"]["use_residual"] is False
    score = run["evaluation"]["validation"]["mean_iou"]
    report = json.loads((tmp_path / "out" / "plan-no_residual" / "validation.json").read_text())
    assert report["image_size"] == [96, 64], "of which the multiply-accumulates are"
    header, row = cells(first, "variant"), dict(zip(cells(first, "variant"), cells(first, "no residual"), strict=True))
    assert header == ["variant", "options", "parameters", "M MACs", "epochs", "validation mIoU", "paper's mIoU"]
    assert row["validation mIoU"] == f"{100 * score:.2f}"
    assert (row["epochs"], row["paper's mIoU"]) == ("1.0", "27.2")
    assert row["parameters"] == f"{run['parameters']:,}"
    assert '"use_residual": false' in row["options"]
    words = shlex.split(row["options"].strip("`"))  # as a shell takes them
    assert json.loads(words[words.index("--model_config") + 1])["use_residual"] is False
    assert "paper" not in row["options"]

    # What has been run is not run again; a crash in the middle costs only the variant it was in.
    started = []
    monkeypatch.setattr(script, "run", lambda name, *words: started.append((name, words)))
    assert compare(PLAN) == first
    assert [name for name, _ in started] == ["train.py", "evaluate.py"]
    assert all(str(tmp_path / "out" / "plan-first") in " ".join(words) for _, words in started)
    assert {"--max_steps", "--cache", "--resume"} <= set(started[0][1])


def test_a_finished_plan_needs_its_data_no_more(compare, tmp_path):
    finished = compare(PLAN, "--only", "first")
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    assert compare(PLAN, "--only", "first") == finished
    with pytest.raises(FileNotFoundError, match="validation"):
        compare(PLAN)


def test_the_splits_are_looked_for_where_the_plan_says(compare, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "run", lambda name, *words: None)
    files = {"train": "train.parquet", "validation": "elsewhere.parquet", "test": "test.parquet"}
    (tmp_path / "validation.parquet").rename(tmp_path / "elsewhere.parquet")
    compare({**PLAN, "options": {**PLAN["options"], "data_files": files}})


def test_seeds_are_summed_up(script, tmp_path):
    plan = {"title": "Seeds", "recipe": "camvid", "notes": "", "splits": ["validation", "test"], "options": {}}
    plan["variants"] = {"one": None, "two": {"seed": 1}, "three": {"seed": 2}, "other": {"max_steps": 5}}
    runs = [
        {"name": f"plan-{name}", "evaluation": {split: {"mean_iou": score} for split, score in scores.items()}}
        for name, scores in {
            "one": {"validation": 0.5, "test": 0.3},
            "two": {"validation": 0.52, "test": 0.4},
            "three": {"validation": 0.54},
            "other": {"validation": 0.9, "test": 0.9},
        }.items()
    ]
    common = {"parameters": 1, "multiply_accumulates": 1, "epochs": 1.0, "hours": 0.1, "hardware": "a CPU"}
    lines = [json.dumps({**run, **common, "versions": {"torch": "2"}}) for run in runs]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    table = script.tabulate(
        plan, argparse.Namespace(plan=Path("plan.yaml"), runs=tmp_path / "runs.jsonl", output_dir=tmp_path)
    )
    (summary,) = [line for line in table.splitlines() if "standard deviation" in line]
    assert summary == (
        "one, mean and standard deviation: validation mIoU 52.00 ± 2.00 (3 seeds), test mIoU 35.00 ± 7.07 (2 seeds)."
    )


def test_a_value_of_another_type_is_named_without_a_traceback(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    plan = {**PLAN, "recipe": str(tmp_path / "recipe.yaml"), "options": {"max_steps": "ten"}}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    words = [
        sys.executable,
        ROOT / "scripts" / "compare.py",
        "--plan",
        tmp_path / "plan.yaml",
        "--output_dir",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [*words, "--runs", tmp_path / "runs", "--table", tmp_path / "table"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("TypeError: ")
    assert "max_steps" in done.stderr


def test_results_of_other_options_are_not_shown_as_those_of_the_plan(compare, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "run", lambda name, *words: None)
    compare({**PLAN, "options": {**PLAN["options"], "mixed_precision": "fp8"}})  # which train.py has refused
    compare(PLAN)
    compare({**PLAN, "notes": "Another note."})
    (tmp_path / "out" / "plan-first" / "checkpoint-0000001").mkdir()
    with pytest.raises(ValueError, match="other settings of max_steps than 'first' has in the plan today"):
        compare({**PLAN, "options": {**PLAN["options"], "max_steps": 3}})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**RECIPE, "title": "Described otherwise"}))
    compare(PLAN)
    recipe.write_text(json.dumps({**RECIPE, "learning_rate": 0.5}))
    with pytest.raises(ValueError, match="other settings of learning_rate than 'first' has in the plan today"):
        compare(PLAN)


def test_a_plan_whose_options_have_numbers_for_keys_goes_on(compare, script, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(script, "run", lambda name, *words: started.append(name))
    plan = {**PLAN, "options": {**PLAN["options"], "label_map": {number: number for number in range(9)}}}
    load = script.yaml.safe_load  # JSON, which the test's plans are, has words alone for keys
    numbered = {"options": plan["options"]}
    monkeypatch.setattr(script.yaml, "safe_load", lambda text: load(text) | numbered)
    compare(plan, "--only", "first")
    (tmp_path / "out" / "plan-first" / "checkpoint-0000001").mkdir()
    compare(plan, "--only", "first")
    assert started.count("train.py") == 2


def test_an_older_line_of_the_same_name_is_no_score_of_a_new_training(compare, script, tmp_path, monkeypatch):
    compare(PLAN, "--only", "first")
    (line,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    older = {**line, "configuration_hash": "another"}
    (tmp_path / "runs.jsonl").write_text(json.dumps(older) + "\n")
    started = []
    monkeypatch.setattr(script, "run", lambda name, *words: started.append(name))
    assert "| first |" not in compare(PLAN, "--only", "first")
    assert started == ["evaluate.py"]
    # The same settings once more, after a change of the code say: the folder's run.json tells them apart.
    (tmp_path / "runs.jsonl").write_text(json.dumps({**line, "hours": 123.0}) + "\n")
    assert "| first |" not in compare(PLAN, "--only", "first")
    assert started == ["evaluate.py"] * 2


def test_false_switches_off_what_the_recipe_has_on(compare, script, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(json.dumps({**RECIPE, "classmix": True, "reduce_labels": True}))
    started = {}
    monkeypatch.setattr(script, "run", lambda name, *words: started.update({name: words}))
    off = {"classmix": False, "reduce_labels": False, "channels_last": False}
    compare({**PLAN, "variants": {"first": off}})
    for name, fields in (("train.py", ("classmix", "reduce_labels")), ("evaluate.py", ("reduce_labels",))):
        words = started[name]
        assert all(words[words.index(f"--{field}") + 1] == "False" for field in fields)
        assert "--channels_last" not in words


def test_a_failing_variant_stops_with_its_command(compare):
    with pytest.raises(SystemExit, match=r"train\.py ended with status .*--num_workers -1"):
        compare({**PLAN, "options": {**PLAN["options"], "num_workers": -1}})


def test_a_failing_variant_leaves_the_table_of_those_before(compare, tmp_path):
    with pytest.raises(SystemExit, match=r"train\.py ended with status"):
        compare({**PLAN, "variants": {"first": None, "second": {"log_every": 0}}})
    assert cells((tmp_path / "table.md").read_text(), "first")[-1] != "–"


def test_a_stopped_comparison_lets_the_training_save_what_it_has(tmp_path):
    """SIGTERM to this process alone, as a scheduler sends it; the one that trains is told, and waited for."""
    for split, samples in load_scenes(4, 2, 2, size=(64, 96)).items():
        samples.to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    options = PLAN["options"] | {"max_steps": 5000, "log_every": 1}
    plan = {"title": "One", "recipe": str(tmp_path / "recipe.yaml"), "options": options, "variants": {"first": None}}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    places = {"plan": "plan.yaml", "data_dir": "", "output_dir": "out", "runs": "runs.jsonl", "table": "table.md"}
    words = [word for name, place in places.items() for word in (f"--{name}", str(tmp_path / place))]
    with subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "compare.py", *words], stderr=subprocess.PIPE
    ) as process:
        folder = tmp_path / "out" / "plan-first"
        while process.poll() is None and not ((folder / "log.jsonl").is_file() and (folder / "log.jsonl").read_text()):
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert b"train.py ended with status 143" in errors
    assert b"Traceback" not in errors
    assert len(list_checkpoints(folder)) == 1


def test_mistakes_in_a_plan_are_named(compare, tmp_path):
    with pytest.raises(ValueError, match=r"the variants of .* are first, no residual"):
        compare(PLAN, "--only", "third")
    with pytest.raises(ValueError, match="must be a mapping with title, recipe and variants"):
        compare({"title": "No variants"})
    with pytest.raises(ValueError, match="must map a name to options"):
        compare({**PLAN, "variants": {}})
    with pytest.raises(ValueError, match="recipe imagenet1k for image-classification"):
        compare({**PLAN, "recipe": "imagenet1k"})
    with pytest.raises(ValueError, match="must be a mapping with title, recipe and variants"):
        compare({**PLAN, "variant": {}})
    with pytest.raises(ValueError, match=r"splits of .* must be a list, such as .*, got 'validation'"):
        compare({**PLAN, "splits": "validation"})
    with pytest.raises(ValueError, match=r"each of the splits must be train, validation, test.* got 'tset'"):
        compare({**PLAN, "splits": ["tset"]})
    with pytest.raises(ValueError, match="must map a name to options for each, got"):
        compare({**PLAN, "variants": {"first": 3}})
    with pytest.raises(ValueError, match=r"the variants of .* are 8, 16"):  # which YAML reads as numbers
        compare({**PLAN, "variants": {8: None, 16: {"seed": 1}}}, "--only", "32")
    (tmp_path / "twice.yaml").write_text("title: t\nrecipe: scenes\nvariants: {first: {}, first: {seed: 1}}\n")
    with pytest.raises(yaml.YAMLError, match="first stands there twice"):
        compare({}, "--plan", str(tmp_path / "twice.yaml"))
    # Before the first variant is trained.
    (tmp_path / "test.parquet").rename(tmp_path / "test.old")
    with pytest.raises(FileNotFoundError, match="no parquet file of the test split"):
        compare({**PLAN, "splits": ["validation", "test"]})
    with pytest.raises(ValueError, match=r"variant 'second': .*model_config has the field 'use_residul'"):
        compare({**PLAN, "variants": {"first": None, "second": {"model_config": {"use_residul": False}}}})
    with pytest.raises(ValueError, match=r"'second': scripts/train.py has no option --lr"):
        compare({**PLAN, "variants": {"first": None, "second": {"lr": 1}}})
    with pytest.raises(ValueError, match=r"'first': .* no option --cutmix \(did you mean 'cutmix_alpha'\?\)"):
        compare({**PLAN, "options": {**PLAN["options"], "cutmix": 1}}, "--table_only")
    with pytest.raises(SystemExit):
        compare(PLAN, "--only", "first", "--table_only")


def test_a_variant_begins_with_the_weights_of_another(compare, script, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(script, "run", lambda name, *words: started.append((name, words)))
    stages = {"first": None, "second": {"init_from": "first"}, "mean": {"init_from": ["first", "second", "elsewhere"]}}
    with pytest.raises(ValueError, match="'second' begins with 'first', which has not been run"):
        compare({**PLAN, "variants": stages}, "--only", "second")
    assert not started
    with pytest.raises(ValueError, match="variant 'mean': init_from names 'first', which must be a variant before it"):
        compare({**PLAN, "variants": dict(reversed(stages.items()))})
    compare({**PLAN, "variants": stages}, "--only", "mean", "second", "first")  # which come in the plan's order
    trainings = [" ".join(words) for name, words in started if name == "train.py"]
    finals = [str(tmp_path / "out" / f"plan-{name}" / "final") for name in ("first", "second")]
    assert "--init_from" not in trainings[0]
    assert trainings[1].endswith(f"--init_from {finals[0]}")
    assert trainings[2].endswith(f"--init_from {finals[0]} {finals[1]} elsewhere")


def test_a_variant_learns_from_others(compare, script, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(script, "run", lambda name, *words: started.append((name, words)))
    variants = {
        "one": None,
        "two": {"seed": 1},
        "taught": {"init_from": "one", "teacher": ["one", "two", "elsewhere"]},
    }
    with pytest.raises(ValueError, match="'taught' begins with 'one', which has not been run"):
        compare({**PLAN, "variants": variants}, "--only", "taught")
    with pytest.raises(ValueError, match="'taught' learns from 'two', which has not been run"):
        compare({**PLAN, "variants": variants}, "--only", "one", "taught")
    with pytest.raises(ValueError, match="variant 'one': teacher names 'one', which must be a variant before it"):
        compare({**PLAN, "variants": {"one": {"teacher": "one"}}})
    assert not started
    compare({**PLAN, "variants": variants})
    *_, last = (" ".join(words) for name, words in started if name == "train.py")
    one, two = (str(tmp_path / "out" / f"plan-{name}" / "final") for name in ("one", "two"))
    assert f"--init_from {one}" in last
    assert f"--teacher {one} {two} elsewhere" in last


def test_a_second_stage_is_trained_from_the_first(compare, tmp_path):
    second = {"init_from": "first", "learning_rate": 1e-12, "warmup_steps": 0, "ema_decay": None, "max_steps": 1}
    table = compare({**PLAN, "variants": {"first": None, "second": {**second, "freeze_batch_norm": True}}})
    assert cells(table, "first")[-1] == cells(table, "second")[-1]
    assert "`--init_from first " in cells(table, "second")[1]
    runs = {run["name"]: run for run in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    assert runs["plan-second"]["settings"]["init_from"] == str(tmp_path / "out" / "plan-first" / "final")


def spreads(script, variants: dict, scores: tuple[float, ...]) -> list[str]:
    """The lines that sum up the seeds of variants with these scores on `test`."""
    entries = {
        name: {"evaluation": {"test": {"mean_iou": score}}} for name, score in zip(variants, scores, strict=True)
    }
    plan = {"splits": ["test"], "options": {}, "variants": variants}
    return [line for line in script.seed_spreads(plan, entries) if line]


def test_stages_of_seeds_are_summed_up_together(script):
    variants = {"one": None, "two": {"seed": 1}, "then one": {"init_from": "one"}}
    variants["then two"] = {"init_from": ["two"], "seed": 1}
    first, second = spreads(script, variants, (0.5, 0.6, 0.7, 0.9))
    assert first.startswith("one, mean and standard deviation: test mIoU 55.00 ± 7.07")
    assert second.startswith("then one, mean and standard deviation: test mIoU 80.00 ± 14.14")


def test_seeds_with_the_same_teachers_are_summed_up_together(script):
    teachers = {"teacher": ["one", "two"]}
    variants = {"one": None, "two": {"seed": 1}, "taught": {"init_from": "one", **teachers}}
    variants["taught too"] = {"init_from": "two", "seed": 1, **teachers}
    first, second = spreads(script, variants, (0.5, 0.6, 0.8, 0.9))
    assert first.startswith("one, mean and standard deviation: test mIoU 55.00 ± 7.07")
    assert second.startswith("taught, mean and standard deviation: test mIoU 85.00 ± 7.07")


@pytest.mark.parametrize("plan", sorted((ROOT / "scripts" / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_published_tables_are_what_the_script_prints(script, tmp_path, monkeypatch, capsys, plan):
    monkeypatch.chdir(ROOT)
    places = ["--runs", "model_cards/runs.jsonl", "--output_dir", str(tmp_path), "--table", str(tmp_path / "table.md")]
    plan = str(plan.relative_to(ROOT))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--plan", plan, *places, "--table_only"])
    script.main()
    published = ROOT / "model_cards" / f"{Path(plan).stem}.md"
    assert (tmp_path / "table.md").read_text() == published.read_text()
