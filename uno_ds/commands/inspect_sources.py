"""What the command that looks inside models reads before any model is opened: recipes, images,
prompts."""

import argparse
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uno_ds.data import scenes
from uno_ds.data.images import ImageSettings
from uno_ds.data.scenes import ScenesSettings
from uno_ds.data.sources import EMBEDDED, Source, SourceSettings
from uno_ds.data.stream import VitImageSettings
from uno_ds.generation.inference import SampleSettings
from uno_ds.inspection.diagnosis import Prompt, read_prompts
from uno_ds.inspection.images import Composition
from uno_ds.inspection.plan import ENCODER
from uno_ds.model.adapter_files import AdapterFolder
from uno_ds.model.adapter_merging import read_share
from uno_ds.model.architecture import Architecture, packaged, read_architecture
from uno_ds.model.regression_metadata import identity_in
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.recipe_file import read_tree
from uno_ds.sequence.composition import SequenceSettings
from uno_ds.settings import SettingsError, build, to_plain
from uno_ds.training.checkpoint_file import is_checkpoint, open_checkpoint
from uno_ds.training.export import architecture_of

# Added to the seed of the recipe's scenes, so that scenes to look at are others than those of
# training.
HELD_OUT = 1_000_003
DATA_FOLDER = "runs/data"


@dataclass(frozen=True)
class Chosen:
    """Settings that all checkpoints share, and where they are from."""

    composition: Composition
    objective: ObjectiveSettings
    drawing: SampleSettings
    embedded: ScenesSettings
    data_folder: str
    origin: str


def shape_of(path: str) -> Architecture:
    """The architecture of a checkpoint; reads no weights. Raises SettingsError under
    `--checkpoint`."""
    folder = packaged(path)
    try:
        if is_checkpoint(folder):
            return architecture_of(*open_checkpoint(folder, "--checkpoint"))
        if not folder.is_dir():
            raise SettingsError("", f"'{path}' does not exist.")
        return read_architecture(folder)
    except SettingsError as error:
        raise SettingsError("--checkpoint", error.message) from None


def regression_of(path: str, adapters: Sequence[str] = ()) -> Mapping[str, Any]:
    """What a checkpoint's metaqueries, or those of the first adapter on it, were trained by
    (model/regression_metadata)."""
    if adapters:
        return identity_in(read_share(adapters[0])[0])
    folder = packaged(path)
    if is_checkpoint(folder):
        _, manifest = open_checkpoint(folder, "--checkpoint")
        identity: Mapping[str, Any] = manifest.get("regression", {})
        return identity if isinstance(identity, Mapping) else {}
    return identity_in(folder)


def adapters_of(options: argparse.Namespace, path: str, number: int) -> list[str]:
    """The texts of --adapter behind the checkpoint `number`, whose path is `path`. Raises
    SettingsError for one that cannot be merged into it; reads no weights."""
    texts = (options.adapter or {}).get(number, [])
    if texts and is_checkpoint(packaged(path)):
        raise SettingsError(
            "--adapter",
            f"belongs to a base folder, and {path} is the checkpoint of a run, whose own adapters "
            "are merged in already.",
        )
    for text in texts:
        AdapterFolder(read_share(text)[0], shape_of(path), "--adapter")
    return texts


def fingerprint(path: str, adapters: Sequence[str] = ()) -> list[Any]:
    """Names, sizes and times of the files that hold a checkpoint's weights, and likewise of the
    adapters that are merged in, with their shares."""
    folder = packaged(path)
    if is_checkpoint(folder):
        folder, _ = open_checkpoint(folder, "--checkpoint")
    found = _files_of(folder)
    for text in adapters:
        adapter, share = read_share(text)
        found += [share, *_files_of(adapter)]
    return found


def _files_of(folder: Path) -> list[Any]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json")]
    # Written beside a checkpoint when it is first verified.
    kept = [file for file in files if file.name != "verified.json"]
    found = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in kept]
    return [str(folder.resolve()), *found]


def names_of(paths: list[str], adapters: Sequence[Sequence[str]] = ()) -> tuple[str, ...]:
    """A name for each checkpoint that can be a folder's: the last part of its path that says
    something, those of its adapters with their shares, and a number where it repeats."""
    names: list[str] = []
    for path, texts in itertools.zip_longest(paths, adapters, fillvalue=()):
        name = _last_part(str(path))
        for text in texts:
            folder, share = read_share(text)
            name += f" + {_last_part(str(folder))}" + (f" x {share:g}" if share != 1 else "")
        # The other encoder has a folder of its own.
        taken = [ENCODER, *names]
        same = sum(other == name or other.startswith(f"{name} (") for other in taken)
        names.append(f"{name} ({same + 1})" if same else name)
    return tuple(names)


def _last_part(path: str) -> str:
    parts = [part for part in Path(path).parts if part not in ("/", "..", "checkpoints", "latest")]
    name = parts[-1] if parts else "model"
    return f"{parts[-2]} {name}" if name.startswith("step_") and len(parts) > 1 else name


