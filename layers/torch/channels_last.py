"""Batch Normalization of channels that come last, as a LayerNorm over channels has them."""

from torch import Tensor, nn


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    r"""Batch Normalization over all dimensions but the last, which holds the channels: input (N, ..., C).

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Arguments, parameters and buffers are those of `torch.nn.BatchNorm1d`.

    Source: Ioffe and Szegedy, "Batch Normalization", section 3.1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, ..., C)."""
        return super().forward(input.movedim(-1, 1)).movedim(1, -1)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take input of any rank: one without a batch has failed before."""
