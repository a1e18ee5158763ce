"""The weight formats that mkaq reads, by `quant_method`."""

from collections.abc import Mapping
from typing import Any

from mkaq.errors import UnsupportedError
from mkaq.formats import bitsandbytes, compressed_tensors, dense, gptq
from mkaq.formats.format import Format

FORMATS: Mapping[str, Format] = {
    "gptq": gptq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
}


def format_of(config: Mapping[str, Any] | None, where: object = None) -> Format:
    """The format of a checkpoint.

    Args:
        config: Its quantization_config; None for a dense checkpoint.
        where: The file to name in errors.

    Raises:
        UnsupportedError: If mkaq does not read the format.
    """
    if config is None:
        return dense
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedError(f"quantization {str(method)[:40]!r} is not supported", where=where)
    return FORMATS[method]
