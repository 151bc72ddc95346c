"""``python -m sbnet_cupy``: the same as the ``sbnet-cupy`` command."""

from ._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
