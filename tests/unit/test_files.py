"""Files that appear when they are whole, and the Chrome trace format."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest

from elmoe.chrome_trace import Span, write_chrome_trace
from elmoe.errors import ElmoeError, HardwareError, RequestError, TraceError
from elmoe.files import PartialFile, check_new_folder, check_output, json_text, whole_file, write_whole


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


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/real")
    for content in (b"new", b"newer"):
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "real").read_bytes() == content
    assert names(tmp_path / "there") == ["real"]


def test_a_pipe_is_written_through(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    check_output(pipe)
    write_whole(pipe, b"content")
    reader.join(120)
    assert got == [b"content"] and stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_a_file_of_the_users_that_is_called_partial_is_left_alone(tmp_path):
    (tmp_path / "a.partial").write_text("mine")
    write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a.partial").read_text() == "mine" and names(tmp_path) == ["a", "a.partial"]


def test_a_name_as_long_as_the_system_allows_is_written_and_permissions_are_kept(tmp_path):
    path = tmp_path / ("n" * 255)
    check_output(path)
    write_whole(path, b"x")
    path.chmod(0o600)
    write_whole(path, b"y")
    assert path.read_bytes() == b"y" and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_output_that_exists_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "r.json"
    check_output(path, what="result")
    path.write_text("old")
    with pytest.raises(RequestError, match=r"result .* exists already") as caught:
        check_output(path, what="result")
    assert "--force" in str(caught.value.hint)
    check_output(path, force=True)
    assert path.read_text() == "old" and names(tmp_path) == ["r.json"]
    check_output(None)


def test_an_output_that_cannot_be_written_is_told_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("no/a", "file/a", "", "x" * 256, "loop", "a\0b"):
        with pytest.raises(RequestError, match="cannot write") as caught:
            check_output(tmp_path / path)
        assert caught.value.hint
    with pytest.raises(RequestError, match="cannot write"):
        check_output("/proc/elmoe")
    check_output(tmp_path / "new" / "deep" / "a", folders=True)
    with pytest.raises(RequestError, match="cannot write"):
        check_output(tmp_path / "file" / "deep" / "a", folders=True)


def test_a_new_folder_that_cannot_be_made_is_told_before_work(tmp_path):
    check_new_folder(tmp_path / "new" / "store", "store")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.partial").write_text("")
    for path in (tmp_path / "link", tmp_path / "file" / "store", tmp_path / "taken", "/proc/elmoe-store"):
        with pytest.raises(RequestError, match="cannot write store"):
            check_new_folder(path, "store")
    (tmp_path / "begun.partial").mkdir()
    check_new_folder(tmp_path / "begun", "store")
    assert names(tmp_path) == ["begun.partial", "file", "link", "taken.partial"]


def test_json_is_strict():
    data = {"a": [float("inf"), float("nan"), 1.5], "b": (1, "x", None, True)}
    assert json.loads(json_text(data)) == {"a": [None, None, 1.5], "b": [1, "x", None, True]}
    assert "Infinity" not in json_text(data) and "NaN" not in json_text(data, indent=1)
