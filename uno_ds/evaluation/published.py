"""Published overall scores, by the judge that gave them: rows of two judges are not comparable."""

from typing import NamedTuple

UNO_PAPER = "arXiv 2605.05781"
BAGEL_PAPER = "arXiv 2505.14683"
# 61.53, with which the UNO paper compares, is of the leaderboard, as arXiv 2510.06308 quotes it.
UNIGENBENCH_PAPER = "arXiv 2510.18701"


class Published(NamedTuple):
    """One number of a paper, on the scale of our results. `judge`: who scored it."""

    benchmark: str
    variant: str
    model: str
    value: float
    judge: str
    source: str


PUBLISHED = (
    Published("geneval", "", "BAGEL", 82.0, "Mask2Former (mmdet)", BAGEL_PAPER),
    Published("geneval", "", "BAGEL, rewritten prompts", 88.0, "Mask2Former (mmdet)", BAGEL_PAPER),
    Published("geneval", "", "BAGEL", 78.8, "Mask2Former (mmdet)", "RecA"),
    Published("geneval", "", "BAGEL + RecA", 82.4, "Mask2Former (mmdet)", "RecA"),
    Published("geneval2", "", "BAGEL", 71.7, "Qwen3-VL-8B, AM as far as inferred", UNO_PAPER),
    Published("geneval2", "", "BAGEL + UNO", 75.1, "Qwen3-VL-8B, AM as far as inferred", UNO_PAPER),
    Published("dpg", "", "BAGEL", 84.03, "mPLUG", UNO_PAPER),
    Published("dpg", "", "BAGEL + UNO", 86.12, "mPLUG", UNO_PAPER),
    Published("dpg", "", "BAGEL + RecA", 85.29, "mPLUG", "RecA"),
    Published("dpg", "", "BAGEL", 84.11, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("dpg", "", "BAGEL + RecA", 85.20, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("unigenbench", "en", "BAGEL", 61.53, "Gemini-2.5-pro", UNO_PAPER),
    Published("unigenbench", "en", "BAGEL + UNO", 65.03, "Gemini-2.5-pro", UNO_PAPER),
    Published("unigenbench", "en", "BAGEL", 59.91, "Gemini-2.5-pro", UNIGENBENCH_PAPER),
    Published("unigenbench", "en_long", "BAGEL", 71.26, "Gemini-2.5-pro", UNIGENBENCH_PAPER),
    Published("unigenbench", "zh", "BAGEL", 65.69, "Gemini-2.5-pro", UNIGENBENCH_PAPER),
    Published("unigenbench", "zh_long", "BAGEL", 75.75, "Gemini-2.5-pro", UNIGENBENCH_PAPER),
    Published("gedit", "en", "BAGEL", 6.52, "GPT-4.1", UNO_PAPER),
    Published("gedit", "en", "BAGEL + UNO", 7.17, "GPT-4.1", UNO_PAPER),
    Published("gedit", "en", "BAGEL", 6.35, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("gedit", "en", "BAGEL + RecA", 6.80, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("gedit", "cn", "BAGEL", 6.50, "GPT-4.1", UNO_PAPER),
    Published("gedit", "cn", "BAGEL + UNO", 7.20, "GPT-4.1", UNO_PAPER),
    Published("gedit", "cn", "BAGEL", 6.52, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("gedit", "cn", "BAGEL + RecA", 6.75, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("imgedit", "", "BAGEL + UNO", 3.85, "GPT-4o", UNO_PAPER),
    Published("imgedit", "", "BAGEL", 3.71, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("imgedit", "", "BAGEL + RecA", 3.89, "Qwen2.5-VL-72B", "TorchUMM"),
    Published("kris", "", "BAGEL + UNO", 62.57, "GPT-4o", UNO_PAPER),
)


def published_rows(benchmark: str, variant: str) -> list[Published]:
    return [row for row in PUBLISHED if (row.benchmark, row.variant) == (benchmark, variant)]
