"""The subcommands of ``mmrl``, one file each, composed by ``cli``.

A file has ``SUMMARY`` (a line for the list of commands), ``DESCRIPTION`` (its help), ``add_arguments(parser)`` and
``run(options) -> exit code``. It imports what is heavy when it runs, so that ``mmrl --help`` is quick. ``ConfigError``
means that nothing was started (exit code 2).
"""
