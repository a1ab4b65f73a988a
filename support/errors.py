"""The one exception for input that a user can put right.

`run_experiment.py` prints it without a traceback and exits with status 2, so its
text must say what was given, what was expected and what to do. Everything else
that escapes is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input: a configuration, text, model or file that cannot be used as given."""
