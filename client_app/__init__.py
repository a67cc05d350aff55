"""The ClientApp: declares the bit-width, trains, evaluates; and its messages, for others' too."""

from exchange.protocol import answer, answer_query, config_in, instruction_in, model_in

__all__ = ["answer", "answer_query", "config_in", "instruction_in", "model_in"]
