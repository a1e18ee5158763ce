"""Sizes in bytes, times in seconds and measured numbers, as people write and read them."""

import math
import re


def human(size: float) -> str:
    """Formats a size in decimal units."""
    if size < 999.5:
        return f"{size:.0f} B"
    for unit in ("KB", "MB", "GB"):
        size /= 1000
        if size < 999.995:
            return f"{size:.2f} {unit}"
    return f"{size / 1000:.2f} TB"


def duration(seconds: float) -> str:
    """A time for a person, to two digits at most."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def decimal(value: float | None, digits: int = 2) -> str:
    """A measured number; None is one that is not finite. Only a huge one has an exponent."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"


def parse_size(text: str) -> int:
    """The number of bytes in a size such as `4GB` (decimal) or `4GiB` (binary).

    Raises:
        ValueError: If `text` is not a size.
    """
    units = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMG]I?)?B?\s*", text.upper())
    if not match or (size := int(float(match[1]) * units[match[2] or ""])) < 1:
        raise ValueError(f"{text!r} is not a size such as 500MB or 4GB")
    return size


def parse_age(text: str) -> float:
    """The seconds in a time such as `30m`, `12h`, `7d` or `2w`.

    Raises:
        ValueError: If `text` is not a time.
    """
    units = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
    match = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([mhdw])\s*", text.lower())
    if not match:
        raise ValueError(f"{text!r} is not a time such as 12h or 7d")
    return float(match[1]) * units[match[2]]
