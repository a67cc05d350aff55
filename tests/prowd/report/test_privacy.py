"""How a run kept its devices private stands in the table of runs."""

from run_records import entry, write_run

from prowd.records import read_record
from prowd.report.tables import runs_table
from server_app.record import RunRecord


def test_the_last_epsilon_and_secure_aggregation_are_shown_of_the_runs_that_have_them(tmp_path):
    plain = write_run(tmp_path / "plain", "fedavg", 0, rounds=1)
    record = RunRecord(tmp_path / "private")
    record.write_config({"strategy": "fedavg", "seed": 0})
    for number, epsilon in ((1, 2.0), (2, 2.9176)):
        line = entry("fedavg", number, 0.5, 0, {}, left_out={})
        line["privacy"] = {"epsilon": epsilon, "delta": 1e-5, "noise_multiplier": 2.0}
        line["secure"] = {"4": {"devices": 3, "code-bits": 0, "float-bits": 23}}
        record.append_round(line)
    record.write_summary("completed")
    record.close()
    records = [read_record(folder) for folder in (plain, tmp_path / "private")]
    assert records[1].summary.privacy["epsilon"] == 2.9176
    table = runs_table(records, [])
    said = "secure aggregation, epsilon 2.92 at delta 1e-05"
    assert table.head[-1] == "privacy"
    assert [row[-1] for row in table.rows] == ["none", said]
    assert "privacy" not in runs_table(records[:1], []).head
