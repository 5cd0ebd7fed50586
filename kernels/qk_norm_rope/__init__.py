from uno_ds.kernels.qk_norm_rope.api import qk_norm_rope

__all__ = ["qk_norm_rope"]
