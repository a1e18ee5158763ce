"""What benchmarks/real_model.py rests on: items and task files, packed scoring, averages, its report."""

import bz2
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.checkpoints import Job
from benchmarks.quality_text import Text, last_states, measure
from benchmarks.real_model import jobs, main
from benchmarks.real_report import able, complete, curve, differences, mean_of, write_report
from benchmarks.real_tasks import (
    ZERO_SHOT,
    converted,
    guessing,
    ifeval_item,
    raw_items,
    spread,
    write_task,
    write_task_file,
)
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.distill.gate import Check
from mkaq.errors import UsageError
from mkaq.evaluate.perplexity import mean_per_token, perplexity
from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk
from tests.tiny import FAMILIES, make_model

needs_harness = pytest.mark.skipif(
    not all(map(find_spec, ("lm_eval", "langdetect", "immutabledict", "nltk"))),
    reason="lm-evaluation-harness is not installed (pip install 'lm-eval[ifeval]')",
)
QUERY = {"query": "Question: Which?\n", "choices": ["this", "that"], "gold": 1}


def test_prompts_are_those_of_the_harness() -> None:
    assert converted("arc_easy", QUERY)["context"] == "Question: Which?\nAnswer:"
    assert converted("piqa", QUERY) == {
        "context": "Question: Which?\nAnswer:",
        "choices": ["this", "that"],
        "gold": 1,
    }
    assert converted("openbookqa", {**QUERY, "query": "A stem"})["context"] == "A stem"
    passage = {**QUERY, "query": "Passage: Words.\nQuestion: is it?"}
    assert converted("boolq", passage)["context"] == "Words.\nQuestion: is it?\nAnswer:"
    hellaswag = converted("hellaswag", ["Cooking: A man", "2", "a", "b", "c", "d"])
    assert hellaswag == {"context": "Cooking: A man", "choices": ["a", "b", "c", "d"], "gold": 2}
    winogrande = {"context_options": ["so A", "so B"], "continuation": "won.", "gold": 0}
    assert converted("winogrande", winogrande) == {
        "choices": ["so A", "so B"],
        "continuation": "won.",
        "gold": 0,
    }
    assert converted("lambada", {"context": "a b", "continuation": "c"}) == {
        "context": "a b",
        "continuation": "c",
    }


def test_ifeval_names_instructions_without_their_language() -> None:
    raw = {"key": 1, "prompt": "p", "instruction_id_list": ["en:punctuation:no_comma"], "kwargs": [{}]}
    assert ifeval_item(raw)["instruction_id_list"] == ["punctuation:no_comma"]


def test_items_are_spread_over_the_set() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 5) == [0, 1, 2]


def test_items_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(QUERY) + "\n\n")
    assert raw_items(tmp_path / "a.jsonl") == [QUERY]
    (tmp_path / "h.bz2").write_bytes(bz2.compress(b"c\n0\n1\n2\n3\n4\nd\n3\n1\n2\n3\n4\n"))
    assert raw_items(tmp_path / "h.bz2")[1] == ["d", "3", "1", "2", "3", "4"]
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    with pytest.raises(UsageError, match=r"a\.jsonl"):
        raw_items(tmp_path / "a.jsonl")


def test_guessing_is_the_best_constant_choice(tmp_path: Path) -> None:
    items = [{"context": "c", "choices": ["a", "b", "c"], "gold": gold} for gold in (0, 2, 2, 1)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    assert guessing("piqa", tmp_path) == 0.5
    (tmp_path / "lambada.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    assert guessing("lambada", tmp_path) == 0


def test_able_is_what_the_source_does_better_than_guessing() -> None:
    scores = {"piqa": 0.60, "boolq": 0.37, "lambada": 0.1, "arc_easy": 0.53}
    source = {"tasks": {name: {"accuracy": mean, "standard_error": 0.02} for name, mean in scores.items()}}
    guesses = {"piqa": 0.5, "boolq": 0.62, "lambada": 0.0, "arc_easy": 0.5, "hellaswag": 0.25}
    assert able(source, guesses) == ["piqa", "lambada"]


def test_task_files_name_local_data_only(tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(QUERY) + "\n")
    assert write_task("arc_easy", tmp_path, tmp_path / "tasks", 5)
    assert write_task("piqa", tmp_path, tmp_path / "tasks", 5) is None
    write_task_file("arc_easy", tmp_path / "tasks", 8)
    config = yaml.safe_load((tmp_path / "tasks" / "arc_easy.yaml").read_text())
    assert config["dataset_path"] == "json"
    assert config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "tasks" / "arc_easy.jsonl")}
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc_norm"]


