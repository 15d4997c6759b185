"""Layers that are torch's own in name, parameters and values, and quicker on a CPU."""

import torch
from torch import nn
from torch.nn.functional import max_pool2d


class MaxPool(nn.MaxPool2d):
    """Max pooling whose values and gradients are torch's to the last bit.

    On a CPU, torch finds maxima three times as fast, or more, in pixels that keep their channels together,
    but spreads their gradients faster over contiguous ones: so places are found in the first layout, and
    values are taken in the second.

    What comes out lies as what came in: Opacus unfolds a convolution's input by the strides of contiguous
    pixels. On CUDA gradients of channels-last windows that overlap are added up in any order, so they have
    other bits.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) to fewer pixels."""
        pooled: torch.Tensor
        if x.ndim != 4 or self.return_indices:
            pooled = super().forward(x)
            return pooled
        exact = x.dtype in (torch.float32, torch.float64)  # others would be added up in another precision
        if x.device.type == "cpu" and exact and x.is_contiguous():
            last = x.detach().contiguous(memory_format=torch.channels_last)
            _, found = max_pool2d(
                last, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
                return_indices=True,
            )  # fmt: skip
            places = found.contiguous()
            return x.flatten(2).gather(2, places.flatten(2)).view_as(places)
        came = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        pooled = super().forward(x.contiguous(memory_format=layout))
        return pooled.contiguous(memory_format=came)


class Dropout(nn.Dropout):
    """Dropout whose masks, on a CPU, are drawn three times as fast: of 24 random bits a value, not of 53.

    A share p is dropped, to within 2^-24; what is kept is scaled by 1 / (1 - p).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of any shape."""
        if not self.training or not 0 < self.p < 1 or self.inplace or x.device.type != "cpu":
            return super().forward(x)
        kept = torch.rand(x.shape, device=x.device) >= self.p
        return x * (kept.to(x.dtype) * (1 / (1 - self.p)))
