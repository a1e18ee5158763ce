"""How linear layers are stored (dense, GPTQ, bitsandbytes), and which runtimes read what."""
