"""The shape of a model: given in a recipe for training from scratch, or read from the configuration
files of a base folder."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from uno_ds.files_on_disk import read_regular
from uno_ds.json_text import read_json
from uno_ds.kernels.selection import Demands
from uno_ds.sequence.composition import Geometry
from uno_ds.settings import SettingsError, build, printable, setting

# Larger sizes are mistakes: building the shapes alone would take minutes or overflow. Sizes that
# are not listed have _LARGEST_SIZE.
_LARGEST = {
    "layers": 1000,
    "vit_layers": 1000,
    "heads": 2**16,
    "kv_heads": 2**16,
    "head_dim": 2**16,
    "vit_side": 1024,
    "vit_patch": 1024,
    "codec_downsample": 1024,
    "latent_patch": 64,
    "latent_side": 1024,
}
_LARGEST_SIZE = 2**24
_LARGEST_CONFIG = 10_000_000
RECIPES = Path(__file__).parent.parent / "recipes"
# Of the registry in codec.py.
CODEC_NAMES = ("flux", "pixel")


@dataclass(frozen=True)
class Architecture:
    """Two experts of one shape (Qwen2), a SigLIP-like visual encoder, and the interface to a
    codec's latents."""

    hidden: int = setting(doc="Width of the residual stream of both experts.", minimum=4)
    layers: int = setting(doc="Decoder layers.", minimum=1)
    heads: int = setting(doc="Query heads.", minimum=1)
    kv_heads: int = setting(doc="Key and value heads; divides `heads`.", minimum=1)
    head_dim: int | None = setting(None, doc="Width of a head; null: hidden / heads.", minimum=2)
    mlp: int = setting(doc="Width of the gated MLP.", minimum=1)
    vocabulary: int = setting(
        doc="Rows of the token embedding; at least the tokenizer's size.", minimum=1
    )
    rope_theta: float = setting(1e6, doc="Base of the rotary frequencies.", above=0)
    norm_eps: float = setting(1e-6, doc="Epsilon of RMSNorm.", above=0)
    vit_hidden: int = setting(doc="Width of the visual encoder.", minimum=1)
    vit_layers: int = setting(doc="Layers of the visual encoder that are used.", minimum=1)
    vit_heads: int = setting(doc="Heads of the visual encoder; divides `vit_hidden`.", minimum=1)
    vit_mlp: int = setting(doc="MLP width of the visual encoder.", minimum=1)
    vit_patch: int = setting(14, doc="Pixels per patch side of the visual encoder.", minimum=1)
    vit_side: int = setting(
        70, doc="Patches per side that the visual encoder's position tables hold.", minimum=1
    )
    codec: str = setting(
        "flux",
        choices=CODEC_NAMES,
        doc="Autoencoder of the latents. flux: the FLUX autoencoder of the base; pixel: pixels "
        "themselves, without weights.",
    )
    codec_downsample: int = setting(8, doc="Pixels per latent side.", minimum=1)
    latent_channels: int = setting(16, doc="Channels of a latent.", minimum=1)
    latent_patch: int = setting(2, doc="Latents per token side.", minimum=1)
    latent_side: int = setting(
        64, doc="Latent tokens per side that the position table holds.", minimum=1
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            value, largest = getattr(self, field.name), _LARGEST.get(field.name, _LARGEST_SIZE)
            if type(value) is int and value > largest:
                raise SettingsError(field.name, f"must be at most {largest}, got {value}.")
        if self.heads % self.kv_heads:
            raise SettingsError(
                "kv_heads", f"must divide the {self.heads} query heads, got {self.kv_heads}."
            )
        if self.head_dim is None:
            if self.hidden % self.heads:
                raise SettingsError(
                    "heads",
                    f"must divide hidden = {self.hidden} when head_dim is not given, got "
                    f"{self.heads}.",
                )
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.head_width % 2:
            raise SettingsError(
                "head_dim", f"must be even for rotary embedding, got {self.head_width}."
            )
        if self.hidden % 4:
            raise SettingsError(
                "hidden", f"must be a multiple of 4 for the 2-D position tables, got {self.hidden}."
            )
        if self.vit_hidden % self.vit_heads:
            raise SettingsError(
                "vit_heads", f"must divide vit_hidden = {self.vit_hidden}, got {self.vit_heads}."
            )
        if self.codec == "pixel" and self.latent_channels != 3 * self.codec_downsample**2:
            wanted = 3 * self.codec_downsample**2
            raise SettingsError(
                "latent_channels",
                f"must be 3 * codec_downsample^2 = {wanted} for the pixel codec, got "
                f"{self.latent_channels}.",
            )

    @property
    def head_width(self) -> int:
        """Values of a head: `head_dim`, which an Architecture always has once it is built."""
        assert self.head_dim is not None, "set in __post_init__"
        return self.head_dim

    @property
    def query_width(self) -> int:
        """Values of all queries of a token."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Values of all keys, or of all values, of a token."""
        return self.kv_heads * self.head_width

    @property
    def latent_values(self) -> int:
        """Values of one latent token."""
        return self.latent_channels * self.latent_patch**2

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            latent_stride=self.codec_downsample * self.latent_patch,
            latent_values=self.latent_values,
            latent_side=self.latent_side,
            vit_stride=self.vit_patch,
            vit_side=self.vit_side,
        )


LLM_KEYS = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
    "vocab_size": "vocabulary",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
