"""What the image installs: tested versions, with hashes; and what `make audit` says of them."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.audit import once_each, pins, report

ROOT = Path(__file__).parent.parent
LISTS = sorted((ROOT / "requirements").glob("*.txt"))
IMAGE = ROOT / "requirements" / "image.txt"
LINUX = {"python_version": "3.11", "python_full_version": "3.11.7", "extra": ""}
EXTRAS = ("eval", "gguf", "gptqmodel", "llamacpp")


def versions(path: Path) -> dict[str, str]:
    """Version by name."""
    found = (Requirement(line) for line in pins([path]))
    inside = [one for one in found if one.marker is None or one.marker.evaluate(LINUX)]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in inside}


def needed(names: list[str]) -> Iterator[str]:
    """The requirements, and what those that are installed here require in turn."""
    seen: set[str] = set()
    while names:
        requirement = Requirement(names.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or not (requirement.marker is None or requirement.marker.evaluate(LINUX)):
            continue
        seen.add(name)
        yield name
        try:
            names += requires(name) or []
        except PackageNotFoundError:
            continue


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_version_has_hashes_and_is_the_tested_one(path: Path) -> None:
    text = re.sub(r"#.*", "", path.read_text()).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line[0]) for line in lines)
    for name, *hashes in lines:
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name
    tested, listed = versions(ROOT / "constraints.txt"), versions(path)
    assert [name for name in listed if listed[name] != tested.get(name, listed[name])] == []


def test_image_has_all_that_mkaq_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = project["project"]["dependencies"] + project["build-system"]["requires"]
    assert set(needed(list(names))) - versions(IMAGE).keys() == set()
    for extra in EXTRAS:
        wanted = [Requirement(one).name for one in project["project"]["optional-dependencies"][extra]]
        listed = versions(ROOT / "requirements" / f"{extra}.txt")
        assert {canonicalize_name(name) for name in wanted} <= listed.keys()
        assert not listed.keys() & versions(IMAGE).keys()  # an extra's file has what it adds


def test_dockerfile_installs_nothing_without_a_hash() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [line for line in re.split(r"\n|;|&&", text) if re.search(r"\$PIP|\bpip install\b", line)]
    assert [line.strip() for line in installs if "--require-hashes" not in line] == [
        'ARG PIP="pip install --no-cache-dir --no-deps --no-build-isolation"',
        "RUN $PIP .",
    ]
    assert len(installs) == 4


# --- the audit ---------------------------------------------------------------------------------


def test_audit_counts_what_was_looked_up() -> None:
    fine = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert report(3, [fine]) == (0, ["1 of 3 versions looked up, 0 known vulnerabilities"])
    code, lines = report(2, [fine, bad])
    assert code == 1 and lines[0] == "b 2: CVE-1, fixed in ['3']"
    assert list(once_each(["a==1", "a==2", "b==1"])) == [["a==1", "b==1"], ["a==2"]]


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}]}),  # ends with 0, says "none"
        "",
    ],
)
def test_audit_without_a_database_says_that_it_was_skipped(answer: str, tmp_path: Path) -> None:
    program, listed = tmp_path / "pip-audit", tmp_path / "list.txt"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    listed.write_text("# some\na==1 \\\n    --hash=sha256:00\n")
    for path in (program, tmp_path / "nowhere"):
        line = [sys.executable, "-m", "tests.audit", path, listed]
        done = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "") and "audit skipped: " in done.stdout
