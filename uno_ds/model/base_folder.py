"""Writing a base folder, complete or not at all, with BAGEL's files and names; importing one from a
folder in any of BAGEL's formats."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from uno_ds.data.text import Tokenizer
from uno_ds.model.architecture import (
    Architecture,
    add_image_size,
    add_model_type,
    read_architecture,
    write_architecture,
    write_interface,
)
from uno_ds.model.bagel import Bagel
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.tensor_file import sync_folder
from uno_ds.model.weights import (
    FIXED,
    TOKENIZERS,
    WeightsFile,
    bagel_name,
    check_base_folder,
    describe_nonfinite,
    meta_tensors,
    write_weights,
)
from uno_ds.settings import SettingsError

PREPROCESSOR = "preprocessor_config.json"
CONFIGS = (
    "llm_config.json",
    "vit_config.json",
    "config.json",
    "generation_config.json",
    PREPROCESSOR,
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


@contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a partial folder next to `out` that is renamed to `out` when the block succeeds and is
    removed when it fails, so that `out` is never half a model. Raises SettingsError if `out` is not
    empty, unless `replace` is given, and if writing fails."""
    if not replace:
        refuse_existing(out)
    out = out.resolve()
    partial = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        if out.exists():
            shutil.rmtree(out)
        os.rename(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise SettingsError(
            str(error.filename or out), f"cannot be written: {error.strerror or error}."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(
            str(out), "exists and is not an empty folder; name another one, or remove it."
        )


def copy_companions(
    target: Path, architecture: Architecture, base: Path | None, tokenizer: Path
) -> None:
    """Writes the files of a base other than its weights: configuration (the base's own, or that of
    a model trained from scratch), tokenizer, autoencoder. Raises SettingsError without a
    tokenizer."""
    if base is None:
        write_architecture(architecture, target)
    companions = [tokenizer / name for name in TOKENIZER]
    if base is not None:
        companions += [base / name for name in (*CONFIGS, FLUX_FILE)]
    for file in companions:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    add_image_size(architecture, target)
    if not (target / "config.json").exists():
        write_interface(architecture, target)
    add_model_type(target)
    _add_preprocessor(architecture, target)
    if not any((target / files[0]).exists() for files in TOKENIZERS):
        raise SettingsError(
            str(tokenizer),
            "holds no tokenizer.json, and no vocab.json with merges.txt; a base needs a tokenizer.",
        )


def _add_preprocessor(architecture: Architecture, folder: Path) -> None:
    """Writes the file from which serving engines read how the visual encoder's images are
    normalised, where the base has none."""
    path = folder / PREPROCESSOR
    if path.exists():
        return
    side = architecture.vit_side * architecture.vit_patch
    half = [0.5, 0.5, 0.5]
    content = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"height": side, "width": side},
        "image_mean": half,
        "image_std": half,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def position_tables(shape: Architecture) -> dict[str, torch.Tensor]:
    """{our name: table} of the fixed tables, in fp32."""
    with torch.device("meta"):
        model = Bagel(shape)
    model.reset_tables()
    return {name: getattr(model, name) for name in FIXED}


def import_base(
    source: Path, out: Path, shard_bytes: float = math.inf, allow_nonfinite: bool = False
) -> list[str]:
    """Checks a BAGEL folder (one file or several, any floating dtype, patch embedding as a
    convolution or as a matrix) and writes it as this program's bases are: bf16, a matrix, with the
    position tables. Raises SettingsError in one line. Returns warnings: NaN and infinite values
    that were allowed, added tokens that the tokenizer splits."""
    refuse_existing(out)
    check_base_folder(source, convolution=True)
    shape = read_architecture(source)
    tokenizer = Tokenizer(source)
    tokenizer.check_vocabulary(shape.vocabulary, "model.tokenizer")
    nonfinite: dict[str, int] = {}
    weights = WeightsFile(source, nonfinite)
    tables = _checked_position_tables(shape, weights)

    def read(name: str) -> torch.Tensor:
        return tables[name] if name in tables else weights.read_matrix(bagel_name(name))

    with new_folder(out) as folder:
        write_weights(folder, meta_tensors(shape), read, shard_bytes=shard_bytes)
        if nonfinite and not allow_nonfinite:
            raise SettingsError(
                "model.base",
                f"{source} {describe_nonfinite(nonfinite)}; to import it all the same, give "
                "--allow-nonfinite.",
            )
        copy_companions(folder, shape, source, source)
    allowed = [f"{source} {describe_nonfinite(nonfinite)}, as allowed."] if nonfinite else []
    return allowed + tokenizer.warnings()


def _checked_position_tables(shape: Architecture, weights: WeightsFile) -> dict[str, torch.Tensor]:
    """`position_tables`. Raises SettingsError if the weights hold different ones; shapes are
    compared first, since a table may be too large to compute."""
    like = meta_tensors(shape)
    stored = [name for name in FIXED if bagel_name(name) in weights.where]
    for name in stored:
        found, wanted = weights.shape(bagel_name(name)), tuple(like[name].shape)
        if found != wanted:
            raise SettingsError(
                "model.base",
                f"{weights.folder}: the weights do not fit the architecture: {bagel_name(name)} "
                f"has shape {list(found)} instead of {list(wanted)}.",
            )
    tables = position_tables(shape)
    for name in stored:
        # bf16 rounds values below 1 by up to 1/256. Written so that a difference of NaN fails too.
        difference = (weights.read(bagel_name(name)).float() - tables[name]).abs().max()
        if not difference <= 1 / 128:
            raise SettingsError(
                str(weights.folder),
                f"{bagel_name(name)} is not the fixed sine-cosine table of BAGEL, which this "
                "program computes.",
            )
    return tables
