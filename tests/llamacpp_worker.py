"""Runs GGUF files in llama.cpp, in an environment of its own: a script of test_llamacpp.py.

usage: llamacpp_worker.py FOLDER...
For each FOLDER reads model.gguf and request.json (texts: strings to tokenize; ids: token ids to run), and
writes answer.json (the token ids of each text, the tokens that end a text) and logits.npy, float32, of shape
(ids, vocabulary).

The C functions of llama.cpp are called, because the Python of xllamacpp has a server and no logits.
Structures that llama.cpp fills with its defaults are passed on as they are, so their layout does not matter.
"""

import ctypes
import json
import sys
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
declare("llama_decode", c_int32, c_void_p, Batch)
declare("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)


def tokenize(vocab: int, text: str) -> list[int]:
    data, room = text.encode(), (c_int32 * (8 * len(text) + 8))()
    count = LIB.llama_tokenize(vocab, data, len(data), room, len(room), True, True)
    assert count >= 0, count
    return list(room[:count])


def logits(model: int, ids: list[int], size: int) -> np.ndarray:
    context = LIB.llama_init_from_model(model, LIB.llama_context_default_params())
    assert context, "no context"
    LIB.llama_set_n_threads(context, 1, 1)
    batch = LIB.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    assert LIB.llama_decode(context, batch) == 0
    rows = (LIB.llama_get_logits_ith(context, place) for place in range(len(ids)))
    return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])


def main() -> None:
    LIB.llama_backend_init()
    for folder in map(Path, sys.argv[1:]):
        request = json.loads((folder / "request.json").read_text())
        model = LIB.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), LIB.llama_model_default_params()
        )
        assert model, f"{folder} does not load"
        vocab = LIB.llama_model_get_vocab(model)
        size = LIB.llama_vocab_n_tokens(vocab)
        answer = {
            "tokens": [tokenize(vocab, text) for text in request["texts"]],
            "ends": [token for token in range(size) if LIB.llama_vocab_is_eog(vocab, token)],
        }
        (folder / "answer.json").write_text(json.dumps(answer))
        if request["ids"]:
            np.save(folder / "logits.npy", logits(model, request["ids"], size))
        print(folder.name, "done", flush=True)


main()