VIT_KEYS = {
    "hidden_size": "vit_hidden",
    "num_attention_heads": "vit_heads",
    "intermediate_size": "vit_mlp",
    "patch_size": "vit_patch",
}
VIT_CONFIG = "vit_config.json"
PUBLISHED_CODEC = "flux"
INTERFACE_KEYS = {
    "vit_max_num_patch_per_side": "vit_side",
    "max_latent_size": "latent_side",
    "latent_patch_size": "latent_patch",
}
# In config.json, as in the published one.
RECOGNISED_BY = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"}
CODEC_KEYS = {"z_channels": "latent_channels", "downsample": "codec_downsample"}


def demands_of(shape: Architecture, precision: str, on_cpu: bool = False) -> Demands:
    """What a model of this shape asks of kernel backends."""
    encoder = shape.vit_hidden // shape.vit_heads
    widths = (shape.hidden, shape.query_width, shape.key_width, shape.mlp)
    return Demands(precision, shape.head_dim, (encoder,), on_cpu, widths)


def packaged(name: str) -> Path:
    """A folder that ships with the project under this name, or else the path."""
    shipped = {path.name for path in RECIPES.iterdir()}
    return RECIPES / name if name in shipped else Path(name)


def read_architecture(folder: Path) -> Architecture:
    """Reads llm_config.json and vit_config.json, and config.json where there is one (the published
    BAGEL's values otherwise). Raises SettingsError under `model.base` that names the file.

    BAGEL uses the output of the layer before the encoder's last, so the file counts one layer more
    than are used."""
    llm = _read(folder / "llm_config.json")
    vit = _read(folder / VIT_CONFIG)
    interface = _read_interface(folder)
    codec = interface.get("vae_config") or {}
    values = _renamed(llm, LLM_KEYS)
    values |= _renamed(vit, VIT_KEYS)
    values |= _renamed(interface, INTERFACE_KEYS)
    if type(vit.get("num_hidden_layers")) is int:
        values["vit_layers"] = vit["num_hidden_layers"] - 1
    values |= _renamed(codec, CODEC_KEYS)
    values["codec"] = codec.get("codec", PUBLISHED_CODEC)
    try:
        return build(Architecture, values)
    except SettingsError as error:
        raise error.under(f"model.base ({folder})") from None


def _renamed(content: dict, keys: dict[str, str]) -> dict:
    """The values of a file under our names; a key that the file lacks is left out."""
    return {ours: content[theirs] for theirs, ours in keys.items() if theirs in content}


def read_codec(folder: Path) -> str:
    """The codec that a base folder names, also where its other files are missing. Raises
    SettingsError for an unknown one."""
    interface = _read_interface(folder)
    codec = (interface.get("vae_config") or {}).get("codec", PUBLISHED_CODEC)
    if codec not in CODEC_NAMES:
        allowed = ", ".join(CODEC_NAMES)
        given = printable(codec)
        raise SettingsError(f"model.base ({folder}).codec", f"must be {allowed}; got {given}.")
    return codec


def write_architecture(architecture: Architecture, folder: Path) -> None:
    """Writes the three files that `read_architecture` reads."""
    llm = _their_names(architecture, LLM_KEYS)
    vit = _their_names(architecture, VIT_KEYS)
    vit["num_hidden_layers"] = architecture.vit_layers + 1
    vit["image_size"] = _image_size(architecture)
    _write(folder / "llm_config.json", llm)
    _write(folder / VIT_CONFIG, vit)
    write_interface(architecture, folder)


def write_interface(architecture: Architecture, folder: Path) -> None:
    """Writes config.json, which a base may lack and serving engines read."""
    interface = _their_names(architecture, INTERFACE_KEYS)
    codec = {"codec": architecture.codec} | _their_names(architecture, CODEC_KEYS)
    interface["vae_config"] = codec
    _write(folder / "config.json", interface)
    add_model_type(folder)


def add_model_type(folder: Path) -> None:
    """Adds to the config.json of a folder with the other two files what serving engines recognise
    BAGEL by and read of those files there, where it is missing."""
    interface = _read(folder / "config.json")
    others = {
        **RECOGNISED_BY,
        "llm_config": _read(folder / "llm_config.json"),
        "vit_config": _read(folder / VIT_CONFIG),
    }
    if not others.keys() <= interface.keys():
        _write(folder / "config.json", others | interface)


def _their_names(architecture: Architecture, keys: dict[str, str]) -> dict:
    return {theirs: getattr(architecture, ours) for theirs, ours in keys.items()}


def add_image_size(architecture: Architecture, folder: Path) -> None:
    """Adds to the VIT_CONFIG of a base that an earlier version wrote the size that the public code
    reads."""
    vit = _read(folder / VIT_CONFIG)
    if "image_size" not in vit:
        _write(folder / VIT_CONFIG, vit | {"image_size": _image_size(architecture)})


def _image_size(architecture: Architecture) -> int:
    """Pixels per side by which the public code sizes the visual encoder's position table."""
    return architecture.vit_side * architecture.vit_patch


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _read_interface(folder: Path) -> dict:
    path = folder / "config.json"
    interface = _read(path) if path.exists() else {}
    if not isinstance(interface.get("vae_config"), dict | None):
        raise SettingsError("model.base", f"{path}: vae_config must be an object.")
    return interface


def _read(path: Path) -> dict:
    try:
        content = read_json(read_regular(path, _LARGEST_CONFIG))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except FileNotFoundError:
        raise SettingsError("model.base", f"{path} does not exist.") from None
    except OSError as error:
        raise SettingsError("model.base", f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError("model.base", f"{path} is not readable JSON: {error}.") from None
