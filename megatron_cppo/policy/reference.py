"""The frozen reference: a second set of weights for the policy's own modules, exchanged in only while it scores.

Exists only when beta > 0. On the device the exchange swaps pointers; from host memory it copies, one parameter at a
time, so that the device never holds both sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Reference:
    """The weights of `parameters` as they are when this is made, kept on the device or in host memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, on_host: bool) -> None:
        self._parameters = list(parameters)
        self._on_host = on_host
        place = torch.device("cpu") if on_host else self._parameters[0].device
        self._weights = [p.detach().to(place, copy=True) for p in self._parameters]

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
            for index, parameter in enumerate(self._parameters):
                if self._on_host:
                    policy = parameter.data.to("cpu", copy=True)
                    parameter.data.copy_(self._weights[index])
                    self._weights[index] = policy
                else:
                    parameter.data, self._weights[index] = self._weights[index], parameter.data
