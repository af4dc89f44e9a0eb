"""The one exception that users are meant to read."""


class UserError(Exception):
    """Bad input, said in one line that names the file or field and the fix; the CLI prints it without a traceback."""
