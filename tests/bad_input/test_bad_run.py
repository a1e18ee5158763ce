"""Command lines, folders, disk and memory that do not do, and interrupts: what a run leaves behind."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mkaq.run.lock import locked
from tests.bad_input.after import added, stopped_in
from tests.runs import STAGES, Mkaq, Outcome, command, kept, one_message, told, tree
from tests.tiny import PROTECT

# --- command lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), ("frobnicate",)),
        (("run",), ("RECIPE",)),
        (("run", "x.yaml", "--until", "nothing"), ("--until", "nothing")),
        (("run", "x.yaml", "--frobnicate"), ("--frobnicate",)),
        (("run", "x.yaml", "y.yaml"), ("y.yaml",)),
        (("run", "tiny_llama_int4", "--device", "tpu"), ("--device", "tpu")),
        (("run", "tiny_llama_int4", "--device", "cuda:99"), ("--device", "cuda:99")),
        (("run", "tiny_llama_int4", "--device", "cuda:²"), ("--device", "is not auto, cpu, cuda or cuda:N")),
        (("generate", "builtin:tiny-llama", ""), ("PROMPT",)),
        (("generate", "builtin:tiny-llama", "\udcff"), ("PROMPT",)),
        (("generate", "builtin:nothing", "x"), ("builtin:nothing", "builtin:tiny-llama")),
        (("analyze", "builtin:tiny-llama", "--num-samples", "0"), ("--num-samples",)),
        (("eval", "builtin:tiny-llama", "--dataset", "text"), ("--dataset", "needs a path")),
        (("eval", "builtin:tiny-llama", "--max-seq-length", "x"), ("--max-seq-length", "x")),
    ],
)
def test_wrong_command_line(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    one_message(mkaq(*arguments), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_help(mkaq: Mkaq) -> None:
    outcome = mkaq()
    assert outcome.code in (0, 2) and "Usage" in outcome.out + outcome.err
    assert "fault of mkaq" not in outcome.err


def test_traceback_only_with_debug(mkaq: Mkaq, tmp_path: Path) -> None:
    one_message(mkaq("run", tmp_path / "nowhere.yaml"), 2)
    outcome = mkaq("--debug", "run", tmp_path / "nowhere.yaml")
    assert outcome.code == 2 and "Traceback (most recent call last)" in outcome.err
    assert outcome.err.splitlines()[-2].startswith("mkaq: ")


def test_fault_of_mkaq_itself_is_one_message(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("mkaq.calibrate.tokens.calibration_tokens", fail)
    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 1 and "fault of mkaq itself: RuntimeError: unforeseen" in outcome.err
    assert "Traceback" not in outcome.err and "report" in outcome.err
    assert "in fail" in mkaq("--debug", "run", recipe(), "--output", folder).err


def test_a_recipe_of_almost_that_name_is_suggested(mkaq: Mkaq) -> None:
    outcome = mkaq("run", "recipes/llama_8b_int4.yaml")
    assert outcome.code == 2 and "did you mean llama3_8b_int4?" in outcome.err
    assert "did you mean" not in mkaq("run", "something_else.yaml").err


def test_debug_may_stand_behind_the_command(mkaq: Mkaq) -> None:
    outcome = mkaq("run", "nonesuch.yaml", "--debug")
    assert outcome.code == 2 and "Traceback" in outcome.err and "no such recipe" in outcome.err


def test_sequences_longer_than_the_model_knows(mkaq: Mkaq, tiny: Path) -> None:
    one_message(mkaq("eval", tiny, "--max-seq-length", 512), 2, "512 tokens", "256 positions")


# --- places, disk, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file", "file/run", "link", "/dev/null/run"])
def test_folder_that_cannot_be_written(
    below: str, mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    one_message(
        mkaq("run", recipe(), "--output", tmp_path / below), 2, below, "cannot be written", "--output"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("pattern", [".lock", ".calibrate-*.partial", ".merge-*.partial"])
def test_read_only_folder(
    pattern: str,
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    earlier: Path,
) -> None:
    """Also one that becomes read-only in the middle of a run. Root may write anywhere, so it is faked."""

    def denied(method: Any) -> Any:
        def maybe(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.match(pattern):
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return method(self, *arguments, **options)

        return maybe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", denied(Path.open))
        patch.setattr(Path, "mkdir", denied(Path.mkdir))
        outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, 2, str(folder), "written", "--output")
    assert added(folder, earlier) <= {"calibrate", "analyze"}
    assert mkaq("verify", folder / "artifact").code == 0


def test_files_of_others_in_the_folder_stay(mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """--output may be a home folder: nothing there is mkaq's because of its name."""
    mine = tmp_path / "home"
    (mine / "deep" / ".cache.partial").mkdir(parents=True)
    (mine / ".vim.old").mkdir()
    for name in (
        ".bashrc",
        ".bashrc.old",
        ".profile.old",
        ".vim.old/x",
        "deep/.cache.partial/x",
        ".x.partial",
    ):
        (mine / name).write_text(name)
    before = tree(mine)
    outcome = mkaq("run", recipe(), "--output", mine, "--until", "calibrate")
    assert outcome.code == 0, outcome.err
    assert {name: data for name, data in tree(mine).items() if name in before} == before


