"""Adapters of the MLP as vLLM-Omni binds them: gate and up projection, which it computes as one
gate_up_proj, have one adapter of twice the rank, and so has the down projection, padded with zeros.

    gate_up_proj   A [2 rank, in] = gate's over up's;  B [2 mlp, 2 rank] = gate's and up's as blocks
    down_proj      A [2 rank, mlp], B [out, 2 rank]: rows and columns from `rank` on are 0
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from uno_ds.json_text import shown
from uno_ds.model.tensor_file import Entry, TensorFile
from uno_ds.settings import SettingsError

GATE, UP, DOWN, PACKED = "gate_proj", "up_proj", "down_proj", "gate_up_proj"
Halves = tuple[torch.Tensor, torch.Tensor]  # A and B


def pack(layer: Mapping[str, Halves]) -> dict[str, Halves]:
    """The adapters {projection: (A, B)} of one layer, packed. Raises SettingsError for one of gate
    and up alone."""
    packed: dict[str, Halves] = {}
    if DOWN in layer:
        a, b = layer[DOWN]
        padding = (0, len(a))
        packed[DOWN] = F.pad(a, (0, 0, *padding)), F.pad(b, padding)
    pair = [layer[name] for name in (GATE, UP) if name in layer]
    if len(pair) == 1:
        raise SettingsError(
            "--packed", "needs adapters on gate_proj and up_proj of a layer, or on neither."
        )
    if pair:
        (gate_a, gate_b), (up_a, up_b) = pair
        packed[PACKED] = torch.cat([gate_a, up_a]), torch.block_diag(gate_b, up_b)
    return packed


def is_packed(names: Iterable[str]) -> bool:
    return any(f".{PACKED}." in name for name in names)


class UnpackedTensors:
    """The tensors of a packed file under the names and with the values of the adapters that were
    packed, of `rank`. With another rank than half of the file's, as of an adapter that another
    program trained packed, gate and up share A and have each its rows of B."""

    def __init__(self, file: TensorFile, rank: int):
        self._file, self._rank = file, rank
        # {name: name in the file}
        self._packed: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        for packed, entry in file.entries.items():
            names = [packed]
            if f".{PACKED}." in packed:
                names = [packed.replace(PACKED, name) for name in (GATE, UP)]
            for name in names:
                self._packed[name] = packed
                values = torch.empty(entry.shape, device="meta")
                shape = tuple(self._part(name, values).shape)
                self.entries[name] = replace(entry, shape=shape)

    def read(self, name: str) -> torch.Tensor:
        """Raises SettingsError (key: the file) if what packing leaves 0 is not."""
        whole = self._file.read(self._packed[name])
        part = self._part(name, whole)
        rest = self._side(name, whole) if part.shape != whole.shape else part
        # The part's own block is all of its side that is not 0.
        if torch.count_nonzero(rest) != torch.count_nonzero(part):
            raise SettingsError(
                str(self._file.path),
                f"cannot be split: {shown(self._packed[name])} is not 0 outside of the blocks of "
                "the adapters that were packed; merge it into a base with the program that "
                "changed it.",
            )
        return part

    def _side(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """The rows of B that belong to gate or to up, all of another tensor but gate_up_proj's
        A."""
        if PACKED not in self._packed[name]:
            return whole
        if not name.endswith("lora_B.weight"):
            return self._part(name, whole)
        rows = len(whole) // 2
        return whole[:rows] if f".{GATE}." in name else whole[rows:]

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        if whole.dim() != 2:
            return whole
        is_b, rank = name.endswith("lora_B.weight"), self._rank
        is_pair = PACKED in self._packed[name]
        if is_b and is_pair:
            whole = self._side(name, whole)
        if whole.shape[1 if is_b else 0] != 2 * rank:
            return whole
        second = is_pair and f".{UP}." in name
        block = slice(rank, None) if second else slice(rank)
        return whole[:, block] if is_b else whole[block]
