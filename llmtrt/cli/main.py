"""`llmtrt VERB …`: parses, calls the verb, turns a UserError into one sentence and exit code 2."""

import argparse
import importlib
import os
import signal
import sys

from llmtrt import __version__
from llmtrt.errors import UserError

VERBS = ("quantize", "build", "refit", "generate", "chat", "eval", "bench", "debug", "inspect", "lint", "doctor")


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 1 for a finding (debug, lint), 2 for whatever the user can mend, Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="llmtrt", description="A Hugging Face LLM as one standard ONNX graph, as a TensorRT engine, as text."
    )
    parser.add_argument("--version", action="version", version=f"llmtrt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"llmtrt.cli.{name}")
        summary = module.__doc__.splitlines()[0]
        sub = verbs.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.arguments(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        return _mistake(options.verb, str(error))
    except KeyboardInterrupt as stop:
        left = str(stop) or ("nothing was left behind" if "output" in options else "")
        return _mistake(options.verb, "interrupted" + (f", {left}" if left else ""))
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("llmtrt"):
            raise
        extra = {"quantize": "quantize", "lint": "quantize", "build": "rtx", "debug": "rtx", "refit": "rtx"}.get(
            options.verb, "cpu"
        )
        return _mistake(options.verb, f"the Python module {error.name} is missing: pip install 'llmtrt[{extra}]'")
    except OSError as error:
        # What the verbs do not say better: a name that is too long, a folder that may not be read, a full stdout.
        return _mistake(options.verb, f"{error.filename or 'output'}: {error.strerror or error}")


def _mistake(verb: str, sentence: str) -> int:
    print(f"llmtrt {verb}: error: {sentence}", file=sys.stderr)
    return 2


def script() -> None:
    """The installed command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as whoever starts a daemon may leave it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process
    # A terminal that cannot show a character shows another; and a polite end cleans up as Ctrl-C does.
    sys.stdout.reconfigure(errors="replace")
    sys.stderr.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
