import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(
    r'__version__ = "([^"]+)"', (root / "uno_ds/__init__.py").read_text(encoding="utf-8")
).group(1)

# The folder `kernels` is imported as uno_ds.kernels: a top-level package of that name would shadow
# the Hugging Face library `kernels`, which transformers looks for. `ds_configs` is installed too,
# so that a wheel contains it.
packages = find_packages(
    include=["uno_ds", "uno_ds.*"], exclude=["uno_ds.kernels", "uno_ds.kernels.*"]
)
packages += [
    "uno_ds.kernels",
    *(f"uno_ds.kernels.{name}" for name in find_packages("kernels")),
    "uno_ds.ds_configs",
]

# Adapters (model.train: lora) and quantised frozen weights (model.frozen_precision: nf4).
LORA = ["peft>=0.21", "bitsandbytes>=0.50; platform_system == 'Linux'"]

setup(
    name="uno_ds",
    version=version,
    description="UNO post-training of unified multimodal models on DeepSpeed ZeRO-3",
    long_description=(root / "README.md").read_text(encoding="utf-8")
    if (root / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir={
        "uno_ds": "uno_ds",
        "uno_ds.kernels": "kernels",
        "uno_ds.ds_configs": "ds_configs",
    },
    package_data={
        "uno_ds": [
            f"recipes/**/*.{suffix}" for suffix in ("yaml", "json", "safetensors", "png", "md")
        ]
        + ["model/flux_autoencoder/*.json"],
        "uno_ds.kernels": ["**/*.json"],
        "uno_ds.ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19.8",
        "transformers>=5",
        "diffusers>=0.36",
        "datasets>=4",
        "pyarrow",
        "tokenizers",
        "safetensors",
        "numpy",
        "pillow",
        "pyyaml",
        "matplotlib",
        "tqdm",
        "tensorboard",
    ],
    # There is no extra for megablocks: version 0.10 pins torch 2.7 and numpy below 2.1, so no
    # resolver can meet both. It is a backend of kernels.experts for environments that were built
    # around it, as docs/fused_losses.md says.
    extras_require={
        "cuda": ["liger-kernel>=0.8"],
        "flash": ["flash-attn>=2.8"],
        "lora": LORA,
        "wandb": ["wandb"],
        "inspect": ["scikit-learn>=1.6"],
        # geneval by Mask2Former (scipy), FID by torchmetrics with torch-fidelity's Inception.
        "evaluate": ["torchmetrics>=1.9", "torch-fidelity>=0.4", "scipy"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.12",
            "mypy>=2.4",
            "torchmetrics>=1.9",
            "scipy",
            "types-psutil",
            "types-PyYAML",
            "types-tqdm",
            "liger-kernel>=0.8; platform_system == 'Linux'",
            "scikit-learn>=1.6",
            # Not every torch brings one that builds wheels, as a test does.
            "setuptools>=77",
            *LORA,
        ],
    },
)
