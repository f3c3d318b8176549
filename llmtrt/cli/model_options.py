"""The options of every verb that loads a model."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrt import LLM, SamplingParams


def add_model(parser: argparse.ArgumentParser, accuracy_level: int = 4) -> None:
    parser.add_argument("model", metavar="MODEL", help="a package or an engine")
    parser.add_argument(
        "--runtime",
        choices=("auto", "onnxruntime", "tensorrt"),
        default="auto",
        help="auto: an engine runs on TensorRT, or its package on ONNX Runtime where there is no GPU for it",
    )
    parser.add_argument("--max-seq", type=int, metavar="N", help="context in tokens (default: the model's own)")
    parser.add_argument("--threads", type=int, metavar="N", help="ONNX Runtime's threads (default: one a core)")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=range(5),
        default=accuracy_level,
        help="ONNX Runtime's INT4 products: 1 is exact in fp32, 4 rounds activations to INT8 "
        f"(default {accuracy_level})",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their SHA-256")
    engine = parser.add_argument_group("for an engine")
    engine.add_argument("--package", metavar="PACKAGE", help="take the weights from here, if it was built to take any")
    engine.add_argument(
        "--weight-budget",
        metavar="SIZE",
        help="weights to keep on the GPU, of an engine that streams them: auto (default), 50%%, 4G",
    )
    engine.add_argument(
        "--allocation",
        choices=("user", "profile", "static"),
        help="who allocates activations: one block of ours (default), or TensorRT for each profile or once",
    )
    add_trust(engine)


def add_trust(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--trust-host-code", action="store_true", help="load a version-compatible engine, which runs code on the host"
    )


def engine_options(options: argparse.Namespace) -> dict:
    """Those of ``LLM`` for an engine that were given."""
    names = ("package", "weight_budget", "allocation", "trust_host_code")
    return {name: value for name in names if (value := getattr(options, name))}


def add_speculation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--speculation",
        choices=("prompt-lookup",),
        help="guess tokens from the text so far and check several in one step, where that is faster",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Each default is the model's own, from its generation_config.json."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default 256)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="R")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="a text that ends the answer; may be repeated")
    add_speculation(parser)


def load(options: argparse.Namespace, **more: object) -> "LLM":
    """The model of ``options``, with ``more`` options of ``LLM``; what it fell back to, if it did, is told on stderr."""
    import sys

    from llmtrt import LLM

    llm = LLM(
        options.model,
        runtime=options.runtime,
        max_seq=options.max_seq,
        threads=options.threads,
        accuracy_level=options.accuracy_level,
        speculation=getattr(options, "speculation", None),
        verify=not options.no_verify,
        **engine_options(options),
        **more,
    )
    if llm.notice:
        print(f"note: {llm.notice}", file=sys.stderr)
    return llm


def sampling(llm: "LLM", options: argparse.Namespace, **more) -> "SamplingParams":
    """The model's defaults with what was asked for."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return llm.params(**asked | more)
