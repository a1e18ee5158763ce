"""The store of a run: every stage is made once, whatever recipes share it; links show the last recipe's."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.manifest import read_manifest
from mkaq.recipe_file import load_recipe
from mkaq.run.publish import HANDOFF
from mkaq.run.store import STORE
from tests.runs import STAGES, Mkaq, Outcome, one_message, run_quietly, told, tree
from tests.tiny import SIMILAR, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
PROTECTED = {"protect": {"first": 1, "last": 1}}
MERGES: dict[str, dict[str, Any]] = {
    "similarity": {**PROTECTED, **SIMILAR},
    "measured": {**PROTECTED, "order": "measured", "fuse": "channels"},
}
ANALYSES = {"similarity": 1, "measured": 2}  # to remove 3 of 4 layers takes groups of 4, else 3 are enough


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 6-layer Llama: of its 4 layers that are not protected 1, 2 or 3 can go."""
    return make_model(tmp_path_factory.mktemp("six") / "model", layers=6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, six: Path, text: Path) -> Callable[..., Path]:
    """Writes a recipe for it; keyword arguments replace whole sections."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(name: str, **sections: Any) -> Path:
        calibration = {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32}
        return write_recipe(folder / f"{name}.yaml", six, text, **{"calibration": calibration} | sections)

    return write


@pytest.fixture(scope="module", params=MERGES)
def searching(request: pytest.FixtureRequest, small: Callable[..., Path]) -> Path:
    """A recipe whose budget so much fits that the search goes as far as it can."""
    return small(
        request.param,
        merge=MERGES[request.param],
        quantize={"method": "gptq", "group_size": 32},
        budget={"perplexity_increase": "99999%", "bits": [8, 4]},
    )


@pytest.fixture
def fixed(small: Callable[..., Path]) -> Path:
    """A recipe that removes one layer, by measured groups."""
    return small("fixed", merge={**MERGES["measured"], "layers": 1})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: Callable[..., Path]) -> Path:
    """The run of `fixed`. Not to be changed: copy it first."""
    recipe = small("finished", merge={**MERGES["measured"], "layers": 1})
    return run_quietly(recipe, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The run of `fixed`, to go on with."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def stored(folder: Path) -> Counter[str]:
    """How many folders of each stage the store holds; they are all published."""
    places = list((folder / STORE).iterdir())
    assert all((place / HANDOFF).is_file() for place in places)
    return Counter(place.name.partition("-")[0] for place in places)


def lines(outcome: Outcome, ending: str) -> Counter[str]:
    """Of how many stages of each kind a run says so, but for the artifact, which is not in the store."""
    assert outcome.code == 0, outcome.err
    found = (line.partition(": ") for line in outcome.err.splitlines())
    stages = (name.partition("/")[0] for name, _, said in found if said.startswith(ending))
    return Counter(stage for stage in stages if stage != "artifact")


def links(folder: Path) -> dict[str, str]:
    """The name of every link of a run, and the folder of the store to which it leads."""
    paths = [path for path in folder.rglob("*") if path.is_symlink()]
    assert all(path.resolve().parent == (folder / STORE).resolve() for path in paths)
    return {str(path.relative_to(folder)): path.resolve().name for path in paths}


def test_budget_makes_every_stage_once(searching: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    folder, kind = tmp_path / "run", searching.stem
    outcome = mkaq("run", searching, "--output", folder)
    budget = read_manifest(folder / "artifact").budget
    assert budget is not None and (budget.chosen.removed, budget.chosen.bits) == (3, 4)
    tried = [(trial.removed, trial.bits) for trial in budget.tried]
    merged = {removed for removed, _ in tried if removed}
    assert {bits for _, bits in tried} == {8, 4} and len(merged) == 3
    expected = {"calibrate": 1, "analyze": ANALYSES[kind], "merge": len(merged), "quantize": len(tried)}
    expected["evaluate"] = 1 + len(merged) + len(tried)
    assert stored(folder) == lines(outcome, "done in") == Counter(expected)
    assert links(folder).keys() == {*STAGES} - {"artifact"}
    asked = lines(outcome, "done in") + lines(outcome, "unchanged, kept")
    assert asked["calibrate"] == asked["quantize"] == len(tried) + 1  # once more for what was chosen

    before = tree(folder / STORE)
    again = mkaq("run", searching, "--output", folder)
    assert "done in" not in again.err and told(again) == dict.fromkeys(STAGES, True)
    assert lines(again, "unchanged, kept") == asked
    assert tree(folder / STORE) == before

    fresh = mkaq("run", searching, "--output", folder, "--fresh")
    assert lines(fresh, "done in") == stored(folder) == Counter(expected)
    assert "artifact: done in" in fresh.err and tree(folder / STORE) == before


def test_what_a_budget_chose_is_the_run_of_a_recipe_that_says_so(
    searching: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert mkaq("run", searching, "--output", folder).code == 0
    settled = folder / "recipe.yaml"
    assert load_recipe(settled).budget is None
    before = links(folder)
    outcome = mkaq("run", shutil.copy(settled, tmp_path / "settled.yaml"), "--output", folder)
    assert told(outcome) == {stage: stage != "artifact" for stage in STAGES}  # whose manifest had a budget
    assert links(folder) == before


def test_another_ratio_shares_what_it_can(fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    first, count = links(folder), stored(folder)
    kept = ("evaluate/source", "calibrate", "analyze")
    outcome = mkaq("run", fixed, "--output", folder, "--set", "merge.layers=2")
    assert told(outcome) == {stage: stage in kept for stage in STAGES}
    assert {stage for stage, place in links(folder).items() if place == first[stage]} == set(kept)
    outcome = mkaq("run", fixed, "--output", folder, "--set", "merge.layers=3")  # groups of 4 too
    assert told(outcome) == {stage: stage in kept[:2] for stage in STAGES}
    new = Counter({"analyze": 1, "merge": 2, "quantize": 2, "evaluate": 4})
    assert stored(folder) == count + new
    outcome = mkaq("run", fixed, "--output", folder)  # the first one again
    assert told(outcome) == {stage: stage != "artifact" for stage in STAGES}
    assert links(folder) == first and stored(folder) == count + new


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        (["quantize=null"], {"quantize", "evaluate/quantize"}),
        (["evaluate=null"], {"evaluate/source", "evaluate/merge", "evaluate/quantize"}),
        (["merge=null"], {"analyze", "merge", "evaluate/merge"}),
        (["merge=null", "evaluate=null"], {*STAGES} - {"calibrate", "quantize", "artifact"}),
    ],
)
def test_links_are_those_of_the_last_recipe(
    settings: list[str], gone: set[str], fixed: Path, folder: Path, mkaq: Mkaq
) -> None:
    before, known = links(folder), tree(folder / STORE)
    changes = [part for setting in settings for part in ("--set", setting)]
    outcome = mkaq("run", fixed, "--output", folder, *changes)
    assert links(folder).keys() == before.keys() - gone == told(outcome).keys() - {"artifact"}
    assert known.items() <= tree(folder / STORE).items()
    outcome = mkaq("run", fixed, "--output", folder)
    assert told(outcome) == {stage: stage != "artifact" for stage in STAGES} and links(folder) == before


def test_run_until_a_stage_links_no_further(fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    before = links(folder)
    outcome = mkaq("run", fixed, "--output", folder, "--until", "analyze")
    assert told(outcome) == dict.fromkeys(STAGES[:3], True)
    assert links(folder) == {stage: before[stage] for stage in STAGES[:3]}


@pytest.mark.parametrize("name", ["calibrate", "merge", "evaluate/source", "evaluate/merge"])
def test_folder_that_no_run_made_is_refused(name: str, fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    place = folder / name
    place.unlink()
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    before = tree(folder / "artifact")
    outcome = mkaq("run", fixed, "--output", folder)
    one_message(
        outcome, 2, f"holds {name.partition('/')[0]}, which mkaq did not make", "fix: choose another folder"
    )
    assert tree(place) == {"thesis.txt": b"mine"} and not place.is_symlink()
    assert tree(folder / "artifact") == before
    shutil.rmtree(place)
    assert told(mkaq("run", fixed, "--output", folder)) == dict.fromkeys(STAGES, True)


@pytest.mark.parametrize("name", ["merge", "evaluate/source"])
def test_file_in_the_place_of_a_link_is_refused(name: str, fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    place = folder / name
    place.unlink()
    place.write_text("mine")
    outcome = mkaq("run", fixed, "--output", folder)
    one_message(outcome, 2, f"holds {name.partition('/')[0]}, which mkaq did not make")
    assert place.read_text() == "mine"


@pytest.mark.parametrize("name", ["merge", "evaluate/source"])
def test_link_of_the_user_in_the_place_of_a_link_is_refused(
    name: str, fixed: Path, folder: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    outcome = mkaq("run", fixed, "--output", folder)
    one_message(outcome, 2, f"holds {name.partition('/')[0]}, which mkaq did not make")
    assert (folder / name).readlink() == tmp_path / "nowhere"


@pytest.mark.parametrize("name", ["merge", "evaluate/source", "store", "artifact"])
def test_link_of_the_user_in_a_new_folder_is_refused(
    name: str, fixed: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    place = tmp_path / "home" / name
    place.parent.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    place.symlink_to(tmp_path / "mine")
    first = name.partition("/")[0]
    one_message(
        mkaq("run", fixed, "--output", tmp_path / "home"), 2, f"holds {first}, which mkaq did not make"
    )
    assert place.readlink() == tmp_path / "mine" and not list((tmp_path / "mine").iterdir())


def test_artifact_that_was_moved_and_linked_is_left_where_it_is(
    fixed: Path, folder: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    moved = (folder / "artifact").rename(tmp_path / "moved")
    (folder / "artifact").symlink_to(moved)
    before = tree(moved)
    outcome = mkaq("run", fixed, "--output", folder, "--set", "name=other")
    assert told(outcome) == {stage: stage != "artifact" for stage in STAGES}, outcome.err
    assert not (folder / "artifact").is_symlink() and tree(moved) == before
    assert told(mkaq("run", fixed, "--output", folder, "--set", "name=other")) == dict.fromkeys(STAGES, True)


def test_stage_of_a_version_without_a_store_gives_way(fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    for name in ("merge", "evaluate/merge"):
        place = folder / name
        target = place.resolve()
        place.unlink()
        shutil.copytree(target, place)
    before = tree(folder / STORE)
    outcome = mkaq("run", fixed, "--output", folder)
    assert told(outcome) == dict.fromkeys(STAGES, True)
    assert links(folder).keys() == {*STAGES} - {"artifact"} and tree(folder / STORE) == before


def test_links_of_the_user_stay(fixed: Path, folder: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (folder / "notes").symlink_to(tmp_path / "other")
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    assert mkaq("run", fixed, "--output", folder).code == 0
    assert (folder / "notes").resolve() == tmp_path / "other" and (folder / "lost").is_symlink()


def test_run_that_is_moved_is_whole(fixed: Path, folder: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """Links say where they lead from where they are."""
    moved = folder.rename(tmp_path / "elsewhere")
    assert told(mkaq("run", fixed, "--output", moved)) == dict.fromkeys(STAGES, True)
    assert all((moved / stage).is_dir() for stage in STAGES)


@pytest.mark.parametrize("ending", [".partial", ".old"])
def test_what_a_killed_run_left_is_put_right(ending: str, fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    """A half-made stage goes; one that was being replaced comes back."""
    place = (folder / "merge").resolve()
    hidden = place.with_name(f".{place.name}{ending}")
    place.rename(hidden)
    outcome = mkaq("run", fixed, "--output", folder)
    assert told(outcome) == {stage: (stage, ending) != ("merge", ".partial") for stage in STAGES}
    assert not hidden.exists() and place.is_dir()


def test_link_that_a_killed_run_had_not_put_in_place_goes(fixed: Path, folder: Path, mkaq: Mkaq) -> None:
    for name in ("merge", "evaluate/merge"):
        (folder / name).rename((folder / name).with_name(".merge.link"))
    assert told(mkaq("run", fixed, "--output", folder)) == dict.fromkeys(STAGES, True)
    assert links(folder).keys() == {*STAGES} - {"artifact"}
