from uno_ds.kernels.pointwise.api import rms_norm, swiglu

__all__ = ["rms_norm", "swiglu"]
