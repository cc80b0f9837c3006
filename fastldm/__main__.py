"""`python -m fastldm`."""

from fastldm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
