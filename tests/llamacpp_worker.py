"""Runs GGUF files in llama.cpp, in an environment of its own: a script of test_llamacpp.py.

usage: llamacpp_worker.py FOLDER...
For each FOLDER reads model.gguf and request.json (texts: strings to tokenize; ids: token ids to run), and
writes answer.json (the token ids of each text, the tokens that end a text) and logits.npy, float32, of shape
(ids, vocabulary).
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from llamacpp_library import Model


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        request = json.loads((folder / "request.json").read_text())
        model = Model(folder / "model.gguf")
        answer = {
            "tokens": [model.tokenize(text) for text in request["texts"]],
            "ends": [token for token in range(model.size) if model.ends(token)],
        }
        (folder / "answer.json").write_text(json.dumps(answer))
        if request["ids"]:
            np.save(folder / "logits.npy", model.context(threads=1).read(request["ids"]))
        print(folder.name, "done", flush=True)


main()
