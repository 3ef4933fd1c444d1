"""The base of every error that a user can mend."""


class UserError(Exception):
    """Something that the user can mend: a setting, a file, a folder, a machine.

    The message stands alone: what is wrong, the value, where, and the remedy. Programs print it in
    one line and end with status 1; see `common.cli.run_script`. Programming errors are no UserError
    and keep their traceback.
    """