@pytest.mark.parametrize("name", ["merge", "store", "evaluate", "artifact"])
def test_folders_that_mkaq_did_not_make_are_left_alone(
    name: str, mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine" / name / "thesis.txt").write_text("mine")
    before = tree(tmp_path / "mine")
    one_message(mkaq("run", recipe(), "--output", tmp_path / "mine"), 2, "mine", name, "did not make")
    assert tree(tmp_path / "mine") == before


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "report.html"])
def test_files_that_mkaq_did_not_make_are_left_alone(
    name: str, mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    one_message(mkaq("run", recipe(), "--output", tmp_path / "mine"), 2, "mine", name, "did not make")
    assert (tmp_path / "mine" / name).read_text() == "mine"


def test_two_runs_in_one_folder(mkaq: Mkaq, recipe: Callable[..., Path], folder: Path) -> None:
    with locked(folder, ("merge",)):
        before = tree(folder)
        outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, 2, str(folder), "another mkaq run is working here (process ", "fix: wait for it")
    assert tree(folder) == before


def test_disk_that_is_too_small(refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(6, "of disk, 1.00 KB are free", "fix: choose another folder", merge={"layers": 1, **PROTECT})


def test_memory_that_is_too_small(refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=10**8, available=10**8, free=10**8)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    refused(6, "cpu has 100.00 MB", "fix: lower evaluate.perplexity")


def test_memory_that_runs_out(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mkaq.merge.write.write_layer", out)
    one_message(mkaq("run", recipe(), "--output", folder), 6, "out of memory")
    assert added(folder, earlier) == {"calibrate", "analyze"}


@pytest.mark.parametrize("place", ["calibrate/handoff.json", "merge/handoff.json", ".artifact.handoff.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": "x", "files": []}', "\udcff"])
def test_damaged_handoff(
    place: str, content: str, mkaq: Mkaq, recipe: Callable[..., Path], whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    damaged = (folder / place).resolve()
    damaged.write_bytes(content.encode(errors="surrogateescape"))
    before = kept(folder)
    outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, 5, str(damaged), "handoff is damaged", "fix: delete it, or use --fresh")
    assert kept(folder) == before


# --- interrupted -------------------------------------------------------------------------------


# The stage in which it happens; the function after whose n-th call it happens.
POINTS = [
    ("calibrate", "safetensors.torch.save_file", 1),
    ("analyze", "safetensors.numpy.save_file", 1),
    ("merge", "mkaq.merge.write.write_layer", 2),
    ("merge", "mkaq.merge.write.copy_side_files", 1),
    ("evaluate/merge", "mkaq.files.write_json", 1),
    ("quantize", "mkaq.quantize.gptq_layer.pack_linear", 9),
    ("quantize", "mkaq.run.make.write_json", 2),
    ("evaluate/quantize", "mkaq.files.write_json", 2),
    ("artifact", "mkaq.card.model_card", 1),
    ("artifact", "mkaq.manifest.write_manifest", 1),
]
FULL = OSError(errno.ENOSPC, "No space left on device")


def stop_after(patch: pytest.MonkeyPatch, target: str, call: int, error: BaseException) -> None:
    """Lets a function work until its n-th call, and raises after that one."""
    module, _, name = target.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        result = original(*arguments, **options)
        calls += 1
        if calls == call:
            raise error
        return result

    patch.setattr(target, counted)


def stop_before_the_rename(patch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
    """Raises when a stage that is done is about to get its name."""
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name.startswith(f".{stage}") and self.suffix == ".partial":
            raise error
        return rename(self, target)

    patch.setattr(Path, "rename", stop)


CTRL_C = (KeyboardInterrupt(), 75, ("interrupted", "fix: the same command resumes"))
DISK_FULL = (FULL, 6, ("disk is full", "the same command resumes"))
STOPS = [(*point, *CTRL_C) for point in POINTS] + [(*point, *DISK_FULL) for point in POINTS[1::2]]


@pytest.mark.parametrize(
    ("stage", "target", "call", "error", "code", "words"),
    STOPS,
    ids=[f"{stop[0]} {stop[1].rpartition('.')[2]} {stop[4]}" for stop in STOPS],
)
def test_stop_in_a_stage(
    stage: str,
    target: str,
    call: int,
    error: BaseException,
    code: int,
    words: tuple[str, ...],
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    earlier: Path,
    whole: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, target, call, error)
        outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, code, *words)
    assert f"note: {folder / 'artifact'} is still that of an earlier run" in outcome.err
    assert code != 6 or f"mkaq: {folder}: the disk is full" in outcome.err
    stopped_in(stage, folder, earlier, whole)
    verified = mkaq("verify", folder / "artifact")
    assert verified.code == 0, verified.err

    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 0, outcome.err
    assert told(outcome) == {name: n < STAGES.index(stage) for n, name in enumerate(STAGES)} | {
        "evaluate/source": True
    }
    assert tree(folder / "artifact") == tree(whole / "artifact")


@pytest.mark.parametrize("stage", ["merge", "artifact"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL], ids=["Ctrl-C", "disk full"])
def test_stop_while_a_stage_is_put_in_its_place(
    stage: str,
    error: BaseException,
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    earlier: Path,
    whole: Path,
) -> None:
    """The old artifact has left its place, the new one has not come."""
    with pytest.MonkeyPatch.context() as patch:
        stop_before_the_rename(patch, stage, error)
        outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code in (6, 75)
    stopped_in(stage, folder, earlier, whole)
    assert mkaq("run", recipe(), "--output", folder).code == 0
    assert tree(folder / "artifact") == tree(whole / "artifact")


@pytest.mark.parametrize("stage", ["merge", "artifact"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL], ids=["Ctrl-C", "disk full"])
def test_stop_while_a_stage_that_is_made_afresh_is_put_in_its_place(
    stage: str, error: BaseException, mkaq: Mkaq, recipe: Callable[..., Path], whole: Path, tmp_path: Path
) -> None:
    """Between the two renames: the old stage has left its place, the new one has not come."""
    folder = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        stop_before_the_rename(patch, stage, error)
        outcome = mkaq("run", recipe(), "--output", folder, "--fresh")
    assert outcome.code in (6, 75)
    assert kept(folder) == kept(whole)
    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 0 and told(outcome) == dict.fromkeys(STAGES, True)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_process(
    sent: signal.Signals, mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, earlier: Path, whole: Path
) -> None:
    """A real process, in the middle of a stage: it says where it is, and waits for the signal there."""
    wait = "print('here', file=sys.stderr, flush=True), time.sleep(60)"
    hold = f"import time, mkaq.merge.write; mkaq.merge.write.write_layer = lambda *_: ({wait})"
    process = subprocess.Popen(
        command("run", recipe(), "--output", folder, first=hold),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    assert process.stderr is not None
    with process:
        lines = []
        while not lines or lines[-1] not in ("here\n", ""):
            lines.append(process.stderr.readline())
        assert len(list(folder.glob("store/.merge-*.partial/.part-0"))) == 1
        os.kill(process.pid, sent)
        out, err = process.communicate(timeout=60)
    outcome = Outcome(process.returncode, out, "".join(lines) + err)
    one_message(outcome, 75, "interrupted", "the same command resumes")
    stopped_in("merge", folder, earlier, whole)
    assert mkaq("verify", folder / "artifact").code == 0
    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 0, outcome.err
    assert told(outcome) == {stage: n < 3 for n, stage in enumerate(STAGES)}
    assert tree(folder / "artifact") == tree(whole / "artifact")


def test_interrupt_of_a_command_that_writes_nothing(
    mkaq: Mkaq, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, "mkaq.evaluate.perplexity.summarize", 1, KeyboardInterrupt())
    options = ("--dataset", "text", "--path", text, "--num-samples", 2, "--max-seq-length", 32)
    one_message(mkaq("eval", model, *options), 75, "interrupted")


def test_recipes_of_the_tests_differ(earlier: Path, whole: Path) -> None:
    """Else a stage of the earlier run could pass for one of the later."""
    for stage in STAGES:
        same = tree(earlier / stage) == tree(whole / stage)
        assert same == (stage == "evaluate/source")
    assert yaml.safe_load((earlier / "recipe.yaml").read_text())["name"] == "earlier"
