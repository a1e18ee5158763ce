"""GGUF files in the real llama.cpp: the tokens and the logits of transformers."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.resolve import BUILTIN
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export import gguf
from mkaq.export.gguf_metadata import window
from mkaq.export.settings import GgufTypes, Settings
from mkaq.walk.whole_model import whole_model
from tests.runs import one_thread, python_of
from tests.tiny import make_gptq, make_model, write_text
from tests.tiny_tokenizers import RULES, use_rules, use_sentencepiece

PYTHON = python_of("llamacpp")
SMALL = BUILTIN["builtin:tiny-llama"]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    },
}
LONG: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512},
        **{"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [2.0 + n for n in range(8)]},
        "attention_factor": 1.5,
    },
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")},
    **{
        f"llama with {k} RoPE": ("llama", {"rope_parameters": r | {"rope_theta": 1e4}})
        for k, r in ROPES.items()
    },
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "phi3 with longrope": ("phi3", LONG),
    "phi3 with part of a head": (
        "phi3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}
CODES: dict[str, dict[str, Any]] = {  # a whole row is 256 or 640 columns, so both kinds of blocks are used
    **{f"{bits} bits": {"bits": bits, "group_size": -1} for bits in (2, 3, 4, 8)},
    **{f"{bits} bits, asymmetric": {"bits": bits, "group_size": -1, "sym": False} for bits in (2, 3, 4)},
    **{f"{bits} bits in groups": {"bits": bits, "group_size": 64} for bits in (2, 4)},
}
NASTY = [
    *("Hello world", "  two  spaces ", "a\n\n\nb\n", "\t\ttabs", "12345 67,890.12", " ", "", "\n", "\r\n"),
    *(
        "naïve café ÉCOLE über",
        "日本語のテキスト",
        "한국어",
        "😀👍🏽 emoji",
        "русский",
        "العربية",
        "İstanbul'da",
    ),
    *(
        "I'm you're THEY'LL don't",
        "<s>hello</s> you",
        "x <|im_start|>user\nhi<|im_end|>\n",
        "a" * 50,
        "<tool> b",
    ),
    *(
        "¼ ² ١٢٣ Ⅷ",
        "\u00a0nbsp\u2003em",
        "e\u0301",
        "f(x):\n    return x**2  # c\r\n",
        "\x00\x7f",
        "a\u200bb\ufeff",
    ),
]
PIECES = [
    *"aabTHEstlvedmr''   \n\n\r\t019,.!?(-_/\\\"éÉßёп日가٣½Ⅷ²ſ’▁",
    "\u00a0",
    "\u0301",
    "👍🏽",
    "<s>",
    "<tool>",
    "the",
]

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no llama.cpp at {PYTHON} (make .venv-llamacpp/ready makes it)"
)


class Answer(NamedTuple):
    """What llama.cpp made of a file."""

    model: Checkpoint
    ids: list[int]
    tokens: dict[str, list[int]]
    ends: list[int]
    logits: torch.Tensor


def texts() -> list[str]:
    """Strings that tokenizers split in different ways."""
    rng = random.Random(0)
    return NASTY + ["".join(rng.choices(PIECES, k=rng.randint(1, 14))) for _ in range(500)]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Answer]]:
    """Writes a GGUF file of each model, and runs all in llama.cpp: ask({name: folder}, positions)."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt").read_text()[:4000]

    def run(
        models: dict[str, Path], positions: int = 200, types: GgufTypes | None = None
    ) -> dict[str, Answer]:
        root, asked = tmp_path_factory.mktemp("llamacpp"), {}
        for number, (name, path) in enumerate(models.items()):
            folder, model = root / str(number), open_checkpoint(path, quantized=True)
            folder.mkdir()
            gguf.write(model, folder, Settings("model", gguf=types or GgufTypes()))
            ids = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]
            ids = ids[: min(positions, window(model.hf_config) or positions)]
            (folder / "request.json").write_text(json.dumps({"texts": texts(), "ids": ids}))
            asked[name] = (folder, model, ids)
        command = [PYTHON, Path(__file__).parent / "llamacpp_worker.py", *(f for f, _, _ in asked.values())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        answers = {}
        for name, (folder, model, ids) in asked.items():
            said = json.loads((folder / "answer.json").read_text())
            logits = torch.from_numpy(np.load(folder / "logits.npy"))
            tokens = dict(zip(texts(), said["tokens"], strict=True))
            answers[name] = Answer(model, ids, tokens, said["ends"], logits)
        return answers

    return run


def compare(answer: Answer) -> tuple[float, float, float]:
    """Share of equal top tokens, mean KL divergence, relative error of the logits."""
    with torch.no_grad(), one_thread():
        model = whole_model(answer.model, torch.device("cpu"), torch.float32)
        ours = model(torch.tensor([answer.ids]), use_cache=False).logits[0].double()
    theirs = answer.logits.double()
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    top = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return (
        top.item(),
        (p.exp() * (p - q)).sum(-1).mean().item(),
        ((ours - theirs).norm() / ours.norm()).item(),
    )


def other_tokens(answer: Answer) -> list[tuple[str, list[int], list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(answer.model.path)
    both = [(text, tokenizer(text)["input_ids"], ids) for text, ids in answer.tokens.items()]
    return [(text, ours, theirs) for text, ours, theirs in both if ours != theirs]


def test_the_built_in_model_gives_the_same_tokens_and_logits(
    tmp_path: Path, ask: Callable[..., dict[str, Answer]]
) -> None:
    models = {"dense": SMALL}
    models |= {name: make_gptq(tmp_path / name, SMALL, **settings) for name, settings in CODES.items()}
    for name, answer in ask(models, positions=256).items():
        assert other_tokens(answer) == [] and answer.ends == [1], name
        top, divergence, error = compare(answer)
        print(f"{name}: top {top:.4f}, KL {divergence:.2e}, logits {error:.4f}")
        coarse = name.startswith(
            ("2", "3")
        )  # llama.cpp rounds hidden states to 8 bits: weaker models feel it
        assert top >= (0.95 if coarse else 0.97) and error < 0.03, (name, top, error)
        assert divergence < (5e-3 if coarse else 1e-3), (name, divergence)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4 bits"])
def test_every_family_gives_the_same_logits(
    tmp_path: Path, ask: Callable[..., dict[str, Answer]], quantized: bool
) -> None:
    models = {name: make_model(tmp_path / name, family, **more) for name, (family, more) in MODELS.items()}
    if quantized:
        models = {name: make_gptq(tmp_path / f"{name}, 4", path) for name, path in models.items()}
    for name, answer in ask(models).items():
        _, divergence, error = compare(answer)
        print(f"{name}: KL {divergence:.2e}, logits {error:.4f}")
        assert divergence < 1e-3 and error < (0.02 if quantized else 0.008), (name, divergence, error)


@pytest.mark.parametrize(("embedding", "limit"), [("f32", 1e-3), ("q8_0", 1e-3), ("q4_0", 0.2)])
def test_other_types_of_the_embedding_run(
    embedding: Any, limit: float, ask: Callable[..., dict[str, Answer]]
) -> None:
    answer = ask({"dense": SMALL}, 64, GgufTypes(embedding=embedding, dense="q8_0"))["dense"]
    assert compare(answer)[1] < limit


def test_every_kind_of_tokenizer_gives_the_same_tokens(
    tmp_path: Path, ask: Callable[..., dict[str, Answer]]
) -> None:
    models = {name: make_model(tmp_path / name, layers=1) for name in RULES}
    for name in RULES:
        use_rules(models[name], name)
    pieces = {"sentencepiece": {}, "no tokenizer.model": {"own": False}, "no space": {"prefix": False}}
    pieces["Phi-3's"] = {"phi3": True}
    for name, settings in pieces.items():
        models[name] = make_model(tmp_path / name, layers=1)
        use_sentencepiece(models[name], **settings)
    for name, answer in ask(models).items():
        assert other_tokens(answer) == [], name
        plain = [1, 2] if name in pieces else [1, 4001]
        assert answer.ends == ([1, 2, 2000, 2002] if name == "Phi-3's" else plain), name
