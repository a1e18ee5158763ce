"""Worker of benchmarks/runtimes.py: ONNX Runtime GenAI, after its model builder."""

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from runtime_job import NEW, serve

EXTRA = ["shared_embeddings=false", "nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1"]


def run(folder: Path, ids: list[int]) -> tuple[list[float], float]:
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
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + NEW + 1, do_sample=False, min_length=len(ids) + NEW)
        generator = og.Generator(model, params)
        given = []
        for token, following in pairwise(ids):
            generator.append_tokens(np.array([token], dtype=np.int32))
            logits = np.asarray(generator.get_logits()).reshape(-1).astype(np.float64)
            given.append(float(logits[following] - np.logaddexp.reduce(logits)))
        generator.append_tokens(np.array(ids[-1:], dtype=np.int32))
        start = time.perf_counter()
        for _ in range(NEW):
            generator.generate_next_token()
        return given, NEW / (time.perf_counter() - start)


serve(run)
