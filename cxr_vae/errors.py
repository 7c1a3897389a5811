"""Errors that are told in one sentence, without a traceback."""


class UserError(ValueError):
    """A mistake of the user's, or a state of the machine they can mend, in one sentence that says what to do.

    Commands print it without a traceback and exit with code 2; any other exception is our bug and keeps its traceback.
    """


class LostPeersError(RuntimeError):
    """Other processes of the job are gone or silent, so this one can't go on. Not its fault: exit code 1."""
