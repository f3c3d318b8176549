"""Prompt lookup on real text: an edit of code, a passage to say again in short, an open chat.

python tools/speculation_tasks.py ENGINE DATA {plain,prompt-lookup}     # the folder DATA has the texts; prints JSON
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, SamplingParams  # noqa: E402

NEW, RUNS = 192, 3
SAMPLING = {
    "greedy": SamplingParams(max_tokens=NEW, temperature=0),
    "sampled": SamplingParams(max_tokens=NEW, temperature=0.8, top_p=0.9, seed=1),
}
TEXTS = {
    "code edit": (
        "code-sample.txt",
        "class PromptFormat_llama",
        1800,
        "Rewrite this code with every method documented:",
    ),
    "summary": ("wikitext2-test.txt", "Robert Boulter is an English film", 1800, "Summarize this passage:"),
}


def tasks(data: Path) -> dict[str, list[dict]]:
    """Messages of a chat by the name of the task."""
    found = {}
    for name, (file, start, size, request) in TEXTS.items():
        text = (data / file).read_text()
        passage = text[text.index(start) :][:size]
        found[name] = [{"role": "user", "content": f"{request}\n\n{passage}"}]
    found["open chat"] = [{"role": "user", "content": "Tell me what one should know before a first visit to Japan."}]
    return found


def answers(llms: list[LLM], data: Path) -> list[dict[str, dict]]:
    """What each of ``llms`` made of each task, greedily and sampled: its tokens, and tokens/s of RUNS times after a first,
    in turn with the others'."""
    found: list[dict[str, dict]] = [{} for _ in llms]
    for name, messages in tasks(data).items():
        for how, params in SAMPLING.items():
            for run in range(RUNS + 1):
                for llm, told in zip(llms, found):
                    before = _accepted(llm)
                    done = llm.chat(messages, params)
                    later, accepted = len(done.token_ids) - 1, _accepted(llm) - before
                    each = told.setdefault(f"{name}, {how}", {"tokens_per_s": [], "tokens_per_step": []})
                    each |= {"prompt_tokens": done.prompt_tokens, "token_ids": done.token_ids}
                    if run:
                        each["tokens_per_s"].append(done.tokens_per_second)
                        each["tokens_per_step"].append(later / max(1, later - accepted))
    return found


def _accepted(llm: LLM) -> int:
    return llm.speculation.accepted if llm.speculation else 0


def compare(plain: dict[str, dict], fast: dict[str, dict], llm: LLM, data: Path) -> dict:
    """By task: tokens/s of both and their ratio in turn, medians; tokens that a step of ``fast`` gave; and the first token
    that differs, with the distance of the two likeliest logits there, of ``llm``."""
    results = {}
    for name, messages in tasks(data).items():
        for how in SAMPLING:
            one, other = (each[f"{name}, {how}"] for each in (plain, fast))
            rates = [each["tokens_per_s"] for each in (one, other)]
            results[f"{name}, {how}"] = {
                "prompt_tokens": one["prompt_tokens"],
                "new_tokens": [len(one["token_ids"]), len(other["token_ids"])],
                "tokens_per_s": [round(statistics.median(each), 1) for each in rates],
                "ratio": round(statistics.median(b / a for a, b in zip(*rates)), 3),
                "tokens_per_step": round(statistics.median(other["tokens_per_step"]), 2),
                "first_difference": _first_difference(llm, messages, one["token_ids"], other["token_ids"]),
            }
    return results


def _first_difference(llm: LLM, messages: list[dict], one: list[int], other: list[int]) -> dict | None:
    place = next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if place is None:
        return None
    prompt = llm.encode(llm.tokenizer.render_chat(messages), special=False)
    second, first = np.sort(llm.logits([*prompt, *one[:place]])[-1])[-2:]
    return {"token": place, "margin": round(float(first - second), 4)}


def main() -> None:
    path, data, kind = sys.argv[1:]
    with LLM(path, verify=False, reuse_prefixes=False, speculation=None if kind == "plain" else kind) as llm:
        (found,) = answers([llm], Path(data))
        seconds = {f"{rows} rows": llm.speculation.seconds(1, rows) for rows in (1, 4, 16)} if llm.speculation else None
    print(json.dumps({"answers": found, "seconds_of_a_step": seconds}))


if __name__ == "__main__":
    main()
