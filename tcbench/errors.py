"""The exceptions that users are meant to read."""


class UserError(Exception):
    """Bad input, said in one line that names the file or field and the fix; the CLI prints it without a traceback."""


class NotRun(UserError):
    """Something that is optional cannot be run here; the text says what it needs and reads well after "not run: "."""