def test_jobs_begin_with_what_matters_most() -> None:
    order = [
        job.name for job in jobs(("gptq", "channels+layerwise", "channels", "sleb", "average"), [4, 8, 13])
    ]
    assert order[:5] == ["dense-0", "dense-0-3bit", "dense-0-4bit", "dense-0-2bit", "dense-0-8bit"]
    assert order[5:9] == ["channels+layerwise-8", "channels+layerwise-8-4bit", "channels-8", "sleb-8"]
    assert order[-2:] == ["average-13", "average-13-4bit"]
    assert len(order) == len(set(order)) == 5 + 3 * 4 * 2
    assert Job(bits=3).base == Job()


def test_mean_over_tasks_has_the_error_of_its_items() -> None:
    mean, error = mean_of([[0, 1, 1, 1], [0, 0]])
    assert mean == pytest.approx(0.375)
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 3) / 2)
    assert mean_of(differences([[1, 0]], [[1, 0]])) == (0.0, 0.0)


def test_mean_per_token_weighs_tokens_and_errs_over_documents() -> None:
    mean, error = mean_per_token([2.0, 8.0], [2, 4])
    assert mean == pytest.approx(10 / 6)
    assert error == pytest.approx(math.sqrt(2 * ((2 - 20 / 6) ** 2 + (8 - 40 / 6) ** 2)) / 6)
    assert mean_per_token([1.0], [2]) == (0.5, None)


def test_divergence_is_zero_from_itself_and_that_of_the_logits_from_another(tmp_path: Path) -> None:
    text = Text([(0, list(range(2, 34))), (1, list(range(40, 60)))], 0)
    walks = []
    for number in (0, 1):
        path = make_model(tmp_path / str(number), layers=2, rms_norm_eps=1e-6 if number else 1e-2)
        walks.append(LayerWalk(open_checkpoint(path), torch.device("cpu")))
    one, other = walks
    same = LayerWalk(one.checkpoint, torch.device("cpu"))
    assert measure(one, text, (same, last_states(same, text)))["kl"] == pytest.approx(0, abs=1e-6)
    found = measure(one, text, (other, last_states(other, text)))
    assert found["perplexity"] == pytest.approx(perplexity_of(one, text))
    total = 0.0
    for _, row in text.sequences:
        scores, wanted = (scores_of(walk, row) for walk in (one, other))
        total += (wanted.exp() * (wanted - scores)).sum().item()
    assert found["kl"] > 0
    assert found["kl"] == pytest.approx(total / found["tokens"], rel=1e-3)


def perplexity_of(walk: LayerWalk, text: Text) -> float:
    return perplexity(walk, [row for _, row in text.sequences], Progress(quiet=True)).perplexity


@torch.no_grad()
def scores_of(walk: LayerWalk, row: list[int]) -> torch.Tensor:
    *_, (_, states) = walk.hidden_states(torch.tensor([row]))
    with walk.head() as head:
        return head(states)[0, :-1].double().log_softmax(-1)


def row_of(
    method: str, removed: int, bits: int | None, perplexity: float, items: list[int]
) -> dict[str, Any]:
    job = Job(method, removed, bits)
    measured = {"perplexity": perplexity, "standard_error": 0.5, "tokens": 10, "documents": 2, "sequences": 2}
    measured |= {"measured_in": 1.0, "on": "a GPU"} | (
        {"kl": 0.25, "kl_error": 0.01} if method != "dense" or bits else {}
    )
    speed = {"prefill": 100.0, "decode": 10.0, "cpu_share": 1.0, "decode_runs": [10.0], "linear": "Linear"}
    return {
        "name": job.name,
        "method": method,
        "removed": removed,
        "bits": bits,
        "joint": False,
        "bytes": 10**8 // (removed + (bits or 16)),
        "seconds": 1.0,
        "dtype": "bfloat16",
        "texts": {"wiki": measured},
        "tasks": {"piqa": {"items": items, "measured_in": 1.0, "on": "a GPU"}},
        "speed": None if bits else speed | {"measured_in": 1.0, "on": "a GPU"},
    }


