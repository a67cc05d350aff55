"""`prowd-paper`: ProWD as the paper has it, to the letter, beside the best that we know of it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from core.constructors import Broadcast
from core.options import Idle
from core.settings import Upload
from strategies.context import StrategyContext
from strategies.prowd.options import FineTuningOptions, ProWDOptions, Share
from strategies.prowd.strategy import ProWD


class ProWDPaperOptions(FineTuningOptions):
    """What the paper leaves open (`prowd-paper-...`).

    >>> ProWDPaperOptions(tau=0.3).as_prowd().mask_at_most
    0.3
    """

    finetune_every: Annotated[int, Field(ge=0), Idle.ONE_WIDTH] = Field(
        5, description="Rounds between fine-tunings of the dequantizer's blocks; 0: never trained."
    )
    tau: Annotated[Share, Idle.ONE_WIDTH] = Field(
        0.5, description="Largest share of coordinates that a mask keeps."
    )
    normalization: Literal["clients", "count"] = Field(
        "clients",
        description="Divide each coordinate by all clients, as the paper's equation, or by those "
        "that contribute to it.",
    )

    def as_prowd(self) -> ProWDOptions:
        """Return the options of `ProWD` that they stand for."""
        own = self.model_dump(exclude={"tau"})
        return ProWDOptions(
            reference="global",
            dequantize="client",
            align="off",
            own_normalization=False,
            mask_at_most=self.tau,
            mask_at_least=0.0,
            aggregate="weights",
            **own,
        )


class ProWDPaper(ProWD):
    """The paper's ProWD (Yoon et al., ICML 2022), equation by equation.

    The dequantizer sees codes only and is fine-tuned every few rounds on the Float32 clients'
    weights and the server's buffer ("Progressive Dequantizer"); every client's model is dequantized
    and masked where its group's movement is not relevant ("Mask Computation"); and the weights, not
    their movements, are averaged over all clients ("Selective Weight Aggregation").

    Parameters
    ----------
    options : ProWDPaperOptions, optional
        What the paper leaves open.
    context : StrategyContext, optional
        As of `ProWD`.

    Examples
    --------
    >>> strategy = ProWDPaper(ProWDPaperOptions(tau=0.3), StrategyContext(seed=1))
    >>> strategy.options.reference, strategy.options.mask_at_most
    ('global', 0.3)
    """

    Options = ProWDPaperOptions
    # It dequantizes every client's model by itself.
    needs_means_only = False

    @classmethod
    def why_not_secure(cls, options: Any, context: StrategyContext) -> str:
        """Refuse, as it dequantizes the weights of single clients."""
        return f"{cls.__name__}, which dequantizes each client's own weights; allowed: false"

    def __init__(
        self, options: ProWDPaperOptions | None = None, context: StrategyContext | None = None
    ) -> None:
        super().__init__(options, context)
        self.options = (options or ProWDPaperOptions()).as_prowd()

    @classmethod
    def preferred_upload(cls, low_bit_training: str) -> Upload:
        """Let clients send the rounded weights that they compute with, as in the paper."""
        return "forward"

    def _sends_difference(self, bits: int) -> bool:
        # The paper's clients send weights.
        return False

    @classmethod
    def preferred_broadcast(cls, low_bit_training: str, has_buffer: bool) -> Broadcast:
        """Send float32, as the paper does."""
        return "float32"
