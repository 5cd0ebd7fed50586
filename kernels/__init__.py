"""Kernels of uno_ds: segment-masked attention and the metaquery regression loss. They know nothing
of the model."""
