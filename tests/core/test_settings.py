import os
import pwd
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from core.errors import SettingsError
from core.settings import Dataset, Settings


def message_of(values, prefix=""):
    with pytest.raises(SettingsError) as caught:
        Settings.read(values, prefix)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# Key, value as Flower would pass it, and what the message must say is allowed.
WRONG = [
    ("num-server-rounds", 0, "greater than or equal to 1"),
    ("num-server-rounds", -3, "greater than or equal to 1"),
    ("num-server-rounds", True, "integer"),
    ("num-server-rounds", 2.0, "integer"),
    ("num-server-rounds", "8", "integer"),
    ("fraction-train", 0.0, "greater than 0"),
    ("fraction-train", 1.01, "less than or equal to 1"),
    ("fraction-train", False, "number"),
    ("round-timeout", 0, "greater than 0"),
    ("round-timeout", float("inf"), "finite"),
    ("fraction-evaluate", -0.1, "greater than or equal to 0"),
    ("fraction-evaluate", 1.1, "less than or equal to 1"),
    ("evaluate-every", 0, "greater than or equal to 1"),
    ("min-nodes", 0, "greater than or equal to 1"),
    ("node-wait", -1.0, "greater than 0"),
    ("local-epochs", 0, "greater than or equal to 1"),
    ("batch-size", 0, "greater than or equal to 1"),
    ("batch-size", True, "integer"),
    ("learning-rate", "oops", "number"),
    ("learning-rate", "0.1", "number"),
    ("learning-rate", 0.0, "greater than 0"),
    ("learning-rate", -0.1, "greater than 0"),
    ("learning-rate", float("nan"), "finite"),
    ("learning-rate", True, "number"),
    ("learning-rate-decay", 1.5, "less than or equal to 1"),
    ("learning-rate-decay", 0.0, "greater than 0"),
    ("momentum", 1.0, "less than 1"),
    ("momentum", -0.1, "greater than or equal to 0"),
    ("momentum", float("nan"), "finite"),
    ("weight-decay", -1e-4, "greater than or equal to 0"),
    ("dataset", "imagenet", "'digits', 'fashion-mnist', 'cifar10', 'cifar100' or 'image-folder'"),
    ("dataset", "Digits", "'digits'"),
    ("dataset", 1, "'digits'"),
    ("data-dir", "data", "absolute or begin with ~"),
    ("data-dir", 0, "string"),
    ("image-size", -1, "greater than or equal to 0"),
    ("image-size", 1025, "less than or equal to 1024"),
    ("samples-per-client", -1, "greater than or equal to 0"),
    ("partitioner", "shards", "'iid', 'dirichlet' or 'file'"),
    ("dirichlet-alpha", 0.0, "greater than 0"),
    ("model", 8, "string"),
    ("bit-mix", 8, "string"),
    ("low-bit-training", "ptq", "'qat', 'strict' or 'integer'"),
    ("activation-bits", 1, "0, 2 to 16, and 32"),
    ("activation-bits", 17, "0, 2 to 16, and 32"),
    ("activation-bits", -8, "0, 2 to 16, and 32"),
    ("gradient-bits", 33, "0, 2 to 16, and 32"),
    ("gradient-bits", 8.0, "integer"),
    ("calibrate-normalization", 1, "boolean"),
    ("calibrate-normalization", "true", "boolean"),
    ("server-buffer", -1, "greater than or equal to 0"),
    ("server-buffer", "256", "integer"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", True, "integer"),
    ("seed", 0.0, "integer"),
    ("client-threads", 0, "greater than or equal to 1"),
    ("server-threads", 0, "greater than or equal to 1"),
    ("norm-bound", 0.5, "0, and 1 or more"),
    ("norm-bound", -1.0, "greater than or equal to 0"),
    ("resume", "runs/x", "absolute or begin with ~"),
    ("output-dir", "runs", "absolute or begin with ~"),
    ("output-dir", "./runs", "absolute or begin with ~"),
    ("output-dir", "../runs", "absolute or begin with ~"),
    ("output-dir", "runs\nmore", "absolute or begin with ~"),
    ("run-name", "../x", "letters, digits"),
    ("run-name", "..", "letters, digits"),
    ("run-name", "/tmp/x", "letters, digits"),
    ("run-name", "a/b", "letters, digits"),
    ("run-name", "a\n", "letters, digits"),
    ("run-name", ".hidden", "letters, digits"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG)
def test_wrong_value_is_one_line_with_key_value_and_what_is_allowed(key, value, allowed):
    message = message_of({key: value})
    assert message.startswith(f"{key}: ")
    assert repr(value) in message
    assert allowed in message


PATHS = ["output-dir", "data-dir", "resume", "partition-file"]


@pytest.mark.parametrize("key", PATHS)
def test_home_of_an_unknown_user_is_refused(key):
    message = message_of({key: "~no-such-user-here/runs"})
    assert message.startswith(f"{key}: '~no-such-user-here/runs' is not allowed: ")
    assert "no home folder is known for ~no-such-user-here; the path must be absolute" in message


@pytest.mark.parametrize("key", PATHS)
def test_unknown_home_is_told(monkeypatch, key):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert "no home folder is known for ~; the path must be absolute" in message_of({key: "~/x"})


@pytest.mark.parametrize("key", PATHS)
def test_path_with_a_nul_is_refused(key):
    message = message_of({key: "/tmp/a\0b"})
    assert message.startswith(f"{key}: '/tmp/a\\x00b' is not allowed: ")
    assert "a path cannot hold a NUL" in message


@pytest.mark.parametrize("bits", [-8, 0, 1, 17, 31, 33, 64])
def test_bit_mix_refuses_widths_off_the_grid(bits):
    message = message_of({"bit-mix": f"{bits}:0.5,32:0.5"})
    assert message == f"bit-mix: {bits} is not a bit-width; allowed: 2 to 16, or 32"


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ("8:0.5,32:0.4", "add up to 0.9, not to 1"),
        ("8:0.5,32:0.6", "add up to 1.1, not to 1"),
        ("8:0.5", "add up to 0.5, not to 1"),
        ("8:0,32:1", "share 0 of width 8; allowed: above 0 to 1"),
        ("8:-0.5,32:1.5", "share -0.5 of width 8; allowed: above 0 to 1"),
        ("8:nan,32:0.5", "share nan of width 8; allowed: above 0 to 1"),
        ("8:inf", "share inf of width 8; allowed: above 0 to 1"),
        ("8:0.5,8:0.5", "width 8 stands twice in '8:0.5,8:0.5'"),
        ("", "'' in '' is not bits:share, as in 8:0.5"),
        ("8", "'8' in '8' is not bits:share, as in 8:0.5"),
        ("8:0.5,", "'' in '8:0.5,' is not bits:share"),
        ("8:0.5 32:0.5", "'8:0.5 32:0.5' in"),
        ("8.0:1", "'8.0:1' in '8.0:1' is not bits:share"),
        ("8:half,32:half", "'8:half' in"),
        ("8:1\n,x", "is not bits:share"),
    ],
)
def test_wrong_bit_mix_is_one_line_that_says_why(mix, said):
    message = message_of({"bit-mix": mix})
    assert message.startswith("bit-mix: ")
    assert said in message


