"""Files are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataparams.report.files import check_writable, replacing, write_json


def test_success_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def _write_half(path: Path, error: type[BaseException]) -> None:
    path.write_text("half of the n")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_writer_keeps_the_old_file_and_no_half_of_the_new(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as beside:
        _write_half(beside, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_turns_nan_into_null(tmp_path):
    write_json({"a": float("nan"), "b": 1.5, "c": "x"}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": None, "b": 1.5, "c": "x"}


def test_what_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file.x .*hydra\.run\.dir"):
        check_writable(tmp_path / "file" / "x")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
