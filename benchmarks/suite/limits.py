"""Sentences about what a result cannot show; results list them as `unknown`, reports print them."""

CPU_RATIOS = (
    "A ratio measured on a CPU does not transfer to a GPU: other rates of products, attention and "
    "memory."
)
DENSE = (
    "On a CPU the naive modes attend with a dense mask over the whole pack, not with "
    "FlexAttention: their times there are not those of a GPU."
)
ONE_RANK = (
    "One rank sends nothing, so the time of ZeRO's communication was not measured; the cost model "
    "gives its volume."
)
SHARED_CORES = (
    "CPU ranks share the cores of one machine: their times say nothing about more devices."
)
NO_AUTOENCODER = (
    "diffusers is not installed here, so latents were given and the autoencoder was not timed in "
    "any mode."
)
