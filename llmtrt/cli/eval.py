"""Measure perplexity on a text, through the runtime that generates, and the distance from the unquantized model.

Windows of --context tokens without overlap, each predicting all its tokens but the first.
"""

import argparse

from llmtrt.cli.model_options import add_model, load


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, accuracy_level=1)
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a window (default 1024)")
    parser.add_argument("--tokens", type=int, metavar="N", help="only the text's first N tokens")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="also the mean KL divergence from this checkpoint, package or engine, and how often both have the same "
        "likeliest token",
    )
    parser.add_argument("--save", action="store_true", help="keep the result in the package's quality.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    import json
    import math
    from pathlib import Path

    from llmtrt import progress
    from llmtrt.errors import UserError
    from llmtrt.evaluate.agreement import agreement
    from llmtrt.evaluate.perplexity import perplexity
    from llmtrt.evaluate.quality import require_package, save_quality
    from llmtrt.evaluate.reference import opened_reference

    try:
        text = Path(options.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {options.text}: expected a readable UTF-8 text ({error})") from None
    if options.save:
        require_package(Path(options.model))
    with load(options) as llm:
        with progress.shown("evaluating") as report:
            ids = llm.encode(text, special=False)
            result = perplexity(llm, ids, options.context, options.tokens, report)
            if options.against:
                with opened_reference(Path(options.against), report) as reference:
                    result |= agreement(llm, reference, ids[: result["tokens"]], options.context, report)
        if options.save:
            how = {"runtime": llm.runtime, "accuracy_level": options.accuracy_level}
            save_quality(Path(options.model), Path(options.text), result, **how)
        if options.json:
            how = {"runtime": llm.runtime, "text": Path(options.text).name, "accuracy_level": options.accuracy_level}
            finite = {name: value if math.isfinite(value) else None for name, value in result.items()}
            print(json.dumps(finite | how))
        else:
            print(
                f"perplexity {result['perplexity']:.3f} over {result['tokens']} tokens, context {result['context']}, "
                f"{llm.runtime}"
            )
            if options.against:
                print(
                    f"against {options.against}: mean KL divergence {result['kl_divergence']:.4f} nats, the same likeliest "
                    f"token {100 * result['top1_agreement']:.2f} % of the time"
                )