def test_report_has_shares_changes_and_equal_bytes(tmp_path: Path) -> None:
    rows = [
        row_of("dense", 0, None, 20.0, [1, 1, 0, 1]),
        row_of("dense", 0, 3, 25.0, [1, 1, 0, 0]),
        row_of("sleb", 8, None, 40.0, [0, 1, 0, 0]),
        row_of("channels", 8, None, 30.0, [1, 1, 0, 0]),
        row_of("channels", 8, 4, 31.0, [1, 1, 0, 0]),
    ]
    record = {
        "command": "c",
        "note": "A note.",
        "outer_bytes": 1e6,
        "model": {"name": "m", "type": "llama", "layers": 30, "hidden_size": 8, "parameters": 10},
        "machine": {"processor": "p", "threads": 2},
        "calibration": [2, 8],
        "libraries": {"torch": "2", "transformers": "5"},
        "options": {
            "group_size": 64,
            "eval_length": 8,
            "prompt_tokens": 8,
            "decoded_tokens": 8,
            "loader_python": None,
        },
        "left_out": {"wiki": 0},
        "tasks": {"zero_shot": ["piqa"], "guessing": {"piqa": 0.5}, "dtype": "torch.bfloat16"},
        "absent": ["ifeval"],
        "failed": {},
        "rows": rows,
    }
    found = write_report(record, "report", tmp_path)
    assert found == (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").stat().st_size > 1000
    saved = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert saved["channels-8"]["texts"]["wiki"]["share"] == 0.5
    assert saved["channels-8-4bit"]["texts"]["wiki"]["share"] is None  # no SLEB with 4 bits to compare with
    assert saved["channels-8"]["zero_shot"][0] == 0.5
    assert saved["channels-8"]["change"][0] == -0.25
    assert saved["channels-8"]["able"] is None  # 3 of 4 is too near to half
    equal = found.partition("## At equal bytes")[2].partition("## Each")[0]
    assert "| GPTQ alone | 0 | 3 bits |" in equal
    assert "| channels | 8 | 4 bits |" in equal
    assert "bfloat16" not in equal
    assert "A note." in found
    assert "Left out, for want of data: ifeval" in found


def test_a_curve_marks_the_weights_that_are_kept() -> None:
    checks = [Check(step, loss, own, 0.5)._asdict() for step, loss, own in ((0, None, 0.4), (8, 0.3, 0.25))]
    row = {"method": "channels+layerwise+distill", "removed": 8, "bits": None, "checks": checks}
    _, title, _, what, _, _, _, first, kept = curve(row)
    assert "channels + layerwise + distill, 8 layers removed" in title
    assert "KL(source || row)" in what
    assert first == "| 0 | - | 0.4000 | 0.5000 |"
    assert kept == "| 8, kept | 0.3000 | 0.2500 | 0.5000 |"


def test_rows_without_all_tasks_have_no_average() -> None:
    rows = [row_of("dense", 0, None, 20.0, [1]), row_of("sleb", 8, None, 30.0, [1])]
    rows[1]["tasks"] = {}
    complete(rows, {"zero_shot": ["piqa"], "guessing": {"piqa": 0.5}})
    assert rows[0]["zero_shot"] == (1.0, 0.0)
    assert rows[1]["zero_shot"] is rows[1]["change"] is None


@needs_harness
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_are_those_of_the_harness(tmp_path: Path, family: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from benchmarks.packed_scoring import PackedModel
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.walk.whole_model import whole_model

    pairs = [
        ("The cat sat on the", " mat"),
        ("The cat sat on the", " hat on the mat"),
        ("A longer context, so that a batch is padded, with", " words"),
        ("A", " b c d e f g"),
        ("The cat sat on the", " mat and went"),
    ]
    checkpoint = open_checkpoint(make_model(tmp_path, family))
    model, tokenizer = whole_model(checkpoint, torch.device("cpu"), torch.float32), load_tokenizer(tmp_path)
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    wanted = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests)
    found = PackedModel(model, tokenizer, 64, 2).loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("tasks", [False, pytest.param(True, marks=needs_harness)])
def test_benchmark_runs_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: bool
) -> None:
    """The built-in model and a few made-up items, twice: the second run makes nothing anew."""
    (tmp_path / "piqa.jsonl").write_text((json.dumps(QUERY) + "\n") * 3)
    (tmp_path / "lambada_openai.jsonl").write_text('{"context": "a b", "continuation": "c"}\n' * 2)
    command = ["real_model", "--model", "builtin:tiny-llama"]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--name", "trial"]
    command += ["--eval-data", str(tmp_path)] if tasks else []
    numbers = {
        "removed": 1,
        "num-samples": 16,
        "max-seq-length": 32,
        "search-sequences": 2,
        "gptq-samples": 8,
    }
    numbers |= {"eval-sequences": 4, "eval-length": 32, "items": 2, "threads": torch.get_num_threads()}
    command += [f"--{name}={number}" for name, number in numbers.items()]
    command += ["--methods", "sleb", "--measure", "text", "task"]
    written = []
    for more in ([], ["--finished"]):
        if more:  # needs no weights
            for file in (tmp_path / "work").rglob("*.safetensors"):
                file.unlink()
        monkeypatch.setattr(sys, "argv", [*command, *more])
        main()
        written.append(json.loads((tmp_path / "trial.json").read_text()))
    assert written[0]["rows"] == written[1]["rows"]
    rows = {row["name"]: row for row in written[0]["rows"]}
    assert list(rows) == ["dense-0", "sleb-1", "sleb-1-4bit"]
    assert rows["sleb-1"]["texts"]["python"]["share"] == 1
    assert rows["sleb-1"]["layers"] == 15
    scored = {name: len(task["items"]) for name, task in rows["dense-0"]["tasks"].items()}
    assert scored == ({"piqa": 2, "lambada": 2} if tasks else {})
    assert set(written[0]["absent"]) == {*ZERO_SHOT, "ifeval"} - scored.keys()
    assert str(tmp_path) not in (tmp_path / "trial.json").read_text() + (tmp_path / "trial.md").read_text()
