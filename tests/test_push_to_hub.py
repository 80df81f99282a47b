# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing: the folder's checks, the card, and the real Hub client against a small Hub on the loopback interface."""

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import run_client, running_hub
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation

from lemore_hf import LeMoReConfig, LeMoReForImageClassification, LeMoReForSemanticSegmentation
from lemore_hf.data.recipes import load_recipe
from lemore_hf.hub import PublishingError, ensure_card, validate_folder, write_card
from lemore_hf.image_processing_lemore import LeMoReImageProcessor

REPOSITORY = Path(__file__).parents[1]
CODE = {
    "configuration_lemore.py",
    "loss_lemore.py",
    "modeling_lemore.py",
    "operations_lemore.py",
    "image_processing_lemore.py",
    "image_processing_pil_lemore.py",
    "post_processing_lemore.py",
}
RESULTS = {
    "mean_iou": 0.68125,
    "per_class_iou": {"sky": 0.9, "road": 0.4625, "car": None},
    "mean_accuracy": 0.75,
    "overall_accuracy": 0.875,
    "confusion_matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
    "dataset": "CamVid",
    "split": "test",
    "num_images": 233,
    "recipe": "camvid",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model and its processor, as training leaves them, with a picture and a log."""
    folder = tmp_path_factory.mktemp("saved") / "final"
    torch.manual_seed(0)
    config = LeMoReConfig(
        image_size=64,
        stem_sizes=(8, 8),
        hidden_sizes=(8, 12, 16, 16),
        decoder_hidden_size=16,
        id2label={0: "sky", 1: "road", 2: "car"},
        label2id={"sky": 0, "road": 1, "car": 2},
    )
    LeMoReForSemanticSegmentation(config).save_pretrained(folder)
    LeMoReImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    Image.new("RGB", (8, 8)).save(folder / "confusion_matrix.png")
    (folder / "log.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "final"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The folder


def test_validated_files_are_those_that_others_need(folder):
    write_card(folder, "someone/lemore-test")
    names = {path.as_posix() for path in validate_folder(folder)}
    loadable = {"model.safetensors", "config.json", "preprocessor_config.json", *CODE}
    assert names == {*loadable, "README.md", "confusion_matrix.png"}


def test_missing_pieces_are_listed_together(folder):
    for name in ("model.safetensors", "preprocessor_config.json", "configuration_lemore.py"):
        (folder / name).unlink()
    with pytest.raises(PublishingError, match=r"model\.safetensors, preprocessor_config\.json, configuration"):
        validate_folder(folder)
    with pytest.raises(PublishingError, match="is not a folder"):
        validate_folder(folder / "nowhere")


def test_code_that_is_imported_only_by_other_code_is_needed(folder):
    (folder / "image_processing_pil_lemore.py").unlink()
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoImageProcessor": "image_processing_lemore.LeMoReImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(PublishingError, match=r"missing: image_processing_pil_lemore\.py"):
        validate_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_of_another_repository_is_refused(folder, name):
    content = json.loads((folder / name).read_text())
    content["auto_map"]["AutoModel"] = "stranger/other--modeling_lemore.LeMoReModel"
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(PublishingError, match=rf"{name} takes its code from another repository \(stranger/other\)"):
        validate_folder(folder)


def test_folder_that_needs_the_package_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishingError, match=r"auto_map in config\.json"):
        validate_folder(folder)


@pytest.mark.parametrize(("field", "value"), [("dilation", "2"), ("dilation", 0)])
def test_a_configuration_that_is_none_is_refused(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(PublishingError, match=r"config\.json is no valid LeMoRe configuration: (.|\n)*dilation"):
        validate_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "figures/scores.pkl"])
def test_pickled_files_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(PublishingError, match=f"pickled files .*{Path(name).name}"):
        validate_folder(folder)


def test_an_openvino_export_beside_the_model_is_no_pickle(folder):
    write_card(folder, "someone/lemore-test")
    files = validate_folder(folder)
    (folder / "export").mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (folder / "export" / name).write_bytes(b"x")
    assert validate_folder(folder) == files
    (folder / "export" / "openvino_model.xml").unlink()
    with pytest.raises(PublishingError, match=r"pickled files .*openvino_model\.bin"):
        validate_folder(folder)


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PublishingError, match="truncated or damaged"):
        validate_folder(folder)


def test_tampered_header_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F16"', 1))
    with pytest.raises(PublishingError, match="truncated or damaged"):
        validate_folder(folder)


def test_weights_of_another_network_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("classifier", "head"): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(PublishingError, match="does not hold the weights of the network"):
        validate_folder(folder)


def test_weights_that_are_not_finite_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    next(tensor for tensor in weights.values() if tensor.is_floating_point()).view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(PublishingError, match="NaN or infinity"):
        validate_folder(folder)


@pytest.mark.parametrize("link", ["figures/gone.png", "../secret.png"])
def test_card_may_show_only_pictures_of_the_folder(folder, link):
    (folder.parent / "secret.png").write_bytes(b"x")
    (folder / "README.md").write_text(f"![picture]({link})")
    with pytest.raises(PublishingError, match="pictures that are not in the folder"):
        validate_folder(folder)
    (folder / "README.md").write_text("![one](data:image/png;base64,AAAA) ![another](https://example.org/a.png)")
    validate_folder(folder)  # which no folder has to hold


def test_pictures_of_html_in_a_card_are_published_too(folder):
    (folder / "README.md").write_text('<img width="90" src="confusion_matrix.png"> <img src=\'figures/gone.png\'/>')
    with pytest.raises(PublishingError, match=r"not in the folder: figures/gone\.png\."):
        validate_folder(folder)
    (folder / "README.md").write_text('<img width="90" src="confusion_matrix.png">')
    assert Path("confusion_matrix.png") in validate_folder(folder)


def test_weights_that_are_infinite_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["decode_head.classifier.bias"][1] = -torch.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(PublishingError, match=r"NaN or infinity, in decode_head\.classifier\.bias:"):
        validate_folder(folder)


# The card


def test_card_says_what_the_results_say(folder):
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("camvid"))
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers"
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE.md")
    assert "CamVid: for research and tests" in (folder / "LICENSE.md").read_text()
    assert Path("LICENSE.md") in validate_folder(folder)
    assert card.data.datasets is None, "CamVid is no data set of the Hub"
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"mean_iou": 0.6813, "mean_accuracy": 0.75, "overall_accuracy": 0.875}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    model = LeMoReForSemanticSegmentation.from_pretrained(folder)
    assert f"{model.num_parameters():,}".replace(",", " ") in card.text
    for line in ("# lemore-test", "| mean IoU | 68.12 |", "| road | 46.25 |", "| car | – |", "233 images"):
        assert line in card.text.splitlines() or line in card.text
    assert "weights trained on it carry that limit" in card.text
    assert (
        "\n- **Preprocessing**: pictures are resized to 64×64 pixels, whatever their shape, and normalized"
        in card.text
    )
    assert "![confusion matrix](confusion_matrix.png)" in card.text
    assert 'model="someone/lemore-test"' in card.text


def test_a_card_takes_no_scores_of_other_weights(folder):
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    write_card(folder, "someone/lemore-test", {**RESULTS, "weights_sha256": weights})
    with pytest.raises(PublishingError, match=r"the results are of other weights \(run/best\) than those in"):
        write_card(folder, "someone/lemore-test", {**RESULTS, "weights_sha256": "0" * 64, "model": "run/best"})


def test_the_licence_goes_with_the_card(folder):
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("camvid"))
    assert "CamVid: for research and tests" in (folder / "LICENSE.md").read_text()
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("cityscapes"))
    assert "CamVid" not in (folder / "LICENSE.md").read_text()
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("scenes"))
    assert not (folder / "LICENSE.md").exists(), "apache-2.0 needs none"


def test_terms_of_initial_weights_hold_for_what_is_trained_from_them(folder):
    recipe = load_recipe("scenes")
    assert recipe.license == "Apache-2.0"
    run = {"steps": 3, "epochs": 1.0, "train_on": "train", "seed": 0, "hours": 0.1, "hardware": "a CPU"}
    run |= {"versions": {"torch": "2.14.1"}, "settings": {"init_from": None}}
    write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}, recipe)
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    run["settings"]["init_from"] = "/home/someone/lemore-camvid/final"
    text = write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}, recipe).read_text()
    assert ModelCard.load(folder / "README.md").data.license == "other"
    assert "began with other weights (lemore-camvid), whose terms hold for these too." in text
    assert ", and of the weights that the training began with." in (folder / "LICENSE.md").read_text()
    assert "/home/someone" not in text


def test_terms_of_initial_weights_hold_without_an_evaluation_too(folder):
    """The run lies beside the model's folder, where training writes it."""
    run = {"steps": 3, "epochs": 1.0, "train_on": "train", "seed": 0, "hours": 0.1, "hardware": "a CPU"}
    run |= {"versions": {"torch": "2.14.1"}, "settings": {"init_from": "model_cards/lemore-camvid"}}
    (folder.parent / "run.json").write_text(json.dumps(run))
    text = write_card(folder, "someone/lemore-test", recipe=load_recipe("scenes")).read_text()
    assert ModelCard.load(folder / "README.md").data.license == "other"
    assert "These weights have not been evaluated." in text
    assert "The scores above" not in text
    assert "3 steps, 1.0 epochs over `train`, from the weights of an earlier run, `model_cards/lemore-camvid`" in text
    assert "began with other weights (model_cards/lemore-camvid), whose terms hold for these too." in text
    (folder / "README.md").unlink()
    ensure_card(folder, "someone/lemore-test", license="cc-by-4.0")
    assert "whose terms hold for these too." in (folder / "README.md").read_text()
    # Scored where no run lay beside the weights, in a copy: evaluation has no more than a name for it then.
    write_card(folder, "someone/lemore-test", {**RESULTS, "run": {"name": "copy"}}, load_recipe("scenes"))
    assert ModelCard.load(folder / "README.md").data.license == "other"
    (folder.parent / "run.json").unlink()
    text = write_card(folder, "someone/lemore-test", RESULTS).read_text()
    assert "began with other weights" not in text
    assert "The scores above hold for pictures" in text


def test_a_repository_needs_a_valid_name(folder, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "scripts" / "push_to_hub.py"))["main"](
            ["--model", str(folder), "--repo_id", "a/b/c", "--dry_run"]
        )
    assert "--repo_id: Repo id must be in the form" in capsys.readouterr().err


