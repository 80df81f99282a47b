# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""The routes from data to a published checkpoint, end to end: by the scripts, by `Trainer` and by the quickstart."""

import importlib.util
import json
import math
import os
import pickle
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from launching import launch, run_here
from loopback_hub import LoopbackHub, run_client, running_hub
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

from lemore_hf import (
    LeMoReConfig,
    LeMoReForImageClassification,
    LeMoReForSemanticSegmentation,
    LeMoReImageProcessor,
)
from lemore_hf.data.loading import RecipeDataset
from lemore_hf.data.recipes import load_recipe
from lemore_hf.data.scenes import CLASS_NAMES, draw_scene, load_scenes
from lemore_hf.metrics import trainer_metrics
from lemore_hf.peers import build_peer

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TINY_MODEL = {"stem_sizes": [8], "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}


@pytest.fixture
def streets(tmp_path) -> Path:
    """Drawn streets in files as the recipe camvid reads them."""
    for split, count in (("train", 8), ("val", 5)):
        pictures, labels = zip(*(draw_scene(seed, (96, 128)) for seed in range(count)), strict=True)
        rows = {"image": list(pictures), "label": list(labels), "name": [f"{split} {index}" for index in range(count)]}
        features = Features({"image": Image(), "label": Image(), "name": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return tmp_path / "data"


def test_train_evaluate_and_publish_in_two_processes(tmp_path, streets):
    size = ["96", "128"]
    data = ["--recipe", "camvid", "--data_dir", streets, "--resize", *size]
    schedule = ["--max_steps", 2, "--eval_every", 2, "--num_workers", 1, "--batch_size", 2, "--eval_batch_size", 2]
    sizes = ["--image_size", *size, "--crop_size", *size, "--class_weights", "none", "--ema_decay", "0.5"]
    config = ["--model_config", json.dumps(TINY_MODEL), "--output_dir", tmp_path / "run"]
    train = launch(2, SCRIPTS / "train.py", *data, *schedule, *sizes, *config)
    with running_hub() as hub:
        result = run_client(train[1:], hub, tmp_path, "--push_to_hub", "lemore-camvid")
        assert result.returncode == 0, result.stderr[-2000:]
        published = hub.repositories["someone/lemore-camvid"]
        assert published["model.safetensors"] == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
        assert b"carry that limit" in published["README.md"]
        assert b"split `validation`" in published["README.md"]

        metrics = tmp_path / "metrics.json"
        model = ["--model", tmp_path / "run" / "final"]
        evaluate = [*model, *data, "--split", "validation", "--output", metrics, "--eval_batch_size", 2]
        result = run_client(launch(2, SCRIPTS / "evaluate.py", *evaluate)[1:], hub, tmp_path)
        assert result.returncode == 0, result.stderr[-2000:]
        scores = json.loads(metrics.read_text())
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert scores["num_processes"] == run["settings"]["num_processes"] == 2
        assert scores["num_images"] == 5
        assert len(scores["per_class_iou"]) == 11
        assert scores["mean_iou"] == pytest.approx(run["best_validation"]["score"], abs=0.01)

        push = [SCRIPTS / "push_to_hub.py", *model, "--repo_id", "lemore-camvid"]
        push = [*push, "--results", metrics, "--recipe", "camvid", "--overwrite"]
        result = run_client(list(map(str, push)), hub, tmp_path, token=LoopbackHub.token)
        assert result.returncode == 0, result.stderr[-2000:]
        assert f"{100 * scores['mean_iou']:.2f}".encode() in hub.repositories["someone/lemore-camvid"]["README.md"]


@pytest.fixture(scope="module")
def classified(tmp_path_factory) -> Path:
    """A classification data set of three colours, as parquet files."""
    folder = tmp_path_factory.mktemp("colours")
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])})
    for split, count in (("train", 12), ("validation", 6)):
        noise = torch.randint(0, 60, (count, 48, 48, 3), dtype=torch.uint8)
        labels = [index % 3 for index in range(count)]
        for index, label in enumerate(labels):
            noise[index, ..., label] += 190
        rows = {"image": list(noise.numpy()), "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_segmentation_starts_from_every_encoder_weight_of_a_classifier(tmp_path, classified, monkeypatch):
    def run_training(*options) -> None:
        model = ["--model_config", json.dumps(TINY_MODEL)]
        run_here(monkeypatch, SCRIPTS / "train.py", *model, "--num_workers", 0, *options)

    recipe = tmp_path / "colours.yaml"
    size = {"image_size": [32, 32], "crop_size": [32, 32], "resize": 36}
    mixes = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
    schedule = {"max_steps": 4, "warmup_steps": 1, "batch_size": 4, "scale_range": [0.5, 1.0]}
    recipe.write_text(json.dumps({"task": "image-classification", **size, **mixes, **schedule}))
    pretrained = tmp_path / "pretrained"
    run_training("--recipe", recipe, "--data_dir", classified, "--output_dir", pretrained, "--eval_every", 2)
    records = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "accuracy" in record] == [2, 4]
    classifier = LeMoReForImageClassification.from_pretrained(pretrained / "final")
    assert classifier.config.id2label == {0: "red", 1: "green", 2: "blue"}

    _, loaded = LeMoReForSemanticSegmentation.from_pretrained(pretrained / "final", output_loading_info=True)
    assert not [name for name in loaded["missing_keys"] if not name.startswith("decode_head.")]
    assert not loaded["mismatched_keys"]

    # Two scenes for its one step, which to draw all takes longer than the rest.
    monkeypatch.setattr("lemore_hf.data.scenes.load_scenes", lambda **others: load_scenes(**{"num_train": 2} | others))
    # With a learning rate of nothing, the segmentation run ends with the weights that it starts from.
    options = [
        "--recipe",
        "scenes",
        "--max_steps",
        1,
        "--batch_size",
        2,
        "--learning_rate",
        "1e-30",
        "--eval_every",
        0,
    ]
    sizes = ["--image_size", 32, 32, "--crop_size", 32, 32]
    output = tmp_path / "segmentation"
    run_training(*options, *sizes, "--init_from", pretrained / "final", "--output_dir", output)
    segmenter = LeMoReForSemanticSegmentation.from_pretrained(output / "final")
    assert segmenter.config.num_labels == 9
    for name, parameter in classifier.lemore.named_parameters():
        torch.testing.assert_close(segmenter.lemore.get_parameter(name), parameter, msg=name)


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_fine_tuning_with_trainer(tmp_path, freeze_encoder):
    torch.manual_seed(0)
    pretrained = LeMoReForSemanticSegmentation(LeMoReConfig(num_labels=5, image_size=64, **TINY_MODEL))
    pretrained.save_pretrained(tmp_path / "pretrained")
    scenes = load_scenes(12, 4, 0, size=(64, 64))
    id2label = dict(enumerate(CLASS_NAMES))

    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    model = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "pretrained",
        **({"num_labels": len(id2label)} if freeze_encoder else labels),
        ignore_mismatched_sizes=True,
    )
    assert model.config.num_labels == len(id2label)
    processor = LeMoReImageProcessor(size={"height": 64, "width": 64})
    for split in scenes.values():
        split.set_transform(lambda batch: processor(batch["image"], segmentation_maps=batch["label"]))
    if freeze_encoder:
        model.lemore.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    metrics = trainer_metrics(model.config.num_labels, id2label)
    trainer = Trainer(
        model,
        TrainingArguments(
            tmp_path / "trainer",
            num_train_epochs=3,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            remove_unused_columns=False,
            batch_eval_metrics=True,
            gradient_accumulation_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=scenes["train"],
        eval_dataset=scenes["validation"],
        compute_metrics=metrics.compute_metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits_for_metrics,
    )
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("decode_head.") for name in changed)
    assert any(name.startswith("lemore.") for name in changed) != freeze_encoder
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    # One step an epoch: the loss of accumulated batches is their mean, about ln 9 at the start, not their sum.
    assert len(losses) == 3
    assert losses[0] < 3
    assert 0 <= trainer.evaluate()["eval_mean_iou"] <= 1

    trainer.save_model(tmp_path / "tuned")
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "tuned").eval()
    pixel_values = scenes["validation"][0]["pixel_values"][None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model.eval()(pixel_values).logits)
    assert loaded.config.id2label == model.config.id2label


