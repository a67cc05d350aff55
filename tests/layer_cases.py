"""A layer for each rule, with inputs, and what is computed of it."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


class Tied(nn.Module):
    """A language model of one embedding, which is its head too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)).relu())


class Attending(nn.Module):
    """Self-attention by keyword, and over a memory, as in a decoder."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(4, 2, batch_first=True)
        self.other = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x, memory):
        x, _ = self.own(query=x, key=x, value=x, need_weights=False)
        return self.other(x, memory, memory)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(x):
    return pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)


SEQUENCE, IMAGE = numbers(2, 5, 4), numbers(2, 4, 5, 5)
TOKENS = torch.tensor([[1, 3, 0], [3, 8, 0]])
CASES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding="valid", groups=2), (IMAGE[:, :, 0],)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (IMAGE,)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (IMAGE,)),
    "conv3d": (
        lambda: nn.Conv3d(4, 2, 2, padding=1, padding_mode="circular"),
        (numbers(1, 4, 3, 3, 3),),
    ),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (IMAGE[:, :, 0],)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, output_padding=1), (IMAGE,)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 2, 2), (numbers(1, 4, 2, 2, 2),)),
    "linear": (lambda: nn.Linear(4, 3), (SEQUENCE,)),
    "bilinear": (lambda: nn.Bilinear(4, 3, 5), (SEQUENCE, numbers(2, 5, 3))),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), (TOKENS,)),
    "bag": (lambda: nn.EmbeddingBag(9, 4, mode="sum"), (TOKENS, None, numbers(2, 3))),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (SEQUENCE,) * 3),
    "attention-apart": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        (SEQUENCE, numbers(6, 5, 3), numbers(6, 5, 5)),
    ),
    "attending": (Attending, (SEQUENCE, numbers(2, 3, 4))),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        (SEQUENCE,),
    ),
    "rnn": (lambda: nn.RNN(4, 6, nonlinearity="relu"), (SEQUENCE,)),
    "lstm": (lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), (SEQUENCE,)),
    "gru": (lambda: nn.GRU(4, 6, batch_first=True, bias=False), (SEQUENCE, numbers(1, 2, 6))),
    "gru-packed": (lambda: nn.GRU(4, 6, 2, batch_first=True), (packed(SEQUENCE),)),
    "rnn-cell": (lambda: nn.RNNCell(4, 6), (SEQUENCE[0], numbers(5, 6))),
    "lstm-cell": (lambda: nn.LSTMCell(4, 6), (SEQUENCE[0], (numbers(5, 6), numbers(6, 5).mT))),
    "gru-cell": (lambda: nn.GRUCell(4, 6, bias=False), (SEQUENCE[0], numbers(5, 6))),
    "tied": (Tied, (TOKENS,)),
}


def made(name):
    """The layer of a case, in float32, and its inputs."""
    torch.manual_seed(7)
    make, inputs = CASES[name]
    return make(), inputs


def tensors_in(y):
    """All tensors of what a layer gives, in order."""
    if isinstance(y, PackedSequence):
        return [y.data]
    if isinstance(y, torch.Tensor):
        return [y]
    return [tensor for part in y or () for tensor in tensors_in(part)]


def loss_of(y):
    return sum((tensor - 0.3).square().sum() for tensor in tensors_in(y))
