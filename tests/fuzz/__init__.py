"""Fuzzing of everything that mkaq reads from outside: `python -m tests.fuzz`."""
