"""The frozen reference: a second set of weights for the policy's own modules, exchanged in only while it scores.

Exists only when beta > 0. On the device the exchange swaps pointers; from host memory it copies, one parameter at a
time, so that the device never holds both sets. Parameters that are kept in FP8 are exchanged number by number, as
making them anew of rounded values would change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron_cppo.policy.quantized import is_quantized, refresh, stored


class Reference:
    """The weights of `parameters` as they are when this is made, kept on the device or in host memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, on_host: bool) -> None:
        self._parameters = list(parameters)
        self._on_host = on_host
        self._place = torch.device("cpu") if on_host else self._parameters[0].device
        self._weights = [[t.detach().to(self._place, copy=True) for t in stored(p)] for p in self._parameters]

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take, on the device or the host."""
        return sum(tensor.nbytes for weights in self._weights for tensor in weights)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this context the model computes with the reference's weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for parameter, weights in zip(self._parameters, self._weights, strict=True):
                if self._on_host or is_quantized(parameter):
                    for index, tensor in enumerate(stored(parameter)):
                        policy = tensor.to(self._place, copy=True)
                        tensor.copy_(weights[index])
                        weights[index] = policy
                else:
                    parameter.data, weights[0] = weights[0], parameter.data
            refresh(self._parameters)
