"""`python -m diffexpo` is the `diffexpo` command (torchrun starts it this way)."""

from diffexpo.cli.main import main

if __name__ == "__main__":
    main()
