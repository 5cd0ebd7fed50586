"""DeepSpeed's configuration: the sharding settings of a file, completed by the recipe's."""

import logging
from typing import TYPE_CHECKING, Any

import deepspeed
import pydantic
from deepspeed.runtime.config import DeepSpeedConfig

from uno_ds.data.files import one_line
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

# Sections and switches of a DeepSpeed file that change the model, its data or its gradients.
UNSUPPORTED = (
    "amp",
    "autotuning",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "elasticity",
    "gradient_predivide_factor",
    "hybrid_engine",
    "prescale_gradients",
    "progressive_layer_drop",
    "sequence_parallel_size",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
)
# Deprecated switches, whose memory use `uno_ds.cost` does not know.
OLD = ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory")


def deepspeed_config(recipe: "Recipe", world_size: int) -> dict[str, Any]:
    """The file's sharding settings, completed by the recipe's batch, clipping and precision."""
    engine, config = recipe.engine, recipe.deepspeed_config()
    stage = config["zero_optimization"]["stage"]
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": engine.resolved_packs_per_step() // world_size,
        "gradient_clipping": engine.clip if stage else 0.0,
        # DeepSpeed would require its own CPU Adam for an offloaded optimizer, which needs a
        # compiler.
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }
    if engine.resolved_precision() == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def check_deepspeed(recipe: "Recipe", world_size: int) -> None:
    """Raises SettingsError if the recipe's DeepSpeed file contains settings that this project does
    not support, or that DeepSpeed would reject when the engine starts."""
    file = recipe.engine.deepspeed
    config = deepspeed_config(recipe, world_size)
    sections = [(key, config.get(key)) for key in UNSUPPORTED]
    sections += [(f"zero_optimization.{key}", config["zero_optimization"].get(key)) for key in OLD]
    for key, section in sections:
        if _switches_on(section):
            raise SettingsError(
                "engine.deepspeed",
                f"{file} asks for {key}, which is not supported; remove it from the file.",
            )
    # Without a process group DeepSpeed assumes one rank, which contradicts this number.
    config.pop("train_batch_size", None)
    logger = deepspeed.utils.logger
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SettingsError(
            "engine.deepspeed",
            f"{file} is refused by DeepSpeed: {key}: {first['msg']}, got {first['input']!r:.80}.",
        ) from None
    except Exception as error:  # whatever its checks raise
        raise SettingsError(
            "engine.deepspeed", f"{file} is refused by DeepSpeed: {one_line(error)}"
        ) from None
    finally:
        logger.setLevel(level)
    for key in ("offload_param", "offload_optimizer"):
        if (config["zero_optimization"].get(key) or {}).get("device") == "nvme":
            raise SettingsError(
                "engine.deepspeed",
                f"{file} offloads to NVMe ({key}), which is not supported; use cpu.",
            )


def _switches_on(section: Any) -> bool:
    """Whether a section or switch has an effect; a factor or a size of 1 has none."""
    if isinstance(section, dict) and "enabled" in section:
        return bool(section["enabled"])
    return section is True or section not in (None, False, {}, 1)
