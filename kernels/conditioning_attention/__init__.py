from uno_ds.kernels.conditioning_attention.api import conditioning_attention

__all__ = ["conditioning_attention"]
