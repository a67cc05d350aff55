"""The federation that rounds are measured on: twenty clients, half of them on four bits."""

from prowd.compare.plan import Setting

CLIENTS, ROUNDS = 20, 4
FEDERATION = f"num-supernodes={CLIENTS} client-resources-num-cpus=1"
SETTINGS: dict[str, Setting] = {
    "strategy": "prowd",
    "dataset": "fashion-mnist",
    "image-size": 32,
    "model": "resnet20",
    "bit-mix": "4:0.5,32:0.5",
    "low-bit-training": "strict",
    "samples-per-client": 600,
    "server-buffer": 512,
    "num-server-rounds": ROUNDS,
    "evaluate-every": ROUNDS,
    "node-wait": 600,
}
ALL_FLOAT32: dict[str, Setting] = {**SETTINGS, "strategy": "fedavg", "bit-mix": "32:1.0"}
