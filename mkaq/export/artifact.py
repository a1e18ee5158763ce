"""The artifact: the last stage's checkpoint, a model card and the manifest."""

import shutil
from pathlib import Path

from mkaq.checkpoint.reader import Checkpoint
from mkaq.digests import describe_files
from mkaq.export.card import model_card
from mkaq.export.manifest import MANIFEST, FileEntry, Manifest, write_manifest


def write_artifact(
    checkpoint: Checkpoint, manifest: Manifest, folder: Path, origins: Path | None
) -> dict[str, str]:
    """Writes what the user ships.

    Args:
        checkpoint: The last stage's.
        manifest: Complete but for `files`.
        folder: Empty.
        origins: The file that says where heads and channels came from, if layers were fused.

    Returns:
        sha256 of the files by name, but for the manifest's.
    """
    beside = {name: checkpoint.path / name for name in [*checkpoint.files, "quantize_config.json"]}
    if origins:
        beside[origins.name] = origins
    for name, path in beside.items():
        if path.is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [FileEntry(**entry) for entry in describe_files(folder, names)]
    write_manifest(folder / MANIFEST, manifest.model_copy(update={"files": files}))
    return {file.path: file.sha256 for file in files}
