"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input from outside: a file, a config key, a shape.

    The message is one line that names the file, key or shape and says what was expected.
    Commands print it without a traceback and exit with code 2 (see `fastmmkd.cli.main`).
    """
