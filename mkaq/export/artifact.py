"""The artifact: the last stage's checkpoint, a model card and the manifest."""

import shutil
from pathlib import Path

from mkaq.export.manifest import MANIFEST, FileEntry, Manifest, write_manifest
from mkaq.export.model_card import model_card
from mkaq.handoff import describe_files
from mkaq.model.checkpoint import Checkpoint


def write_artifact(checkpoint: Checkpoint, manifest: Manifest, folder: Path) -> None:
    """Writes what the user ships.

    Args:
        checkpoint: The last stage's.
        manifest: Complete but for `files`.
        folder: Empty.
    """
    for name in [*checkpoint.files, "quantize_config.json"]:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    names = sorted(path.name for path in folder.iterdir())
    files = [FileEntry(**entry) for entry in describe_files(folder, names)]
    write_manifest(folder / MANIFEST, manifest.model_copy(update={"files": files}))
