"""The one exception class a user is meant to read.

Everything a user can cause ends in a `UserError` whose text is one line: what was found, what was
expected, what to do. The command line prints it and exits with code 2; any other exception is a
defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in a config, an input file or the environment, told in one line.

    Example:
        >>> raise UserError("window_tokens is 0; expected at least 1; set window.tokens=1 or more")
    """
