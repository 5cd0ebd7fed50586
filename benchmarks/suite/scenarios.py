"""The scenarios of benchmarks/README.md: what a pack of each holds. Every benchmark reads this
table."""

from uno_ds.cost.scenario import Scenario

# prompt, latents, caption, metaqueries; samples. `vit`: tokens of a condition image in the visual
# encoder.
SCENARIOS = {
    "A": Scenario(200, 4096, 200, 256, 6),
    "B": Scenario(200, 4096, 200, 1024, 5),
    "C": Scenario(200, 1024, 200, 64, 22),
    "D": Scenario(200, 1024, 200, 256, 19),
    "E": Scenario(300, 1024, 300, 1024, 12),
    "F": Scenario(100, 4096, 200, 256, 3, vit=4096),
}
