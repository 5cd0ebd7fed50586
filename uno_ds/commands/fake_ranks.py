"""One optimizer step as rank 0 of N in a single process, with the run's sharding, losses and
structure on a narrow model.

Torch's fake process group completes every collective at once with this rank's own data, so the
values of loss and weights mean nothing. The step shows that DeepSpeed initialises with this number
of ranks, that forward calls every module, that backward reaches every trained weight through
DeepSpeed's hooks, and that the optimizer updates them.
"""

import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from uno_ds.data.layouts import get_layout
from uno_ds.data.layouts.base import RandomContent
from uno_ds.model.adapters import adapted_modules
from uno_ds.model.architecture import Architecture
from uno_ds.recipe import Recipe
from uno_ds.run import Run
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import ImageViews
from uno_ds.settings import build, to_plain
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine

HEAD_DIM, SIDE = 8, 32
IMAGES = {"max_side": SIDE, "min_side": 16, "max_pixels": SIDE**2}
PROVES = (
    "the engine was initialised, and forward, backward through every trained weight and the "
    "optimizer's step ran. The other ranks are simulated, so loss and weights mean nothing."
)


def run_one_step(run: Run) -> dict[str, Any]:
    """Runs the step and describes it, for JSON; any exception of the step is passed on."""
    started = time.perf_counter()
    before = dict(os.environ)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": str(run.world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=run.world_size)
    try:
        deepspeed.init_distributed(verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            ran = _step(run, Path(folder))
        return ran | {"seconds": time.perf_counter() - started, "proves": PROVES}
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ |= before


def _step(run: Run, folder: Path) -> dict[str, Any]:
    recipe = narrow(run, folder)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engine = Engine(recipe, device, run.read_answers)
    trained = {
        name: parameter for name, parameter in engine.named_parameters() if parameter.requires_grad
    }
    average = Ema(engine, 0.5)
    # Their initial value is 0, through which the flow loss has no gradient in any layer, and A of
    # an adapter none at all.
    for name, output in engine.named_parameters():
        if name != "model.llm2vae.weight" and ".lora_B." not in name:
            continue
        with deepspeed.zero.GatheredParameters([output], modifier_rank=0), torch.no_grad():
            output.normal_()
    before = {name: shard.clone() for name, shard in average.shards.items()}
    forward: set[str] = set()
    for name, module in engine.objective.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, name=name: forward.add(name))
    batch = synthetic_batch(recipe, [layout for _, layout in run.layouts])
    result = engine.train_step([batch], 1e-2)
    average.update()
    owners = {name.rpartition(".")[0] for name, _ in engine.named_parameters()}
    moved = {name for name, shard in average.shards.items() if not torch.equal(shard, before[name])}
    return {
        "ranks": engine.world_size,
        "stage": engine.placement.stage,
        "precision": engine.placement.precision,
        "device": engine.placement.device,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.named_parameters()),
        "step_applied": not result.skipped,
        "adapted_modules": len(adapted_modules(engine.objective.model)),
        "modules": len(owners),
        "modules_called": len(forward & owners),
        "trained_weights": len(trained),
        # Below ZeRO-3 rank 0 updates its share of them, and the simulated ranks theirs never.
        "trained_weights_of_rank": sum(shard.numel() > 0 for shard in average.shards.values()),
        "trained_weights_moved": len(moved),
    }


def narrow(run: Run, folder: Path) -> Recipe:
    """The recipe on a model of two layers with heads in the same proportion, one pack per rank, and
    sharding thresholds in proportion to it, so that its weights are sharded and gathered as the
    large ones are. The DeepSpeed configuration is written into `folder`."""
    recipe = run.recipe
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(_narrow_config(recipe)))
    plain = to_plain(recipe)
    del plain["architecture"]
    plain |= {"samples": {}, "hardware": {}}
    plain["model"] |= {
        "base": None,
        "published_shape": None,
        "adapter": None,
        "tokenizer": "tiny_base",
        "architecture": to_plain(_narrow_shape(recipe.architecture)),
    }
    plain["sequence"] |= {
        "token_budget": 4096,
        "max_text_tokens": 16,
        "drop_text": 0.0,
        "drop_vit": 0.0,
        "drop_latent": 0.0,
        "supervised_fraction": 1.0,
        "supervision_window": [0.0, 1.0],
    }
    # A pattern may name layers that the narrow model does not have.
    plain["lora"]["targets"] = "attention+mlp"
    plain["data"] |= {"latent_image": dict(IMAGES), "vit_image": dict(IMAGES)}
    plain["engine"] |= {
        "deepspeed": str(path),
        "packs_per_step": run.world_size,
        "precision": recipe.engine.resolved_precision(),
    }
    return build(Recipe, plain)


def _narrow_shape(shape: Architecture) -> Architecture:
    heads = shape.heads // shape.kv_heads
    hidden = heads * HEAD_DIM
    if hidden % 4:  # which an Architecture does not allow
        hidden *= 4
    vit_hidden = 2 * HEAD_DIM
    return Architecture(
        hidden=hidden,
        layers=2,
        heads=heads,
        kv_heads=1,
        head_dim=HEAD_DIM,
        mlp=max(8, hidden * shape.mlp // shape.hidden),
        vocabulary=512,
        vit_hidden=vit_hidden,
        vit_layers=2,
        vit_heads=2,
        vit_mlp=max(8, vit_hidden * shape.vit_mlp // shape.vit_hidden),
        vit_patch=8,
        vit_side=SIDE // 8,
        codec="pixel",
        codec_downsample=2,
        latent_channels=12,
        latent_patch=2,
        latent_side=SIDE // 4,
    )


def _narrow_config(recipe: Recipe) -> dict[str, Any]:
    """The run's DeepSpeed configuration with the thresholds of it that are given made smaller."""
    config = recipe.deepspeed_config()
    zero = config["zero_optimization"]
    thresholds = {
        "stage3_param_persistence_threshold": 64,
        "reduce_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 100_000,
        "stage3_max_live_parameters": 100_000,
        "stage3_max_reuse_distance": 50_000,
    }
    for key, value in thresholds.items():
        if key in zero:
            zero[key] = value
    return config


def synthetic_batch(recipe: Recipe, layouts: list[str]) -> PackedBatch:
    """One sample of each layout, random images and texts."""
    composer = recipe.composer(None)
    rng = np.random.default_rng(recipe.seed)

    def text() -> list[int]:
        return rng.integers(4, recipe.architecture.vocabulary, size=6).tolist()

    def pixels() -> np.ndarray:
        return rng.uniform(-1, 1, size=(3, SIDE, SIDE)).astype(np.float32)

    def image() -> ImageViews:
        return ImageViews(latent=pixels(), vit=pixels())

    content = RandomContent(text, image)
    different = dict.fromkeys(layouts)
    samples = [get_layout(name).random_sample(composer, content, rng) for name in different]
    return recipe.collator(composer.tokens)(samples)
