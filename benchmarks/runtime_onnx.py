"""Worker of benchmarks/runtimes.py: ONNX Runtime GenAI, after its model builder."""

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from runtime_job import NEW, Answer, Stopwatch, serve

EXTRA = ["shared_embeddings=false", "nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1"]


def run(folder: Path, ids: list[int], prompts: list[list[int]]) -> Answer:
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", out]
        command += ["-e", "cpu", "-c", out, "-p", "int4" if quantized else "fp32"]
        done = subprocess.run(
            command + (["--extra_options", *EXTRA] if quantized else []), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"model builder: {done.stderr.strip().splitlines()[-1]}")
        model = og.Model(out)

        def generator_of(length: int) -> og.Generator:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=length, do_sample=False)
            return og.Generator(model, params)

        generator, given = generator_of(len(ids) + 1), []
        for token, following in pairwise(ids):
            generator.append_tokens(np.array([token], dtype=np.int32))
            logits = np.asarray(generator.get_logits()).reshape(-1).astype(np.float64)
            given.append(float(logits[following] - np.logaddexp.reduce(logits)))
        watch, texts = Stopwatch(), []
        for prompt in prompts:
            generator = generator_of(len(prompt) + NEW)
            generator.append_tokens(np.array(prompt, dtype=np.int32))
            with watch:
                while not generator.is_done():
                    generator.generate_next_token()
            texts.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
        return Answer(given, texts, watch.speed(texts))


serve(run)
