"""The base of every strategy: clients of different bit-widths under Flower's Strategy interface.

A subclass decides what a client does (`instruct`) and how the updates make the next model
(`combine`). The base does the rest: it samples the nodes under the seed, encodes the model for
their widths (`strategies.models`), reads the replies one by one, rejects bad ones, and passes on
the good ones in the order of their partitions, so that sums do not depend on the order of arrival.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from math import ceil
from typing import Any, Self

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from core.constructors import Broadcast, own_options
from core.options import Options as OwnOptions
from core.settings import Upload
from exchange.evaluations import Evaluation, evaluation_metrics, read_evaluation
from exchange.inbox import Batch, match_replies, warn_of_left_out
from exchange.nodes import Nodes, sample_nodes
from exchange.protocol import (
    FACTS,
    INSTRUCTION,
    MODEL,
    Declaration,
    Instruction,
    Report,
    plain,
)
from exchange.replies import (
    BadReply,
    ClientUpdate,
    Ranges,
    Reply,
    decode_in_order,
    payload_of,
    read_reply,
    training_metrics,
    within_norms,
)
from exchange.round_plan import RoundLog, RoundPlan, completed, with_config, with_upload
from exchange.states import (
    RoundDropped,
    Snapshot,
    State,
    checked_model,
    to_arrays,
    to_state,
    what_is_kept,
    why_unusable,
    without_negative_variances,
)
from quant import (
    FLOAT_BITS,
    Update,
    UpdateSpec,
)
from strategies.context import StrategyContext, own_context
from strategies.sums import SumsByWidth


class MixedPrecisionStrategy(SumsByWidth, Strategy):
    """Flower strategy for clients that declare a bit-width.

    Parameters
    ----------
    options : Options, optional
        The strategy's own settings, of its class `Options`; their defaults where none are given.
    context : StrategyContext, optional
        All else that it works with.

    Raises
    ------
    SettingsError
        If these are of other classes, or do not go together (`check`).

    Attributes
    ----------
    options, context : Options, StrategyContext
        As given. Only the strategy itself sets its attributes.
    upload : {"forward", "dithered", "stored"}
        What low-bit clients send of their weights.
    nodes : Nodes
        Who takes part.
    round_log, evaluate_log : RoundLog
        What happened to the clients in the last round of training, and in the last evaluation.

    Examples
    --------
    >>> class KeepModel(MixedPrecisionStrategy):
    ...     def combine(self, server_round, start, updates):
    ...         return start
    >>> KeepModel().context.fraction_train
    1.0
    """

    # Class of the strategy's own settings; a subclass with settings overrides it.
    Options: type[OwnOptions] = OwnOptions
    # Of that class, which a subclass may narrow for its type checker.
    options: Any
    # What stands behind the colon of ``strategy="name:suffix"``, in words; empty: no colon.
    suffix = ""
    # Settings of every run that have no effect, and the values of `broadcast` with which they have
    # none; no values: whatever it is.
    idle: Mapping[str, tuple[str, ...]] = {}
    evaluates_on_server = True
    # Whether the tensors that `checkpoint` returns are only ever replaced, and never changed in
    # place: they need not be copied then. A subclass that keeps something else sets it again.
    replaces_kept = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "configure_train" in vars(cls):
            raise TypeError(
                f"{cls.__name__} has a configure_train of its own, which the server does not call; "
                "override training_messages"
            )
        if "combine" in vars(cls) and "needs_means_only" not in vars(cls):
            # That of its parent needed no more; its own may compare clients.
            cls.needs_means_only = False
        if {"combine", "checkpoint"} & vars(cls).keys() and "replaces_kept" not in vars(cls):
            cls.replaces_kept = False

    def __init__(
        self, options: OwnOptions | None = None, context: StrategyContext | None = None
    ) -> None:
        self.context = own_context(context, self)
        self.options = own_options(options, self.Options, self)
        self.check_all(self.options, self.context)
        self._ranges = Ranges(self.context.metric_range, self.context.loss_range)
        self.upload: Upload = self.context.upload or self.preferred_upload(
            self.context.low_bit_training
        )
        self.nodes = Nodes(
            self.context.min_nodes,
            self.context.node_wait,
            self.context.most_examples,
            self.context.examples_of,
            self.context.facts,
        )
        self.round_log = RoundLog()
        self.evaluate_log = RoundLog()
        self._plan = RoundPlan()

    # --- answered by the class, before an instance is made ---------------------------------------

    @classmethod
    def named(cls, suffix: str) -> type[Self]:
        """Return the class that is meant by ``strategy="name:suffix"``; there is only this one."""
        return cls

    @classmethod
    def preferred_upload(cls, low_bit_training: str) -> Upload:
        """Return what ``upload="auto"`` stands for.

        Parameters
        ----------
        low_bit_training : {"qat", "strict", "integer"}
            How low-bit clients train.
        """
        return "forward"

    @classmethod
    def preferred_broadcast(cls, low_bit_training: str, has_buffer: bool) -> Broadcast:
        """Return what ``broadcast="auto"`` stands for.

        Parameters
        ----------
        low_bit_training : {"qat", "strict", "integer"}
            How low-bit clients train.
        has_buffer : bool
            Whether the server has unlabelled images to calibrate the rounding with.
        """
        return "float32"

    @classmethod
    def check(cls, options: Any, context: StrategyContext) -> None:
        """Refuse what does not go together: before a run loads its data, and once more when made.

        The context then lacks what takes the data or the network.

        Raises
        ------
        SettingsError
            One line that names the setting, its value and what is allowed.
        """

    # --- overridden by subclasses; `state_for` too, of `ModelsByWidth` ---------------------------

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Return what this client is asked to do; the default: train and send its weights."""
        return Instruction(server_round)

    @abstractmethod
    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Make the next global model.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        start : dict of str to Tensor
            The float32 model that the clients were sent.
        updates : iterator of ClientUpdate
            The good updates in the order of their partitions, decoded one at a time. To be read
            to its end.

        Returns
        -------
        dict of str to Tensor or None
            The next model; None to keep the present one, as the round's line then shows. A run in
            which no round made one has failed, unless `evaluates_on_server` is False.
        """

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return what later rounds depend on besides the global model: tensors, and JSON values.

        A strategy that keeps something from round to round returns it here and takes it back in
        `restore`; after both, it must do what it would have done, to the bit.
        """
        return {}, {}

    def restore(self, tensors: State, values: Mapping[str, Any]) -> None:
        """Take back what `checkpoint` returned, tensors in the same order, in place of all else."""

    def roll_back(self, before: Snapshot) -> None:
        """Be as before a round whose result is dropped.

        Clients get no message: a strategy whose clients keep something too restores that here.
        """
        self.restore(before.tensors, before.values)

    # --- Flower's interface --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return `training_messages`, which the server itself asks for, all at once.

        A `config` that is not empty goes to the clients with them, under the key "config".
        """
        batches = self.training_messages(server_round, arrays, grid)
        return with_config((message for batch in batches for message in batch()), config)

    def training_messages(self, server_round: int, arrays: ArrayRecord, grid: Grid) -> list[Batch]:
        """Sample the nodes of this round, whose messages are made when they are asked for.

        The widest nodes, whose model needs no rounding, so can train while it is rounded for the
        next, where no evaluation has rounded it before.

        Returns
        -------
        list of callable
            For each width, the widest first, what makes the messages to its nodes. Each is to be
            called once, in order.
        """
        detailed = self.context.detailed is not None and self.context.detailed(server_round)
        self.round_log, self.evaluate_log = RoundLog(detailed=detailed), RoundLog()
        kind, fraction = MessageType.TRAIN, self.context.fraction_train
        batches = self._ask(kind, fraction, server_round, arrays, grid, self.round_log)
        if self.context.secure_aggregation:
            self._plan.secure = self.agree_on_keys(grid, self._plan, self.round_log)
        return batches

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the replies as they come, then combine the good updates in order."""
        plan, round_log = self._plan, self.round_log
        accepted = []
        for client, reply in match_replies(plan.messages, plan.clients, replies, round_log):
            if (item := self._accept(client, reply)) is not None:
                accepted.append(item)
        round_log.received = time.monotonic()
        accepted.sort(key=lambda item: item.client.partition_id)
        reports: list[Report] = []
        if plan.secure is None:
            # A movement that is clipped needs no other bound; and one device's could decide, by the
            # median, whether the updates of others count.
            bound = 0.0 if self.context.dp_clip else self.context.norm_bound
            good = within_norms(plan, accepted, bound, round_log.rejected)
            updates = self._updates(good, reports)
            if self.context.dp_clip:
                updates = self.noised(server_round, plan, round_log, updates)
        else:
            updates = self.sums_of(plan, round_log, reports)
        state = self._combine_or_drop(server_round, updates)
        warn_of_left_out(server_round, plan.clients, round_log)
        if round_log.dropped:
            log(WARNING, "Round %d is left out: %s", server_round, round_log.dropped)
        arrays = None if state is None else to_arrays(without_negative_variances(state))
        return arrays, training_metrics(reports) if reports else None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make a message for each node that is to evaluate the model at its own width."""
        self.evaluate_log = RoundLog()
        if not self.context.fraction_evaluate:
            self._plan = RoundPlan()
            return self._plan.messages
        kind, fraction = MessageType.EVALUATE, self.context.fraction_evaluate
        batches = self._ask(kind, fraction, server_round, arrays, grid, self.evaluate_log)
        return with_config((message for batch in batches for message in batch()), config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' accuracies and losses by width, and over all clients."""
        found: dict[int, list[Evaluation]] = {}
        plan, round_log = self._plan, self.evaluate_log
        for client, reply in match_replies(plan.messages, plan.clients, replies, round_log):
            try:
                one = read_evaluation(reply, server_round, self._ranges)
                found.setdefault(client.bits, []).append(one)
            except BadReply as error:
                round_log.rejected[client.partition_id] = str(error)
        warn_of_left_out(server_round, plan.clients, round_log)
        better = self.context.higher_is_better
        return evaluation_metrics(found, better) if found else None

    def summary(self) -> None:
        """Log what the strategy is."""
        name, context = type(self).__name__, self.context
        log(INFO, "\t├──> %s: trains a share of %g", name, context.fraction_train)
        log(INFO, "\t└──> seed %d", context.seed)

    # --- the base's own ------------------------------------------------------------------------

    def _ask(
        self,
        kind: str,
        fraction: float,
        server_round: int,
        arrays: ArrayRecord,
        grid: Grid,
        round_log: RoundLog,
    ) -> list[Batch]:
        purpose = (server_round, int(kind == MessageType.EVALUATE))
        alone = kind == MessageType.TRAIN and bool(self.context.dp_clip)
        present, seed = self.nodes.gather(grid), self.context.seed
        clients = sample_nodes(present, fraction, seed, *purpose, each_alone=alone)
        start = to_state(arrays)
        self._plan = plan = RoundPlan(start, self._spec(start, clients), clients)
        for client in clients.values():
            plan.ask(client, self._instruction_for(server_round, client))
            round_log.sampled.append(client.partition_id)
        if alone:
            self.plan_widths(server_round, plan, present.values())
        widths = sorted({client.bits for client in clients.values()}, reverse=True)
        return [partial(self._messages_to, bits, kind, plan, round_log) for bits in widths]

    def _spec(self, start: State, clients: Mapping[int, Declaration]) -> UpdateSpec:
        low_bit = any(client.bits != FLOAT_BITS for client in clients.values())
        asked_low = self.context.quantized is not None or low_bit
        return UpdateSpec.of(start, self.on_grid(start) if asked_low else ())

    def _messages_to(
        self, bits: int, kind: str, plan: RoundPlan, round_log: RoundLog
    ) -> list[Message]:
        """Make the messages to the nodes of a width."""
        models: dict[int, tuple[ArrayRecord, Update]] = {}
        messages = []
        for node_id, client in plan.clients.items():
            if client.bits != bits:
                continue
            instruction = plan.instructions[client.partition_id]
            content = RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())})
            if self.context.facts:
                content[FACTS] = ConfigRecord(dict(self.context.facts))
            if downlink_bits := instruction.downlink_bits:
                # They share one record: Flower then stores the model once.
                if downlink_bits not in models:
                    models[downlink_bits] = self._encode_model(plan.start, bits, downlink_bits)
                    model = models[downlink_bits][1]
                    if plan.secure is not None:
                        scales = partial(self.sum_scales, bits, plan.start, model)
                        plan.secure.prepare(bits, model, scales)
                    elif self.context.dp_clip:
                        plan.received[bits] = model.dequantize()
                content[MODEL], model = record, _ = models[downlink_bits]
                plan.sent(client, model)
                round_log.downlink_bytes[bits] += len(record[MODEL].data)
                if plan.secure is not None:
                    plan.secure.add_to(content, client)
            messages.append(Message(content, node_id, kind))
        plan.messages += messages
        return messages

    def _combine_or_drop(self, server_round: int, updates: Iterator[ClientUpdate]) -> State | None:
        """Return the next model, or None and all that is kept as it was before."""
        before = Snapshot.of(*what_is_kept(self.checkpoint), self.replaces_kept)
        try:
            state = self.combine(server_round, self._plan.start, updates)
            if state is not None:
                source = f"{type(self).__name__}.combine"
                state = checked_model(state, self._plan.start, source)
            reason = why_unusable(state, what_is_kept(self.checkpoint)[0], before.tensors)
        except RoundDropped as error:
            state, reason = None, str(error)
        except BaseException:
            self.roll_back(before)
            raise
        if reason:
            self.roll_back(before)
            self.round_log.dropped = plain(reason)
        elif state is None and self.round_log.aggregated and self.evaluates_on_server:
            self.round_log.unchanged = f"{type(self).__name__}.combine returned no model"
        return None if reason else state

    def chosen(self) -> dict[str, str]:
        """Return what "auto" stands for, and which metric is the better one, for the record."""
        better = "higher" if self.context.higher_is_better else "lower"
        return {"broadcast": self.context.broadcast, "upload": self.upload, "better": better}

    @property
    def largest_payload(self) -> int:
        """Bytes of the largest update that a client was asked for in the last messages."""
        return self._plan.largest_payload

    def _instruction_for(self, server_round: int, client: Declaration) -> Instruction:
        by_broadcast = FLOAT_BITS if self.context.broadcast == "float32" else client.bits
        owner = type(self).__name__
        instruction = completed(self.instruct(server_round, client), by_broadcast, owner)
        training, seed = self.context.low_bit_training, self.context.seed
        return replace(
            with_upload(instruction, client, training, self.upload, seed),
            number=client.partition_id,
            coded=int(self.context.coded),
            keep_in=self.context.clients_keep_in,
        )

    def _accept(self, client: Declaration, reply: Message) -> Reply | None:
        self.round_log.uplink_bytes[client.bits] += len(payload_of(reply) or b"")
        secure = self._plan.secure
        most_bytes = self._plan.expected[client.partition_id].most_bytes
        if secure is not None:
            most_bytes = secure.payload_bytes(client)
        server_round = self._plan.instructions[client.partition_id].server_round
        try:
            item = read_reply(
                reply,
                client,
                server_round,
                most_bytes,
                self._most_steps(client),
                self._ranges,
            )
            if secure is not None:
                secure.take(item)
                # It is in the sum, and no more known than that.
                item = replace(item, payload=b"")
            return item
        except BadReply as error:
            self.round_log.rejected[client.partition_id] = str(error)
            return None

    def counted(self, client: Declaration) -> int:
        """Return what a client counts for in a sum, by the examples that it declared."""
        return 1 if self.weighs_alike else self._examples_of(client.num_examples)

    def _examples_of(self, reported: int) -> int:
        """Return what a client's examples count for."""
        if self.context.weighting == "uniform":
            return 1
        return min(reported, self.context.max_examples or reported)

    def _weighted(self, report: Report) -> Report:
        """Return a report whose examples are what they count for."""
        return replace(report, num_examples=self._examples_of(report.num_examples))

    def _most_steps(self, client: Declaration) -> int | None:
        if self.context.local_epochs is None:
            return None
        return self.context.local_epochs * ceil(client.num_examples / self.context.batch_size)

    def _updates(self, replies: list[Reply], reports: list[Report]) -> Iterator[ClientUpdate]:
        for item in decode_in_order(self._plan, replies, self.round_log.rejected):
            self.round_log.aggregated.append(item.client.partition_id)
            reports.append(item.report)
            yield replace(item, report=self._weighted(item.report))
            # Let go of it before the next one is decoded.
            del item
