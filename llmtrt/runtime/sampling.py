"""The sampler on the host: fp32 logits in, token ids out; transformers' mathematics without its full sorts."""

import secrets
from dataclasses import dataclass

import numpy as np

from llmtrt.errors import UserError
from llmtrt.runtime.params import SamplingParams

NOT_NUMBERS = (
    "the model's logits are not numbers (NaN or infinite): its activations overflow in this package's type; quantize "
    "it again with a recipe that keeps float32"
)

_DRAWS = 4  # numbers of fp64 that Philox makes of one value of its counter
_AHEAD = 256  # steps that noise is drawn for at a time, which costs the same as for one
_MOST_NOISE = np.nextafter(np.float32(1), np.float32(0))
_GROUP = 64  # logits of which a top-k search looks at the largest first


@dataclass(frozen=True)
class TokenLogprob:
    """``logprob`` of the chosen token under the model's own logits, and the ``top`` (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request, step by step.

    The noise of a step is a function of the request's seed and the step alone (Philox, Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), so neither the batch around a request nor its slot changes its tokens. Steps
    may be chosen elsewhere from the same ``noise`` and ``seen``, and reported with ``take``.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: np.ndarray):
        self.params = params
        self._step = 0
        self._seed = secrets.randbits(64) if params.seed is None else int(params.seed)
        self._drawn, self._drawn_from = np.empty(0, np.float32), 0  # noise, and of which step the first is
        self._seen = None
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, bool)
            self._seen[prompt] = True

    def choose(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """The next token for ``logits`` [V], fp32, which stay as they are; UserError if they are not numbers."""
        params, scores = self.params, logits
        if self._seen is not None:
            scores = penalized(scores, np.flatnonzero(self._seen), params.repetition_penalty)
        if not np.isfinite(scores.max()):
            raise UserError(NOT_NUMBERS)
        if params.greedy:
            token = int(scores.argmax())
        else:
            ids, weights = distribution(scores, params)
            cumulative = np.cumsum(weights, dtype=np.float64)
            noise = float(self.noise(1)[0])
            # side="right" skips tokens of weight 0; noise is below 1, and in fp64 so is its share of the sum.
            place = int(np.searchsorted(cumulative, noise * cumulative[-1], side="right"))
            token = place if ids is None else int(ids[place])
        self.take(token)
        return token, None if params.logprobs is None else token_logprob(logits, token, params.logprobs)

    @property
    def step(self) -> int:
        """How many tokens were chosen."""
        return self._step

    @property
    def seen(self) -> np.ndarray | None:
        """bool [V]: the tokens of the prompt and those chosen; None where no penalty asks for them. Not to be written."""
        return self._seen

    def noise(self, count: int) -> np.ndarray:
        """fp32 [count] in [0, 1): the noise of the next ``count`` steps, which stay to be taken. Not to be written."""
        place = self._step - self._drawn_from
        if place + count > len(self._drawn):
            bits, place = np.random.Philox(key=self._seed), self._step % _DRAWS
            bits.advance(self._step // _DRAWS)
            drawn = np.random.Generator(bits).random(place + max(count, _AHEAD))
            self._drawn = np.minimum(drawn.astype(np.float32), _MOST_NOISE)
            self._drawn_from = self._step - place
        return self._drawn[place : place + count]

    def take(self, token: int) -> None:
        """The next token is ``token``, chosen elsewhere; UserError where it is negative, the word of the sampler's graph
        for logits that are not numbers."""
        if token < 0:
            raise UserError(NOT_NUMBERS)
        self._step += 1
        if self._seen is not None:
            self._seen[token] = True


def penalized(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """A copy of ``logits`` [V] with the repetition penalty on the token ids ``seen`` (each once)."""
    scores = logits.copy()
    picked = scores[seen]
    with np.errstate(over="ignore"):  # np.where takes both sides of, say, a mask of the lowest number
        scores[seen] = np.where(picked < 0, picked * penalty, picked / penalty)
    return scores


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that top_k, top_p and min_p leave of ``logits`` [V], and their weights [n]: their probabilities over
    that of the most likely one.

    Ids ascend, so that two nearly equal logits that change their rank do not move the other tokens' share of the noise;
    they are None where every token is left, [n] otherwise. A tie at the border of top_k or top_p keeps all that tie.
    """
    ids = None
    if 0 < params.top_k < len(logits):
        ids = np.flatnonzero(logits >= _kth_largest(logits, params.top_k))
        logits = logits[ids]
    weights = logits - logits.max()  # before the division: a tiny temperature then gives 0 and -inf, never NaN
    with np.errstate(over="ignore"):
        weights /= weights.dtype.type(max(params.temperature, 1e-30))
    np.exp(weights, out=weights)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p)  # the most likely token's weight is 1
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ascending places of the fewest largest ``weights`` [n] whose share of the sum reaches ``top_p`` (Holtzman et al.
    2019, arXiv:1904.09751), and of those that equal the smallest."""
    total = weights.sum(dtype=np.float64)
    # All below 1 - top_p of the mean sum to less than 1 - top_p of the total: none of them is needed.
    places = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    candidates = weights[places]
    falling = np.sort(candidates)[::-1]
    count = 1 + int(np.searchsorted(np.cumsum(falling[:-1], dtype=np.float64), top_p * total))
    return places[candidates >= falling[count - 1]]


def _kth_largest(values: np.ndarray, k: int) -> np.floating:
    """The k-th largest of ``values`` [n], 1 ≤ k ≤ n."""
    groups = values[: len(values) // _GROUP * _GROUP].reshape(-1, _GROUP).max(1)
    if len(groups) > k:  # k groups have a value of at least the k-th largest maximum: below it nothing counts
        values = values[values >= np.partition(groups, -k)[-k]]
    return np.partition(values, -k)[-k]


def token_logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """Log-softmax of ``logits`` [V] at ``token`` and at its ``count`` largest."""
    count = min(count, len(logits))
    top = float(logits.max())
    normalizer = top + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    best = np.flatnonzero(logits >= _kth_largest(logits, count)) if count else np.empty(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")][:count]
    pairs = tuple((int(index), float(logits[index]) - normalizer) for index in best)
    return TokenLogprob(token, float(logits[token]) - normalizer, pairs)
