from uno_ds.kernels.metaquery_regression.api import metaquery_contrast, metaquery_regression

__all__ = ["metaquery_contrast", "metaquery_regression"]
