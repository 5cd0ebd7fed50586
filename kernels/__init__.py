"""Kernels of uno_ds: segment-masked attention, QK-norm with rotary embedding, RMSNorm and SwiGLU,
cross entropy and the metaquery regression loss. They import nothing of the model."""
