"""The exceptions that users are meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, said in one line that names the file or field and the fix; the CLI prints it without a traceback."""


class NotRun(UserError):
    """Something that is optional cannot be run here; the text says what it needs and reads well after "not run: "."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest, upper and lower case being alike, or all of them if none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(names.values()) or 'none'}"
