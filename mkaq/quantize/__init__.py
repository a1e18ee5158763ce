"""GPTQ (our solver) and bitsandbytes (the library), one layer at a time."""