def test_unknown_key_is_named():
    assert message_of({"learning-rat": 0.1}) == "learning-rat: there is no such setting (value 0.1)"


def test_two_wrong_values_are_both_named_with_the_prefix():
    message = message_of({"seed": -1, "momentum": 2.0}, prefix="common-")
    assert "common-seed: -1 " in message
    assert "common-momentum: 2.0 " in message


def test_calibration_without_a_buffer_is_refused():
    message = message_of({"server-buffer": 0})
    assert message.startswith("server-buffer: 0 ")
    assert "calibrate-normalization=false" in message
    assert Settings.read({"server-buffer": 0, "calibrate-normalization": False}).server_buffer == 0


def test_defaults_are_valid_and_survive_a_round_trip():
    settings = Settings.read({})
    assert settings.mix == {8: 0.5, 32: 0.5}
    assert settings.num_server_rounds == 8
    assert (settings.dataset, settings.model) == ("digits", "resnet8")
    values = settings.to_settings()
    # Flower's run configuration holds these types only.
    assert {type(value) for value in values.values()} <= {bool, int, float, str}
    assert all("_" not in key for key in values)
    assert Settings.read(values) == settings


def test_prefix_is_put_before_every_key():
    plain = Settings().to_settings()
    assert Settings().to_settings("x-") == {"x-" + key: value for key, value in plain.items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning-rate", 1),  # TOML writes 1 where a float is meant.
        ("fraction-train", 1),
        ("momentum", 0),
        ("image-size", 1024),
        ("activation-bits", 2),
        ("activation-bits", 16),
        ("gradient-bits", 32),
        ("output-dir", "~"),
        ("output-dir", os.sep),
        ("data-dir", "~/data"),
        ("data-dir", ""),
        ("run-name", "a.b-c_d=1+2"),
        ("bit-mix", " 2:0.25, 4:0.25 ,16:0.25,32:0.25"),
        *[("dataset", name) for name in get_args(Dataset)],
    ],
)
def test_edge_of_what_is_allowed_is_taken_as_it_is(key, value):
    assert Settings.read({key: value}).to_settings()[key] == value


