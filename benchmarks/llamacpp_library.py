"""llama.cpp's C functions, from the Python package xllamacpp, whose own Python has a server and no logits.

Structures that llama.cpp fills with its defaults are passed on as they are, so their layout does not matter.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from pathlib import Path

import numpy as np
from xllamacpp import xllamacpp

LIB = ctypes.CDLL(xllamacpp.__file__)


class Defaults(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 4096)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def declare(name: str, result: object, *arguments: object) -> None:
    function = getattr(LIB, name)
    function.restype, function.argtypes = result, arguments


declare("llama_backend_init", None)
declare("llama_model_default_params", Defaults)
declare("llama_context_default_params", Defaults)
declare("llama_model_load_from_file", c_void_p, c_char_p, Defaults)
declare("llama_init_from_model", c_void_p, c_void_p, Defaults)
declare("llama_set_n_threads", None, c_void_p, c_int32, c_int32)
declare("llama_model_get_vocab", c_void_p, c_void_p)
declare("llama_vocab_n_tokens", c_int32, c_void_p)
declare("llama_vocab_is_eog", c_bool, c_void_p, c_int32)
declare("llama_tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
declare("llama_batch_init", Batch, c_int32, c_int32, c_int32)
declare("llama_batch_free", None, Batch)
declare("llama_free", None, c_void_p)
declare("llama_decode", c_int32, c_void_p, Batch)
declare("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)


LIB.llama_backend_init()


class Model:
    """A GGUF file, loaded."""

    def __init__(self, path: Path) -> None:
        self._model = LIB.llama_model_load_from_file(str(path).encode(), LIB.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{path.name} does not load")
        self._vocabulary = LIB.llama_model_get_vocab(self._model)
        self.size = LIB.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with special tokens."""
        data, room = text.encode(), (c_int32 * (8 * len(text) + 8))()
        count = LIB.llama_tokenize(self._vocabulary, data, len(data), room, len(room), True, True)
        assert count >= 0, count
        return list(room[:count])

    def ends(self, token: int) -> bool:
        """Whether a token ends a text."""
        return bool(LIB.llama_vocab_is_eog(self._vocabulary, token))

    def context(self, threads: int) -> "Context":
        """An empty context."""
        context = LIB.llama_init_from_model(self._model, LIB.llama_context_default_params())
        assert context, "no context"
        LIB.llama_set_n_threads(context, threads, threads)
        return Context(context, self.size)


class Context:
    """The KV cache of one text."""

    def __init__(self, context: int, size: int) -> None:
        self._context, self._size, self._length = context, size, 0

    def read(self, ids: list[int]) -> np.ndarray:
        """Goes on with some tokens; the logits at each, float32, shape (tokens, vocabulary)."""
        batch = LIB.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, self._length + place
            batch.n_seq_id[place], batch.logits[place], batch.seq_id[place][0] = 1, 1, 0
        assert LIB.llama_decode(self._context, batch) == 0
        self._length += len(ids)
        rows = (LIB.llama_get_logits_ith(self._context, place) for place in range(len(ids)))
        logits = np.stack([np.ctypeslib.as_array(row, (self._size,)).copy() for row in rows])
        LIB.llama_batch_free(batch)
        return logits

    def free(self) -> None:
        """Gives the memory back."""
        LIB.llama_free(self._context)