def test_card_tells_of_the_run_that_the_weights_come_from(folder):
    run = {"steps": 300, "epochs": 5.1, "train_on": "train+validation", "seed": 3, "hours": 1.25, "hardware": "a CPU"}
    run |= {"versions": {"torch": "2.14.1"}, "settings": {"init_from": None}}
    text = write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("300 steps")]
    assert line == "300 steps, 5.1 epochs over `train+validation`, from random weights; seed 3;"
    run["settings"]["init_from"] = "crops/final"
    text = write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}, load_recipe("camvid")).read_text()
    assert "from the weights of an earlier run, `crops`; seed 3;\n1.25 hours on a CPU with PyTorch 2.14.1." in text
    assert load_recipe("camvid").notes[:40] not in text, "notes on a recipe are not on these weights"
    text = write_card(
        folder, "someone/lemore-test", {**RESULTS, "run": run}, training_notes="In *stages*.\n"
    ).read_text()
    assert "## Training\n\nIn *stages*.\n\n## " in text
    assert "1.25 hours" not in text
    run["settings"]["init_from"] = ["one/final", "two/best"]
    text = write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}).read_text()
    assert "over `train+validation`, from the mean of the weights of earlier runs, `one`, `two`; seed 3;" in text
    run |= {"steps": 0, "epochs": 0.0, "hours": 0.0}
    text = write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}).read_text()
    assert "\nThe mean of the weights of earlier runs, `one`, `two`; these were trained on `train+" in text


