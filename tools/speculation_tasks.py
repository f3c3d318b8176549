"""Prompt lookup on real text: an edit of code, a passage to say again in short, an open chat."""

import statistics
from pathlib import Path

import numpy as np

from llmtrt import LLM, SamplingParams

NEW = 192
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


def compare(plain: LLM, fast: LLM, data: Path, runs: int = 3) -> dict:
    """Each task on both in turn, greedily and sampled, ``runs`` times after a first: tokens/s of both, tokens that a step of
    ``fast`` gave, and the first token that differs, with the distance of the two likeliest logits there."""
    results = {}
    for name, messages in tasks(data).items():
        for how, params in SAMPLING.items():
            rates, per_step = [], []
            for run in range(runs + 1):
                before = fast.speculation.accepted
                one, other = (llm.chat(messages, params) for llm in (plain, fast))
                if run:
                    rates.append((one.tokens_per_second, other.tokens_per_second))
                    later = len(other.token_ids) - 1
                    per_step.append(later / max(1, later - (fast.speculation.accepted - before)))
            results[f"{name}, {how}"] = {
                "prompt_tokens": one.prompt_tokens,
                "new_tokens": [len(one.token_ids), len(other.token_ids)],
                "tokens_per_s": [round(statistics.median(each), 1) for each in zip(*rates)],
                "ratio": round(statistics.median(b / a for a, b in rates), 3),
                "tokens_per_step": round(statistics.median(per_step), 2),
                "first_difference": _first_difference(plain, messages, one.token_ids, other.token_ids),
            }
    return results


def _first_difference(llm: LLM, messages: list[dict], one: list[int], other: list[int]) -> dict | None:
    place = next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if place is None:
        return None
    prompt = llm.encode(llm.tokenizer.render_chat(messages), special=False)
    second, first = np.sort(llm.logits([*prompt, *one[:place]])[-1])[-2:]
    return {"token": place, "margin": round(float(first - second), 4)}
