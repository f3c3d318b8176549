"""Chat with a package or an engine: `python tools/chat.py MODEL`. An empty line or Ctrl-D ends it."""

import argparse
import sys

from llmtrt import LLM
from llmtrt.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder made by `llmtrt quantize` or `llmtrt build`")
    parser.add_argument("--system", help="what the model is told before the conversation")
    parser.add_argument("--temperature", type=float, help="0: always the most likely token (default: the model's own)")
    parser.add_argument("--max-tokens", type=int, help="the most tokens of one answer (default: 256)")
    arguments = parser.parse_args()
    try:
        with LLM(arguments.model) as llm:
            chat(llm, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def chat(llm: LLM, arguments: argparse.Namespace) -> None:
    print(llm.notice or llm.runtime)
    params = llm.params(temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    while question := read("> "):
        messages.append({"role": "user", "content": question})
        for piece in llm.chat_stream(messages, params):
            print(piece.text, end="", flush=True)
        done = piece.completion
        messages.append({"role": "assistant", "content": done.text})
        speed = f", {done.tokens_per_second:.1f} tokens/s" if done.tokens_per_second else ""
        print(f"\n[{len(done.token_ids)} tokens, first after {done.ttft * 1000:.0f} ms{speed}, {done.finish_reason}]")


def read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