def test_settings_are_frozen():
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1
    assert settings.seed == 0


@pytest.mark.parametrize(
    ("given", "bits", "used"), [(0, 4, 4), (0, 32, 32), (8, 4, 8), (32, 4, 32)]
)
def test_activation_bits_are_the_clients_unless_set(given, bits, used):
    assert Settings(activation_bits=given).activation_bits_of(bits) == used


@pytest.mark.parametrize(
    ("given", "training", "used"),
    [(0, "strict", 8), (0, "qat", 32), (4, "strict", 4), (4, "qat", 4), (32, "strict", 32)],
)
def test_gradient_bits_default_to_8_strict_and_32_qat(given, training, used):
    settings = Settings(gradient_bits=given, low_bit_training=training)
    assert settings.gradient_bits_of(4) == used


@pytest.mark.parametrize(
    ("given", "bits", "used"), [(0, 8, 8), (0, 6, 6), (0, 16, 8), (0, 32, 32), (4, 16, 4)]
)
def test_integer_training_computes_with_eight_bits_at_most(given, bits, used):
    given = {"activation_bits": given, "gradient_bits": given}
    settings = Settings(low_bit_training="integer", **given)
    assert settings.activation_bits_of(bits) == settings.gradient_bits_of(bits) == used


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"broadcast": "calibrated"}, "broadcast: calibrated with low-bit-training integer; "),
        ({"weight_decay": 0.1}, "weight-decay: 0.1 with low-bit-training integer; allowed: 0"),
        ({"weight_step": 0.5}, "weight-step: 0.5 with low-bit-training integer; allowed: strict"),
    ],
)
def test_what_does_not_go_with_integer_training_is_refused(settings, said):
    with pytest.raises(SettingsError, match=said):
        Settings(low_bit_training="integer", **settings)


def test_keys_of_a_run_are_read_and_the_strategies_own_left_alone():
    # "local" is a strategy and "local-epochs" a common setting.
    run_config = {"seed": 3, "local-epochs": 2, "prowd-reference": "global", "fedcom-bits": 4}
    assert Settings.of_run(run_config) == Settings(seed=3, local_epochs=2)
    with pytest.raises(SettingsError, match="seed: -1 is not allowed"):
        Settings.of_run({"seed": -1, "prowd-reference": 5})


def test_keys_are_those_of_the_settings():
    assert Settings.keys() == set(Settings().to_settings())
    assert {"seed", "num-server-rounds", "bit-mix"} <= Settings.keys()


def test_defaults_are_those_of_pyproject():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    config = tomllib.loads(pyproject.read_text())["tool"]["flwr"]["app"]["config"]
    defaults = Settings().to_settings()
    written = {key: value for key, value in config.items() if key in defaults}
    assert written == defaults
    # True is 1 and 1 is 1.0, but Flower keeps the type that stands in the file.
    assert {k: type(v) for k, v in written.items()} == {k: type(v) for k, v in defaults.items()}
