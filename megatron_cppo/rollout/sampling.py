"""From logits to tokens: the processed distribution, its random numbers, and the draw.

Owns the meaning of temperature, banned ids and seeds in the embedded engine; knows neither models nor prompts.
Shape letters: B rows that are decoded together, V vocabulary, K banned ids, T response tokens.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniform_numbers(count: int, *words: int | str) -> np.ndarray:
    """`count` numbers in [0, 1), float64, that depend on `words` alone, one for each token of one sample.

    The words are hashed to the key of a Philox counter generator: streams are independent, and a longer stream
    begins with the shorter one, so a sample does not depend on where generation is cut.

    >>> float(uniform_numbers(1, 0, "train", 17)[0]) == float(uniform_numbers(9, 0, "train", 17)[0])
    True
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def sampling_logp(logits_BV: Tensor, *, temperature: float, banned_K: Tensor) -> Tensor:
    """Log-probs in nats, fp32, of the distribution that is sampled from: banned ids are -inf, then temperature.

    Temperature 0 is greedy choice, whose own distribution says nothing; the log-probs are then those of temperature 1.
    """
    logits_BV = logits_BV.float().index_fill(1, banned_K, -torch.inf)
    return (logits_BV / (temperature or 1.0)).log_softmax(-1)


def greedy_tokens(logp_BV: Tensor) -> Tensor:
    """The most probable id of each row; of equals, the first."""
    return logp_BV.argmax(-1)


def drawn_tokens(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The ids that the numbers `uniform_B` in [0, 1) stand for: inverse of the cumulative distribution, in fp64.

    The first id whose cumulative probability exceeds u * total is drawn, so an id of zero probability owns no
    interval. Rounding could still hit one (u next to 1; a parallel cumulative sum that is not monotone): there the
    most probable id is drawn, hence a banned id never is.
    """
    probability_BV = logp_BV.double().exp()
    cumulative_BV = probability_BV.cumsum(-1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp_(max=logp_BV.shape[1] - 1)
    drawable_B1 = probability_BV.gather(1, token_B1) > 0
    return torch.where(drawable_B1, token_B1, probability_BV.argmax(-1, keepdim=True)).squeeze(1)
