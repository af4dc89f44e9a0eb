"""The exceptions that users are meant to read."""

import difflib
from collections.abc import Iterable

NEAR = 0.6
"""Share of two words' letters that are common, in order, from which on one may be meant by the other."""


class UserError(Exception):
    """Bad input, said in one line that names the file or field and the fix; the CLI prints it without a traceback."""


class NotRun(UserError):
    """Something that is optional cannot be run here; the text says what it needs and reads well after "not run: "."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest, upper and lower case being alike; up to three if they are equally near.

    If none is near, all of them.
    """

    def plain(name: str) -> str:
        return name.lower().removesuffix(".yaml")  # that both are configs makes no two names alike

    likeness = {name: difflib.SequenceMatcher(None, plain(name), plain(word)).ratio() for name in known}
    best = max(likeness.values(), default=0.0)
    if best < NEAR:
        return f"known: {', '.join(likeness) or 'none'}"
    near = [repr(name) for name, like in likeness.items() if like == best]
    return f"did you mean {' or '.join(near[:3])}?"


def is_full(error: BaseException) -> bool:
    """Whether a GPU has no memory left for what was asked. It goes by the name, because torch may not be imported."""
    return type(error).__name__ == "OutOfMemoryError"
