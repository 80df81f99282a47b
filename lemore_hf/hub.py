# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing a trained model on the Hugging Face Hub: its folder checked, its card rendered, one commit uploaded."""

from __future__ import annotations

import contextlib
import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoFile,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, StrictDataclassError
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from .checkpointing import atomic_file, pickled_files, sha256_of
from .configuration_lemore import LeMoReConfig
from .data.recipes import Recipe, listed
from .modeling_lemore import LeMoReForImageClassification, LeMoReForSemanticSegmentation

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
CARD, LICENSE = "README.md", "LICENSE.md"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".svg", ".gif")
# In the repository it lies beside the package, in an installed wheel inside.
_CARD_FOLDERS = [folder / "model_cards" for folder in Path(__file__).parents[:2]]
CARD_TEMPLATE = next((folder for folder in _CARD_FOLDERS if folder.is_dir()), _CARD_FOLDERS[0]) / "template.md"

_MODEL_CLASSES = {cls.__name__: cls for cls in (LeMoReForSemanticSegmentation, LeMoReForImageClassification)}
_PIPELINE_TAGS = {
    "LeMoReForSemanticSegmentation": "image-segmentation",
    "LeMoReForImageClassification": "image-classification",
}
# Scores of an evaluation that a card reports: key in its JSON → name.
_SCORES = {
    "mean_iou": "mean IoU",
    "mean_accuracy": "mean class accuracy",
    "overall_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
    "accuracy": "top-1 accuracy",
    "top5_accuracy": "top-5 accuracy",
}


class PublishingError(RuntimeError):
    """A folder that cannot be published, or a Hub that did not take it. The message says why and what to do."""


# The folder


def validate_folder(folder: str | Path) -> list[Path]:
    """Check that a folder can be loaded by anyone who downloads it, with or without this package.

    Args:
        folder: as `save_pretrained` of model and image processor write it, with the model card.

    Returns:
        The files to publish, relative to the folder: weights, configurations, remote code, card, licence and the card's
        pictures. Whatever else lies in the folder stays there.

    Raises:
        PublishingError: for pickled files, a missing piece (all are listed), or weights that are truncated, not
            finite, or not those of the network that the configuration describes.
    """
    folder = Path(folder)
    return [*_loadable_files(folder), *_card_files(folder)]


def _loadable_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PublishingError(f"{folder} is not a folder. Give the one that `save_pretrained` wrote.")
    if pickled := [str(path.relative_to(folder)) for path in pickled_files(folder.rglob("*"))]:
        raise PublishingError(
            f"{folder} holds pickled files ({', '.join(pickled)}), which can run code when they are loaded. Delete or "
            "move them: only safetensors are published."
        )
    missing = [name for name in (WEIGHTS, CONFIG, PROCESSOR) if not (folder / name).is_file()]
    code, missing_code = _code_files(folder)
    if missing := missing + missing_code:
        raise PublishingError(
            f"{folder} cannot be loaded by others, this is missing: {', '.join(missing)}. Save the model and the image "
            "processor there with `save_pretrained`, after `import lemore_hf`."
        )
    _check_weights(folder)
    return [Path(name) for name in (WEIGHTS, CONFIG, PROCESSOR, *code)]


def _code_files(folder: Path) -> tuple[list[str], list[str]]:
    """The remote-code files that the configurations name and those that these import; and what of that is missing."""
    pending, missing = [], []
    for name in (CONFIG, PROCESSOR):
        if (folder / name).is_file():
            auto_map = read_json(folder / name).get("auto_map")
            if not auto_map:
                missing.append(f"auto_map in {name}")
            pending += re.findall(r'"(\w+)\.\w+"', json.dumps(auto_map))
            if other := re.findall(r'"([^"]+)--[^"]*"', json.dumps(auto_map)):
                raise PublishingError(
                    f"{folder / name} takes its code from another repository ({other[0]}), which whoever loads the model "
                    "would run: save model and image processor anew with `save_pretrained`."
                )
    found: list[str] = []
    while pending:
        name = f"{pending.pop()}.py"
        if name in found + missing:
            continue
        if (folder / name).is_file():
            found.append(name)
            pending += get_relative_imports(folder / name)
        else:
            missing.append(name)
    return sorted(found), sorted(missing)


