"""The scenarios: packs whose numbers of tokens are given, by name. This is their only table.

A scenario that is added to SCENARIOS can be given to `--scenarios` of overhead and kernels and to
`--scenario` of scale; benchmarks/README.md lists it too, which a test compares.
"""

from benchmarks.suite.command_line import names_of
from uno_ds.cost.scenario import Scenario, read_scenario

# BAGEL-7B: samples that fill about 32,768 tokens. vit: tokens of a condition image in the visual
# encoder, for editing; clean: as latents; images: generated images of a sample.
SCENARIOS = {
    "A": Scenario(prompt=200, latents=4096, caption=200, metaqueries=256, samples=6),
    "B": Scenario(prompt=200, latents=4096, caption=200, metaqueries=1024, samples=5),
    "C": Scenario(prompt=200, latents=1024, caption=200, metaqueries=64, samples=22),
    "D": Scenario(prompt=200, latents=1024, caption=200, metaqueries=256, samples=19),
    "E": Scenario(prompt=300, latents=1024, caption=300, metaqueries=1024, samples=12),
    "F": Scenario(prompt=100, latents=4096, caption=200, metaqueries=256, samples=3, vit=4096),
    # Interleaved: an image and three edits, each of the image before it.
    "G": Scenario(
        prompt=60,
        latents=1024,
        caption=200,
        metaqueries=256,
        samples=3,
        vit=1024,
        clean=1024,
        images=3,
    ),
}
# The same structure, small enough to test kernels.py on a CPU.
SMALL_SCENARIOS = {
    "A": Scenario(prompt=7, latents=64, caption=7, metaqueries=9, samples=2),
    "F": Scenario(prompt=5, latents=32, caption=6, metaqueries=8, samples=1, vit=32),
}
# For building plans only: 25 samples of four segments.
HUNDRED_SEGMENTS = Scenario(prompt=200, latents=1024, caption=40, metaqueries=64, samples=25)
# The pack of the tiny model around which `sweep` varies and whose traffic `scale` counts.
TINY_SCENARIO = Scenario(prompt=20, latents=49, caption=20, metaqueries=9, samples=6)


def read_scenarios(text: str) -> dict[str, Scenario]:
    """From `A,D,F`, or from one scenario as scripts/estimate.py takes it, named `given`. Raises
    SettingsError."""
    if "=" in text:
        return {"given": read_scenario(text)}
    return {name: SCENARIOS[name] for name in names_of("--scenarios", text, SCENARIOS)}
