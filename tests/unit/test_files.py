"""Files that appear when they are whole, and the Chrome trace format."""

from __future__ import annotations

import json

import pytest

from elmoe.chrome_trace import Span, write_chrome_trace
from elmoe.errors import ElmoeError, HardwareError, TraceError
from elmoe.files import PartialFile, whole_file, write_whole


def names(folder):
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, sync):
    (tmp_path / "a").write_text("old")
    with whole_file(tmp_path / "a", TraceError, sync=sync) as partial:
        partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


def test_an_error_in_the_block_leaves_nothing_and_is_not_disguised(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a", TraceError) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_a_refusal_of_the_system_is_the_callers_error_with_its_hint(tmp_path):
    expected = pytest.raises(TraceError, match=r"cannot write '.*a': No space left")
    with expected as caught, whole_file(tmp_path / "a", TraceError, "free some disk") as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert caught.value.hint == "free some disk" and names(tmp_path) == []


def test_folders_are_made_only_where_asked(tmp_path):
    with pytest.raises(TraceError, match="No such file"), whole_file(tmp_path / "no" / "a", TraceError) as partial:
        partial.write_text("x")
    assert names(tmp_path) == []
    write_whole(tmp_path / "new" / "folder" / "a", b"x")
    assert (tmp_path / "new" / "folder" / "a").read_bytes() == b"x"
    (tmp_path / "file").write_text("")
    with pytest.raises(HardwareError, match="cannot write"):
        write_whole(tmp_path / "file" / "a", b"x")


def test_a_partial_file_that_is_not_finished_can_be_discarded(tmp_path):
    file = PartialFile(tmp_path / "a")
    file.discard()  # nothing there yet
    file.partial.write_text("half")
    file.discard()
    assert names(tmp_path) == []


def test_a_chrome_trace_names_its_tracks_and_counts_microseconds_from_the_first_span(tmp_path):
    spans = [Span("work", "b", 12.5, 13.0), Span("main", "a", 12.0, 12.25)]
    write_chrome_trace(spans, tmp_path / "t", lambda track: track != "work")
    events = json.loads((tmp_path / "t").read_text())["traceEvents"]
    assert [(e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"] == [(0, "work"), (1, "main")]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        (0, "b", 0.5e6, 0.5e6),
        (1, "a", 0.0, 0.25e6),
    ]
    with pytest.raises(ElmoeError, match="cannot write"):
        write_chrome_trace(spans, tmp_path)
