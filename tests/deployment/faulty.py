"""The two apps with faults in them: what the rehearsed run sends in place of prowd's own.

The server's clock goes ahead by the round's timeout when only the late client is still to answer:
so the timeout is one that no sound client can miss, however loaded the machine is.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from client_app.app import app as sound
from exchange.protocol import INSTRUCTION

# By round and site; the test writes them here.
FAULTS = {}
LATE = "answer late"

client = ClientApp()


def round_of(message):
    return message.content[INSTRUCTION]["server_round"]


@client.query()
def query(message, context):
    return sound(message, context)


@client.train()
def train(message, context):
    state = Path(context.node_config["state-dir"])
    (state / "number").write_text(str(message.content[INSTRUCTION]["number"]))
    fault = FAULTS.get(round_of(message), {}).get((state / "site").read_text())
    if fault == "raise":
        raise RuntimeError("the accelerator is on fire")
    if fault == "die":
        os._exit(1)
    over = state / f"round-{round_of(message)}-is-over"
    while fault == LATE and not over.exists():
        time.sleep(0.1)
    return sound(message, context)


server = ServerApp()


@server.main()
def serve(grid, context):
    from exchange import inbox
    from server_app.app import main

    ahead, answered, pull = 0.0, {}, inbox.pull

    def watching(grid, message, *arguments):
        nonlocal ahead
        reply = pull(grid, message, *arguments)
        if reply is not None and message.metadata.message_type == "train":
            number = round_of(message)
            answered[number] = answered.get(number, 0) + 1
            late = LATE in FAULTS.get(number, {}).values()
            if late and answered[number] == context.run_config["min-nodes"] - 1:
                ahead += context.run_config["round-timeout"]
        return reply

    inbox.pull = watching
    inbox.time = SimpleNamespace(
        time=time.time, sleep=time.sleep, monotonic=lambda: time.monotonic() + ahead
    )
    main(grid, context)