def _check_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  Not a dictionary.
    except (SafetensorError, OSError) as error:
        raise PublishingError(f"{path} is truncated or damaged ({error}). Save or copy the model again.") from error
    with torch.device("meta"):
        network = _model_class(folder)(_load_config(folder)).state_dict()
    shapes, expected = ({name: tuple(tensor.shape) for name, tensor in x.items()} for x in (tensors, network))
    if wrong := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
        name = wrong[0]
        raise PublishingError(
            f"{path} does not hold the weights of the network in {CONFIG}: {len(wrong)} tensors differ, such as {name} "
            f"({shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}). Save model and configuration "
            "together."
        )
    not_finite = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if not_finite:
        raise PublishingError(f"{path} holds NaN or infinity, in {listed(not_finite, 5)}: training has diverged.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PublishingError: naming the file, where there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise PublishingError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise PublishingError(f"{path} is not the JSON object that belongs there, but a {type(content).__name__}.")
    return content


def _load_config(folder: Path) -> LeMoReConfig:
    try:
        return LeMoReConfig.from_dict(read_json(folder / CONFIG))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise PublishingError(f"{folder / CONFIG} is no valid LeMoRe configuration: {error}") from error


def _model_class(folder: Path) -> type[torch.nn.Module]:
    architectures = read_json(folder / CONFIG).get("architectures") or [None]
    if architectures[0] not in _MODEL_CLASSES:
        raise PublishingError(
            f"{folder / CONFIG} names the architecture {architectures[0]}; published are {', '.join(_MODEL_CLASSES)}."
        )
    return _MODEL_CLASSES[architectures[0]]


def _card_files(folder: Path) -> list[Path]:
    """The card, the licence, if the folder has one, and the pictures in the folder that the card shows."""
    if not (folder / CARD).is_file():
        raise PublishingError(f"{folder} has no {CARD}: render it with `write_card`, from an evaluation's JSON.")
    text = (folder / CARD).read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(r"<img[^>]*\ssrc=[\"']([^\"']+)", text)
    pictures = sorted({unquote(link) for link in links if "://" not in link and not link.startswith("data:")})
    outside = [link for link in pictures if not (folder / link).resolve().is_relative_to(folder.resolve())]
    missing = [link for link in pictures if not (folder / link).is_file()]
    if bad := outside + missing:
        raise PublishingError(f"{folder / CARD} shows pictures that are not in the folder: {', '.join(bad)}.")
    return [Path(name) for name in (CARD, LICENSE, *pictures) if (folder / name).is_file()]


# The card


def write_card(
    folder: str | Path,
    repo_id: str,
    results: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    license: str | None = None,
    training_notes: str | None = None,
    template: str | Path = CARD_TEMPLATE,
) -> Path:
    """Render the model card into a folder that `save_pretrained` wrote; and its `LICENSE.md`, where the Hub asks for one.

    Args:
        folder: the model's; every picture in it and in its subfolder `figures/` is shown.
        repo_id: the repository that the card's example loads from.
        results: an evaluation's scores, the JSON of `scripts/evaluate.py`; without them the card says that there are
            none, and tells of the training by the `run.json` beside the folder, if there is one. `mean_iou` and the other
            scores are in 0…1, `per_class_iou` is by name or in the labels' order.
        recipe: the recipe of the training, for the data's name, terms and citation.
        license: Hub licence identifier of the weights. Default: `apache-2.0` where the recipe's data is, `other` with
            the data's terms where they are others or where the training began with other weights, whose terms hold too,
            `unknown` without recipe. `other` needs a file with the terms: one in the folder stays.
        training_notes: Markdown on how the weights came about, instead of what the results tell of the run.
        template: Jinja template of the card.

    Raises:
        PublishingError: if configurations, weights, results or template cannot be read.
    """
    folder = Path(folder)
    if not Path(template).is_file():
        raise PublishingError(f"there is no card template {template}; give one, such as the repository's model_cards/")
    results = results or {}
    config, architecture = _load_config(folder), _model_class(folder).__name__
    if export := results.get("export"):
        raise PublishingError(
            f"the results are of an export ({export.get('format')}, {export.get('precision')}), not of these weights: "
            "evaluate the model itself"
        )
    of_weights = results.get("weights_sha256")
    if of_weights and (folder / WEIGHTS).is_file() and of_weights != sha256_of(folder / WEIGHTS):
        raise PublishingError(
            f"the results are of other weights ({results.get('model')}) than those in {folder}: evaluate these"
        )
    scores = _scores(results)
    # An evaluation's own `run` says less where no run.json lay beside what it scored.
    results = {**results, "run": _run_beside(folder) | (results.get("run") or {})}
    card = ModelCard.from_template(
        _card_data(architecture, repo_id, results, scores, recipe, license),
        template_path=str(template),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        pipeline_tag=_PIPELINE_TAGS[architecture],
        config=config,
        processor=read_json(folder / PROCESSOR),
        num_parameters=_num_parameters(folder),
        results=results,
        scores=[(name, f"{100 * scores[key]:.2f}") for key, name in _SCORES.items() if key in scores],
        per_class=_per_class(results, config),
        recipe=recipe,
        training_notes=training_notes,
        initial_weights=_initial_weights(results),
        pictures=_pictures(folder),
    )
    # Rendered in full before the old card goes.
    with atomic_file(folder / CARD) as part:  # what an old one links to stays as it is
        part.write_text(str(card), encoding="utf-8")
    licence = folder / LICENSE
    if not licence.is_file() or licence.read_text(encoding="utf-8").startswith(_CODE_TERMS):  # not a text of one's own
        licence.unlink(missing_ok=True)
        if card.data.license == "other":
            licence.write_text(_terms(recipe, bool(_initial_weights(results))), encoding="utf-8")
    return folder / CARD


def ensure_card(
    folder: str | Path,
    repo_id: str,
    results: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    license: str | None = None,
    training_notes: str | None = None,
) -> None:
    """Render the card (`write_card`) where there is none or where `results` are given; else keep the one there is.

    Raises:
        PublishingError: for a recipe, licence or notes without results, where a card exists: they would have to replace
            it; and for a card whose example loads from another repository.
    """
    path = Path(folder) / CARD
    if results is not None or not path.is_file():
        write_card(folder, repo_id, results, recipe, license, training_notes)
    elif recipe or license or training_notes:
        raise PublishingError(
            f"{folder} has a card already, which recipe, licence and notes do not change: give the results too, so that it is "
            f"rendered anew, or delete its {CARD}."
        )
    else:
        example = re.search(r'pipeline\("[^"]+", model="([^"]+)"', path.read_text(encoding="utf-8"))
        if example and example[1] != repo_id:
            raise PublishingError(
                f"the card in {folder} loads from {example[1]!r}, not from {repo_id!r}: give the results too, so that it "
                f"is rendered anew, or mend or delete its {CARD}."
            )


def _card_data(
    architecture: str,
    repo_id: str,
    results: Mapping[str, Any],
    scores: Mapping[str, float],
    recipe: Recipe | None,
    license: str | None,
) -> ModelCardData:
    hub_dataset = recipe.dataset if recipe and "/" in (recipe.dataset or "") else None
    if recipe and recipe.name == "folder":  # whose title is of the recipe, not of data
        name = "custom"
    else:
        name = (recipe.title or recipe.name) if recipe else results.get("dataset") or "custom"
    terms = recipe.license if recipe else ""
    if license is None:
        is_free = terms.lower() == "apache-2.0" and not _initial_weights(results)
        license = "unknown" if not terms else "apache-2.0" if is_free else "other"
    # What the Hub asks for where the licence is not one of its list.
    other = {"license_name": "terms-of-the-training-data", "license_link": LICENSE} if license == "other" else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINE_TAGS[architecture],
        license=license,
        **other,
        tags=["lemore", "vision", "lightweight"],
        datasets=[hub_dataset] if hub_dataset else None,
        metrics=list(scores) or None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type=_PIPELINE_TAGS[architecture],
                dataset_type=hub_dataset or (recipe.name if recipe else "custom"),
                dataset_name=name,
                dataset_split=results.get("split"),
                metric_type=key,
                metric_name=_SCORES[key],
                metric_value=round(score, 4),
            )
            for key, score in scores.items()
        ]
        or None,
    )