@pytest.mark.parametrize("kind", ["classifier", "peer"])
def test_trainer_averages_the_loss_of_accumulated_batches(kind, tmp_path):
    """Their sum would make steps as many times as large, and is what `Trainer` takes where models do not tell."""
    torch.manual_seed(0)
    if kind == "classifier":  # of several labels at once, whose loss no `num_items_in_batch` divides
        config = LeMoReConfig(**TINY_MODEL, image_size=64, num_labels=3, problem_type="multi_label_classification")
        model, labels, start = LeMoReForImageClassification(config), torch.ones(3), math.log(2)
    else:
        model, start = build_peer("lraspp-mobilenet-v3-large", 3), math.log(3)
        labels = torch.randint(3, (64, 64))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        report_to="none",
        use_cpu=True,
    )
    samples = [{"pixel_values": torch.randn(3, 64, 64), "labels": labels} for _ in range(8)]
    loss = Trainer(model, arguments, train_dataset=samples).train().training_loss
    assert loss == pytest.approx(start, rel=0.3)


def test_quickstart_reuses_a_checkpoint_of_the_same_data_and_settings_alone(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(SCRIPTS / "quickstart.py"))
    trained, main = [], script["main"].__globals__
    for name in ("first_look", "score", "report", "draw_held_out"):
        monkeypatch.setitem(main, name, lambda *_: None)
    monkeypatch.setitem(main, "AutoModelForSemanticSegmentation", SimpleNamespace(from_pretrained=lambda _: None))

    def fine_tune(recipe, train, held_out, folder, args):
        trained.append(recipe.num_classes)
        folder.mkdir()
        (folder / "model.safetensors").touch()

    monkeypatch.setitem(main, "fine_tune", fine_tune)
    own = tmp_path / "own"
    for part in ("images", "masks"):
        (own / part).mkdir(parents=True)
        for index in range(8):
            PIL.Image.new("RGB" if part == "images" else "L", (64, 64), index % 2).save(own / part / f"{index}.png")
    (own / "classes.txt").write_text("floor\nwall\n")

    def quickstart(*words: str) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        arguments = ["quickstart.py", "--dataset", str(own), "--output_dir", str(tmp_path / "out"), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        script["main"]()

    quickstart()
    quickstart()
    assert trained == [2]
    with pytest.raises(SystemExit, match="trained with another epochs: give another --output_dir"):
        quickstart("--epochs", "1")
    with pytest.raises(SystemExit, match="2"):
        quickstart("--batch_size", "0")
    for part, folder in (
        ("images", "JPEGImages"),
        ("masks", "SegmentationClass"),
    ):  # as errors of such a layout advise
        (own / part).rename(own / folder)
    with pytest.raises(SystemExit, match="trained with another image_folder and label_folder"):
        quickstart("--image_folder", "JPEGImages", "--label_folder", "SegmentationClass")
    assert "--batch_size must be at least 1, got 0" in capsys.readouterr().err


def test_quickstart_reuses_no_checkpoint_of_options_that_are_no_longer_given(tmp_path):
    check_reuse = runpy.run_path(str(SCRIPTS / "quickstart.py"))["check_reuse"]
    settings_file = tmp_path / "trained_with.json"
    settings_file.write_text(json.dumps({"epochs": "1", "label_suffix": "_mask"}))
    check_reuse({"epochs": "1", "label_suffix": "_mask"}, settings_file, tmp_path)
    with pytest.raises(SystemExit, match="trained with another label_suffix: give"):
        check_reuse({"epochs": "1"}, settings_file, tmp_path)


def test_quickstart_takes_the_lists_of_splits_that_an_error_advises(tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPTS / "quickstart.py"))
    lists = "ImageSets/Segmentation/{split}.txt"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--dataset", str(tmp_path), "--split_file", lists])
    assert script["named_recipe"](script["parse_arguments"]()).split_file == lists


