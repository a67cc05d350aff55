"""The global model as clients of each bit-width get it: half of the base of every strategy."""

from flwr.app import ArrayRecord

from core.errors import FederationError, SettingsError
from exchange.protocol import MODEL, to_array
from exchange.states import State, checked_model
from quant import (
    FLOAT_BITS,
    FlatUpdate,
    Update,
    encode,
    fixed_point,
    quantize_fitted,
    quantize_state,
    stored_state,
)
from strategies.context import StrategyContext


class ModelsByWidth:
    """Brings a float32 model to the widths of the clients, by the strategy's context."""

    context: StrategyContext

    def state_for(self, bits: int, state: State) -> State:
        """Return the float32 model that clients of a width use; by default the global one."""
        return state

    def model_for(self, bits: int, state: State) -> Update:
        """Return the model as clients of a width compute with it."""
        if self.context.low_bit_training == "integer" and bits != FLOAT_BITS:
            state = self.state_at(bits, state)
            return stored_state(state, self.on_grid(state), bits)
        return self._at_width(bits, self.state_at(bits, state), self.context.weight_step)

    def state_at(self, bits: int, state: State) -> State:
        """Return what `state_for` does, which a subclass writes; what is no model is refused."""
        source = f"{type(self).__name__}.state_for"
        return checked_model(self.state_for(bits, state), state, source)

    def on_grid(self, state: State) -> list[str]:
        """Return the names of the weights that low-bit clients hold on a grid.

        Raises
        ------
        FederationError
            If the strategy's context does not name them.
        """
        if self.context.quantized is None:
            raise FederationError(
                f"quantized: {type(self).__name__} does not know which weights low-bit clients "
                "quantize; give it StrategyContext(quantized=quantizable_weights(model))"
            )
        return [name for name in state if name in self.context.quantized]

    def _encode_model(
        self, start: State, bits: int, downlink_bits: int
    ) -> tuple[ArrayRecord, Update]:
        """Return the model as clients of a width are sent it, in a record, and decoded."""
        if downlink_bits == bits != FLOAT_BITS:
            model = self.model_for(bits, start)
        else:
            # Fixed-point weights have the client's own width.
            model = self._at_width(downlink_bits, self.state_at(bits, start), weight_step=0.0)
        if model.bits != downlink_bits:
            raise SettingsError(
                f"strategy: {type(self).__name__}.model_for returns a model of {model.bits} bits; "
                f"allowed: {downlink_bits}"
            )
        if downlink_bits != FLOAT_BITS:
            # In the form that every reply is read beside.
            model = FlatUpdate.of(model)
        payload = encode(model, coded=self.context.coded)
        return ArrayRecord({MODEL: to_array(payload)}), model

    def _at_width(self, bits: int, state: State, weight_step: float) -> Update:
        """Return a model at a width, rounded by the setting `broadcast`."""
        if bits == FLOAT_BITS:
            return quantize_state(state, bits)
        if self.context.broadcast == "calibrated":
            if self.context.round_calibrated is None:
                raise ValueError("broadcast: 'calibrated' needs round_calibrated, which is not set")
            return self.context.round_calibrated(state, bits)
        names = self.on_grid(state)
        if weight_step:
            return quantize_state(state, bits, fixed_point(state, names, weight_step))
        return quantize_fitted(state, bits, names)
