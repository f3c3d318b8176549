"""Measure how fast a model answers: time to first token, between tokens, tokens and bytes a second.

Random prompts, greedy, past every EOS: one run to warm up, then --runs that count. --context says how many tokens of a
chat's earlier turns are in the cache when the prompt comes.
"""

import argparse

from llmtrt.cli.model_options import add_model, add_speculation, load


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of a prompt (default 512)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new tokens (default 128)")
    parser.add_argument("--batch", type=numbers, default=[1], metavar="N,…", help="sequences together (default 1)")
    parser.add_argument("--context", type=numbers, default=[0], metavar="N,…", help="tokens before (default 0)")
    add_speculation(parser)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs that count (default 3)")
    parser.add_argument("--vs", choices=("transformers",), help="the same there, in the same run; takes --checkpoint")
    parser.add_argument("--checkpoint", metavar="CHECKPOINT", help="what MODEL was made from, for --vs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(options: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from llmtrt import progress
    from llmtrt.errors import UserError
    from llmtrt.evaluate.bandwidth import device_bandwidth, host_bandwidth
    from llmtrt.evaluate.peer import Transformers, require_transformers
    from llmtrt.evaluate.speed import cases, measure, weight_bytes

    if bool(options.vs) != bool(options.checkpoint):
        raise UserError("--vs transformers and --checkpoint CHECKPOINT go together: give both or neither")
    if options.vs:
        require_transformers(Path(options.checkpoint))
    asked = cases(options.prompt, options.tokens, options.batch, options.context)
    peer = None
    with progress.shown("measuring") as report:
        with load(options, max_batch=max(options.batch)) as llm:
            model = Path(options.model)
            speeds = [
                measure(llm, case, options.runs, weight_bytes(model, case.batch), report=report) for case in asked
            ]
            memory, runtime = llm.memory(), llm.runtime
        bandwidth = device_bandwidth() if memory else host_bandwidth(options.threads)
        rows = [(runtime, speed) for speed in speeds]
        if options.vs:
            peer = Transformers.read(Path(options.checkpoint))
            rows += [(peer.description, peer.measure(case, options.runs, report)) for case in asked]
    if options.json:
        result = {
            "runtime": runtime,
            "copy_bytes_per_second": bandwidth,
            "results": [{"system": system} | speed.to_json() for system, speed in rows],
        }
        result |= {"memory": memory.to_json()} if memory else {}
        result |= {"peer_gpu_bytes": peer.gpu_bytes()} if peer and peer.gpu_bytes() else {}
        print(json.dumps(result))
        return
    for system in dict.fromkeys(system for system, _ in rows):
        print(f"\n{system}")
        print(
            f"{'batch':>6}{'context':>9}{'prompt':>8}{'TTFT ms':>10}{'p50 ms':>9}{'p99 ms':>9}{'tokens/s':>10}", end=""
        )
        print(f"{'GB/s':>8}  of copy")
        for name, speed in rows:
            if name == system:
                print(_line(speed, bandwidth))
    if options.vs:
        ratios = [a.tokens_per_second / b.tokens_per_second for (_, a), (_, b) in zip(rows, rows[len(asked) :])]
        print("tokens/s against transformers: " + ", ".join(f"{ratio:.2f} ×" for ratio in ratios))
    print(
        f"a copy in memory reads and writes {bandwidth / 1e9:.1f} GB/s"
        + (f"; GPU memory: {memory.measured}" if memory else "")
    )


def _line(speed, bandwidth: float) -> str:
    case = speed.case
    read = speed.bytes_per_second
    rate = f"{read / 1e9:>8.1f}{100 * read / bandwidth:>7.0f} %" if read else ""
    return (
        f"{case.batch:>6}{case.context:>9}{case.prompt:>8}{speed.ttft * 1e3:>10.1f}{speed.gap_p50 * 1e3:>9.2f}"
        f"{speed.gap_p99 * 1e3:>9.2f}{speed.tokens_per_second:>10.1f}{rate}"
    )
