"""Code of the user's own through `flwr run`: sent with the app, and on the PYTHONPATH."""

import shutil

import pytest
from documents import PROJECT, section

from core.reference import PACKAGES


@pytest.mark.deployment
def test_a_model_sent_with_the_app_and_a_strategy_on_the_pythonpath(flower, tmp_path):
    app = tmp_path / "prowd"
    for folder in PACKAGES:
        shutil.copytree(PROJECT / folder, app / folder)
    pyproject = (PROJECT / "pyproject.toml").read_text()
    added = pyproject.replace("fab-include = [", 'fab-include = [\n"my_package/**/*.py",')
    (app / "pyproject.toml").write_text(added)
    for name in ("LICENSE", "README.md"):
        shutil.copy(PROJECT / name, app)
    page = "bring-your-own.md"
    section(page, "A model").write(app)
    section(page, "A strategy").write(flower.modules)
    (flower.modules / "my_package").rename(flower.modules / "elsewhere")

    run = flower.run(
        "own",
        app=app,
        model="my_package.models:small_net",
        strategy="elsewhere.strategies:BitWeighted",
        strategy_options="power = 0.5",
        num_server_rounds=2,
    )
    assert run.status == "finished:completed", run.output
    assert run.rounds[-1]["clients"] == {"sampled": 2, "aggregated": 2, "rejected": 0, "failed": 0}
    assert run.summary["accuracy"]["final"]["average"] >= 0.6
    assert (run.folder / "model.safetensors").stat().st_size < 20_000  # resnet8: 310,000.
