"""FedProx: FedAvg whose clients are held near the model that they received."""

from typing import Annotated

from pydantic import Field

from core.options import Options
from exchange.protocol import Declaration, Instruction
from strategies.fedavg import FedAvg


class FedProxOptions(Options):
    """FedProx's own settings (`fedprox-...`)."""

    mu: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Factor of the proximal term mu / 2 |w - w_received|^2; 0 is FedAvg."
    )


class FedProx(FedAvg):
    """Proximal local training (Li et al., 2018, arXiv:1812.06127, equation 2).

    >>> FedProx(FedProx.Options(mu=0.1)).options.mu
    0.1
    """

    Options = FedProxOptions
    options: FedProxOptions

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Add the proximal term."""
        return Instruction(server_round, proximal_mu=self.options.mu)
