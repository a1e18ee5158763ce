"""Whether a change leaves every byte as it was: `python -m tests.golden.check`; before it, with `--write`.

The digests are those of one machine: sums of floats come out otherwise on another one. The folder lives for
the time of a move.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from mkaq.cli import main
from tests.tiny import make_model, write_text

HERE = Path(__file__).parent.resolve()
DIGESTS = HERE / "digests.json"
TEXT = {"dataset": "text", "path": "topics.txt", "max_seq_length": 32}
CHANNELS = {"layers": 1, "fuse": "channels", "order": "measured", "protect": {"first": 1, "last": 0}}
AVERAGE = {"layers": 1, "protect": {"first": 1, "last": 0}, "manifold": {"points": 128}}
TUNE = {"method": "layerwise", "steps": 5, "batch_size": 4}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}
BNB = {"method": "bitsandbytes"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("llama", {"merge": AVERAGE | {"order": "back_to_front"}, "quantize": GPTQ}),
    "mistral": (
        "mistral",
        {"merge": CHANNELS, "recover": TUNE, "quantize": GPTQ | {"bits": 3, "sym": False}},
    ),
    "qwen2": (
        "qwen2",
        {"merge": CHANNELS, "quantize": GPTQ | {"bits": 8, "desc_act": True, "static_groups": True}},
    ),
    "qwen3": (
        "qwen3",
        {
            "merge": AVERAGE | {"order": "measured", "coefficient": "measured", "manifold": None},
            "quantize": GPTQ | {"bits": 2, "group_size": -1},
        },
    ),
    "gemma2": ("gemma2", {"merge": AVERAGE, "quantize": BNB | {"bits": 4}}),
    "phi3": ("phi3", {"merge": CHANNELS, "recover": TUNE, "quantize": BNB | {"bits": 8}}),
    "phi3-joint": ("phi3", {"merge": CHANNELS, "quantize": GPTQ | {"target": "source"}}),
    "gemma2-gptq": ("gemma2", {"merge": None, "quantize": GPTQ | {"desc_act": True, "sym": False}}),
    "fp4": (
        "llama",
        {"merge": None, "calibration": None, "quantize": BNB | {"quant_type": "fp4", "double_quant": False}},
    ),
    "merge-only": (
        "mistral",
        {
            "merge": AVERAGE | {"coefficient": 0.7},
            "quantize": None,
            "export": {"shard_size": "200KB"},
            "model": {"path": "models/mistral", "dtype": "float32"},
        },
    ),
    "fused-only": ("qwen3", {"merge": CHANNELS, "quantize": None}),
    "tuned-average": ("qwen2", {"merge": AVERAGE, "recover": TUNE, "quantize": None}),
    "budget": (
        "llama",
        {
            "merge": {"protect": {"first": 1, "last": 0}, "manifold": {"points": 128}},
            "quantize": {"method": "gptq", "group_size": 32},
            "budget": {"perplexity_increase": "5000%", "bits": [8, 4]},
        },
    ),
    "two": ("llama", {"merge": CHANNELS, "recover": TUNE, "quantize": GPTQ | {"target": "source"}}),
}


def mkaq(*arguments: str) -> str:
    """What a command prints on stdout, or how it fails."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["mkaq", *arguments]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                return f"exit {stop.code}: {err.getvalue()}"
    return out.getvalue()


def one(name: str, family: str, sections: dict[str, Any]) -> dict[str, str]:
    """Digests of what a run makes and tells."""
    if not Path("models", family).exists():
        make_model(Path("models", family), family)
    data: dict[str, Any] = {
        "version": 1,
        "name": name,
        "model": {"path": f"models/{family}"},
        "calibration": {**TEXT, "num_samples": 16},
        "evaluate": {"perplexity": {**TEXT, "num_samples": 2}},
    }
    data |= sections
    Path(f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    found = {"plan": mkaq("plan", f"{name}.yaml", "--json"), "plan text": mkaq("plan", f"{name}.yaml")}
    if name == "two":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        run = [*launch, "-m", "mkaq", "run", f"{name}.yaml"]
        paths = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
        subprocess.run(run, check=True, env=paths, capture_output=True)
    else:
        found["run"] = mkaq("run", f"{name}.yaml", "--device", "cpu")
    artifact = Path("runs", name, "artifact")
    for command in (["inspect", str(artifact)], ["verify", str(artifact), "--source", f"models/{family}"]):
        found[command[0]] = mkaq(*command)
    digests = {what: hashlib.sha256(text.encode()).hexdigest() for what, text in found.items()}
    for path in sorted(artifact.rglob("*")):
        if path.is_file():
            digests[path.relative_to(artifact).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    keep = Path("told", name)
    keep.mkdir(parents=True, exist_ok=True)
    for what, text in found.items():
        (keep / what).write_text(text)
    return digests


def everything(only: list[str]) -> dict[str, dict[str, str]]:
    """Digests of all runs, made in a fresh folder, which an environment variable can name to keep it."""
    torch.set_num_threads(1)
    place = Path(os.environ.get("GOLDEN") or tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    write_text(Path("topics.txt"))
    chosen = {name: run for name, run in RUNS.items() if not only or name in only}
    return {name: one(name, family, sections) for name, (family, sections) in chosen.items()}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    found = everything([name for name in arguments if not name.startswith("--")])
    if "--write" in arguments:
        DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
        sys.exit(0)
    known = json.loads(DIGESTS.read_text())
    bad = [
        f"{name}: {file}"
        for name, digests in found.items()
        for file in sorted({*digests, *known[name]})
        if digests.get(file) != known[name].get(file)
    ]
    print("\n".join(bad) or f"{len(found)} runs, {sum(map(len, found.values()))} digests: as they were")
    sys.exit(bool(bad))
