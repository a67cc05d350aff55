"""The measurement of rounded gradients, on one layer whose gradients are known in closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.gradients import Backward, Squares, measure, table, to_nearest
from quant import QuantConfig, prepare
from task.data.dataset import Images
from task.data.to_input import to_input


@pytest.fixture
def one_layer():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = prepare(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), QuantConfig(8))
    images = Images(rng.integers(0, 256, (20, 1, 2, 2)).astype(np.uint8), np.arange(20) % 3)
    return model, images


def expected(model, images, index):
    """Input, and (softmax - one-hot) / n: the gradient of mean cross-entropy at the logits."""
    x = to_input(images.pixels[index]).flatten(1)
    output = model[1](x).detach().softmax(1)
    output[torch.arange(len(index)), torch.from_numpy(images.labels[index])] -= 1
    return x, output / len(index)


def test_to_nearest_by_hand():
    # 3 bits: step 6 / 3 = 2; -1.2 / 2 rounds to -1, 0.9 / 2 to 0, 3.1 / 2 to 2.
    assert to_nearest(torch.tensor([6.0, -1.2, 0.9, 3.1]), 3).tolist() == [6, -2, 0, 4]
    assert to_nearest(torch.zeros(2), 3).tolist() == [0, 0]


def test_a_layers_gradients_are_those_of_the_closed_form(one_layer):
    index = np.arange(12)
    x, output = expected(*one_layer, index)
    backward = Backward(*one_layer, index)
    exact = backward.weight_gradients()
    torch.testing.assert_close(exact["1.weight"], output.T @ x)
    torch.testing.assert_close(backward.outputs["1.weight"], output)
    # Rounded twice: what enters the product, and the product.
    rounded = backward.weight_gradients(lambda gradient: to_nearest(gradient, 3))
    product = to_nearest(to_nearest(output, 3).T @ x, 3)
    torch.testing.assert_close(rounded["1.weight"], product)
    torch.testing.assert_close(backward.weight_gradients(), exact, rtol=0, atol=0)


def test_what_is_measured(one_layer):
    index = np.arange(12)
    x, output = expected(*one_layer, index)
    sums: dict[str, Squares] = {}
    measure(Backward(*one_layer, index), 3, 400, sums)
    found = sums["1.weight"]
    weight, near = output.T @ x, to_nearest(output, 3)
    assert found.values == 36
    assert found.zeros == 0
    assert found.zeros_nearest == int((near == 0).sum()) > 0
    assert found.exact == pytest.approx(float(weight.square().sum()), rel=1e-5)
    assert found.output == pytest.approx(float(output.square().sum()), rel=1e-5)
    assert found.output_nearest == pytest.approx(float((near - output).square().sum()), rel=1e-5)
    off = to_nearest(near.T @ x, 3) - weight
    assert found.nearest == pytest.approx(float(off.square().sum()), rel=1e-5)
    # No bias: what is left of it is chance, |noise|^2 / 400 in either direction.
    assert abs(found.bias) < 0.02 * found.draw


def test_the_last_row_is_of_all_layers():
    one = Squares(exact=100.0, nearest=1.0, draw=4.0, output=1.0, values=10.0, zeros_nearest=5.0)
    other = Squares(exact=300.0, nearest=35.0, draw=0.0, output=1.0, values=30.0)
    last = table({"a": one, "b": other}).splitlines()[-1]
    # Square roots of 36 / 400 and 4 / 400.
    assert last == "| all | 0.0 | 12.5 | 0.0 | 0.0 | 0.0 | 30.0 | 10.0 | 0.0 |"
