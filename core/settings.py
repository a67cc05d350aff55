"""The settings that every run has, validated once; each strategy adds its own (`Options`).

Keys and defaults are in ``[tool.flwr.app.config]`` of pyproject.toml too, because Flower accepts
no key that is not there; a test holds the two together.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from core.bits import ALLOWED_WIDTHS, FLOAT_BITS
from core.errors import SettingsError
from core.files import is_utf8
from core.mix import parse_mix
from core.options import Allowed, Options, WidthOrNone, parse_assignments

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
# More than any machine has; torch would try to start them all.
Threads = Annotated[int, Field(ge=1, le=1024)]

# What is allowed, in words, for the page of settings and for the errors of the validators below.
_BOUND = "0, and 1 or more"
# WAGE's activations and output gradients; of fewer bits on a device that has no more.
_WAGE_BITS = 8
_NAME = "letters, digits and . _ + = - only, beginning with a letter or digit; 200 bytes at most"
_MIX = f"bits:share,...; bits {ALLOWED_WIDTHS}, each once; shares above 0, 1 in all"
AbsolutePath = Annotated[str, Allowed("path, absolute or from ~")]

LowBitTraining = Literal["qat", "strict", "integer"]
LocalOptimizer = Literal["sgd", "adamw"]
# What becomes of a bit-width with too few devices for a sum.
SmallGroups = Literal["leave-out", "merge"]
# What they send of their weights (`quant.upload`).
Upload = Literal["forward", "dithered", "stored"]
Dataset = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "image-folder"]


class Settings(Options):
    """Settings of a run that do not belong to one strategy. All have defaults.

    >>> Settings(num_server_rounds=3, bit_mix="4:0.5,32:0.5").batch_size
    32
    """

    strategy: str = Field(
        "prowd",
        description="Aggregation on the server: prowd or a baseline, flwr:NAME of Flower's own, or "
        "package.module:Class.",
    )
    strategy_options: str = Field(
        "",
        description="Settings of a strategy given as package.module:Class, as in "
        "eta = 0.1, name = 'x'.",
    )
    num_server_rounds: AtLeastOne = Field(8, description="Rounds of training.")
    fraction_train: Positive = Field(
        1.0,
        le=1,
        description="Share of the clients that trains in a round, at least one; with dp-clip the "
        "probability with which each does.",
    )
    fraction_evaluate: Share = Field(
        0.0,
        description="Share of the clients that evaluates the model itself, on the test set, or on "
        "held-out examples of its own; in local training, and without a test set, all do.",
    )
    round_timeout: Positive = Field(
        3600.0, description="Seconds after which a round continues without the missing clients."
    )
    min_nodes: AtLeastOne = Field(1, description="Nodes that must be there before the first round.")
    node_wait: Positive = Field(
        60.0,
        description="Seconds that the server waits for nodes, from the last one that answered; in "
        "all rounds together, for those that come later and then do not answer.",
    )

    lossless_coding: bool = Field(
        True,
        description="Codes travel entropy-coded where that makes them shorter, as differences from "
        "the codes that the client was sent where it was sent codes.",
    )
    norm_bound: Annotated[float, Field(ge=0), Allowed(_BOUND)] = Field(
        10.0,
        description="An update more than this many times as large as the model and as the round's "
        "median update is rejected; a lone update is compared with the model only. A smaller one "
        "counts: at nearly this many times the model it still moves the mean by so many models, "
        "times its share of the examples. 1 or more, or 0: none is rejected.",
    )

    secure_aggregation: bool = Field(
        False,
        description="The server gets sums of updates over the devices of a bit-width, and never "
        "one device's (docs/privacy.md).",
    )
    secure_threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.66,
        description="Share of a group's devices that must answer for their sum to be unmasked.",
    )
    secure_min_group: Annotated[int, Field(ge=2)] = Field(
        3, description="Devices that are summed at least."
    )
    secure_small_groups: SmallGroups = Field(
        "leave-out",
        description="What becomes of a bit-width with fewer: they are left out of the round, or "
        "summed with the next wider ones, and count as these.",
    )
    secure_float_bits: Annotated[int, Field(ge=16, le=24)] = Field(
        20,
        description="Width in fixed point of what is not on a low-bit grid: normalization, biases "
        "and all of Float32 devices.",
    )
    dp_clip: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Differential privacy of devices: largest norm of how far a device moves the "
        "model in a round; a longer movement is shortened to it.",
    )
    dp_noise_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Standard deviation of the noise on the sum of a bit-width's movements, in "
        "clips; 0: none, or what dp-epsilon takes over all rounds.",
    )
    dp_epsilon: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Privacy budget: the run ends before the round that would exceed it; 0: none.",
    )
    dp_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="Delta at which epsilon is stated; well below one by the devices."
    )

    local_epochs: AtLeastOne = Field(1, description="Passes over a client's data in a round.")
    batch_size: AtLeastOne = Field(32, description="Images in a step of local training.")
    optimizer: LocalOptimizer = Field(
        "sgd",
        description="What takes the steps of local training: sgd, or adamw, which has momentum as "
        "its beta1, 0.999 as its beta2, and usually a learning-rate of about 0.001.",
    )
    learning_rate: Positive = Field(
        0.05, description="Step size of the local optimizer in the first round."
    )
    learning_rate_decay: Positive = Field(
        0.97, le=1, description="Factor on the step size from round to round."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="Momentum of the local optimizer; beta1 of adamw."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="L2 penalty of local training; with adamw the share of each weight, times the "
        "step size, that a step takes from it.",
    )

    task: str = Field(
        "images",
        description="What is learned: images, text, table, or package.module:Class of yours.",
    )
    task_options: str = Field(
        "",
        description="Settings of the task, as in context = 64 of text, label = 'diagnosis' of "
        "table, or those of a task of yours.",
    )
    local_test_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2,
        description="Share of a device's own examples that it evaluates on and never trains on, "
        "where its data has no test part.",
    )
    max_examples: Count = Field(
        0,
        description="Most examples that count as a device's weight in the mean, whatever it "
        "declares; 0: no bound.",
    )
    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="Whether devices count by their examples, or all alike."
    )
    classes: str = Field(
        "", description="Names of the classes, as in cat,dog, where the server has no images."
    )
    image_channels: Literal[1, 3] = Field(
        3, description="Channels of the devices' images, where the server has none."
    )
    dataset: Dataset = Field("digits", description="Which images are learned.")
    data_dir: AbsolutePath = Field(
        "", description="Folder of the data; empty: ~/.cache/prowd/data, downloaded if need be."
    )
    image_size: Count = Field(
        0, le=1024, description="Images are resized to this many pixels a side; 0: as they are."
    )
    samples_per_client: Count = Field(
        0, description="Training images a client uses; 0: all it has."
    )
    partitioner: Literal["iid", "dirichlet", "file"] = Field(
        "iid", description="How the training images are partitioned among the clients."
    )
    partition_file: AbsolutePath = Field(
        "",
        description='JSON file with the partition for partitioner=file: {"clients": [[0, 5], [2]]} '
        "gives client 0 the first and the sixth; absolute or ~.",
    )
    dirichlet_alpha: Positive = Field(
        0.3, description="Concentration of the classes over clients; small is very uneven."
    )
    model: str = Field(
        "resnet8",
        description="resnet8, resnet20, cnn, vit, crnn, vgg7 or vgg7-nobn (with a factor on its "
        "channels as in vgg7-x0.5), a torchvision classifier, or package.module:factory.",
    )

    bit_mix: Annotated[str, Allowed(_MIX)] = Field(
        "8:0.5,32:0.5", description="Shares of the simulated clients by bit-width."
    )
    low_bit_training: LowBitTraining = Field(
        "qat",
        description="qat: float latent weights; strict: weights never leave their grid; integer: "
        "WAGE's, for a model of its layers, as vgg7: weights on the client's grid that compute as "
        "ternary ones, with activations and output gradients of at most 8 bits.",
    )
    integer_learning_rate: Positive = Field(
        8.0,
        description="Step size of integer low-bit clients in the first round, as WAGE's eta: by "
        "how many 128ths a layer's largest gradient moves its weight, within a factor of 1.42. "
        "learning-rate and momentum are of Float32 clients then.",
    )
    weight_step: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Fixed-point weights: one step for all layers of strict low-bit clients, as "
        "2**-6; 0: each channel's own, fitted to it.",
    )
    activation_bits: WidthOrNone = Field(
        0,
        description="Width of the activations of low-bit clients; 0: the client's, in integer "
        "training 8 at most; 32: float32.",
    )
    gradient_bits: WidthOrNone = Field(
        0,
        description="Width of output gradients and, in strict training, weight gradients; "
        "0: 8 in strict and 32 in qat training; in integer training the client's and at most 8.",
    )
    upload: Literal["auto", "forward", "dithered", "stored"] = Field(
        "auto",
        description="What low-bit clients send of the weights that they trained: those that they "
        "compute with, rounded to nearest (forward) or stochastically under a seed that the server "
        "knows (dithered), or those that they hold (stored): in qat training float32, in integer "
        "training of the client's width, in strict training the same; a difference is taken of "
        "these, also by prowd of those of qat training. auto: stored for fedpaq, fedcom, "
        "fedcomgate and for prowd in qat training, dithered for prowd in integer training and, "
        "with secure aggregation, in qat, forward for all others.",
    )
    broadcast: Literal["auto", "float32", "nearest", "calibrated"] = Field(
        "auto",
        description="How low-bit clients get and use the model: in float32, which they round to "
        "nearest, or as codes of their own width, rounded by the server to nearest or by GPTQ "
        "on its buffer; auto: calibrated for prowd in strict training, float32 for all others.",
    )
    calibrate_normalization: bool = Field(
        True, description="Recalibrate BatchNorm statistics per width on the server's buffer."
    )
    evaluate_every: AtLeastOne = Field(
        1, description="Rounds between evaluations; the last round is always evaluated."
    )
    server_buffer: Count = Field(
        256, description="Training images held back for the server, without their labels."
    )

    validation_samples: Count = Field(
        0,
        description="Training examples held out to evaluate on instead of the test set, to choose "
        "settings by; 0: the test set.",
    )

    seed: Count = Field(0, lt=2**63, description="Seeds everything.")
    client_threads: Threads = Field(1, description="Threads of a client; changes the last bits.")
    server_threads: Threads = Field(1, description="Threads of the server; changes the last bits.")
    server_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where the server evaluates, rounds and distils: auto is the GPU where there "
        "is one. Clients compute on the GPU that Flower gives them, as with the federation's "
        "client-resources-num-gpus=0.1, or that their machine has.",
    )
    output_dir: AbsolutePath = Field(
        "~/prowd-runs", description="Where run records go; absolute or ~."
    )
    run_name: Annotated[str, Allowed(_NAME)] = Field(
        "", description="Folder of this run's record; empty: strategy, data and time."
    )
    resume: AbsolutePath = Field(
        "",
        description="Folder of a run to resume from its last checkpoint; absolute or ~. All "
        "settings that decide the result must be that run's. Empty: a new run.",
    )

    @field_validator("bit_mix")
    @classmethod
    def _mix_is_valid(cls, value: str) -> str:
        parse_mix(value)
        return value

    @field_validator("norm_bound")
    @classmethod
    def _bound_spares_the_usual(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(f"allowed are {_BOUND}")
        return value

    @field_validator("strategy_options", "task_options")
    @classmethod
    def _options_parse(cls, value: str) -> str:
        parse_assignments(value)
        return value

    @field_validator("output_dir", "data_dir", "partition_file", "resume")
    @classmethod
    def _path_is_absolute(cls, value: str) -> str:
        # The app runs from a copy, in the SuperLink's working directory, not in the user's.
        if "\0" in value:
            raise ValueError("a path cannot hold a NUL")
        if not is_utf8(value):
            raise ValueError("the path must be in UTF-8, as all settings are")
        if value and not os.path.isabs(os.path.expanduser(value)):
            if value.startswith("~"):
                user = value.split(os.sep)[0]
                raise ValueError(
                    f"no home folder is known for {user}; the path must be absolute or begin with "
                    "~ and a home that is known"
                )
            raise ValueError("the path must be absolute or begin with ~")
        return value

    @field_validator("run_name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if value and not (
            re.fullmatch(r"[A-Za-z0-9][\w.+=-]*", value) and len(value.encode()) <= 200
        ):
            raise ValueError(_NAME)
        return value

    @model_validator(mode="after")
    def _calibration_has_data(self) -> "Settings":
        if self.calibrate_normalization and self.server_buffer < 2:
            raise SettingsError(
                f"server-buffer: {self.server_buffer} leaves too few images for "
                "calibrate-normalization; allowed: 2 or more, or calibrate-normalization=false"
            )
        return self

    @model_validator(mode="after")
    def _file_has_its_partitioner(self) -> "Settings":
        if (self.partitioner == "file") != bool(self.partition_file):
            raise SettingsError(
                f"partition-file: {self.partition_file!r} with partitioner {self.partitioner}; "
                "allowed: a file with partitioner=file, none with the others"
            )
        return self

    @model_validator(mode="after")
    def _fixed_point_is_strict(self) -> "Settings":
        if self.weight_step and self.low_bit_training != "strict":
            raise SettingsError(
                f"weight-step: {self.weight_step:g} with low-bit-training {self.low_bit_training}; "
                "allowed: strict, as qat fits its grid to the trained weights, and integer has one "
                "of its own"
            )
        return self

    @model_validator(mode="after")
    def _integer_goes_together(self) -> "Settings":
        if self.low_bit_training != "integer":
            return self
        if self.broadcast == "calibrated":
            raise SettingsError(
                "broadcast: calibrated with low-bit-training integer; allowed: auto, float32 and "
                "nearest, as it rounds for layers that compute with their stored weights"
            )
        if self.optimizer != "sgd":
            raise SettingsError(
                f"optimizer: {self.optimizer} with low-bit-training integer; allowed: sgd, to "
                "whose steps its gradients are scaled"
            )
        if self.weight_decay:
            raise SettingsError(
                f"weight-decay: {self.weight_decay:g} with low-bit-training integer; allowed: 0, "
                "as its steps have the gradient's direction and no size to add a decay to"
            )
        return self

    @model_validator(mode="after")
    def _privacy_goes_together(self) -> "Settings":
        if bool(self.dp_clip) != bool(self.dp_noise_multiplier or self.dp_epsilon):
            raise SettingsError(
                f"dp-clip: {self.dp_clip:g} with dp-noise-multiplier {self.dp_noise_multiplier:g} "
                f"and dp-epsilon {self.dp_epsilon:g}; allowed: 0 of all, or a clip and one of them"
            )
        if self.is_private and self.weighting != "uniform":
            raise SettingsError(
                f"weighting: {self.weighting} with dp-clip {self.dp_clip:g}; allowed: uniform, as "
                "the noise hides one device that counts as much as each other"
            )
        return self

    @classmethod
    def keys(cls) -> set[str]:
        """Return the keys of the common settings."""
        return {str(field.alias) for field in cls.model_fields.values()}

    @classmethod
    def of_run(cls, run_config: Mapping[str, object]) -> "Settings":
        """Read the common settings from a run's configuration; strategies' own are left alone."""
        known = cls.keys()
        return cls.read({key: value for key, value in run_config.items() if key in known})

    @property
    def is_private(self) -> bool:
        """Whether the run has differential privacy."""
        return self.dp_clip > 0

    @property
    def data_name(self) -> str:
        """What the data is called in the names of runs."""
        return self.dataset if self.task == "images" else self.task

    @property
    def model_name(self) -> str:
        """What the model is called in errors and files."""
        return self.model if self.task == "images" else f"{self.task}.model"

    @property
    def mix(self) -> dict[int, float]:
        """Shares of the simulated clients by bit-width."""
        return parse_mix(self.bit_mix)

    def activation_bits_of(self, bits: int) -> int:
        """Width of a client's activations."""
        return self.activation_bits or self._integer_bits(bits) or bits

    def gradient_bits_of(self, bits: int) -> int:
        """Width of a low-bit client's gradients."""
        own = 8 if self.low_bit_training == "strict" else FLOAT_BITS
        return self.gradient_bits or self._integer_bits(bits) or own

    def _integer_bits(self, bits: int) -> int:
        """Width of what a low-bit client computes with in integer training; 0 in any other."""
        if self.low_bit_training != "integer" or bits == FLOAT_BITS:
            return 0
        return min(bits, _WAGE_BITS)
