"""UNO's loss a second time, the slow way: one packed sequence in sequence order, one dense mask, no
slabs and no plan.

For tests only, and longer than other files: it is one implementation, to be read from top to
bottom. Every function takes the product's parameters by name, so that autograd's gradients land in
them.

Shape suffixes: docs/notation.md.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from uno_ds.model.architecture import Architecture
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.segments import Kind, Sample, Segment

Weights = dict[str, torch.Tensor]
SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)
RMS_EPS = 1e-3
CONTEXT = (Kind.TEXT, Kind.VIT, Kind.CLEAN)


@dataclass(frozen=True)
class Token:
    """One token of the pack; `segment` and `supervises` count within its sample, `place` within its
    segment."""

    sample: int
    segment: int
    kind: Kind
    place: int
    rope_id: int
    generation: bool
    supervises: int


def tokens_of(samples: list[Sample]) -> list[Token]:
    return [
        Token(
            number,
            index,
            segment.kind,
            place,
            int(rope_id),
            segment.kind in (Kind.CLEAN, Kind.NOISED) and 0 < place < len(segment.rope_ids) - 1,
            segment.supervises,
        )
        for number, sample in enumerate(samples)
        for index, segment in enumerate(sample.segments)
        for place, rope_id in enumerate(segment.rope_ids)
    ]


def sees(query: Token, key: Token) -> bool:
    """The visibility table, one pair of tokens at a time."""
    if query.sample != key.sample:
        return False
    if query.segment == key.segment:
        return query.kind not in (Kind.TEXT, Kind.CAPTION) or key.place <= query.place
    if query.kind in (Kind.CAPTION, Kind.METAQUERY):
        return key.segment == query.supervises
    return key.kind in CONTEXT and key.segment < query.segment


def dense_mask(tokens: list[Token]) -> torch.Tensor:
    """bool [T, T], sequence order."""
    return torch.tensor(
        [[sees(query, key) for key in tokens] for query in tokens], dtype=torch.bool
    ).reshape(len(tokens), len(tokens))


def _weights(objective: UnoObjective) -> Weights:
    """Parameters without adapters; the weight of an adapted projection is W + s B A."""
    parameters = dict(objective.named_parameters())
    weights = {name.replace(".base_layer", ""): weight for name, weight in parameters.items()}
    for name in [name for name in parameters if ".lora_A." in name]:
        module = name.partition(".lora_A.")[0]
        change = parameters[name.replace("lora_A", "lora_B")] @ parameters[name]
        scaling = objective.get_submodule(module).scaling["default"]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + scaling * change
    return weights


def uno_loss(
    objective: UnoObjective,
    samples: list[Sample],
    counts: torch.Tensor,
    stop: bool,
    states: list[torch.Tensor] | None = None,
    supervision: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, [flow, caption, regression, answer]) in fp64. `stop`: understanding tokens of context
    segments are constants, unless the understanding expert trains. `states` gets the residual
    stream [T, H] after each layer. `supervision`: factor of the weights of caption and
    regression."""
    weights, shape = _weights(objective), objective.model.shape
    settings = objective.settings
    tokens = tokens_of(samples)
    constant_T = torch.tensor(
        [
            stop
            and not weights["model.lm_head.weight"].requires_grad
            and not token.generation
            and token.kind in CONTEXT
            for token in tokens
        ]
    )
    segments = [segment for sample in samples for segment in sample.segments]
    embedded = [_embed(weights, shape, segment) for segment in segments]
    outputs_TH = _transformer(
        weights, shape, torch.cat([x for x, _ in embedded]), tokens, constant_T, states
    )

    sums = [outputs_TH.new_zeros(()) for _ in range(4)]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    factors_of_pairs: list[float] = []
    weighted = [outputs_TH.new_zeros(()) for _ in range(4)]
    read = [
        sample.segments[segment.supervises] if segment.supervises >= 0 else segment
        for sample in samples
        for segment in sample.segments
    ]
    start = 0
    for segment, (_, velocity), noised in zip(segments, embedded, read):
        before = list(sums)
        rows = outputs_TH[start : start + segment.length]
        start += segment.length
        if segment.kind == Kind.NOISED:
            error = _linear(weights, "model.llm2vae", rows[1:-1]) - velocity
            sums[0] = sums[0] + (error**2).mean(dim=1).sum()
        if segment.kind == Kind.CAPTION and not segment.negative or segment.answer:
            which = 1 if segment.kind == Kind.CAPTION else 3
            sums[which] = sums[which] + _entropy(weights, segment, rows)
        t = noised.timestep
        factors = [
            1.0,
            supervision * by_t(settings.caption_weight_by_t, t),
            supervision * by_t(settings.regression_weight_by_t, t),
            1.0,
        ]
        # A batch holds factors in fp32.
        factors = [float(np.float32(factor)) for factor in factors]
        for place, factor in enumerate(factors):
            weighted[place] = weighted[place] + factor * (sums[place] - before[place])
        if segment.kind == Kind.METAQUERY:
            pairs.append(_regression_pair(objective, weights, segment, rows))
            factors_of_pairs += [factors[2]] * segment.length
    if pairs:
        regression_M = _regression(settings, *map(torch.cat, zip(*pairs)))
        sums[2] = regression_M.sum()
        weighted[2] = (regression_M * torch.tensor(factors_of_pairs).double()).sum()
    if settings.flow_contrast:
        contrast = _flow_contrast(weights, samples, embedded, outputs_TH)
        sums.append(contrast)
        weighted.append(contrast)
    if settings.negative_weight:
        plain, with_factors = _negatives(weights, settings, samples, outputs_TH, supervision)
        sums.append(plain)
        weighted.append(with_factors)
    losses = torch.stack(sums) / counts
    wanted = [
        settings.flow_weight,
        settings.caption_weight,
        settings.regression_weight,
        settings.answer_weight,
    ]
    if settings.flow_contrast:
        wanted.append(-settings.flow_contrast * settings.flow_weight)
    if settings.negative_weight:
        wanted.append(settings.negative_weight)
    total = sum(part / count * weight for part, count, weight in zip(weighted, counts, wanted))
    return total, losses


