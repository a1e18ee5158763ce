"""GPTQ (mkaq's own solver) and bitsandbytes (the library), one layer at a time."""