_CODE_TERMS = "# Licence\n\nThe code in this folder is licensed under the Apache License, version 2.0"


def _run_beside(folder: Path) -> dict[str, Any]:
    """`run.json` of the training that a model comes from, which lies beside its folder; empty where there is none."""
    path = folder.resolve().parent / "run.json"
    return read_json(path) if path.is_file() else {}


def _initial_weights(results: Mapping[str, Any]) -> list[str]:
    """The folders or Hub ids whose weights a training began with; none where these were random."""
    start = ((results.get("run") or {}).get("settings") or {}).get("init_from") or []
    folders = [start] if isinstance(start, str) else start
    folders = [re.sub(r"[/\\](final|best)$", "", folder) for folder in folders]
    # A path from the root says nothing to others.
    return [Path(folder).name if Path(folder).is_absolute() else folder for folder in folders]


def _terms(recipe: Recipe | None, began_with_others: bool) -> str:
    """The licence file of weights whose licence is not one of the Hub's list."""
    terms = f"{recipe.title or recipe.name}: {recipe.license}" if recipe and recipe.license else "not recorded here"
    return (
        f"{_CODE_TERMS} (https://www.apache.org/licenses/LICENSE-2.0).\n\n"
        "The weights carry the terms of the data that they were trained "
        f"on ({terms}){', and of the weights that the training began with' if began_with_others else ''}.\n"
    )


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    scores = {key: results[key] for key in _SCORES if results.get(key) is not None}
    if bad := [f"{key}={score!r}" for key, score in scores.items() if not _is_fraction(score)]:
        raise PublishingError(f"the results hold scores that are not numbers in 0…1: {', '.join(bad)}")
    if results and not scores:
        raise PublishingError(
            f"the results hold none of the scores {', '.join(_SCORES)}: they are no evaluation's JSON"
        )
    return scores


