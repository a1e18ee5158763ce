"""The inputs that are kept: for each target a corpus in one archive, and every input that crashed once."""

from collections.abc import Iterable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

CORPUS, CRASHES = Path(__file__).parent / "corpus", Path(__file__).parent / "crashes"
_MOST, _BYTES = 200, 200_000  # of a target


def kept(target: str) -> list[bytes]:
    """The corpus of a target; empty if there is none yet."""
    if not (archive := CORPUS / f"{target}.zip").is_file():
        return []
    with ZipFile(archive) as files:
        return [files.read(name) for name in files.namelist()]


def crashed(target: str) -> dict[str, bytes]:
    """Every input that crashed a target once, by name."""
    folder = CRASHES / target
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def pack(target: str, inputs: Iterable[bytes]) -> None:
    """Keeps the smallest inputs as the corpus of a target; the same ones give the same archive."""
    CORPUS.mkdir(exist_ok=True)
    room = _BYTES
    with ZipFile(CORPUS / f"{target}.zip", "w", ZIP_DEFLATED) as files:
        for number, data in enumerate(sorted(set(inputs), key=lambda data: (len(data), data))[:_MOST]):
            if (room := room - len(data)) >= 0:
                files.writestr(ZipInfo(f"{number:03}"), data, ZIP_DEFLATED)
