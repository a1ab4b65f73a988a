"""Read and write steering vectors in the file formats of other tools (phase 3 and `tools/`).

`.gguf`: a control vector of llama.cpp and repeng, whose `direction.N` is added to the output of decoder block
N, counted from 0 (measured: it acts at our `layer_idx` N). `.safetensors` and `.pt` of this project: the same
names, with metadata. Other `.pt`: a tensor (d,) or (layers, d), as persona_vectors (arXiv 2507.21509) writes
it with the embedding's row first, a list of tensors, or a dictionary block number -> tensor. `.npy`: (d,) or
(layers, d). An axis of length 1 is left out.
"""

import json
import pickle
import re
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
from support.errors import InputError, first_line

FORMATS = ("gguf", "safetensors", "pt")
LM_EVAL = "lm-eval"
ARCHITECTURE = "controlvector"
PREFIX = "direction."
NUMBERED = re.compile(r"(?:direction\.|layers?[._]?)?(\d+)")  # the name of a block's vector
MODEL_HINT = f"{ARCHITECTURE}.model_hint"


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

    def at(self, layer_idx: int, n_blocks: int | None, d_model: int, model_type: str = "") -> Tensor:
        """Return the vector for a block of a model, (d_model,) float32.

        n_blocks: None if it is not known, which is not enough for rows.
        Raises InputError: another width, architecture or number of layers, or no vector for that layer.
        """
        width, remedy = self.tensors[0].shape[-1], "give vectors of this model"
        if self.model_hint and model_type and self.model_hint != model_type:
            problem = f"is for a model of type {self.model_hint!r}, this one is {model_type!r}"
            raise InputError(f"{self.path} {problem}; {remedy}")
        if width != d_model:
            problem = f"holds vectors of width {width}, the model's is {d_model}"
            raise InputError(f"{self.path} {problem}; {remedy}")
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
        elif n_blocks is not None and (last := max(by_layer)) >= n_blocks:
            raise InputError(
                f"{self.path} has a vector for layer {last}, the model has blocks 0 to {n_blocks - 1}; "
                "number the vectors by the block whose output they are of"
            )
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
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path} cannot be read as {path.suffix} ({reason}); write it again") from error
    if not found.tensors:
        raise InputError(f"{path} holds no vector; expected {PREFIX}N, or one tensor of (d,) or (layers, d)")
    if len({each.shape[-1] for each in found.tensors}) > 1:
        raise InputError(f"{path} holds vectors of several widths; give those of one model")
    if not all(torch.isfinite(each).all() for each in found.tensors):
        raise InputError(f"{path} holds numbers that are not finite; write it again")
    return found


def _read_gguf(path: Path) -> VectorFile:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = fields.get("general.architecture", "")
    if architecture != ARCHITECTURE:
        raise InputError(f"{path} is a GGUF of {architecture!r}, expected a control vector")
    tensors = {each.name: torch.tensor(np.array(each.data), dtype=torch.float32) for each in reader.tensors}
    return _from_tensors(path, tensors, fields.get(MODEL_HINT, ""))


def _read_safetensors(path: Path) -> VectorFile:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    return _from_tensors(path, tensors, metadata.get("model_hint", ""))


def _read_pt(path: Path) -> VectorFile:
    expected = "a tensor, a list of tensors or a dictionary block number -> tensor"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} cannot be read as .pt: it is damaged, or holds objects of a program; save {expected}"
        ) from error
    if isinstance(content, list | tuple) and content and all(isinstance(each, Tensor) for each in content):
        content = torch.stack([each.squeeze() for each in content])
    if isinstance(content, Tensor):
        return _from_tensors(path, {"": content})
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected {expected}")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return _from_tensors(path, tensors, str(content.get("model_hint", "")))


def _read_npy(path: Path) -> VectorFile:
    return _from_tensors(path, {"": torch.from_numpy(np.load(path, allow_pickle=False))})


def _from_tensors(path: Path, tensors: Mapping[str, Tensor], hint: str = "") -> VectorFile:
    if directions := _directions(path, tensors):
        return VectorFile(path, directions, model_hint=hint)
    if len(tensors) != 1:
        return VectorFile(path)
    only = next(iter(tensors.values())).float()
    vectors = only.squeeze()
    if vectors.ndim not in (1, 2):
        raise InputError(f"{path} holds a tensor of shape {tuple(only.shape)}, expected (d,) or (layers, d)")
    return VectorFile(path, **{"anywhere" if vectors.ndim == 1 else "rows": vectors}, model_hint=hint)


def _directions(path: Path, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    directions = {}
    for name, value in tensors.items():
        if found := NUMBERED.fullmatch(name):
            vector = value.float().squeeze()
            if vector.ndim != 1:
                raise InputError(f"{path}: {name} has shape {tuple(value.shape)}, expected (d,)")
            directions[int(found[1])] = vector
    return directions


def write_vectors(
    path: Path, form: str, directions: Mapping[int, Tensor], model_hint: str, metadata: Mapping[str, Any]
) -> None:
    """Write vectors as gguf, safetensors or pt in one step.

    directions: layer_idx -> (d,), as strength 1 adds them. metadata: plain values.
    Raises InputError: layer 0 as GGUF, which llama.cpp cannot steer.
    """
    vectors = {layer: vector.float() for layer, vector in sorted(directions.items())}
    named = {f"{PREFIX}{layer}": vector for layer, vector in vectors.items()}
    if form == "gguf":
        if 0 in vectors:
            raise InputError("a GGUF control vector cannot steer layer 0; export it as safetensors or pt")
        _write_gguf(path, named, model_hint, metadata)
    elif form == "safetensors":
        plain = {"model_hint": model_hint, **{key: json.dumps(value) for key, value in metadata.items()}}
        with replacing(path) as file:
            file.write(to_safetensors({name: vector.contiguous() for name, vector in named.items()}, plain))
    else:
        copies = {name: vector.clone() for name, vector in named.items()}
        save_tensors(path, {"model_hint": model_hint, **metadata, **copies})


def write_hookpoints(path: Path, directions: Mapping[int, Tensor], blocks: str) -> None:
    """Write vectors as the steered models of lm-evaluation-harness load them, in one step.

    directions: layer_idx -> (d,), as they are added to the block's output. blocks: path of the list of blocks
    from the model's `base_model`. The file holds nothing else: each of its entries is a place to steer.
    """
    save_tensors(
        path,
        {
            f"{blocks}.{layer}": {
                "steering_vector": vector.float().clone(),
                "steering_coefficient": 1.0,
                "action": "add",
                "bias": None,
                "head_index": None,
            }
            for layer, vector in sorted(directions.items())
        },
    )


def _write_gguf(path: Path, named: Mapping[str, Tensor], hint: str, metadata: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(MODEL_HINT, hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(named))
        writer.add_string("persona_transfer.metadata", json.dumps(metadata))
        for name, vector in named.items():
            writer.add_tensor(name, vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with replacing(path) as file:
            file.write(temporary.read_bytes())
