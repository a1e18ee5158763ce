"""mkaq: merge the similar layers of a language model, quantize the rest, ship a verified artifact."""

__version__ = "0.1.0"
