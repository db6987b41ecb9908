"""The exceptions that commands turn into one line and an exit code (see `fastmmkd.cli`)."""


class UserError(Exception):
    """Bad input from outside: a file, a config key, a shape.

    The message is one line that names the file, key or shape and says what was expected.
    Commands print it without a traceback and exit with code 2 (see `fastmmkd.cli`).
    """


class Interrupted(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM), and has saved its state; commands exit with code 130."""
