"""The one exception that means "you can mend this", as opposed to a bug of ours."""


class UserError(ValueError):
    """A mistake in what the user gave us: a file, a key, an option.

    Its message is one sentence that names the thing, says what was expected and what to do. The command line prints
    it without a traceback and exits with 2; everything else that is raised is ours and keeps its traceback.
    """
