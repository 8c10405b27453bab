"""The CLI's face: `halfmoon …` and `python -m halfmoon …`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .deploy.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"the halfmoon command needs {error.name}: pip install 'halfmoon[cli]' (or 'halfmoon[server]' to serve)")
    app()


if __name__ == "__main__":
    main()
