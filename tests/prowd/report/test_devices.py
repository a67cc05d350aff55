"""The devices' own evaluation on the page: of real records, and by hand."""

import pytest
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from report_page import Page, read
from run_records import entry

from prowd.report.page import write_page
from server_app.app import main
from server_app.record import RunRecord

PART = "Evaluation on devices, all runs"


def page_of(folder):
    write_page(folder / "page.html", "T", read(folder))
    return Page((folder / "page.html").read_text())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run whose server has no test set, with two metrics beside the first."""
    folder = tmp_path_factory.mktemp("devices")
    config = {
        "task": "my_tasks:Density",
        "strategy": "fedavg",
        "num-server-rounds": 1,
        "batch-size": 8,
        "bit-mix": "8:0.75,32:0.25",
        "node-wait": 1.0,
        "output-dir": str(folder),
        "run-name": "run",
    }
    main(
        InProcessGrid({i: ClientAppNode(i, 4, config) for i in range(4)}),
        Context(1, 0, {}, RecordDict(), config),
    )
    return page_of(folder), read(folder)[0].rounds[-1].evaluated_by_clients


def test_the_page_shows_what_the_record_has_by_width(real):
    page, found = real
    head, *rows = page.tables[PART]
    assert head == ["system", "devices", "metric", "mean", "spread", "worst", "loss"]
    shown = {(row[1], row[2]): row[3:] for row in rows}
    for devices, width in (("8-bit", "8"), ("32-bit", "32"), ("all", "average")):
        first = [f"{found[f'{key}-{width}']:.2%}" for key in ("accuracy", "spread", "worst")]
        assert shown[devices, "first"] == [*first, f"{found[f'loss-{width}']:.4g}"]
        mean, spread, least, most = (
            f"{found[f'recall-1/{key}-{width}']:.4g}" for key in ("mean", "spread", "least", "most")
        )
        assert shown[devices, "recall-1"] == [mean, spread, f"{least} to {most}", ""]
    # Three devices differ; one has no spread.
    assert shown["8-bit", "first"][1] != "0.00%"
    assert shown["32-bit", "first"][1] == "0.00%"


def test_a_figure_of_each_width_says_mean_and_worst(real):
    page, found = real
    for width in ("8", "32"):
        text = page.figures[f"On {width}-bit devices, over rounds"]
        assert f"fedavg {100 * found[f'accuracy-{width}']:.4g}, " in text
        assert f"fedavg, worst {100 * found[f'worst-{width}']:.4g}." in text


def test_means_are_over_seeds(tmp_path):
    """Of 0.5 and 0.7 with spreads of 0.1 and 0.2 and worst devices of 0.4 and 0.5."""
    for seed, figures in enumerate([(0.5, 0.1, 0.4, 1.0), (0.7, 0.2, 0.5, 2.0)]):
        record = RunRecord(tmp_path / f"run-{seed}")
        record.write_config({"strategy": "fedavg", "seed": seed, "num-server-rounds": 1})
        names = ("accuracy-3", "spread-3", "worst-3", "loss-3")
        found = dict(zip(names, figures, strict=True))
        record.append_round(entry("fedavg", 1, 0.5, evaluated_by_clients=found))
        record.write_summary("completed")
        record.close()
    [_, row] = page_of(tmp_path).tables[PART]
    assert row == ["fedavg", "3-bit", "first", "60.00%", "15.00%", "45.00%", "1.5"]


def test_where_devices_did_not_evaluate_the_page_says_so(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_config({"strategy": "fedavg", "seed": 0, "num-server-rounds": 1})
    record.append_round(entry("fedavg", 1, 0.5))
    record.write_summary("completed")
    record.close()
    page = page_of(tmp_path)
    assert PART not in page.tables
    assert "Devices did not evaluate: they do where the server has no test set" in page.said
