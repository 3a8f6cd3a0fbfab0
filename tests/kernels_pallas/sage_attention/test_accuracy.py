"""The accuracy report that the README quotes."""

import numpy as np

from kernels_pallas.accuracy import errors, main


def test_errors_are_within_the_documented_budget():
    measured = errors(200, 64, key_bias=8.0, is_causal=True)
    assert np.all(np.array(measured["int8"]) <= [0.026, 0.065, 0.065, 0.065])
    assert np.all(np.array(measured["int8"]) >= 0.005)  # it did compare INT8 with something else
    assert np.all(np.array(measured["bf16"]) <= 0.05)


def test_the_report_is_a_markdown_table(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["accuracy", "--tokens", "64", "--head-dim", "16", "--key-bias", "0"]
    )
    main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| 64 | 16 | 0 | 0.0")
