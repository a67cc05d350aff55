"""Quantization-aware recurrent layers."""

from torch import nn

from quant.qat.base import QuantLayer


class QuantRecurrent(QuantLayer, nn.RNNBase):
    """What recurrent layers share: all weights of all layers and directions on their grids.

    Each gate of each layer has a scale for each of its units. The input has a grid, also as a
    `PackedSequence`; the hidden state, from outside and from step to step, is float32, and so is
    what one of several layers hands to the next, all of which torch's kernel keeps to itself. The
    gradients of the output and of the last hidden state are quantized on their way in, those from
    step to step are not.
    """


class QuantRNN(QuantRecurrent, nn.RNN):
    """`nn.RNN` with fake-quantized weights and input (`QuantRecurrent`)."""


class QuantLSTM(QuantRecurrent, nn.LSTM):
    """`nn.LSTM`, also with projections, with fake-quantized weights and input."""


class QuantGRU(QuantRecurrent, nn.GRU):
    """`nn.GRU` with fake-quantized weights and input (`QuantRecurrent`)."""


class QuantRNNCell(QuantLayer, nn.RNNCell):
    """`nn.RNNCell` with fake-quantized weights and input; the hidden state is float32."""


class QuantLSTMCell(QuantLayer, nn.LSTMCell):
    """`nn.LSTMCell` with fake-quantized weights and input; the hidden state is float32."""


class QuantGRUCell(QuantLayer, nn.GRUCell):
    """`nn.GRUCell` with fake-quantized weights and input; the hidden state is float32."""


def weights_of(layer: nn.RNNBase) -> list[str]:
    """Return the names of the weights of all layers and directions; the others are biases.

    >>> weights_of(nn.LSTM(2, 4, proj_size=3))
    ['weight_ih_l0', 'weight_hh_l0', 'weight_hr_l0']
    """
    return [name for name in layer._parameters if name.startswith("weight_")]
