"""Read and write steering vectors in the file formats of other tools (phase 3 and `tools/`).

`.gguf`: a control vector of llama.cpp and repeng, whose `direction.N` is added to the output of decoder block
N, counted from 0 (measured: it acts at our `layer_idx` N). `.safetensors` and `.pt` of this project: the same
names, with metadata. `.pt` of persona_vectors (arXiv 2507.21509): (layers, d), whose first row is the
embedding's. `.npy`: (d,) or (layers, d).
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from support.artifacts import replacing, save_tensors
from support.errors import InputError

FORMATS = ("gguf", "safetensors", "pt")
ARCHITECTURE = "controlvector"
PREFIX = "direction."


@dataclass(frozen=True)
class VectorFile:
    """Hold the vectors of a file.

    by_layer: layer_idx -> (d,) float32. anywhere: a vector without a layer, or None. rows: (layers, d), whose
    layers depend on the model's number of blocks, or None. model_hint: the model's architecture, or "".
    """

    path: Path
    by_layer: Mapping[int, Tensor] = field(default_factory=dict)
    anywhere: Tensor | None = None
    rows: Tensor | None = None
    model_hint: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that the file holds."""
        return [each for each in (*self.by_layer.values(), self.anywhere, self.rows) if each is not None]

    def at(self, layer_idx: int, n_blocks: int, d_model: int, model_type: str = "") -> Tensor:
        """Return the vector for a block of a model, (d_model,) float32.

        Raises InputError: another width, architecture or number of layers, or no vector for that layer.
        """
        width = self.tensors[0].shape[-1]
        if self.model_hint and model_type and self.model_hint != model_type:
            raise InputError(
                f"{self.path} is for a model of type {self.model_hint!r}, this one is {model_type!r}; give "
                "vectors of this model"
            )
        if width != d_model:
            raise InputError(
                f"{self.path} holds vectors of width {width}, the model's is {d_model}; give vectors of "
                "this model"
            )
        if self.anywhere is not None:
            return self.anywhere
        by_layer = self.by_layer
        if self.rows is not None:
            n = len(self.rows)
            if n not in (n_blocks, n_blocks + 1):
                raise InputError(
                    f"{self.path} holds vectors of {n} layers, the model has {n_blocks} blocks; expected as "
                    "many, or one more with the embedding's first"
                )
            by_layer = dict(enumerate(self.rows[n - n_blocks :]))
        if layer_idx not in by_layer:
            known = ", ".join(map(str, sorted(by_layer)))
            raise InputError(
                f"{self.path} has no vector for layer {layer_idx}, only for {known}; choose one of these"
            )
        return by_layer[layer_idx]


def read_vectors(path: Path) -> VectorFile:
    """Read a file of vectors. Raises InputError: no such file, another format, damage, or not finite."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; name a .gguf, .safetensors, .pt or .npy file of vectors")
    readers = {".gguf": _read_gguf, ".safetensors": _read_safetensors, ".pt": _read_pt, ".npy": _read_npy}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is none of {', '.join(readers)}; convert it to one of these")
    try:
        found = reader(path)
    except InputError:
        raise
    except Exception as error:  # the readers of a damaged file can raise anything
        raise InputError(
            f"{path} cannot be read as {path.suffix} ({type(error).__name__}: {error}); write it again"
        ) from error
    if not found.tensors:
        raise InputError(f"{path} holds no vector; expected {PREFIX}N, or one tensor of (d,) or (layers, d)")
    if len({each.shape[-1] for each in found.tensors}) > 1:
        raise InputError(f"{path} holds vectors of several widths; give those of one model")
    if not all(torch.isfinite(each).all() for each in found.tensors):
        raise InputError(f"{path} holds numbers that are not finite; write it again")
    return found


def _read_gguf(path: Path) -> VectorFile:
    reader = gguf.GGUFReader(path)
    architecture = _gguf_text(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(f"{path} is a GGUF of {architecture!r}, expected a control vector")
    tensors = {
        tensor.name: torch.tensor(np.array(tensor.data), dtype=torch.float32) for tensor in reader.tensors
    }
    return VectorFile(path, _directions(tensors), model_hint=_gguf_text(reader, f"{ARCHITECTURE}.model_hint"))


def _gguf_text(reader: gguf.GGUFReader, key: str) -> str:
    found = reader.get_field(key)
    return "" if found is None else bytes(found.parts[found.data[0]]).decode()


def _read_safetensors(path: Path) -> VectorFile:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    return _from_tensors(path, tensors, metadata.get("model_hint", ""))


def _read_pt(path: Path) -> VectorFile:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        return _from_tensors(path, {"": content})
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a tensor or {PREFIX}N -> tensor")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    return _from_tensors(path, tensors, str(content.get("model_hint", "")))


def _read_npy(path: Path) -> VectorFile:
    return _from_tensors(path, {"": torch.from_numpy(np.load(path, allow_pickle=False))})


def _from_tensors(path: Path, tensors: Mapping[str, Tensor], hint: str = "") -> VectorFile:
    if directions := _directions(tensors):
        return VectorFile(path, directions, model_hint=hint)
    if len(tensors) != 1:
        return VectorFile(path)
    only = next(iter(tensors.values())).float()
    if only.ndim not in (1, 2):
        raise InputError(f"{path} holds a tensor of shape {tuple(only.shape)}, expected (d,) or (layers, d)")
    return VectorFile(path, **{"anywhere" if only.ndim == 1 else "rows": only}, model_hint=hint)


def _directions(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    numbered = [
        (name.removeprefix(PREFIX), value) for name, value in tensors.items() if name.startswith(PREFIX)
    ]
    return {int(number): value.float().flatten() for number, value in numbered if number.isdigit()}


def write_vectors(
    path: Path, form: str, directions: Mapping[int, Tensor], model_hint: str, metadata: Mapping[str, Any]
) -> None:
    """Write vectors as gguf, safetensors or pt in one step.

    directions: layer_idx -> (d,), as strength 1 adds them. metadata: plain values.
    Raises InputError: layer 0 as GGUF, which llama.cpp cannot steer.
    """
    ordered = dict(sorted(directions.items()))
    if form == "gguf":
        _write_gguf(path, ordered, model_hint, metadata)
    elif form == "safetensors":
        plain = {"model_hint": model_hint, **{key: json.dumps(value) for key, value in metadata.items()}}
        tensors = {f"{PREFIX}{layer}": vector.float().contiguous() for layer, vector in ordered.items()}
        with replacing(path) as file:
            file.write(to_safetensors(tensors, plain))
    else:
        named = {f"{PREFIX}{layer}": vector.float().clone() for layer, vector in ordered.items()}
        save_tensors(path, {"model_hint": model_hint, **metadata, **named})


def _write_gguf(path: Path, directions: Mapping[int, Tensor], hint: str, metadata: Mapping[str, Any]) -> None:
    if 0 in directions:
        raise InputError("a GGUF control vector cannot steer layer 0; export it as safetensors or pt")
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string("persona_transfer.metadata", json.dumps(metadata))
        for layer, vector in directions.items():
            writer.add_tensor(f"{PREFIX}{layer}", vector.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with replacing(path) as file:
            file.write(temporary.read_bytes())
