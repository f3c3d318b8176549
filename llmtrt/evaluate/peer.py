"""The same work on transformers, to compare with: its own generate(), as its documentation makes it fast."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.errors import UserError
from llmtrt.evaluate.speed import Case, Speed
from llmtrt.progress import Report, silent


class Transformers:
    """A model of transformers' own: on a GPU (in fp16) with a static cache, compiled; on the CPU in fp32."""

    def __init__(self, model: Any):
        import torch
        import transformers

        self._torch, self._model = torch, model
        self._on_gpu = model.device.type == "cuda"
        kind = "fp16, static cache, compiled" if self._on_gpu else "fp32"
        self.description = f"transformers {transformers.__version__}, torch {torch.__version__}, {kind}"

    @classmethod
    def read(cls, path: Path) -> "Transformers":
        """The checkpoint in ``path``, on the GPU where torch has one.

        Raises UserError where torch or transformers is missing, or the checkpoint is none of transformers'.
        """
        checkpoint = require_transformers(path)
        import torch

        on_gpu = torch.cuda.is_available()
        model = load_transformers(checkpoint, torch.float16 if on_gpu else torch.float32)
        return cls(model.cuda() if on_gpu else model)

    def measure(self, case: Case, runs: int = 3, report: Report = silent) -> Speed:
        """As ``speed.measure``; tokens between the first and the last are not told apart, so all gaps are their mean. A
        context is part of the prompt, since generate() keeps nothing from one call to the next."""
        rng, firsts, rates = np.random.default_rng(0), [], []
        for run in range(runs + 1 + self._on_gpu):  # compiled, the second is the first that is not traced
            report(run, runs + 1, f"transformers, batch {case.batch}, context {case.context}")
            shape = case.batch, case.context + case.prompt
            ids = self._torch.from_numpy(rng.integers(0, self._model.config.vocab_size, shape))
            first = self._seconds(ids, 1)
            whole = self._seconds(ids, case.tokens)
            if run > self._on_gpu:
                firsts.append(first)
                rates.append(case.batch * (case.tokens - 1) / (whole - first))
        report(runs + 1, runs + 1)
        rate = float(np.median(rates))
        return Speed(case, float(np.median(firsts)), case.batch / rate, case.batch / rate, rate)

    def gpu_bytes(self) -> int | None:
        """The most GPU memory that was taken; None on the CPU."""
        return self._torch.cuda.max_memory_reserved() if self._on_gpu else None

    def _seconds(self, ids: Any, tokens: int) -> float:
        torch = self._torch
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if self._on_gpu:
            ids, settings = ids.cuda(), settings | {"cache_implementation": "static"}
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **settings
            )
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def require_transformers(path: Path) -> Checkpoint:
    """The checkpoint in ``path``; UserError where torch or transformers is missing, or there is none: what can be said at
    once."""
    from llmtrt.checkpoints import open_checkpoint

    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--vs transformers cannot import what it compares with ({error}): install it with `pip install torch "
            "transformers`"
        ) from None
    return open_checkpoint(path)


def load_transformers(checkpoint: Checkpoint, dtype: Any) -> Any:
    """transformers' model of ``checkpoint``, with weights of torch's ``dtype``; read by our own readers, since
    transformers' of GGUF needs accelerate. Raises UserError where the two do not fit together."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.for_model(**checkpoint.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        state = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.tensors()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{checkpoint.path}: transformers cannot be given this checkpoint ({error})") from None
    if unexpected or {*missing} - {"lm_head.weight"}:
        name = sorted([*unexpected, *missing])[0]
        raise UserError(f"{checkpoint.path}: transformers and the checkpoint do not agree on the tensor {name}")
    model.tie_weights()
    return model
