"""Talk with a model on the terminal.

An empty line or Ctrl-D ends it, Ctrl-C cuts an answer short.
"""

import argparse

from llmtrt.cli.model_options import add_model, add_sampling, load, sampling


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_sampling(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")


def run(options: argparse.Namespace) -> None:
    import sys

    from llmtrt.errors import UserError

    with load(options) as llm:
        llm.require_chat()
        params = sampling(llm, options)
        messages = [{"role": "system", "content": options.system}] if options.system else []
        print(f"{llm.runtime}, up to {llm.max_seq} tokens; an empty line ends the chat", file=sys.stderr)
        while True:
            try:
                asked = input("> ").strip()
            except EOFError:
                break
            if not asked:
                break
            messages.append({"role": "user", "content": asked})
            answer = ""
            try:
                for piece in llm.chat_stream(messages, params):
                    print(piece.text, end="", flush=True)
                    answer += piece.text
            except KeyboardInterrupt:
                print(" …", end="")
            except UserError as error:
                # It outgrew the context, or the template refuses a message: either would meet every later question too.
                print(f"error: {error}; the chat starts anew", file=sys.stderr)
                del messages[1 if options.system else 0 :]
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
