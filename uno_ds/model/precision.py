"""The number formats of weights and activations."""

import torch

# By their names in recipes and flags.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
