"""The subcommands of ``mmrl``, one file each, composed by ``cli``.

A file has ``SUMMARY`` (a line for the list of commands), ``DESCRIPTION`` (its help), ``add_arguments(parser)`` and
``run(options) -> exit code``. It imports what is heavy when it runs, so that ``mmrl --help`` is quick. ``ConfigError``
means that nothing was started (exit code 2). ``EXPECTED``, where a file has it, lists what its work raises for input
that is wrong: the message is all a user needs (exit code 1). Anything else is our own fault and shows its traceback.
"""