def _entropy(weights: Weights, segment: Segment, rows: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of a text."""
    log_probability = (rows[:-1] @ weights["model.lm_head.weight"].T).log_softmax(dim=1)
    labels = enumerate(segment.token_ids[1:])
    return -sum(log_probability[place, label] for place, label in labels)


def _negatives(
    weights: Weights,
    settings: ObjectiveSettings,
    samples: list[Sample],
    outputs_TH: torch.Tensor,
    supervision: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over negatives, the same with the factors of their images)."""
    plain = with_factors = outputs_TH.new_zeros(())
    start = 0
    for sample in samples:
        means: dict[tuple[int, bool], torch.Tensor] = {}
        for segment in sample.segments:
            rows = outputs_TH[start : start + segment.length]
            start += segment.length
            if segment.kind == Kind.CAPTION:
                mean = _entropy(weights, segment, rows) / (segment.length - 1)
                means[segment.supervises, segment.negative] = mean
        for image in {image for image, negative in means if negative}:
            gap = means[image, True] - means[image, False]
            missing = settings.negative_margin - gap
            if settings.negative_form == "hinge":
                loss = missing if missing > 0 else 0 * missing
            else:
                loss = torch.log1p(missing.exp())
            t = sample.segments[image].timestep
            factor = float(np.float32(supervision * by_t(settings.caption_weight_by_t, t)))
            plain, with_factors = plain + loss, with_factors + factor * loss
    return plain, with_factors


def _flow_contrast(
    weights: Weights,
    samples: list[Sample],
    embedded: list[tuple[torch.Tensor, torch.Tensor | None]],
    outputs_TH: torch.Tensor,
) -> torch.Tensor:
    """Over the cells of each noised image: squared distance of its velocity to the target of the
    next noised image that belongs to another sample, at the cell in the same place."""
    images = []
    number = start = 0
    for which, sample in enumerate(samples):
        for segment in sample.segments:
            rows = outputs_TH[start : start + segment.length]
            if segment.kind == Kind.NOISED:
                velocity = _linear(weights, "model.llm2vae", rows[1:-1])
                images.append((which, segment.grid, velocity, embedded[number][1]))
            number, start = number + 1, start + segment.length
    total = outputs_TH.new_zeros(())
    for place, (which, (height, width), velocity, _) in enumerate(images):
        others = [*images[place + 1 :], *images[:place]]
        other = next((image for image in others if image[0] != which), None)
        if other is None:
            continue
        _, (tall, wide), _, target = other
        for row in range(height):
            for column in range(width):
                cell = int((row + 0.5) * tall / height) * wide + int((column + 0.5) * wide / width)
                total = total + (velocity[row * width + column] - target[cell]).square().mean()
    return total


def by_t(pairs: list[list[float]], t: float) -> float:
    """Linear between [t, weight] pairs, constant outside of them; 1 without pairs."""
    if not pairs:
        return 1.0
    before = [pair for pair in pairs if pair[0] <= t]
    after = [pair for pair in pairs if pair[0] > t]
    if not before:
        return after[0][1]
    if not after:
        return before[-1][1]
    (t0, w0), (t1, w1) = before[-1], after[0]
    return w0 + (w1 - w0) * (t - t0) / (t1 - t0)


def _embed(
    weights: Weights, shape: Architecture, segment: Segment
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows that the first layer reads, velocity target of a noised segment)."""
    table = weights["model.token_embedding.weight"]
    start, end = table[SPECIAL.start_of_image, None], table[SPECIAL.end_of_image, None]
    if segment.kind in (Kind.TEXT, Kind.CAPTION):
        return table[torch.from_numpy(segment.token_ids)], None
    if segment.kind == Kind.METAQUERY:
        height, width = _grid_of(segment.pixels, shape.vit_patch)
        middles = [
            (int((row + 0.5) * height / side), int((column + 0.5) * width / side))
            for side in segment.sides
            for row in range(side)
            for column in range(side)
        ]
        return weights["metaqueries.weight"] + _positions(shape.hidden, middles), None
    if segment.kind == Kind.VIT:
        height, width = _grid_of(segment.pixels, shape.vit_patch)
        body = _connector(weights, _encode_image(weights, shape, segment.pixels)) + _positions(
            shape.hidden, _cells(height, width)
        )
        return torch.cat([start, body, end]), None
    latent = (
        segment.latent
        if segment.latent is not None
        else encode_pixels(segment.pixels, shape.codec_downsample)
    )
    clean = _patches(torch.as_tensor(latent).double(), shape.latent_patch)
    height, width = _grid_of(latent, shape.latent_patch)
    velocity, t = None, torch.zeros(1, dtype=torch.float64)
    shown = clean
    if segment.kind == Kind.NOISED:
        # A batch holds t in fp32.
        t = torch.tensor([segment.timestep], dtype=torch.float32).double()
        noise = torch.from_numpy(segment.noise).double()
        shown, velocity = clean + t * (noise - clean), noise - clean
    body = (
        _linear(weights, "model.vae2llm", shown)
        + _embed_timestep(weights, t)
        + _positions(shape.hidden, _cells(height, width))
    )
    return torch.cat([start, body, end]), velocity


def _transformer(
    weights: Weights,
    shape: Architecture,
    x_TH: torch.Tensor,
    tokens: list[Token],
    constant_T: torch.Tensor,
    states: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`states` gets the residual stream [T, H] after each layer."""
    mask_TT = dense_mask(tokens)
    generation_T = torch.tensor([token.generation for token in tokens])
    rope_T = torch.tensor([token.rope_id for token in tokens])
    for layer in range(shape.layers):
        each = functools.partial(_by_expert, weights, f"model.layers.{layer}", generation_T)
        x_TH = torch.where(constant_T[:, None], x_TH.detach(), x_TH)
        normed = each(_rms_norm, "input_norm", x_TH)
        q, k, v = (
            each(_linear, name, normed).unflatten(1, (-1, shape.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (
            _rotate(each(_rms_norm, "q_norm", q), rope_T, shape),
            _rotate(each(_rms_norm, "k_norm", k), rope_T, shape),
        )
        heads = [
            _attend(
                q[:, head],
                k[:, head * shape.kv_heads // shape.heads],
                v[:, head * shape.kv_heads // shape.heads],
                mask_TT,
            )
            for head in range(shape.heads)
        ]
        x_TH = x_TH + each(_linear, "o_proj", torch.cat(heads, dim=1))
        normed = each(_rms_norm, "post_norm", x_TH)
        gate, up = each(_linear, "gate_proj", normed), each(_linear, "up_proj", normed)
        x_TH = x_TH + each(_linear, "down_proj", gate * torch.sigmoid(gate) * up)
        if states is not None:
            states.append(x_TH)
    x_TH = torch.where(constant_T[:, None], x_TH.detach(), x_TH)
    return torch.where(
        generation_T[:, None],
        _rms_norm(weights, "model.norm_gen", x_TH),
        _rms_norm(weights, "model.norm", x_TH),
    )


def _by_expert(
    weights: Weights,
    layer: str,
    generation_T: torch.Tensor,
    apply: Callable,
    module: str,
    x: torch.Tensor,
) -> torch.Tensor:
    """Both experts on all tokens; each token keeps the row of its own."""
    gen, und = (apply(weights, f"{layer}.{expert}.{module}", x) for expert in ("gen", "und"))
    return torch.where(generation_T.reshape(-1, *[1] * (x.dim() - 1)), gen, und)


def _attend(
    q_TD: torch.Tensor, k_TD: torch.Tensor, v_TD: torch.Tensor, mask_TT: torch.Tensor
) -> torch.Tensor:
    return ((q_TD @ k_TD.T) / math.sqrt(q_TD.shape[1])).masked_fill(~mask_TT, -math.inf).softmax(
        dim=1
    ) @ v_TD


def _rotate(x_TND: torch.Tensor, rope_T: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by angles that are fp32 whatever the dtype of
    the model."""
    frequency = shape.rope_theta ** -(
        torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    )
    angle = rope_T.float()[:, None] * frequency
    turn = torch.complex(angle.cos().double(), angle.sin().double())
    turned = torch.complex(*x_TND.chunk(2, dim=2)) * turn[:, None]
    return torch.cat([turned.real, turned.imag], dim=2)


def _regression_pair(
    objective: UnoObjective, weights: Weights, segment: Segment, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of the predictions of a segment of metaqueries and of their targets."""
    settings, shape = objective.settings, objective.model.shape
    features = _target_features(objective, weights, segment)
    height, width = _grid_of(segment.pixels, shape.vit_patch)
    if settings.regression_target_norm == "spatial":
        features = _spatial(features, settings.regression_mean_share)
    maps = features.detach().T.reshape(1, -1, height, width)
    pooled = [F.adaptive_avg_pool2d(maps, side)[0].flatten(1).T for side in segment.sides]
    target = torch.cat(pooled)
    predicted = hidden
    if settings.regression_target != "connector":
        predicted = hidden @ weights["regression.weight"].T
    predicted = predicted / predicted.norm(dim=1, keepdim=True)
    return predicted, target / target.norm(dim=1, keepdim=True)


def _regression(
    settings: ObjectiveSettings, predicted: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """[M]: loss of each metaquery."""
    if settings.regression_loss == "contrastive":
        # Of each metaquery of the pack, the share of its own target among all.
        scores = (predicted @ target.T / settings.regression_temperature).exp()
        return -(scores.diagonal() / scores.sum(dim=1)).log()
    if settings.regression_loss == "cosine":
        return 1 - (predicted * target).sum(dim=1)
    distance = (predicted - target).abs()
    if settings.regression_loss == "l2":
        return (distance**2).sum(dim=1)
    return torch.where(distance < 1, distance**2 / 2, distance - 0.5).sum(dim=1)


def _target_features(objective: UnoObjective, weights: Weights, segment: Segment) -> torch.Tensor:
    """[P, W']: of the clean image of one segment of metaqueries."""
    shape, name = objective.model.shape, objective.settings.regression_target
    if name == "hog":
        return _hog(segment.pixels, shape.vit_patch)
    if name == "encoder":
        # An encoder whose patches are those of the model's own.
        folder = objective.encoder.folder
        assert folder.patch == shape.vit_patch
        colours = torch.from_numpy(segment.pixels).double() / 2 + 0.5
        planes = [
            (plane - mean) / deviation
            for plane, mean, deviation in zip(colours, folder.mean, folder.deviation)
        ]
        with torch.no_grad():
            tokens = objective.encoder.model(pixel_values=torch.stack(planes)[None])
        height, width = _grid_of(segment.pixels, shape.vit_patch)
        return tokens.last_hidden_state[0, -height * width :]
    features = _encode_image(weights, shape, segment.pixels)
    return _connector(weights, features) if name == "connector" else features


def _hog(pixels: np.ndarray, patch: int) -> torch.Tensor:
    """Pixel by pixel: the formulas of uno_ds/objectives/hog.py."""
    _, height, width = pixels.shape

    def slope(values: np.ndarray, at: int) -> float:
        low, high = max(0, at - 1), min(len(values) - 1, at + 1)
        return (float(values[high]) - float(values[low])) / (high - low)

    rows = []
    for top, left in _cells(height // patch, width // patch):
        block = (slice(top * patch, (top + 1) * patch), slice(left * patch, (left + 1) * patch))
        histograms, contrasts = [], []
        for plane in pixels.astype(np.float64):
            votes = [0.0] * 9
            for row in range(block[0].start, block[0].stop):
                for column in range(block[1].start, block[1].stop):
                    down, across = slope(plane[:, column], row), slope(plane[row], column)
                    angle = math.atan2(down, across) % math.pi / (math.pi / 9)
                    bin, share = int(angle), angle - int(angle)
                    votes[bin % 9] += (1 - share) * math.hypot(down, across) / patch**2
                    votes[(bin + 1) % 9] += share * math.hypot(down, across) / patch**2
            votes.append(0.05)
            norm = math.sqrt(sum(vote**2 for vote in votes))
            histograms += [vote / norm for vote in votes]
            contrasts.append(float(plane[block].std()))
        rows.append([*histograms, *contrasts])
    return torch.tensor(rows, dtype=torch.float64)


def _spatial(features: torch.Tensor, share: float) -> torch.Tensor:
    """Of every feature of one image, minus a share of its mean, over its deviation."""
    columns = [
        (column - share * column.mean()) / (column.var(correction=0).sqrt() + 1e-6)
        for column in features.unbind(dim=1)
    ]
    return torch.stack(columns, dim=1)


def visual_features(objective: UnoObjective, pixels: np.ndarray) -> torch.Tensor:
    """[P, W], fp64, of one image [3, h, w] in -1 to 1."""
    weights = {name: values.double() for name, values in _weights(objective).items()}
    return _encode_image(weights, objective.model.shape, pixels)


def _encode_image(weights: Weights, shape: Architecture, pixels: np.ndarray) -> torch.Tensor:
    """[P, W] features of one image on its own."""
    height, width = _grid_of(pixels, shape.vit_patch)
    places = torch.tensor([row * shape.vit_side + column for row, column in _cells(height, width)])
    x_PW = _linear(
        weights,
        "model.vit.patch_embedding",
        _patches(torch.from_numpy(pixels).double(), shape.vit_patch),
    )
    x_PW = x_PW + weights["model.vit.position_embedding.weight"][places]
    for layer in range(shape.vit_layers):
        name = f"model.vit.layers.{layer}"
        normed = _layer_norm(weights, f"{name}.layer_norm1", x_PW)
        q, k, v = (
            _linear(weights, f"{name}.{which}_proj", normed).unflatten(1, (shape.vit_heads, -1))
            for which in "qkv"
        )
        everything = torch.ones(len(x_PW), len(x_PW), dtype=torch.bool)
        heads = [
            _attend(q[:, head], k[:, head], v[:, head], everything)
            for head in range(shape.vit_heads)
        ]
        x_PW = x_PW + _linear(weights, f"{name}.out_proj", torch.cat(heads, dim=1))
        inner = _gelu(
            _linear(weights, f"{name}.fc1", _layer_norm(weights, f"{name}.layer_norm2", x_PW))
        )
        x_PW = x_PW + _linear(weights, f"{name}.fc2", inner)
    return _layer_norm(weights, "model.vit.post_layernorm", x_PW)


def _connector(weights: Weights, features_PW: torch.Tensor) -> torch.Tensor:
    return _linear(
        weights, "model.connector.fc2", _gelu(_linear(weights, "model.connector.fc1", features_PW))
    )


def _embed_timestep(weights: Weights, t: torch.Tensor) -> torch.Tensor:
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double()
    inner = _linear(
        weights,
        "model.time_embedder.mlp.0",
        torch.cat([(t * frequency).cos(), (t * frequency).sin()])[None],
    )
    return _linear(weights, "model.time_embedder.mlp.2", inner * torch.sigmoid(inner))


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def _rms_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + RMS_EPS) * weights[f"{name}.weight"]


def _layer_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return (
        centred
        / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-6)
        * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def encode_pixels(pixels: np.ndarray, block: int) -> torch.Tensor:
    """The pixel codec: each block of pixels becomes channels, (colour, row, column)."""
    image = torch.from_numpy(pixels)
    return torch.stack(
        [
            image[colour, row::block, column::block]
            for colour in range(3)
            for row in range(block)
            for column in range(block)
        ]
    )


def _patches(image: torch.Tensor, side: int) -> torch.Tensor:
    """One row per patch, row by row, each flattened as (row, column, channel)."""
    return torch.stack(
        [
            image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            .permute(1, 2, 0)
            .flatten()
            for row, column in _cells(*_grid_of(image, side))
        ]
    )


def _waves(place: int, frequencies: list[float]) -> list[float]:
    angles = [place * frequency for frequency in frequencies]
    return [*map(math.sin, angles), *map(math.cos, angles)]


def _positions(hidden: int, cells: list[tuple[int, int]]) -> torch.Tensor:
    """Sines and cosines of the column, then of the row, rounded to fp32 as the model's tables
    are."""
    frequencies = [10000 ** (-4 * number / hidden) for number in range(hidden // 4)]
    rows = [[*_waves(column, frequencies), *_waves(row, frequencies)] for row, column in cells]
    return torch.tensor(rows, dtype=torch.float64).float().double()


def _grid_of(image: np.ndarray | torch.Tensor, stride: int) -> tuple[int, int]:
    return image.shape[1] // stride, image.shape[2] // stride


def _cells(height: int, width: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(height) for column in range(width)]
