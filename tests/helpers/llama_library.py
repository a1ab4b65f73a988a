"""Call llama.cpp's C library to try a control vector: load a model, steer it, read logits.

LLAMA_LIBRARY names the folder of the library. The fields of its structures of parameters differ between
versions; all keep their defaults, so the structures are passed on as bytes.
"""

import ctypes
import os
from pathlib import Path

import numpy as np

ROOM = 1024  # bytes, more than any structure of parameters has


class _Opaque(ctypes.Structure):
    _fields_ = (("words", ctypes.c_int64 * (ROOM // 8)),)


class _Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), *((name, ctypes.c_void_p) for name in "abcdef"))


def library_folder():
    """Return the folder of the library, or None."""
    named = os.environ.get("LLAMA_LIBRARY")
    found = sorted(Path(named).rglob("libllama.*so*")) if named else []
    return found[0].parent if found else None


class Llama:
    """A model in llama.cpp. path: a GGUF file."""

    def __init__(self, path):
        folder = library_folder()
        ggml, library = (
            ctypes.CDLL(next(folder.glob(f"lib{name}.*so*")), ctypes.RTLD_GLOBAL)
            for name in ("ggml", "llama")
        )
        self.library = library
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        library.llama_backend_init()
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Opaque
        for name in ("llama_model_load_from_file", "llama_init_from_model"):
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_batch_get_one.restype = _Batch
        library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        cvec = (pointer, pointer, ctypes.c_size_t, number, number, number)
        library.llama_set_adapter_cvec.argtypes = cvec
        defaults = library.llama_model_default_params()
        self.model = pointer(library.llama_model_load_from_file(str(path).encode(), defaults))
        self.n_layers = library.llama_model_n_layer(self.model)
        self.width = library.llama_model_n_embd(self.model)

    def logits(self, tokens, vocabulary, directions=None, strength=1.0):
        """Return (vocabulary,) logits after the tokens; directions: layer -> (d,), which llama.cpp adds."""
        library = self.library
        defaults = library.llama_context_default_params()
        context = ctypes.c_void_p(library.llama_init_from_model(self.model, defaults))
        if directions:
            # The file of a control vector becomes one row for each layer from 1 on.
            rows = np.zeros((self.n_layers - 1, self.width), dtype=np.float32)
            for layer, direction in directions.items():
                rows[layer - 1] += strength * np.asarray(direction)
            given = rows.ctypes.data_as(ctypes.c_void_p), rows.size
            assert library.llama_set_adapter_cvec(context, *given, self.width, 1, self.n_layers) == 0
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        assert library.llama_decode(context, library.llama_batch_get_one(held, len(tokens))) == 0
        found = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (vocabulary,)).copy()
        library.llama_free(context)
        return found
