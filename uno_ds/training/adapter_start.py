"""Training that continues from an adapter folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uno_ds.model.adapter_files import AdapterFolder
from uno_ds.model.adapters import is_adapter
from uno_ds.model.regression_metadata import identity_in
from uno_ds.training.checkpoint_file import WEIGHT
from uno_ds.training.collectives import raise_on_all_ranks
from uno_ds.training.regression_identity import foreign_weights
from uno_ds.training.shards import TrainedState, shape_of

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe
    from uno_ds.training.engine import Engine


def seed_dropout(recipe: "Recipe", step: int, rank: int) -> None:
    """Makes what the dropout of adapters drops depend on seed, step and rank, so that a resumed run
    drops the same."""
    if recipe.model.train == "lora" and recipe.lora.dropout:
        torch.manual_seed(hash((recipe.seed, step, rank)) % 2**63)


def restore_adapter(engine: "Engine") -> None:
    """Sets the fp32 master weights of a new engine to those of `model.adapter`; what the folder
    does not hold keeps its initial values. Collective; raises SettingsError on every rank for an
    adapter of another base."""
    recipe = engine.recipe
    assert recipe.model.adapter is not None
    state = TrainedState(engine)
    with raise_on_all_ranks(), torch.no_grad():
        folder = AdapterFolder(Path(recipe.model.adapter), recipe.architecture, "model.adapter")
        folder.check_base(engine.frozen_hashes.__getitem__)
        beside = folder.beside
        foreign = foreign_weights(identity_in(folder.folder), engine.regression)
        for name, parameter in state.parameters.items():
            same_shape = beside.get(name) == tuple(shape_of(parameter))
            if not is_adapter(name) and (name in foreign or not same_shape):
                if engine.rank == 0:
                    lacking = f"that of {foreign[name]}" if name in foreign else "none of its shape"
                    print(f"{name} starts anew: {folder.folder} has {lacking}", flush=True)
                continue
            piece = state.pieces.get(name)
            if piece is not None:
                values = folder.read(name).flatten()[piece.start : piece.start + piece.size]
                state.write(WEIGHT, name, values)
    state.end_restore()