@pytest.mark.parametrize(
    ("resize", "said"),
    [
        (None, "233 images, in percent"),
        ([720, 960], "233 images, resized to 720×960 pixels for the network, in percent"),
        (512, "233 images, resized to a shortest edge of 512 pixels for the network, in percent"),
    ],
)
def test_card_says_at_what_size_the_scores_are(folder, resize, said):
    measured = {"inference": {"resize": resize}, "multiply_accumulates": 1_990_834_176, "image_size": [720, 960]}
    text = write_card(folder, "someone/lemore-test", {**RESULTS, **measured}).read_text()
    assert said in text
    assert "- **Multiply-accumulates**: 1991 million for 720×960 pixels\n- **Weights**" in text


def test_card_says_how_the_scores_were_made(folder):
    inference = {"scales": [0.75, 1.0, 1.25], "flip": True, "window": [360, 480], "resize": None}
    text = write_card(
        folder, "x/lemore-test", {**RESULTS, "inference": inference, "mixed_precision": "bf16"}
    ).read_text()
    how = "averaged over the scales 0.75, 1.0, 1.25, averaged with their mirror images, in windows of 360×480 pixels"
    assert f"233 images, {how}, computed in bf16, in percent of the pixels at their own size" in text
    inference = {"scales": [1.0], "flip": False, "window": None, "resize": None}
    text = write_card(
        folder, "x/lemore-test", {**RESULTS, "inference": inference, "mixed_precision": "no"}
    ).read_text()
    assert "233 images, in percent of the pixels at their own size; void pixels do not count:" in text
    text = write_card(folder, "x/lemore-test", {**RESULTS, "inference": inference | {"center_crop": None}}).read_text()
    assert "233 images, in percent" in text
    limited = inference | {"resize": 900, "max_longest_edge": 1200}
    text = write_card(folder, "x/lemore-test", {**RESULTS, "inference": limited}).read_text()
    assert "resized to a shortest edge of 900 pixels and a longest one of at most 1200 for the network, in" in text
    middle = inference | {"center_crop": [270, 480]}
    text = write_card(folder, "x/lemore-test", {**RESULTS, "inference": middle}).read_text()
    assert "233 images, of each the middle 270×480 pixels, in percent" in text


