"""What belongs to a model beside its weights comes along, and nothing else does."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mkaq.checkpoint import resolve
from mkaq.checkpoint.side_files import side_files, stays_inside
from mkaq.manifest import FileEntry, read_manifest
from mkaq.verify.files import check_files
from tests.runs import Mkaq, forge, one_message, run_quietly, tree
from tests.tiny import make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
BELONG = [
    "tekken.json",
    "tokenizer.model.v3",
    "qwen.tiktoken",
    "vocab.txt",
    "LICENSE",
    "LICENSE.txt",
    "Notice.md",
]
BELONG += ["USE_POLICY.md", "MODEL_LICENSE", "SYSTEM_PROMPT.txt", "tool_chat_template.jinja"]
BELONG += ["additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
FOREIGN = ["modeling_llama.py", "LICENSE.py", "tokenizer.model.v3.py", "pytorch_model.bin", "params.json"]
FOREIGN += ["README.md", "additional_chat_templates/evil.py", "additional_chat_templates/deep/x.jinja"]
FOREIGN += ["onnx/tokenizer.json", "license/text"]


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with many files beside its weights, and chat templates by name."""
    folder = make_model(tmp_path_factory.mktemp("rich") / "model", layers=3)
    for name in [*BELONG, *FOREIGN]:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.fixture(scope="module")
def made(rich: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over it with every kind of stage."""
    folder = tmp_path_factory.mktemp("made")
    recover = {"method": "layerwise", "steps": 1}
    recipe = write_recipe(folder / "r.yaml", rich, text, recover=recover, evaluate=None)
    return run_quietly(recipe, folder / "run")


def test_they_are_in_every_stage_and_in_the_manifest(rich: Path, made: Path, mkaq: Mkaq) -> None:
    for stage in ("merge", "recover", "quantize", "artifact"):
        have = tree(made / stage)
        for name in BELONG:
            assert have[name] == (rich / name).read_bytes(), (stage, name)
        assert not have.keys() & (set(FOREIGN) - {"README.md"})
    manifest = read_manifest(made / "artifact")
    assert set(BELONG) <= {file.path for file in manifest.files}
    assert set(BELONG) <= {file.path for file in manifest.source.files}
    assert {file.path for file in manifest.files} == tree(made / "artifact").keys() - {"mkaq-manifest.json"}
    assert "mkaq" in (made / "artifact" / "README.md").read_text()
    outcome = mkaq("verify", made / "artifact", "--source", rich)
    assert outcome.code == 0, outcome.err


def test_templates_of_the_artifact_are_those_of_the_source(rich: Path, made: Path) -> None:
    for folder in (rich, made / "artifact"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template["tool_use"] == "this is additional_chat_templates/tool_use.jinja"


def test_everything_that_comes_along_is_fetched(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules of the hub's client, in which `*` also stands for folders."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[str] = []

    def download(
        repository: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.extend(allow_patterns)
        assert ignore_patterns == ["consolidated*"]  # Mistral's second copy of the weights
        return str(rich)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve.resolve_model("org/name") == rich
    fetched = set(filter_repo_objects(tree(rich).keys(), allow_patterns=asked))
    assert {*BELONG, *side_files(rich), "config.json", "model.safetensors"} <= fetched
    assert not {name for name in fetched if name.endswith((".bin", ".md")) and name not in BELONG}


@pytest.mark.parametrize("change", ["byte", "missing", "added", "added folder"])
def test_verify_looks_below(change: str, made: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    artifact = shutil.copytree(made / "artifact", tmp_path / "artifact")
    below = artifact / "additional_chat_templates"
    assert mkaq("verify", artifact).code == 0
    if change == "byte":
        (below / "rag.jinja").write_text("{{ evil }}")
    elif change == "missing":
        (below / "rag.jinja").unlink()
    elif change == "added":
        (below / ".evil.jinja").write_text("x")
    else:
        (below / "more").mkdir()
    name = {"added": ".evil.jinja", "added folder": "more"}.get(change, "rag.jinja")
    one_message(mkaq("verify", artifact), 5, f"additional_chat_templates/{name}")


@pytest.mark.parametrize(
    "path",
    ["../r.yaml", "/etc/hostname", "a/../../r.yaml", "./config.json", "", ".", "a\0b", "sub//x", "loop/x"],
)
def test_paths_of_a_hostile_manifest(path: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("x")
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "loop").symlink_to("loop")
    entry = FileEntry(path=path, bytes=1, sha256="0" * 64)
    assert len(check_files(folder, [entry])) == 1


def test_link_out_of_the_artifact(made: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """Though the bytes are the right ones: they are somebody else's to change."""
    artifact = shutil.copytree(made / "artifact", tmp_path / "artifact")
    shutil.move(artifact / "additional_chat_templates", tmp_path / "elsewhere")
    (artifact / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    one_message(mkaq("verify", artifact), 5, "additional_chat_templates/rag.jinja", "leaves the folder")
    forge(artifact, lambda manifest: None)
    one_message(mkaq("verify", artifact), 5, "leaves the folder")


@pytest.mark.parametrize(
    "linked", ["LICENSE", "additional_chat_templates/x.jinja", "additional_chat_templates"]
)
def test_link_out_of_the_source(linked: str, tmp_path: Path, text: Path, mkaq: Mkaq) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.jinja").write_text("secret")
    model = make_model(tmp_path / "model", layers=3)
    (model / linked).parent.mkdir(exist_ok=True)
    (model / linked).symlink_to(secret if linked.endswith("templates") else secret / "x.jinja")
    recipe = write_recipe(tmp_path / "r.yaml", model, text, evaluate=None)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    one_message(outcome, 4, "is a link that leaves the folder", "fix: copy")
    assert not (tmp_path / "run" / "artifact").exists()


def test_snapshot_of_the_hub_links_below_too(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "additional_chat_templates"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("x")
    (snapshot / "x.jinja").symlink_to(Path("..", "..", "..", "blobs", "1"))
    assert side_files(snapshot.parent) == ["additional_chat_templates/x.jinja"]
    assert stays_inside(snapshot.parent, "additional_chat_templates/x.jinja")


def test_settings_are_copied_byte_for_byte(rich: Path, made: Path) -> None:
    name = "tokenizer_config.json"
    assert json.loads((rich / name).read_text())
    assert (made / "artifact" / name).read_bytes() == (rich / name).read_bytes()
