"""The one exception whose message is written for the person at the terminal."""


class OpdError(Exception):
    """What was given, what was expected, which file or key, and what to do, in one line.

    Commands print it without a traceback and exit with status 2.
    """