def test_card_of_a_classifier_speaks_of_pictures(folder):
    config = LeMoReConfig.from_pretrained(folder)
    LeMoReForImageClassification(config).save_pretrained(folder)
    results = {"accuracy": 0.5, "dataset": "ImageNet-1k", "split": "validation", "num_images": 9}
    text = write_card(folder, "someone/lemore-test", results).read_text()
    assert "On ImageNet-1k, split `validation`, 9 images, in percent:\n" in text
    assert "Every picture gets one of the classes" in text
    assert "pixels do not count" not in text


def test_card_tells_of_the_crop(folder):
    """Of classifiers, whose pictures lose their edges."""
    LeMoReImageProcessor(**load_recipe("imagenet1k").processor_settings).save_pretrained(folder)
    text = write_card(folder, "someone/lemore-test", RESULTS).read_text()
    assert "a shortest edge of 256 pixels, cropped to the 224×224 pixels in their middle, and normalized" in text


def test_card_names_the_hubs_data_sets_alone(folder):
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("ade20k"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["zhoubolei/scene_parse_150"]
    assert {result.dataset_type for result in card.data.eval_results} == {"zhoubolei/scene_parse_150"}
    text = write_card(folder, "someone/lemore-test", recipe=load_recipe("folder")).read_text()
    assert "Local folder" not in text
    results = {**RESULTS, "dataset": "Local folder"}
    text = write_card(folder, "someone/lemore-test", results, recipe=load_recipe("folder")).read_text()
    assert "Local folder" not in text
    assert "On pictures of a local folder, split `test`" in text


def test_card_shows_no_hidden_pictures(folder):
    """Such as macOS leaves beside those that it copies."""
    (folder / "._confusion_matrix.png").write_bytes(b"x")
    text = write_card(folder, "someone/lemore-test", RESULTS).read_text()
    assert text.count(".png)") == text.count("confusion_matrix.png)") == 1
    assert "._" not in text


def test_scores_of_classes_without_names_are_in_the_labels_order(folder):
    results = {**RESULTS, "per_class_iou": [0.9, 0.4625, None]}
    text = write_card(folder, "someone/lemore-test", results).read_text()
    assert "| sky | 90.00 |\n| road | 46.25 |\n| car | – |\n" in text
    with pytest.raises(PublishingError, match=r"not of this model: they hold the IoU of the classes 0, 1, 2, 3, the"):
        write_card(folder, "someone/lemore-test", {**RESULTS, "per_class_iou": [0.9, 0.4625, None, 0.5]})


def test_results_know_better_than_the_folder_of_which_run_they_are(folder):
    run = {"steps": 300, "epochs": 5.1, "train_on": "train", "seed": 3, "hours": 1.25, "hardware": "a CPU"}
    run |= {"versions": {"torch": "2.14.1"}, "settings": {"init_from": None}}
    (folder.parent / "run.json").write_text(json.dumps(run | {"steps": 40, "epochs": 1.0}))
    text = write_card(folder, "someone/lemore-test", {**RESULTS, "run": run}).read_text()
    assert "300 steps, 5.1 epochs" in text
    assert "40 steps" not in text


def test_a_licence_of_ones_own_is_kept(folder):
    (folder / "LICENSE.md").write_text("mine")
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("camvid"))
    assert (folder / "LICENSE.md").read_text() == "mine"


