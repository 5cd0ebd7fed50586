"""uno_ds: UNO post-training of unified multimodal models on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