def _is_fraction(score: Any) -> bool:
    return isinstance(score, (int, float)) and not isinstance(score, bool) and 0 <= score <= 1


def _per_class(results: Mapping[str, Any], config: LeMoReConfig) -> list[tuple[str, str]]:
    """Class names and IoU in percent; a class that does not occur in the set has none."""
    scores = results.get("per_class_iou") or {}
    names = [config.id2label[index] for index in range(config.num_labels)]
    if config.num_labels == 1 and len(scores) == 2:
        names = list(scores) if isinstance(scores, Mapping) else ["background", *names]  # one label tells two apart
    if not isinstance(scores, Mapping):
        scores = dict(enumerate(scores)) if len(scores) != len(names) else dict(zip(names, scores, strict=True))
    if scores and list(scores) != names:
        raise PublishingError(
            f"the results are not of this model: they hold the IoU of the classes {', '.join(map(str, scores))}, the "
            f"model has {', '.join(names)}"
        )
    scores = {name: None if isinstance(iou, float) and math.isnan(iou) else iou for name, iou in scores.items()}
    if bad := [f"{name}={iou!r}" for name, iou in scores.items() if iou is not None and not _is_fraction(iou)]:
        raise PublishingError(f"the results hold IoU of classes that are not numbers in 0…1: {listed(bad, 5)}")
    return [(_in_table(name), "–" if iou is None else f"{100 * iou:.2f}") for name, iou in scores.items()]


