"""`python -m mkaq`, and `torchrun -m mkaq`."""

from mkaq.cli import main

if __name__ == "__main__":
    main()