def test_quickstart_ends_with_scores_and_pictures(tmp_path, monkeypatch):
    """The whole of it, for one epoch on eight pictures."""
    for split, samples in load_scenes(8, 2, 0, size=(64, 64)).items():
        if len(samples):
            samples.to_parquet(tmp_path / f"{split}.parquet")
    words = ["--dataset", str(tmp_path), "--epochs", "1", "--batch_size", "4", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    quickstart_script(monkeypatch).main()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(scores["per_class_iou"]) == len(CLASS_NAMES)
    assert 0 < scores["mean_iou"] < 1
    sizes = {name: PIL.Image.open(tmp_path / "out" / f"{name}.png").size for name in ("first_look", "overlay", "grid")}
    assert sizes["first_look"][0] > 2 * 480, "a picture and what was found in it"
    assert sizes["grid"][0] >= 3 * 64, "picture, truth and prediction"
    assert sizes["overlay"][0] >= 64
    processor = LeMoReImageProcessor.from_pretrained(tmp_path / "out" / "model")
    assert processor.size == {"height": 64, "width": 64}


def test_masks_of_one_class_are_explained(tmp_path, monkeypatch):
    for part, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "own" / part).mkdir(parents=True)
        for index in range(20):
            picture = PIL.Image.new(mode, (64, 64))
            picture.paste((255,) * len(mode) if mode == "RGB" else 255, (0, 0, 32, 64))
            picture.save(tmp_path / "own" / part / f"{index}.png")
    script = quickstart_script(monkeypatch)
    monkeypatch.setattr(script, "first_look", lambda folder: None)
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", "--dataset", str(tmp_path / "own"), "--output_dir", str(tmp_path)]
    )
    with pytest.raises(ValueError, match=r"hold \[0, 255\], where 255 is void: .* Store them as the numbers 0, 1"):
        script.main()


