"""Flags of the sampling command."""

from pathlib import Path

from uno_ds.commands.flags import Parser
from uno_ds.generation.inference import CaptionSettings
from uno_ds.generation.sampler import RENORMALISATIONS, EditSettings, SamplerSettings
from uno_ds.kernels.backends import backend_names
from uno_ds.model.precision import DTYPES
from uno_ds.model.quantisation import KINDS


def _drawing_flags(defaults: SamplerSettings) -> Parser:
    """Flags of the commands that draw. A flag that is not given is None: the recipe or the defaults
    of the task apply."""
    drawing = Parser(add_help=False)
    drawing.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="folder of the PNG files (default samples)",
    )
    drawing.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    drawing.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="pictures for each request, with seeds that count up (default 1)",
    )
    drawing.add_argument("--steps", type=int, help=f"Euler steps (default {defaults.steps})")
    drawing.add_argument(
        "--num-timesteps",
        type=int,
        metavar="N",
        help="in place of --steps, as the public BAGEL counts: N noise levels, N - 1 Euler steps",
    )
    drawing.add_argument("--shift", type=float, help=f"timestep shift (default {defaults.shift:g})")
    drawing.add_argument(
        "--text-guidance",
        type=float,
        metavar="S",
        help=f"guidance scale of the text; 1: off (default {defaults.text_guidance:g})",
    )
    drawing.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guidance applies at LOW < t <= HIGH, t = 1 being noise (default "
        f"{defaults.guidance_interval[0]:g} {defaults.guidance_interval[1]:g})",
    )
    drawing.add_argument(
        "--renormalise",
        choices=RENORMALISATIONS,
        help=f"norm that guidance must not exceed (default {defaults.renormalise})",
    )
    drawing.add_argument(
        "--renormalise-least",
        type=float,
        metavar="X",
        help="smallest factor of the renormalisation (default 0)",
    )
    return drawing


def model_flags() -> Parser:
    """Flags that name a model and how it is opened."""
    flags = Parser(add_help=False)
    flags.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a BAGEL folder, a run (runs/NAME), one of its checkpoints, or a model that ships "
        "with uno_ds (tiny_base)",
    )
    flags.add_argument(
        "--no-ema",
        action="store_true",
        help="of a checkpoint: the trained weights, where the default is their moving average",
    )
    flags.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="of a checkpoint: the base that it was trained on, if that was moved",
    )
    flags.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)"
    )
    flags.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *DTYPES),
        help="auto: bf16 on a GPU, fp32 on a CPU",
    )
    flags.add_argument(
        "--adapter",
        action="append",
        metavar="DIR[:SHARE]",
        help="an adapter folder that is merged into the base folder --checkpoint, and by how much "
        "it counts (default 1); may be repeated",
    )
    flags.add_argument(
        "--quantise",
        choices=KINDS,
        help="store the weights of projections, token embedding and visual encoder quantised, for "
        "cards that cannot hold them; pictures differ a little",
    )
    flags.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *backend_names("attention")),
        help="attention backend (default auto)",
    )
    return flags


def sample_parser() -> Parser:
    parser = Parser(
        prog="sample.py", description="Draws, edits and describes pictures with a trained model."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults_note = (
        "Settings that no flag gives are those of the recipe (samples, samples.edit) where the "
        "checkpoint is that of a run, and else the defaults below."
    )
    drawing = _drawing_flags(SamplerSettings())
    editing = _drawing_flags(EditSettings())

    common = Parser(add_help=False, parents=[model_flags()])
    common.add_argument(
        "--seed",
        type=int,
        help="seed of the first picture or text; the next ones count up (default 0)",
    )
    common.add_argument(
        "--batch",
        type=int,
        default=4,
        metavar="N",
        help="requests that are computed together (default 4)",
    )

    generate_parser = commands.add_parser(
        "generate", parents=[common, drawing], help="text to image", description=defaults_note
    )
    generate_parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to draw; may be repeated"
    )
    generate_parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line"
    )
    generate_parser.add_argument(
        "--height", type=int, help="pixels (default: as large as the model's square)"
    )
    generate_parser.add_argument(
        "--width", type=int, help="pixels (default: as large as the model's square)"
    )

    edit_parser = commands.add_parser(
        "edit",
        parents=[common, editing],
        help="image and instruction to image",
        description=defaults_note,
    )
    edit_parser.add_argument("--image", type=Path, metavar="FILE", help="source image")
    edit_parser.add_argument("--instruction", metavar="TEXT", help="what to change")
    edit_parser.add_argument(
        "--edits",
        type=Path,
        metavar="FILE",
        help='json lines: {"image": FILE, "instruction": TEXT}',
    )
    edit_parser.add_argument(
        "--image-guidance",
        type=float,
        metavar="S",
        help=f"guidance scale of the source image (default {EditSettings().image_guidance:g})",
    )
    edit_parser.add_argument(
        "--height", type=int, help="pixels of the result, with --width (default: the source's size)"
    )
    edit_parser.add_argument("--width", type=int, help="pixels of the result, with --height")

    caption_parser = commands.add_parser("caption", parents=[common], help="image to text")
    caption_parser.add_argument(
        "--image", type=Path, nargs="+", required=True, metavar="FILE", help="images to describe"
    )
    caption_parser.add_argument(
        "--question", metavar="TEXT", help="what to ask about each image (default: nothing)"
    )
    caption_parser.add_argument(
        "--view", choices=("vit", "latents", "both"), help="how the image is seen (default vit)"
    )
    caption_parser.add_argument(
        "--from-noised",
        type=float,
        metavar="T",
        help="read the latents noised to level T (0 clean, 1 noise) and nothing else, as UNO's "
        "caption loss does",
    )
    caption_parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="with --from-noised: the prompt that the noised latents, not the caption, read",
    )
    _add_text_flags(caption_parser)
    caption_parser.add_argument("--json", action="store_true", help="a JSON object a line")
    caption_parser.set_defaults(count=1)

    chat_parser = commands.add_parser(
        "chat",
        parents=[common, drawing],
        help="images and texts to an image or a text",
        description=defaults_note,
    )
    chat_parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help='json lines: {"parts": [{"text": TEXT} or {"image": FILE}, ...], "output": "image" '
        '(default) or "text", "think": false}; without it lines of standard input are answered',
    )
    chat_parser.add_argument(
        "--think", action="store_true", help="write a text before each picture, which it reads"
    )
    chat_parser.add_argument(
        "--view",
        default="both",
        choices=("vit", "latents", "both"),
        help="how images are seen (default both)",
    )
    chat_parser.add_argument(
        "--image-guidance",
        type=float,
        metavar="S",
        help=f"guidance scale of images (default {EditSettings().image_guidance:g})",
    )
    chat_parser.add_argument(
        "--height", type=int, help="pixels, with --width (default: those of the last image)"
    )
    chat_parser.add_argument("--width", type=int, help="pixels, with --height")
    _add_text_flags(chat_parser)
    return parser


def _add_text_flags(parser: Parser) -> None:
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=CaptionSettings.max_tokens,
        help="longest text (default 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: greedy (default); above: tokens are drawn",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest tokens of this joint probability (default 1)",
    )
