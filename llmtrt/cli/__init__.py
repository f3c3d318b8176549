"""The command line: one module a verb, each with ``arguments(parser)`` and ``run(options)``; no logic lives here."""
