"""Models of a user's own that something is wrong with: `model="faulty_models:raises"`."""

import itertools
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import Net

NAN = float("nan")
_CALLS = itertools.count()
not_a_function = 3


class Mute(Exception):
    """Its own code fails where it is to say what it is."""

    def __str__(self) -> str:
        raise ValueError("no words")


class Unusual(BaseException):
    """What no `except Exception` catches."""


# Factories ---------------------------------------------------------------------------------------


def raises(channels, size, num_classes):
    raise KeyError("one\ntwo")


def mute(channels, size, num_classes):
    raise Mute


def exits(channels, size, num_classes):
    sys.exit(3)


def unusual(channels, size, num_classes):
    raise Unusual("no Exception")


def nothing(channels, size, num_classes):
    pass


def few_arguments(channels):
    return Net(channels, 10)


def other_weights(channels, size, num_classes):
    net = Net(channels, num_classes)
    nn.init.constant_(net.head.bias, next(_CALLS))
    return net


def nan_weight(channels, size, num_classes):
    net = Net(channels, num_classes)
    with torch.no_grad():
        net.head.weight[0, 0] = NAN
    return net


def float16(channels, size, num_classes):
    return Net(channels, num_classes).half()


def on_meta(channels, size, num_classes):
    with torch.device("meta"):
        return Net(channels, num_classes)


def sparse_buffer(channels, size, num_classes):
    net = Net(channels, num_classes)
    net.register_buffer("adjacency", torch.eye(3).to_sparse())
    return net


def buffer(value):
    def factory(channels, size, num_classes):
        net = Net(channels, num_classes)
        net.register_buffer("extra", value)
        return net

    return factory


bfloat16_buffer = buffer(torch.ones(3, dtype=torch.bfloat16))
float8_buffer = buffer(torch.ones(3).to(torch.float8_e4m3fn))
huge_buffer = buffer(torch.full((3,), 1e300, dtype=torch.float64))


def huge_weight(channels, size, num_classes):
    net = Net(channels, num_classes)
    nn.init.constant_(net.head.weight, 3e38)
    return net


def lazy_unused(channels, size, num_classes):
    net = Net(channels, num_classes)
    net.unused = nn.LazyLinear(3)
    return net


def odd_name(channels, size, num_classes):
    net = Net(channels, num_classes)
    net.register_buffer("b\udcff", torch.ones(3))
    return net


def frozen(channels, size, num_classes):
    return Net(channels, num_classes).requires_grad_(False)


def empty_layer(channels, size, num_classes):
    net = Net(channels, num_classes)
    net.unused = nn.Linear(0, 5)
    return net


def tied(channels, size, num_classes):
    net = Net(channels, num_classes)
    net.again = net.hidden
    return net


def unsent_buffers(channels, size, num_classes):
    """What is not sent may be of any type."""
    net = Net(channels, num_classes)
    net.register_buffer("codes", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    net.register_buffer("phases", torch.full((3,), NAN, dtype=torch.complex64))
    net.register_buffer("flags", torch.tensor([True, False]))
    net.register_buffer("aside", torch.ones(3).to(torch.float8_e4m3fn), persistent=False)
    return net


class _NoLayer(nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : len(self.scale)] * self.scale


def one_class_more(channels, size, num_classes):
    return Net(channels, num_classes + 1)


# Modules -----------------------------------------------------------------------------------------


class _Pair(Net):
    def forward(self, x: Tensor):
        return super().forward(x), x


class _PairInTraining(Net):
    def forward(self, x: Tensor):
        logits = super().forward(x)
        return (logits, x) if self.training else logits


class _Bool(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) > 0


class _Sparse(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to_sparse()


class _TrainRaises(Net):
    def train(self, mode: bool = True):
        raise RuntimeError("no train")


class _TrainReturnsNothing(Net):
    def train(self, mode: bool = True):
        super().train(mode)


class _LoadsOtherNames(Net):
    def __init__(self, channels, num_classes):
        super().__init__(channels, num_classes)
        self._register_state_dict_hook(self._renamed)

    @staticmethod
    def _renamed(module, state, prefix, metadata):
        return {name.replace("head", "tail"): tensor for name, tensor in state.items()}


class _Keywords(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(input=x)), 2)
        x = self.pool(F.relu(self.conv2(input=x)))
        return self.head(F.relu(self.hidden(input=x.flatten(1))))


class _ExtraState(Net):
    def get_extra_state(self):
        return {"made": "by hand"}

    def set_extra_state(self, state):
        assert state == {"made": "by hand"}


class _NoCopy(Net):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class _ExitsForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        sys.exit("in forward")


class _RaisesInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("only in training")
        return super().forward(x)


class _OnClients(Net):
    """Fails on the clients alone: the server trains with two images at most."""

    def fail(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return self.fail(logits) if self.training and len(x) > 2 else logits


class _ClientNan(_OnClients):
    def fail(self, x):
        return x * NAN


class _ClientNanGradient(_OnClients):
    def fail(self, x):
        return x + torch.sqrt((x * 0) ** 2)


class _ClientRaises(_OnClients):
    def fail(self, x):
        # Nothing that is no text: the traceback is logged too, and xdist cannot send that.
        raise RuntimeError("one\ntwo \x1b[2J")


class _ClientIsLong(_OnClients):
    def fail(self, x):
        raise RuntimeError("long " * 1000)


class _ClientExits(_OnClients):
    def fail(self, x):
        sys.exit(4)


class _ClientIsMute(_OnClients):
    def fail(self, x):
        raise Mute


class _ClientIsUnusual(_OnClients):
    def fail(self, x):
        raise Unusual("no Exception")


class _Grows(_OnClients):
    def __init__(self, channels, num_classes):
        super().__init__(channels, num_classes)
        self.register_buffer("seen", torch.zeros(0))

    def fail(self, x):
        self.seen = torch.zeros(len(x))
        return x


class _ServerRaises(Net):
    """Fails where the server evaluates: on more images than any client trains with at once."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 32:
            raise RuntimeError("one\ntwo b\udcff")
        return super().forward(x)


class _ServerIsMute(Net):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 32:
            raise Mute
        return super().forward(x)


def _factory(kind: type[Net]):
    return lambda channels, size, num_classes: kind(channels, num_classes)


pair = _factory(_Pair)
pair_in_training = _factory(_PairInTraining)
gives_bool = _factory(_Bool)
gives_sparse = _factory(_Sparse)
train_raises = _factory(_TrainRaises)
train_returns_nothing = _factory(_TrainReturnsNothing)
loads_other_names = _factory(_LoadsOtherNames)
no_layer = _factory(_NoLayer)
keywords = _factory(_Keywords)
extra_state = _factory(_ExtraState)
no_copy = _factory(_NoCopy)
exits_forward = _factory(_ExitsForward)
raises_in_training = _factory(_RaisesInTraining)
client_nan = _factory(_ClientNan)
client_nan_gradient = _factory(_ClientNanGradient)
client_raises = _factory(_ClientRaises)
client_is_long = _factory(_ClientIsLong)
client_exits = _factory(_ClientExits)
client_is_mute = _factory(_ClientIsMute)
client_is_unusual = _factory(_ClientIsUnusual)
grows = _factory(_Grows)
server_raises = _factory(_ServerRaises)
server_is_mute = _factory(_ServerIsMute)