def test_masks_of_one_number_are_explained_whatever_it_is(tmp_path, monkeypatch):
    for part, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "own" / part).mkdir(parents=True)
        for index in range(20):
            PIL.Image.new(mode, (64, 64), 1 if mode == "L" else "red").save(tmp_path / "own" / part / f"{index}.png")
    script = quickstart_script(monkeypatch)
    with pytest.raises(ValueError, match=r"hold \[1\], .* no two classes to tell apart"):
        script.describe_data(SimpleNamespace(recipe=None, dataset=tmp_path / "own"))


def test_masks_whose_numbers_have_gaps_are_explained(tmp_path, monkeypatch):
    """Such as those that were made bright, so that people see them."""
    for part, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "own" / part).mkdir(parents=True)
        for index in range(20):
            PIL.Image.new(mode, (64, 64), index % 5 * 50 if mode == "L" else "red").save(
                tmp_path / "own" / part / f"{index}.png"
            )
    script = quickstart_script(monkeypatch)
    args = SimpleNamespace(recipe=None, dataset=tmp_path / "own")
    with pytest.raises(ValueError, match=r"hold the numbers 0, 50, 100, 150, 200, with more gaps than classes"):
        script.describe_data(args)
    (tmp_path / "own" / "classes.txt").write_text("\n".join(f"class {number}" for number in range(201)))
    assert script.describe_data(args).num_classes == 201


