"""Where the files that ship with the package are. Imports no torch."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"


def locate(file: Path | str) -> Path:
    """The package's own file of that name under its assets if there is one, else the user's path."""
    packaged = ASSETS / file
    return packaged if packaged.exists() else Path(file)