def choose(options: argparse.Namespace, shape: Architecture) -> Chosen:
    """Raises SettingsError."""
    recipes = {name: _recipe_of(name) for name in options.checkpoint}
    trees = {name: found for name, found in recipes.items() if found is not None}
    origin = f"the largest sizes of {options.checkpoint[0]}"
    tree: dict[str, Any] = {}
    if options.recipe is not None:
        origin, tree = f"recipe {options.recipe}", read_tree(options.recipe)
        trees = {options.recipe: tree}
    elif trees:
        name, tree = next(iter(trees.items()))
        origin = f"the recipe of {name}"
    data, sequence, drawing = (_section(tree, key) for key in ("data", "sequence", "samples"))
    if sequence:
        most_tokens = build(SequenceSettings, sequence, "sequence").max_text_tokens
    else:
        most_tokens = SequenceSettings.max_text_tokens
    composition = Composition(
        latent_image=_images(ImageSettings, data, "latent_image", shape, "latent"),
        vit_image=_images(VitImageSettings, data, "vit_image", shape, "vit"),
        max_text_tokens=most_tokens,
        prompts=not options.without_prompts,
        seed=options.seed,
    )
    embedded = build(ScenesSettings, data.get("scenes") or {}, "data.scenes")
    embedded = dataclasses.replace(
        embedded,
        rows=options.images,
        seed=embedded.seed + HELD_OUT + options.seed,
        **({} if tree else {"size": _side(shape)}),
    )
    drawing |= {"prompts": [], "seed": options.seed}
    if not tree or "height" not in drawing:
        drawing |= {"height": _side(shape), "width": _side(shape)}
    if options.steps is not None:
        drawing["steps"] = options.steps
    try:
        settings = build(SampleSettings, drawing)
    except SettingsError as error:
        raise SettingsError(f"--{error.key}", error.message) from None
    objective, of_objective = _objective(trees)
    return Chosen(
        composition,
        objective,
        settings,
        embedded,
        str(data.get("folder", DATA_FOLDER)),
        f"{origin}, weights of the losses of {of_objective}",
    )


def open_source(options: argparse.Namespace, chosen: Chosen) -> Source:
    """Raises SettingsError under `--data`."""
    try:
        return Source(
            build(SourceSettings, {"path": options.data}),
            decoding=chosen.composition.latent_image,
            embedded=chosen.embedded,
            root=chosen.data_folder,
        )
    except SettingsError as error:
        raise SettingsError("--data", error.message) from None
    except (OSError, ValueError) as error:
        raise SettingsError("--data", f"'{options.data}' cannot be opened: {error}") from None


def prompts_of(options: argparse.Namespace, chosen: Chosen) -> tuple[Prompt, ...]:
    """Those of --prompts, or of scenes where the data is an embedded set; none otherwise."""
    if options.prompts is not None:
        return tuple(read_prompts(options.prompts))
    if options.data not in EMBEDDED:
        return ()
    drawn = scenes.prompts(chosen.embedded, options.scene_prompts, options.seed + 1)
    return tuple(Prompt(text, scene) for text, scene in drawn)


def plain_prompts(prompts: tuple[Prompt, ...]) -> str:
    """A digest of what is drawn and asked, not of verdicts, which come later."""
    content = [(prompt.text, prompt.scene, prompt.questions) for prompt in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _recipe_of(path: str) -> dict[str, Any] | None:
    """The recipe of the run that a checkpoint belongs to, if it is there."""
    folder = packaged(path)
    if not is_checkpoint(folder):
        return None
    run = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    file = run / "recipe.yaml"
    return read_tree(str(file)) if file.is_file() else None


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy of a section of a recipe; empty where it has none."""
    section = tree.get(key) or {}
    if not isinstance(section, dict):
        raise SettingsError("--recipe", f"its {key} must be a mapping of keys to values.")
    return dict(section)


def _objective(trees: dict[str, dict[str, Any]]) -> tuple[ObjectiveSettings, str]:
    """The weights of the first recipe that has losses of understanding, so that all models are
    measured with the same, and whose they are; else the defaults."""
    for name, tree in trees.items():
        settings = build(ObjectiveSettings, _section(tree, "objective"), "objective")
        if settings.caption_weight or settings.regression_weight:
            return dataclasses.replace(settings, answer_weight=0.0), name
    return ObjectiveSettings(answer_weight=0.0), "the defaults"


def _images(cls: Any, data: dict[str, Any], key: str, shape: Architecture, kind: str) -> Any:
    """Sizes of the recipe, or as large as the position tables allow."""
    geometry = shape.geometry
    stride, side = (
        (geometry.latent_stride, geometry.latent_side)
        if kind == "latent"
        else (geometry.vit_stride, geometry.vit_side)
    )
    if key in data:
        settings = build(cls, data[key], f"data.{key}")
        if settings.max_side > stride * side:
            raise SettingsError(
                "--recipe",
                f"its data.{key}.max_side is {settings.max_side} pixels, but the model's position "
                f"table holds {side} tokens of {stride} pixels per side = {stride * side}.",
            )
        return settings
    most = min(stride * side, cls().max_side)
    return build(
        cls,
        {"max_side": most, "min_side": min(most, cls().min_side), "max_pixels": most * most},
        f"data.{key}",
    )


def _side(shape: Architecture) -> int:
    """The largest square picture of the model, in pixels."""
    return min(1024, shape.geometry.latent_stride * shape.geometry.latent_side)


def plain_settings(chosen: Chosen) -> dict[str, Any]:
    """What of the shared settings decides the results."""
    return {
        "latent_image": to_plain(chosen.composition.latent_image),
        "vit_image": to_plain(chosen.composition.vit_image),
        "max_text_tokens": chosen.composition.max_text_tokens,
        "prompts_shown": chosen.composition.prompts,
        "seed": chosen.composition.seed,
        "losses": to_plain(chosen.objective),
        "drawing": to_plain(chosen.drawing),
    }
