"""Quantization-aware layers of torch's types: convolutions, linear layers, embeddings.

What has a class without a body computes by `QuantLayer.forward`. Convolutions and linear layers
call torch's function themselves, which takes less time than a call with other parameters.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quant.qat.base import QuantLayer


class QuantConv1d(QuantLayer, nn.Conv1d):
    """`nn.Conv1d`, also grouped or depthwise, with fake-quantized weights and input."""

    def forward(self, input: Tensor) -> Tensor:
        y = self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output_gradient(y)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` that computes with fake-quantized weights and input.

    >>> model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), QuantConfig(weight_bits=4))
    >>> model[0].weight_scale.shape
    torch.Size([4])
    """

    def forward(self, input: Tensor) -> Tensor:
        y = self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output_gradient(y)


class QuantConv3d(QuantLayer, nn.Conv3d):
    """`nn.Conv3d`, also grouped or depthwise, with fake-quantized weights and input."""

    def forward(self, input: Tensor) -> Tensor:
        y = self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output_gradient(y)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` that computes with fake-quantized weights and input.

    >>> model = prepare(nn.Sequential(nn.Linear(8, 1)), QuantConfig(weight_bits=2))
    >>> len(model[0].quantized_weight().unique()) <= 3
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output_gradient(y)


class QuantOutProjection(QuantLayer, NonDynamicallyQuantizableLinear):
    """`out_proj` of attention, which computes with its weight and never calls its forward pass."""


class QuantBilinear(QuantLayer, nn.Bilinear):
    """`nn.Bilinear` with fake-quantized weights and first input; the second stays float32."""


class QuantConvTranspose1d(QuantLayer, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with fake-quantized weights and input.

    Its weight is ``[inputs, outputs / groups, size]``, and scales are those of the first dimension
    as everywhere: one for each input channel, where other convolutions have one for each output.
    """


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with fake-quantized weights and input; scales as in one dimension."""


class QuantConvTranspose3d(QuantLayer, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with fake-quantized weights and input; scales as in one dimension."""


class QuantEmbedding(QuantLayer, nn.Embedding):
    """`nn.Embedding` that looks up fake-quantized rows, with one scale a row.

    There is no input to quantize. A row of zeros, as that of `padding_idx`, is zero on its grid,
    and a row that no index looks up has no gradient.
    """


class QuantEmbeddingBag(QuantLayer, nn.EmbeddingBag):
    """`nn.EmbeddingBag` of fake-quantized rows, with one scale a row; weights a sample are float32.

    There is no input to quantize.
    """
