"""What a client does with each message. Everything it learns with comes from `task` and `quant`."""

import time

import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from client_app.node import declare
from client_app.tracking import correction, effective_steps, remember
from quant import (
    STYPE,
    UpdateSpec,
    decode_update,
    encode_update,
    quantize_difference,
    set_scales,
    weight_scales,
)
from task.data import Images, load_dataset
from task.errors import SettingsError
from task.models import build_model
from task.partition import client_images
from task.protocol import (
    DECLARATION,
    INSTRUCTION,
    MODEL,
    REPORT,
    UPDATE,
    Declaration,
    Instruction,
    Report,
)
from task.seeds import derive_seed
from task.settings import Settings
from task.training import (
    LocalTraining,
    Score,
    at_width,
    calibrate_normalization,
    evaluate,
    load_state,
    model_state,
    train,
)

app = ClientApp()

_OWN_MODEL, _OWN_SCALES = "own-model", "own-scales"


@app.query()
def answer_query(message: Message, context: Context) -> Message:
    """Declare the node: its partition, bit-width and examples, or why it cannot take part."""
    declaration = declare(context.node_config, context.run_config)
    record = ConfigRecord(declaration.to_record())
    return Message(RecordDict({DECLARATION: record}), reply_to=message)


@app.train()
def answer_train(message: Message, context: Context) -> Message:
    """Train the received model, or the client's own, at the client's width and send the update."""
    started = time.perf_counter()
    settings, client, instruction = _begin(message, context)
    model, scales = _model(message, context, settings, instruction, client.bits)
    config = LocalTraining.of(
        settings, client.bits, instruction.server_round, instruction.proximal_mu
    )
    seed = derive_seed(settings.seed, 5, instruction.server_round, client.partition_id)
    received = {name: tensor.clone() for name, tensor in model_state(model).items()}
    delta = {}
    if instruction.tracks_gradient:
        delta = correction(
            context.state, received, instruction.server_round, instruction.server_learning_rate
        )
    images = _images(settings, client)
    trained = train(model, images, config, seed, scales=scales, correction=delta)
    content = RecordDict()
    update = trained.update
    if instruction.uplink == "difference":
        bits = instruction.uplink_bits or client.bits
        generator = torch.Generator().manual_seed(derive_seed(seed, 6))
        update = quantize_difference(trained.moved, bits, generator)
    if instruction.uplink == "nothing":
        context.state[_OWN_MODEL] = _to_record(model_state(model))
        context.state[_OWN_SCALES] = _to_record(weight_scales(model))
    else:
        payload = encode_update(update)
        array = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
        content[UPDATE] = ArrayRecord({UPDATE: array})
    if instruction.tracks_gradient:
        # Last of all, so that a client whose training failed keeps what it had.
        parameters = {name for name, _ in model.named_parameters()}
        sent = {n: t for n, t in update.dequantize().items() if n in parameters}
        remember(
            context.state,
            delta,
            {name: received[name] for name in sent},
            sent,
            instruction.server_round,
            config.learning_rate,
            effective_steps(trained.steps, config.momentum),
        )
    content[REPORT] = _report(trained.score, started)
    return Message(content, reply_to=message)


@app.evaluate()
def answer_evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model, or the client's own, at the client's width."""
    started = time.perf_counter()
    settings, client, instruction = _begin(message, context)
    model, scales = _model(message, context, settings, instruction, client.bits)
    model = at_width(model, settings, client.bits)
    set_scales(model, scales)
    if settings.calibrate_normalization:
        # Statistics of the client's own images: it has no access to the server's.
        pixels = _images(settings, client).pixels[: settings.server_buffer]
        calibrate_normalization(model, pixels)
    score = evaluate(model, load_dataset(settings).test)
    return Message(RecordDict({REPORT: _report(score, started)}), reply_to=message)


def _begin(message: Message, context: Context) -> tuple[Settings, Declaration, Instruction]:
    settings = Settings.of_run(context.run_config)
    # A fixed number of threads: sums, and with them the last bits, depend on it.
    torch.set_num_threads(settings.client_threads)
    client = declare(context.node_config, context.run_config)
    if client.refused:
        raise SettingsError(client.refused)
    return settings, client, Instruction.from_record(message.content[INSTRUCTION])


def _images(settings: Settings, client: Declaration) -> Images:
    return client_images(settings, client.partition_id, client.num_partitions)


def _model(
    message: Message,
    context: Context,
    settings: Settings,
    instruction: Instruction,
    bits: int,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model that was sent, or the client's own, and the grid that it was sent on."""
    data = load_dataset(settings)
    model = build_model(settings.model, data.channels, data.size, data.num_classes, settings.seed)
    scales = {}
    if instruction.downlink_bits:
        array = message.content[MODEL][MODEL]
        spec = UpdateSpec.of(model.state_dict())
        sent = decode_update(array.data, spec, instruction.downlink_bits)
        state = sent.dequantize()
        if instruction.downlink_bits == bits:
            scales = {name: tensor.scale for name, tensor in sent.quantized.items()}
    elif _OWN_MODEL in context.state:
        state = _from_record(context.state[_OWN_MODEL])
        # Evaluated on the grid that it was trained on; training fits a new one every round.
        if message.metadata.message_type == MessageType.EVALUATE:
            scales = _from_record(context.state[_OWN_SCALES])
    else:
        raise RuntimeError("this client no longer has a model of its own, and was sent none")
    load_state(model, state)
    return model, scales


def _to_record(tensors: dict[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def _from_record(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def _report(score: Score, started: float) -> MetricRecord:
    seconds = time.perf_counter() - started
    report = Report(score.num_examples, score.loss, score.accuracy, seconds)
    return MetricRecord(report.to_record())
