"""What a strategy is handed from outside: all of it at once, when it is made, and never later."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor

from core.arguments import check_names, check_number
from core.constructors import Broadcast, checked
from core.errors import SettingsError
from core.options import shown
from core.settings import LocalOptimizer, LowBitTraining, SmallGroups, Upload
from quant import Update

Predict = Callable[[Mapping[str, Tensor]], Tensor]
RoundCalibrated = Callable[[Mapping[str, Tensor], int], Update]

# Those that have no setting of their name.
_FUNCTIONS = ("examples_of", "predict", "round_calibrated", "detailed")
# Those that may be left open.
_OR_NONE = ("local_epochs", "upload")
_NO_SETTING = {
    *_FUNCTIONS,
    *("most_examples", "quantized", "clients_keep_in"),
    *("facts", "metric_range", "loss_range", "higher_is_better"),
}


@dataclass(frozen=True, kw_only=True)
class StrategyContext:
    """The federation, the model and the server that a strategy works with.

    What is a setting of a run too has its bounds, which are checked here, and its default.

    Parameters
    ----------
    fraction_train, fraction_evaluate : float
        Share of the nodes that trains, and that evaluates on its own, in a round. At least one
        node trains; with 0, none evaluates.
    seed : int
        Seeds the sampling and whatever a strategy draws.
    min_nodes : int
        Nodes that must take part.
    node_wait : float
        Seconds to wait for them before the first round (`exchange.nodes`).
    most_examples : int
        Examples that a node can have; one that declares more is refused, as the number is its
        weight in the mean.
    examples_of : callable, optional
        ``f(partition_id, num_partitions)``: how many a partition has, where the server knows
        (`exchange.nodes.Nodes`).
    broadcast : {"float32", "nearest", "calibrated"}
        How the model reaches low-bit clients: in float32, which they round to nearest themselves,
        or as codes of their own width that the server rounded.
    low_bit_training : {"qat", "strict", "integer"}
        How low-bit clients train.
    optimizer : {"sgd", "adamw"}
        What takes the steps of local training.
    upload : {"forward", "dithered", "stored"}, optional
        What they send of their weights (`quant.upload`); by default what the strategy prefers.
    weight_step : float
        Step of the weights of low-bit clients in fixed point, for strict training; 0 where each
        channel has its own.
    secure_aggregation : bool
        Whether only sums over the clients of a width are seen (`exchange.secure_round`).
    secure_threshold : float
        Share of these that must be left for their sum, above a half.
    secure_min_group : int
        Clients that are summed at least.
    secure_small_groups : {"leave-out", "merge"}
        What becomes of a width with fewer: they are left out, or summed with the next wider ones.
    secure_float_bits : int
        Bits of what is summed in fixed point.
    dp_clip : float
        Largest norm of a client's movement, with differential privacy; 0: without.
    dp_noise_multiplier : float
        Standard deviation of the noise on the sum of a width, by that clip.
    round_timeout : float
        Seconds for each step of secure aggregation but training.
    norm_bound : float
        Largest norm of an update, in that of the usual ones (`exchange.replies`); 0: any.
    coded : bool
        Whether codes are entropy-coded on their way, in both directions (`quant.codec.coding`).
    local_epochs : int or None
        Passes that a client makes over its data in a round. With it, a client that reports more
        steps than that takes is rejected; None where it is not known.
    batch_size : int
        Images in each of these steps.
    max_examples : int
        Most examples that count as a client's weight in the mean; 0: no bound.
    weighting : {"examples", "uniform"}
        Whether clients count by their examples, or all alike.
    facts : mapping
        What clients are told of the task, and must agree on (`task.interface.Task.facts`).
    higher_is_better : bool
        Whether a larger metric is the better one.
    metric_range : tuple of float
        Smallest and largest value that a client's metric can have.
    loss_range : tuple of float
        The same of its loss; by default, of cross-entropy, which diverged where it is larger.
    quantized : collection of str, optional
        Names of the weights that low-bit clients hold on a grid (`quant.quantizable_weights` of
        the model); needed as soon as such a client takes part.
    predict : callable, optional
        ``f(u; w)``: differentiable logits on the server's unlabelled examples for a float32 state
        dict. Without it ProWD leaves the distillation term out.
    round_calibrated : callable, optional
        ``f(state, bits)``: a float32 state dict brought to a bit-width, an `Update`; needed with
        ``broadcast="calibrated"``.
    clients_keep_in : str
        Where clients keep what they need again after a crash (`Instruction.keep_in`).
    detailed : callable, optional
        ``f(server_round)``: whether a round is to be recorded in full; by default none is.

    Raises
    ------
    SettingsError
        If an argument is not what the setting of its name allows; NumPy's numbers are taken.

    Examples
    --------
    Half of the nodes train in each round, and at least ten must be there:

    >>> from strategies import FedAvg
    >>> context = StrategyContext(fraction_train=0.5, min_nodes=10, quantized=["conv.weight"])
    >>> FedAvg(context=context).context.fraction_train
    0.5

    Another one that differs in one thing is `dataclasses.replace(context, seed=1)`.
    """

    fraction_train: float = 1.0
    fraction_evaluate: float = 0.0
    seed: int = 0
    min_nodes: int = 1
    node_wait: float = 60.0
    most_examples: int = 10**9
    examples_of: Callable[[int, int], int | None] | None = None
    broadcast: Broadcast = "float32"
    low_bit_training: LowBitTraining = "qat"
    optimizer: LocalOptimizer = "sgd"
    upload: Upload | None = None
    weight_step: float = 0.0
    secure_aggregation: bool = False
    secure_threshold: float = 0.66
    secure_min_group: int = 3
    secure_small_groups: SmallGroups = "leave-out"
    secure_float_bits: int = 20
    dp_clip: float = 0.0
    dp_noise_multiplier: float = 0.0
    round_timeout: float = 3600.0
    norm_bound: float = 10.0
    coded: bool = True
    local_epochs: int | None = None
    batch_size: int = 1
    max_examples: int = 0
    weighting: Literal["examples", "uniform"] = "examples"
    facts: Mapping[str, str | int | float | list[str]] = field(default_factory=dict)
    higher_is_better: bool = True
    metric_range: tuple[float, float] = (0.0, 1.0)
    loss_range: tuple[float, float] = (0.0, 1e4)
    quantized: Collection[str] | None = None
    predict: Predict | None = None
    round_calibrated: RoundCalibrated | None = None
    clients_keep_in: str = ""
    detailed: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        numbers = {name: value for name, value in given.items() if name not in _NO_SETTING}
        numbers = {k: v for k, v in numbers.items() if k not in _OR_NONE or v is not None}
        held: dict[str, object] = checked(numbers)
        try:
            check_number("most_examples", self.most_examples, least=1, whole=True)
            if self.quantized is not None:
                held["quantized"] = check_names("quantized", self.quantized)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        held["most_examples"] = int(self.most_examples)
        for name, value in held.items():
            # NumPy's numbers became plain ones, names a set.
            object.__setattr__(self, name, value)
        for name in _FUNCTIONS:
            if given[name] is not None and not callable(given[name]):
                raise SettingsError(
                    f"{name}: {given[name]!r} is not allowed: it should be a function, or None"
                )


def own_context(context: StrategyContext | None, owner: object) -> StrategyContext:
    """Return the context that a strategy was given, or the default one.

    Raises
    ------
    SettingsError
        If it is anything else.
    """
    if context is None:
        return StrategyContext()
    if not isinstance(context, StrategyContext):
        raise SettingsError(
            f"context: {type(owner).__name__} has {shown(context)}; allowed: StrategyContext"
        )
    return context