def quickstart_script(monkeypatch):
    """As a module, which worker processes find that are not forked."""
    spec = importlib.util.spec_from_file_location("quickstart_script", SCRIPTS / "quickstart.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    return script


def test_quickstart_makes_the_network_that_a_recipe_describes(tmp_path, monkeypatch):
    script = quickstart_script(monkeypatch)
    recipe = load_recipe("scenes", {"image_size": (64, 64), "model_config": TINY_MODEL})
    monkeypatch.setattr(script, "make_trainer", lambda *_: SimpleNamespace(train=lambda: None))
    script.fine_tune(recipe, None, None, tmp_path / "model", SimpleNamespace(seed=0))
    config = LeMoReConfig.from_pretrained(tmp_path / "model")
    assert {name: getattr(config, name) for name in TINY_MODEL} == TINY_MODEL
    assert config.num_labels == recipe.num_classes


def test_quickstart_asks_the_processor_for_bfloat16_only_where_it_trains(monkeypatch):
    script = quickstart_script(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for has_apples_gpu in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda value=has_apples_gpu: value)
        assert script.has_fast_bfloat16() is not has_apples_gpu


def test_quickstart_trains_on_few_pictures(tmp_path, monkeypatch):
    """With one picture more than its batches take, and what worker processes need that are not forked, as on macOS."""
    script = quickstart_script(monkeypatch)
    recipe = load_recipe("scenes", {"crop_size": (64, 64), "image_size": (64, 64)})
    train = RecipeDataset(load_scenes(5, 1, 1, size=(64, 64))["train"], recipe, True, cache="memory")
    args = SimpleNamespace(output_dir=tmp_path, epochs=14, batch_size=2, learning_rate=1e-3, seed=0)
    model = LeMoReForSemanticSegmentation(LeMoReConfig(**TINY_MODEL, num_labels=9))
    trainer = script.make_trainer(model, recipe, args, train)
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [2, 2]
    assert trainer.args.warmup_steps == 14 * 2 // 27
    collate = pickle.loads(pickle.dumps(loader.collate_fn))
    assert collate([train[0]])["pixel_values"].is_floating_point()


def test_an_environment_that_broke_off_is_made_again(tmp_path):
    """As where Debian's python3-venv is missing at first: the interpreter is there, `activate` is not."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    (tmp_path / ".venv" / ".installed-base").touch()  # what is to be seen is the environment, not an installation
    (tmp_path / "python").write_text(
        f'#!/bin/sh\n{shlex.quote(sys.executable)} "$@" && touch .venv/.installed-base || exit 1\n'
    )
    (tmp_path / "python").chmod(0o755)
    source = 'source scripts/environment.sh "" && python -c "import sys; print(sys.prefix)"'
    made = subprocess.run(
        ["bash", "-euc", source],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": str(tmp_path / "python")},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert Path(made.stdout.strip()).samefile(tmp_path / ".venv")


def test_an_environment_of_another_kind_is_not_cleared_away(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / ".venv" / "conda-meta").mkdir(parents=True)
    refused = subprocess.run(["bash", "scripts/test.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert ".venv is there, and no environment that venv has made: move it away." in refused.stderr
    assert (tmp_path / ".venv" / "conda-meta").is_dir()


def test_an_old_python_is_named_before_anything_is_made(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / "old").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.6\nexit 1\n')
    (tmp_path / "old").chmod(0o755)
    refused = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": str(tmp_path / "old")},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "Python 3.10 or newer is needed" in refused.stderr
    assert "3.9.6" in refused.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_environment_as_windows_makes_it(tmp_path):
    """Its programs lie in `Scripts`. It is made once, and reused."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$@" >> called\nif [ "$2" = venv ]; then mkdir -p .venv/Scripts; cp "$0" .venv/Scripts/python; '
        "echo 'PATH=$PWD/.venv/Scripts:$PATH' > .venv/Scripts/activate; fi\n"
    )
    (tmp_path / "python").chmod(0o755)
    for _ in range(2):
        made = subprocess.run(
            ["bash", "-euc", 'source scripts/environment.sh "" && command -v python'],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": str(tmp_path / "python")},
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        assert Path(made.stdout.splitlines()[-1]).samefile(tmp_path / ".venv" / "Scripts" / "python")
    calls = (tmp_path / "called").read_text().splitlines()
    assert [call for call in calls if "venv" in call or "pip" in call] == [
        "-m venv --clear .venv",
        "-m pip install --quiet --disable-pip-version-check --editable .",
    ]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs Git")
def test_bash_can_read_its_scripts_where_git_changes_line_ends(tmp_path):
    """As Git for Windows does unless it is told not to."""
    (tmp_path / "scripts").mkdir()
    for name in (".gitattributes", "environment.sh", "quickstart.sh", "test.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    git = ["git", "-c", "core.autocrlf=true", "-C", tmp_path]
    for words in (["init", "--quiet"], ["add", "."], ["checkout-index", "--all", "--prefix=out/"]):
        subprocess.run([*git, *words], check=True)
    scripts = list((tmp_path / "out" / "scripts").glob("*.sh"))
    assert len(scripts) == 3
    assert not any(b"\r" in script.read_bytes() for script in scripts)


@pytest.mark.parametrize("options", [(), ("--dataset", "my data", "--epochs", "2")])
def test_quickstarts_options_go_to_the_script_and_not_to_pip(tmp_path, options):
    """A stand-in for the environment's Python prints what it is started with."""
    (tmp_path / "scripts").mkdir()
    for name in ("quickstart.sh", "environment.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text('#!/bin/sh\nprintf "<%s>" "$@"\necho\n')
    (binaries / "python").chmod(0o755)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    (tmp_path / "pyproject.toml").touch()
    command = ["bash", str(tmp_path / "scripts" / "quickstart.sh"), *options]
    elsewhere = tmp_path / "elsewhere"  # from which paths are read
    elsewhere.mkdir()
    (binaries / "python").write_text('#!/bin/sh\nprintf "<%s>" "$@"\necho\necho "$PWD" > "$0.place"\n')
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=elsewhere)
    assert Path(f"{binaries / 'python'}.place").read_text().strip() == str(elsewhere)
    *_, pip, quickstart = done.stdout.splitlines()
    assert pip.endswith("<--editable><.>")
    assert quickstart == "".join(f"<{word}>" for word in (tmp_path / "scripts" / "quickstart.py", *options))
