"""``python -m custom.cli`` is `comnet`."""

from . import main

if __name__ == "__main__":
    main()
