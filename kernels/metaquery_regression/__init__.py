from uno_ds.kernels.metaquery_regression.api import metaquery_regression

__all__ = ["metaquery_regression"]
