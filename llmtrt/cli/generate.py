"""Complete a prompt.

The prompt goes to the model as it is; `llmtrt chat` uses the model's chat format.
"""

import argparse

from llmtrt.cli.model_options import add_model, add_sampling, load, sampling


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "-p", "--prompt", required=True, action="append", metavar="TEXT", help="repeat it for a batch of prompts"
    )
    add_sampling(parser)
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message in the model's chat format"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log-probabilities of the N likeliest tokens"
    )
    parser.add_argument("--json", action="store_true", help="print the completions as JSON when they are done")


def run(options: argparse.Namespace) -> None:
    import json
    import sys
    from dataclasses import asdict

    from llmtrt.errors import UserError

    if options.chat and len(options.prompt) > 1:
        raise UserError("--chat takes one --prompt: leave the others out")
    with load(options) as llm:
        params = sampling(llm, options, logprobs=options.logprobs)
        if options.chat:
            pieces = llm.chat_stream([{"role": "user", "content": options.prompt[0]}], params)
        else:
            pieces = llm.generate_stream(options.prompt, params)
        done, printed = {}, len(options.prompt) == 1 and not options.json
        for piece in pieces:
            if printed:
                print(piece.text, end="", flush=True)
            if piece.completion:
                done[piece.index] = piece.completion
        completions = [done[index] for index in sorted(done)]
        if options.json:
            answers = [
                asdict(completion) | {"prompt": prompt} for prompt, completion in zip(options.prompt, completions)
            ]
            memory = {"memory": used.to_json()} if (used := llm.memory()) else {}
            print(json.dumps({"runtime": llm.runtime, "completions": answers} | memory, ensure_ascii=False))
            return
        for completion in [] if printed else completions:
            print(completion.text, end="\n---\n")
        if printed:
            print()
        for completion in completions:
            rate = f", then {completion.tokens_per_second:.1f} tokens/s" if completion.tokens_per_second else ""
            print(
                f"{llm.runtime}: {completion.prompt_tokens} prompt tokens, {len(completion.token_ids)} new, "
                f"first after {completion.ttft * 1e3:.0f} ms{rate}, ended by {completion.finish_reason}",
                file=sys.stderr,
            )
        if used := llm.memory():
            print(f"GPU memory: {used.measured} ({used.predicted.total / 1e9:.2f} GB predicted)", file=sys.stderr)