def test_card_without_results_claims_nothing(folder):
    write_card(folder, "someone/lemore-test")
    card = ModelCard.load(folder / "README.md")
    assert "have not been evaluated" in card.text
    assert card.data.eval_results is None
    assert card.data.license == "unknown"
    write_card(folder, "someone/lemore-test", recipe=load_recipe("scenes"))
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"


def test_card_of_a_user_is_kept(folder):
    (folder / "README.md").write_text("mine")
    ensure_card(folder, "someone/lemore-test")
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(PublishingError, match="has a card already"):
        ensure_card(folder, "someone/lemore-test", recipe=load_recipe("camvid"))
    ensure_card(folder, "someone/lemore-test", RESULTS)
    assert "68.12" in (folder / "README.md").read_text()
    ensure_card(folder, "someone/lemore-test")
    with pytest.raises(PublishingError, match="loads from 'someone/lemore-test', not from 'else/lemore-test'"):
        ensure_card(folder, "else/lemore-test")


def test_card_of_a_network_with_a_single_label(folder):
    config = LeMoReConfig.from_pretrained(folder, id2label={0: "crack"}, label2id={"crack": 0})
    LeMoReForSemanticSegmentation(config).save_pretrained(folder)
    scores = {"mean_iou": 0.7, "per_class_iou": {"off": 0.9, "crack": 0.5}}  # a recipe has a class for the rest
    text = write_card(folder, "someone/lemore-test", scores).read_text()
    assert "| off | 90.00 |" in text
    assert "| crack | 50.00 |" in text


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"mean_iou": 68.1}, r"numbers in 0…1: mean_iou=68\.1"),
        ({"loss": 1.0}, "no evaluation's JSON"),
        ({"mean_iou": 0.5, "per_class_iou": [0.1, 0.2]}, "not of this model"),
        ({"mean_iou": 0.5, "export": {"format": "onnx", "precision": "int8"}}, r"of an export \(onnx, int8\)"),
        ({"mean_iou": 0.5, "per_class_iou": {"sky": 0.1, "road": 0.2, "boat": 0.3}}, "not of this model.*boat"),
    ],
)
def test_results_that_cannot_be_reported_are_refused_and_the_old_card_stays(folder, results, message):
    (folder / "README.md").write_text("old")
    with pytest.raises(PublishingError, match=message):
        write_card(folder, "someone/lemore-test", results)
    assert (folder / "README.md").read_text() == "old"


