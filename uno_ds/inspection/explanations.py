"""What each section of the report shows, and what it does not prove."""

EXPLANATIONS: dict[str, list[str]] = {
    "maps": [
        "Hidden states of the generation expert at the noised latents, as colours: the first "
        "three principal components of all models and noise levels together, one basis for each "
        "layer, so that equal colours mean equal directions across models and noise levels. "
        "Patches of one colour that follow an object at high t mean that the states tell it from "
        "its surroundings.",
        "Three components are a part of the variance (below), colours have no meaning of their "
        "own, and a smooth map may show positions rather than content.",
    ],
    "alignment": [
        "How far images that are alike for the visual encoder of the clean image are alike for "
        "the hidden states of the noised one: CKNNA asks for the same nearest neighbours, CKA for "
        "the same similarities overall, and the grey line is what shuffled images give. The "
        "spatial measures say whether neighbouring tokens are more alike than distant ones; the "
        "last one, of scenes alone, whether tokens of objects are more alike to their neighbours "
        "than to distant background.",
        "Alignment with an encoder is not quality: a model may know what that encoder does not "
        "see. Values depend on the number of images, and features that are wider than there are "
        "images have a high CKA even where they are shuffled: compare with the grey line, and "
        "models within one report only.",
    ],
    "probes": [
        "What a linear probe reads off the hidden states, averaged over quarters of the image: "
        "attributes of the scene (logistic regression) and the visual encoder's features (ridge "
        "regression). The dotted line is chance, the grey one the same probe on shuffled labels; "
        "bars are 95 % intervals over images.",
        "That a probe finds something does not mean that the model uses it, and where the "
        "generation expert sees prompts, the states may have it from the prompt. Intervals do not "
        "hold the variance between runs of training.",
    ],
    "reading": [
        "The caption that the frozen understanding expert reads from the latents at each noise "
        "level: its cross entropy, with 95 % intervals over images, and for scenes how often the "
        "greedy caption is right, judged by program. Metaquery maps show where in the image the "
        "visual encoder's features are predicted.",
        "Where the generation expert sees prompts, the reader may read what came from the prompt "
        "and not from the image. A wrong caption may be the reader's fault.",
    ],
    "gradients": [
        "Norms of each weighted loss's gradient on one batch at each noise level, its share of "
        "their sum, and the cosines between losses. A negative cosine means that a small step "
        "along one loss's gradient alone raises the other loss.",
        "It is one batch at one point of training. AdamW scales each weight, so that shares of "
        "the gradient are not shares of its step, and a conflict in one batch need not persist.",
    ],
    "diagnosis": [
        "Drawn right: the picture shows what was asked for, by program or by the verdicts that "
        "were given. Read right: the understanding expert, which captions the finished picture, "
        "agrees with that judgement. Drawn wrong and read right are errors of generation that the "
        "reader sees; those in the cells of read wrong are errors of understanding.",
        "Supervision by the reader can mend what the reader sees. The program judges coarse "
        "shapes and may be wrong about a blurred picture, a caption that leaves something out "
        "counts as agreeing with it, and few prompts give coarse shares.",
    ],
}