def _in_table(text: Any) -> str:
    """Text as a cell of Markdown shows it: with no line, column, link or HTML of its own."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _num_parameters(folder: Path) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _model_class(folder)(_load_config(folder)).parameters())


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """(caption, path) of the pictures beside the card."""
    paths = sorted(path for place in (folder, folder / "figures") for path in place.glob("*"))
    return [
        (re.sub(r"[][_\s-]", " ", path.stem), quote(path.relative_to(folder).as_posix()))
        for path in paths
        if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
    ]


# The Hub


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    license: str | None = None,
    training_notes: str | None = None,
    overwrite: bool = False,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Publish a folder as a model repository, in one commit: a failed upload leaves the repository as it was.

    Args:
        folder: as `validate_folder` describes it, its card as `ensure_card` does; otherwise it is only read.
        repo_id: "name" or "namespace/name"; created if it does not exist.
        results, recipe, license, training_notes: as in `ensure_card`.
        overwrite: let the folder replace what the repository holds. Without it a repository with other content is
            refused; the same content again is no error.
        private: create the repository as a private one; an existing public one is refused.
        token: default: the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        The repository's address.

    Raises:
        PublishingError: for a folder that `validate_folder` refuses, a token without the right to write, a repository
            with other content, or an upload that failed.
    """
    folder = Path(folder)
    loadable = _loadable_files(folder)
    api = HfApi(token=token)
    user = signed_in_user(token)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    ensure_card(folder, repo_id, results, recipe, license, training_notes)
    files = [*loadable, *_card_files(folder)]

    with _explained(f"create or read the repository {repo_id}"):
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise PublishingError(
                f"the repository {repo_id} is there already, and public: make it private in its settings on the Hub, or "
                "choose another name."
            )
        revision = info.sha
        tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    remote.pop(".gitattributes", None)  # Written by the Hub.
    local = {path.as_posix(): folder / path for path in files}
    other = sorted(path for path, entry in remote.items() if path not in local or not _is_same(entry, local[path]))
    if other and not overwrite:
        raise PublishingError(
            f"the repository {repo_id} already holds other content ({listed(other, 8)}). Choose another name, or replace "
            "it with --overwrite (its history keeps the old files)."
        )
    if not other and remote.keys() == local.keys():
        return str(address)

    operations = [CommitOperationAdd(path, str(file)) for path, file in local.items()]
    operations += [CommitOperationDelete(path) for path in remote if path not in local]
    with _explained(f"upload to {repo_id}"):
        api.create_commit(
            repo_id, operations, commit_message=f"Publish {repo_id.split('/')[-1]}", parent_commit=revision
        )
    return str(address)


def signed_in_user(token: str | None = None) -> str:
    """Name of the Hub's user, to be asked for before long work that ends with `push_folder`.

    Raises:
        PublishingError: if there is no token, or the Hub does not take it.
    """
    api = HfApi(token=token)
    with _explained(f"sign in to {api.endpoint}"):
        return api.whoami()["name"]


def _is_same(entry: RepoFile, path: Path) -> bool:
    """Whether a file of the repository has the content of a local one, by the hash that the Hub keeps of it."""
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_of(path)
    return entry.blob_id == git_hash(path.read_bytes())


@contextlib.contextmanager
def _explained(action: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `PublishingError` that says what to do."""
    try:
        yield
    except PublishingError:
        raise
    except LocalTokenNotFoundError as error:
        raise PublishingError(f"cannot {action}: there is no token. Run `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = {
            401: "The token is wrong or has expired: run `hf auth login`, or set HF_TOKEN to one that may write.",
            403: "The token has no right to write there: make one that has, or choose another namespace.",
            412: "The repository changed meanwhile: look at it, and run the command again.",
        }.get(status, "Run the command again.")
        raise PublishingError(f"cannot {action} (HTTP status {status}). {advice} Details: {error}") from error
    except ValueError as error:  # A name or metadata that the Hub does not take.
        raise PublishingError(f"cannot {action}: {error}") from error
    except Exception as error:  # The client's transport errors differ between its versions and share no other base.
        cause = error.__cause__ or error
        raise PublishingError(
            f"cannot {action}: {error} ({type(cause).__name__}: {cause}). The repository has the files it had before, "
            "the local folder is complete. Check the connection and run the command again."
        ) from error
