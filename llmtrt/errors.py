"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Bad input, a missing machine feature or a full disk, told in one sentence.

    The sentence names the file, tensor or flag, what was expected and what to do. The command line prints it without a
    traceback and exits with code 2; a program that embeds llmtrt may catch it and show ``str(error)``.
    """


class CannotRunHere(UserError):
    """An engine that is sound, and a machine that lacks what it needs: a GPU of its kind, a driver, its TensorRT."""
