"""How a client trains: the settings of a round at its width, as local training takes them."""

from dataclasses import dataclass
from sys import float_info

from core.arguments import check_number
from core.bits import check_width
from core.mix import check_client_bits
from core.settings import LocalOptimizer, LowBitTraining, Settings
from quant import FLOAT_BITS
from quant.lowbit.integer import sigma


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in one round.

    Attributes
    ----------
    bits : int
        The client's width, 2 to 16, or 32 for plain float32 training.
    low_bit_training : {"qat", "strict", "integer"}
        Float latent weights with a straight-through gradient, weights on the grid, or weights on
        the grid that compute as ternary ones (`quant.lowbit.integer`).
    activation_bits, gradient_bits : int
        Widths of activations and of gradients below 32 bits.
    epochs, batch_size : int
        Passes over the data, and images a step.
    learning_rate, momentum, weight_decay : float
        Of the optimizer; AdamW's first beta is the momentum, and its second 0.999.
    proximal_mu : float
        Factor of ``mu / 2 |w - w_received|^2`` in the loss (Li et al., arXiv:1812.06127).
    weight_step : float
        One step for all weights (fixed point); 0 fits each channel's.
    integer_learning_rate : float
        Of `quant.IntegerSGD`.
    optimizer : {"sgd", "adamw"}
        What takes the steps; of weights on a grid, its strict form (`quant.lowbit.strict`).
    """

    bits: int
    low_bit_training: LowBitTraining = "qat"
    activation_bits: int = FLOAT_BITS
    gradient_bits: int = FLOAT_BITS
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    weight_step: float = 0.0
    integer_learning_rate: float = 8.0
    optimizer: LocalOptimizer = "sgd"

    def __post_init__(self) -> None:
        check_client_bits(self.bits, "bits")
        check_width("activation-bits", self.activation_bits)
        check_width("gradient-bits", self.gradient_bits)
        check_number("proximal-mu", self.proximal_mu, least=0)
        # The others have the bounds of the settings that they come from.
        Settings(
            low_bit_training=self.low_bit_training,
            local_epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            weight_step=self.weight_step,
            integer_learning_rate=self.integer_learning_rate,
        )

    @classmethod
    def of(cls, settings: Settings, bits: int, server_round: int, mu: float) -> "LocalTraining":
        """Take from the settings what a client of this width does in this round."""
        return cls(
            bits=bits,
            low_bit_training=settings.low_bit_training,
            activation_bits=settings.activation_bits_of(bits),
            gradient_bits=settings.gradient_bits_of(bits),
            epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            optimizer=settings.optimizer,
            learning_rate=_decayed(settings.learning_rate, settings, server_round),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            proximal_mu=mu,
            weight_step=settings.weight_step,
            integer_learning_rate=_decayed(settings.integer_learning_rate, settings, server_round),
        )

    @property
    def in_integers(self) -> bool:
        """Whether the weights move in whole steps of integer training."""
        return self.low_bit_training == "integer" and self.bits != FLOAT_BITS

    @property
    def step_size(self) -> float:
        """How far a gradient of 1 moves a weight."""
        return self.integer_learning_rate * sigma(8) if self.in_integers else self.learning_rate


def _decayed(rate: float, settings: Settings, server_round: int) -> float:
    # Above zero, however many rounds it decays.
    return max(rate * settings.learning_rate_decay ** (server_round - 1), float_info.min)