def test_an_installed_wheel_is_whole_and_renders_cards(folder, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("lemore_hf", "model_cards"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run([sys.executable, *build, str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    for path in (REPOSITORY / "lemore_hf").rglob("*"):
        if path.suffix in (".py", ".yaml", ".html", ".typed"):
            assert (site / path.relative_to(REPOSITORY)).is_file()

    render = "import sys, lemore_hf.hub as hub; hub.write_card(sys.argv[1], 'someone/x'); print(hub.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", render, str(folder)], cwd=site, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout.strip() == str(site / "lemore_hf" / "hub.py"), result.stderr
    assert "have not been evaluated" in (folder / "README.md").read_text()


# The Hub


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


DOWNLOAD = """
    import sys
    sys.modules["lemore_hf"] = None  # As where the package is not installed.
    import torch
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    image = torch.arange(3 * 50 * 70, dtype=torch.uint8).reshape(3, 50, 70)
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    torch.save(logits, sys.argv[2])
"""


def test_published_model_gives_the_same_logits_elsewhere(hub, folder, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(RESULTS))
    script = [str(REPOSITORY / "scripts" / "push_to_hub.py")]
    arguments = ["--model", folder, "--repo_id", "lemore-test", "--results", tmp_path / "metrics.json"]
    result = run_client(script, hub, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert f"{hub.url}/someone/lemore-test" in result.stdout

    published = hub.repositories["someone/lemore-test"]
    assert set(published) == {".gitattributes", *map(str, validate_folder(folder))}
    assert all(published[name] == (folder / name).read_bytes() for name in published if name != ".gitattributes")
    assert published["README.md"].count(b"68.12") == 1

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run_client(
        ["-c", textwrap.dedent(DOWNLOAD)], hub, elsewhere, "someone/lemore-test", elsewhere / "logits.pt", token=""
    )
    assert result.returncode == 0, result.stderr
    image = torch.arange(3 * 50 * 70, dtype=torch.uint8).reshape(3, 50, 70)
    with torch.no_grad():
        model = LeMoReForSemanticSegmentation.from_pretrained(folder)
        expected = model(**LeMoReImageProcessor.from_pretrained(folder)(image, return_tensors="pt")).logits
    torch.testing.assert_close(torch.load(elsewhere / "logits.pt"), expected, rtol=0, atol=0)


def test_output_is_exactly_the_folder_that_would_be_uploaded(folder, tmp_path):
    push = runpy.run_path(str(REPOSITORY / "scripts" / "push_to_hub.py"))["main"]
    Image.new("RGB", (9, 9)).save(tmp_path / "curves.png")
    (tmp_path / "metrics.json").write_text(json.dumps(RESULTS))
    options = ["--model", str(folder), "--repo_id", "someone/lemore-test", "--results", str(tmp_path / "metrics.json")]
    output = tmp_path / "released"
    for _ in range(2):  # the second replaces the first
        push([*options, "--figures", str(tmp_path / "curves.png"), "--output", str(output)])
        assert {path.relative_to(output) for path in output.rglob("*") if path.is_file()} == set(
            validate_folder(output)
        )
    assert "![curves](figures/curves.png)" in (output / "README.md").read_text()
    assert AutoModelForSemanticSegmentation.from_pretrained(output).config.id2label[2] == "car"
    current = (folder / "modeling_lemore.py").read_bytes()
    (folder / "modeling_lemore.py").write_text("# of an older release")
    push([*options, "--refresh_code", "--output", str(output)])
    assert (output / "modeling_lemore.py").read_bytes() == current
    with pytest.raises(SystemExit, match="holds the model's own folder"):
        push([*options, "--output", str(folder)])
    with pytest.raises(SystemExit, match="holds the model's own folder"):
        push([*options, "--output", str(folder.parent), "--overwrite"])
    assert (folder / "model.safetensors").is_file()
    (output / "checkpoint-1").mkdir()
    (output / "checkpoint-1" / "trainer_state.json").touch()
    with pytest.raises(SystemExit, match=r"holds what would be lost: checkpoint-1/trainer_state\.json\. Give another"):
        push([*options, "--output", str(output)])
    push([*options, "--output", str(output), "--overwrite"])
    assert not (output / "checkpoint-1").exists()

    # A name with a space is shown like any other; a card that stays as it is would not show it.
    Image.new("RGB", (9, 9)).save(tmp_path / "my plot.png")
    push([*options, "--figures", str(tmp_path / "my plot.png"), "--output", str(output)])
    assert "![my plot](figures/my%20plot.png)" in (output / "README.md").read_text()
    assert (output / "figures" / "my plot.png").is_file()
    (tmp_path / "plot.pdf").write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"plot\.pdf: a card shows \.png"):
        push([*options, "--figures", str(tmp_path / "plot.pdf")])
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"scores\.json is not the JSON object"):
        push(["--model", str(folder), "--repo_id", "someone/x", "--results", str(tmp_path / "scores.json")])
    without_results = ["--model", str(folder), "--repo_id", "someone/lemore-test", "--dry_run"]
    with pytest.raises(SystemExit, match="has a card already; give --results"):
        push([*without_results, "--figures", str(tmp_path / "curves.png")])


# Runs the script again and again in one process, and prints how each run ended.
PUBLISH_EACH = """
    import json, os, runpy, sys, time
    time.sleep = lambda seconds: None  # The client waits longer and longer between its attempts.
    script, folder, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    ends = []
    for token, repo_id, *options in runs:
        os.environ["HF_TOKEN"] = token
        sys.argv = [script, "--model", folder, "--repo_id", repo_id, *options]
        try:
            runpy.run_path(script, run_name="__main__")
            ends.append(None)
        except SystemExit as error:
            ends.append(error.code)
    print(json.dumps(ends))
"""


def test_failures_are_explained_and_leave_everything_as_it_was(hub, folder, tmp_path):
    (folder / "README.md").write_text("A card of its user's own.")
    before = contents(folder)
    other = {".gitattributes": b"", "config.json": b"{}", "notes.txt": b"important"}
    for name in ("taken", "replaced"):
        hub.commit(f"someone/{name}", dict(other))
    hub.commit("someone/cut", {".gitattributes": b""})
    hub.cut_repositories = ("someone/cut",)
    runs = [
        ("hf_wrong", "someone/new"),
        (hub.token, "someone/taken"),
        (hub.token, "someone/cut"),
        (hub.token, "someone/replaced", "--overwrite"),
        (hub.token, "replaced"),  # The same content again.
        (hub.token, "replaced", "--private"),
        (hub.token, "secret", "--private"),
        (hub.token, "unclear", "--model", str(tmp_path / "unclear")),
    ]
    shutil.copytree(folder, tmp_path / "unclear")
    (tmp_path / "unclear" / "README.md").write_text("---\nlicense: other\nlicense_link: README.md\n---\n# A model\n")
    script = REPOSITORY / "scripts" / "push_to_hub.py"
    result = run_client(["-c", textwrap.dedent(PUBLISH_EACH)], hub, tmp_path, script, folder, json.dumps(runs))
    assert result.returncode == 0, result.stderr
    wrong_token, taken, cut, replaced, again, public, secret, unclear = json.loads(result.stdout.splitlines()[-1])

    # `sys.exit` with a text prints it and ends with status 1.
    assert wrong_token.startswith("error: cannot sign in")
    assert "HF_TOKEN" in wrong_token
    assert "someone/new" not in hub.repositories
    assert "already holds other content (config.json, notes.txt)" in taken
    assert "--overwrite" in taken
    assert hub.repositories["someone/taken"] == other
    assert cut.startswith("error: cannot upload to someone/cut")
    assert "run the command again" in cut
    assert set(hub.repositories["someone/cut"]) == {".gitattributes"}

    assert replaced is None
    assert set(hub.repositories["someone/replaced"]) == {".gitattributes", *map(str, validate_folder(folder))}
    assert again is None
    assert public.startswith("error: the repository someone/replaced is there already, and public")
    assert secret is None
    assert hub.private_repositories == {"someone/secret"}
    assert unclear.startswith("error: cannot upload to someone/unclear: Invalid metadata in README.md")
    assert "license_link" in unclear
    assert "connection" not in unclear
    assert sum(path == "/api/models/someone/replaced/commit/main" for _, path in hub.requests) == 1
    assert contents(folder) == before


def test_a_repository_of_the_same_files_is_completed_and_one_of_other_weights_is_kept(hub, folder, tmp_path):
    write_card(folder, "someone/begun")
    published = {path.as_posix(): (folder / path).read_bytes() for path in validate_folder(folder)}
    begun = {name: content for name, content in published.items() if name != "confusion_matrix.png"}
    hub.commit("someone/begun", {".gitattributes": b"", **begun})
    weights = published["model.safetensors"]
    other = {".gitattributes": b"", **begun, "model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}
    hub.commit("someone/other", dict(other))  # of as many bytes, as another training leaves them
    shutil.copytree(folder, tmp_path / "other")
    write_card(tmp_path / "other", "someone/other")
    hub.commit("someone/contested", {".gitattributes": b""})
    hub.contested_repositories = ("someone/contested",)
    shutil.copytree(folder, tmp_path / "contested")
    write_card(tmp_path / "contested", "someone/contested")
    runs = [(hub.token, "someone/begun")]
    runs += [(hub.token, f"someone/{name}", "--model", str(tmp_path / name)) for name in ("other", "contested")]
    script = REPOSITORY / "scripts" / "push_to_hub.py"
    result = run_client(["-c", textwrap.dedent(PUBLISH_EACH)], hub, tmp_path, script, folder, json.dumps(runs))
    assert result.returncode == 0, result.stderr
    completed, refused, contested = json.loads(result.stdout.splitlines()[-1])
    assert completed is None
    assert hub.repositories["someone/begun"] == {".gitattributes": b"", **published}
    assert "already holds other content (README.md, model.safetensors)" in refused
    assert hub.repositories["someone/other"] == other
    assert "The repository changed meanwhile: look at it" in contested
    assert set(hub.repositories["someone/contested"]) == {".gitattributes", "notes.txt"}


def test_class_names_stay_in_their_cells(folder):
    config = json.loads((folder / "config.json").read_text())
    names = ["car | truck", "<img src=x>\nroad", "[a](http://b.c)"]
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    scores = {"mean_iou": 0.5, "per_class_iou": dict.fromkeys(names, 0.5)}
    card = write_card(folder, "someone/lemore-test", scores).read_text()
    rows = ["| car \\| truck | 50.00 |", "| &lt;img src=x&gt; road | 50.00 |", "| \\[a\\](http://b.c) | 50.00 |"]
    assert "\n".join(rows) in card


def test_iou_of_classes_in_percent_is_refused(folder):
    scores = {"mean_iou": 0.5, "per_class_iou": {"sky": 90.0, "road": "high", "car": None}}
    with pytest.raises(PublishingError, match=r"not numbers in 0…1: sky=90\.0, road='high'"):
        write_card(folder, "someone/lemore-test", scores)


def test_card_takes_the_place_of_a_link_and_not_of_its_file(folder, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    (folder / "README.md").symlink_to(tmp_path / "notes.md")
    write_card(folder, "someone/lemore-test")
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert "# lemore-test" in (folder / "README.md").read_text()


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_damaged_results_are_named(folder, tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    push = runpy.run_path(str(REPOSITORY / "scripts" / "push_to_hub.py"))["main"]
    with pytest.raises(SystemExit, match=r"scores\.json is not readable JSON"):
        push(["--model", str(folder), "--repo_id", "someone/x", "--results", str(tmp_path / "scores.json")])


def test_pictures_of_any_name_are_shown(folder):
    Image.new("RGB", (8, 8)).save(folder / "a](b_c.png")
    write_card(folder, "someone/lemore-test")
    assert Path("a](b_c.png") in validate_folder(folder)
