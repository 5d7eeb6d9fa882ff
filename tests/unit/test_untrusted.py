"""JSON and YAML of others: read as written, or refused with file, line and path; never a traceback, never a hang."""

from __future__ import annotations

import time

import msgspec
import pytest

from elmoe.errors import HardwareError, TraceError
from elmoe.untrusted import decode_json, load_json, load_object, load_yaml, read_bytes, read_text, short


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    count: int


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    parts: list[Inner]


def of_yaml(text: str) -> object:
    return load_yaml(text, "mine.yaml", HardwareError, "mend it").data


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: 100", {"a": 100}), ("a: -7", {"a": -7}), ("a: 1.5", {"a": 1.5}),
        ("a: .5", {"a": 0.5}), ("a: 1e3", {"a": 1000.0}),
        ("a: true", {"a": True}),
        ("a: False", {"a": False}), ("a: ~", {"a": None}), ("a:", {"a": None}),
        ("a: no", {"a": "no"}), ("yes: on", {"yes": "on"}),
        ("a: 2001-01-01", {"a": "2001-01-01"}), ("a: '0100'", {"a": "0100"}),
        ("a: \"1:40\"", {"a": "1:40"}), ("a: 102.4 GB/s", {"a": "102.4 GB/s"}), ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: >-\n  one\n  two", {"a": "one two"}), ("- 1\n- {b: 2}", [1, {"b": 2}]), ("a: =", {"a": "="}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_yaml_is_read_as_yaml_1_2_reads_it(text, data):
    assert of_yaml(text) == data


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is there twice, first in line 1"),
        ("m:\n  a: 1\n  a: 1", 3, "twice"),
        ("x: 1\na: 0100", 2, "'0100' is not a plain decimal number"),
        ("a: 1:40", 1, "'1:40'"),
        ("a: 1:30.5", 1, "'1:30.5'"),
        ("a: 0x10", 1, "'0x10'"),
        ("a: 0b1", 1, "'0b1'"),
        ("a: 1_000", 1, "'1_000'"),
        ("a: " + "9" * 5000, 1, "not a plain decimal number"),
        ("a: .nan", 1, "finite"),
        ("a: -.inf", 1, "finite"),
        ("a: 1e400", 1, "finite"),
        ("a: 1.0e+400", 1, "finite"),
        ("a: 01.5", 1, "finite"),
        ("a: !!bool maybe", 1, "tag 'bool'"),
        ("a: !!str 5", 1, "tag 'str'"),
        ("a: !!set {x}", 1, "tag 'set'"),
        ("a: !mine [1]", 1, "tag '!mine'"),
        ("a: !!python/object/apply:os.system ['true']", 1, "tag 'python"),
        ("<<: {a: 1}", 1, "not short plain text"),
        ("1: x", 1, "not short plain text"),
        ("[a]: x", 1, "not short plain text"),
        ("~: x", 1, "not short plain text"),
        ("k" * 300 + ": x", 1, "not short plain text"),
        ("a: &x [*x]", 1, "nested deeper"),
        ("a: [1", 1, "not YAML"),
        ("--- 1\n--- 2", 2, "another document"),
        ("a: *b", 1, "undefined alias"),
    ],
)
def test_yaml_that_programs_read_differently_is_refused_with_file_and_line(text, line, told):
    with pytest.raises(HardwareError, match=told) as caught:
        of_yaml(text)
    assert str(caught.value).startswith(f"'mine.yaml', line {line}") and caught.value.hint == "mend it"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, "{" * 100_000, "- " * 50_000 + "a", "- a\n" * 250_000, "a: " + "x" * (1 << 20), "\x00", "a: \ud800",
        "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
                  + [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, 9)]),
        "? " * 20_000, "&a " * 20_000, "!!a " * 10_000, "a:\n" + " b:\n" * 20_000,
    ],
    ids=["lists", "maps", "dashes", "many", "large", "null", "surrogate", "aliases", "keys", "anchors", "tags", "same"],
)  # fmt: skip
def test_hostile_yaml_is_refused_quickly(text):
    began = time.process_time()
    with pytest.raises(HardwareError, match=r"mine\.yaml"):
        of_yaml(text)
    assert time.process_time() - began < 20


def test_a_yaml_value_of_another_type_is_told_with_its_line_and_path():
    described = load_yaml("parts:\n- count: 1\n- count: x\n", "mine.yaml", HardwareError, "mend it")
    with pytest.raises(HardwareError, match=r"'mine\.yaml', line 3: .*\$\.parts\[1\]\.count"):
        described.convert(Outer, HardwareError, "mend it")
    described = load_yaml("parts:\n- count: 1\n- kount: 2\n", "mine.yaml", HardwareError, "mend it")
    with pytest.raises(HardwareError, match=r"line 3: .*unknown field `kount`"):
        described.convert(Outer, HardwareError, "mend it")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b"[" * 70 + b"]" * 70, "nested deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
        (b"9" * 5000, "5000 digits"),
        (b'"\\ud800"', "surrogates"),
        (b'{"\\ud800": 1}', "surrogates"),
        (b"\xff", "not text"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS pointer"),
    ],
)
def test_json_that_is_damaged_or_hostile_is_refused(raw, told):
    with pytest.raises(TraceError, match=rf"a\.json.*{told}"):
        load_json(raw, "a.json", TraceError, "mend it")


def test_json_numbers_that_are_not_finite_are_taken_only_where_configurations_hold_them():
    assert load_json(b"[Infinity]", "a.json", TraceError) == [float("inf")]
    for raw in (b"[NaN]", b"[-Infinity]", b"[1e999]"):
        with pytest.raises(TraceError, match="not JSON"):
            load_json(raw, "a.json", TraceError, non_finite=False)


def test_repeated_keys_of_a_models_configuration_are_read_as_python_reads_them():
    assert load_json(b'{"a": 1, "a": 2}', "a.json", TraceError, repeated_keys=True) == {"a": 2}


def test_a_typed_file_tells_the_path_in_it():
    class Kind(msgspec.Struct):
        count: int

    assert decode_json(b'{"count": 3}', "a.json", Kind, TraceError, "no kind").count == 3
    for raw in (b'{"count": "x"}', b"{}", b'{"count": 1e999}', b'{"count": ' + b"[" * 5000):
        with pytest.raises(TraceError, match=r"a\.json.*is no kind"):
            decode_json(raw, "a.json", Kind, TraceError, "no kind")
    with pytest.raises(TraceError, match="holds no JSON object"):
        load_object(b"[]", "a.json", TraceError)


def test_files_are_read_up_to_a_limit_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(path, TraceError, 6, "text") == "abc"
    with pytest.raises(TraceError, match="more than 5 bytes: it is no text"):
        read_bytes(path, TraceError, 5, "text")
    for missing in (tmp_path / "none", tmp_path, tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(TraceError, match="cannot read"):
            read_bytes(missing, TraceError, 5, "text")
    with pytest.raises(TraceError, match="more than"):
        read_bytes("/dev/zero", TraceError, 5, "text")


def test_text_in_messages_is_short_and_printable():
    assert short("a\n b\x1b[31m\ud800c" + "x" * 1000, 20) == "a b [31m cxxxxxxx..."
