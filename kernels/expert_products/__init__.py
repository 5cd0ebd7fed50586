from uno_ds.kernels.expert_products.api import expert_product

__all__ = ["expert_product"]
