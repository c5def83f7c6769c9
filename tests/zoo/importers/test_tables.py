"""Tables beside a zoo."""

from __future__ import annotations

from pathlib import Path

import pytest

from wslfast import WslfastError
from wslfast.zoo.importers.tables import read_table


def test_numbers_of_a_table_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes('\ufefffile\ta\tb\tc\td\r\nx.pt\t3\t-0.5e-3\tnan\t"two\twords"\r\n\r\ny.pt\t1_0\t\tTrue\r\n'.encode())
    first = {"file": "x.pt", "a": 3, "b": -0.0005, "c": None, "d": "two\twords"}
    assert read_table(tmp_path / "t.tsv") == [first, {"file": "y.pt", "a": "1_0", "b": None, "c": "True"}]
    for text, says in ((b"", "empty"), (b"a,a\n1,2", "twice"), (b"a,b\n1,2,3", "expected 2 columns"), (b"a\xff\n", "cannot be read")):
        (tmp_path / "bad.csv").write_bytes(text)
        with pytest.raises(WslfastError, match=says):
            read_table(tmp_path / "bad.csv")
