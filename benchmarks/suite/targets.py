"""What the GPU numbers are held against: our targets, and figures that others published.

Rates are useful TFLOP/s in bf16 at head dim 128, backward counted 2.5 times forward where others
say so; the figures of MagiAttention's benchmark (H100 SXM) were read from its plots by eye."""

# Of the Triton attention, (forward, backward), by scenario.
ATTENTION_RATES = {"A": (400, 300), "D": (300, 220)}
# Forward and backward together, over the tuned FlexAttention.
OVER_FLEX = {"A": 1.25, "B": 1.25, "C": 1.25, "D": 1.25, "E": 1.25, "F": 2.0}
PUBLISHED_ATTENTION = {
    "FA2, varlen full 8k": (357, 261),
    "FA3, varlen full 8k": (560, 421),
    "MagiAttention, varlen full 8k": (565, 420),
    "FlexAttention, varlen full 8k": (240, 164),
}
# Operations of a whole step over those of plain flow matching, structured and naive, computed.
UNO_OVER_FLOW = {"A": 1.08, "B": 1.22, "C": 1.17, "D": 1.30, "E": 1.84, "F": 1.06}
UNO_OVER_NAIVE_FLOW = {"A": 1.03, "B": 1.16, "C": 1.10, "D": 1.21, "E": 1.68, "F": 0.77}
PUBLISHED_MFU = {
    "torchtitan, Llama-3.1-8B, H100, bf16": "33 to 39 %",
    "Megatron, H100, bf16": "41 to 48 %",
}
