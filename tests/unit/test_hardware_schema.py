"""Hardware descriptions: presets are complete and fair to the rivals, and what is wrong with a file is named."""

from __future__ import annotations

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from elmoe.errors import HardwareError, RequestError
from elmoe.schema.constants import Constant, Ratio, Seconds, described_text, load_described
from elmoe.schema.hardware import Hardware, PeArray, Processor, load_hardware, preset_names, preset_text, write_hardware
from elmoe.schema.rivals import variant_names

PAPER = ("xpu", "xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu", "elmoe3d_4gb", "elmoe3d_8gb")
BOXES = ("dgx_spark", "jetson_thor", "rtx_pro_6000", "ddr5_nvme")
# A source that says this is none: the constant must be marked as assumed.
SAID_BY_NOBODY = ("nobody", "no source")


def constants(data: object, where: str = "$") -> list[tuple[str, Constant]]:
    if isinstance(data, Constant):
        return [(where, data)]
    if isinstance(data, msgspec.Struct):
        return [pair for field in data.__struct_fields__ for pair in constants(getattr(data, field), f"{where}.{field}")]
    return []


def test_the_presets_are_these():
    assert set(preset_names()) == {*PAPER, *BOXES}


@pytest.mark.parametrize("name", (*preset_names(), *variant_names()))
def test_every_constant_has_a_source_a_status_and_a_range_around_it(name):
    hardware = load_hardware(name)
    assert hardware.name == name and len(hardware.description) > 20
    found = constants(hardware)
    assert len(found) >= 11
    for where, constant in found:
        assert len(constant.source) >= 10, where
        assert 0 < constant.low <= constant.value <= constant.high, where
        assert constant.status == "assumed" or not any(word in constant.source for word in SAID_BY_NOBODY), where


@pytest.mark.parametrize("name", (*preset_names(), *variant_names()))
def test_energies_and_power_that_are_assumed_can_be_swept(name):
    for where, constant in constants(load_hardware(name)):
        if constant.status == "assumed" and constant.dimension != "ratio" and constant.dimension != "capacity":
            assert constant.low < constant.high, where


@pytest.mark.parametrize("name", [name for name in PAPER if name != "elmoe3d_4gb"])
def test_every_rival_has_the_same_processor_and_main_memory(name):
    """Equal xPU compute: nothing but the fast memory, the near-memory compute and the features may differ."""
    rival, xpu = load_hardware(name), load_hardware("xpu")
    for field in ("main", "compute", "sram", "links", "vector", "static_share", "layer_overhead"):
        assert getattr(rival, field) == getattr(xpu, field), field
    text, shared = yaml.safe_load(preset_text(name)), yaml.safe_load(preset_text("xpu"))
    assert all(text[key] == shared[key] for key in ("main", "compute", "sram", "links", "vector", "static_share"))


def test_the_published_peaks():
    for name, tops, bandwidth in (("elmoe3d_8gb", 524e12, 1638.4e9), ("elmoe3d_4gb", 262e12, 819.2e9)):
        hardware = load_hardware(name)
        array = hardware.compute
        assert isinstance(array, PeArray) and hardware.fast is not None
        macs = array.elements.value * array.tokens.value * array.outputs.value * array.inputs.value
        assert 2 * macs * array.clock.value / 2 == pytest.approx(tops, rel=0.001)  # 2 operations, 2 passes of 4 bits
        assert hardware.fast.bandwidth.value == pytest.approx(bandwidth)
        assert (hardware.fast.energy.low, hardware.fast.energy.high) == pytest.approx((0.43e-12, 0.88e-12))


def test_features_and_near_memory_of_the_rivals():
    on = {name: {f for f in features.__struct_fields__ if getattr(features, f)} for name, features in (
        (name, load_hardware(name).features) for name in preset_names())}  # fmt: skip
    every = {"fast_dense", "expert_cache", "bit_slices", "parallel_tiers", "refill"}
    assert on["elmoe3d_8gb"] == on["elmoe3d_4gb"] == on["ddr5_nvme"] == every
    assert on["hb_xpu"] == {"fast_dense", "expert_cache", "refill"} and on["xpu_nmp"] == {"fast_dense", "expert_cache"}
    assert not on["xpu"] | on["xpu_pim"] | on["xpu_logicpim"] | on["dgx_spark"] | on["rtx_pro_6000"]
    external = load_hardware("xpu").main.bandwidth.value
    for name, times, intensity, placement in (("xpu_pim", 16, 1, "main"), ("xpu_logicpim", 4, 8, "main")):
        near = load_hardware(name).near
        assert near is not None and near.placement == placement
        assert near.bandwidth.value == pytest.approx(times * external) and near.intensity.value == intensity
    near = load_hardware("xpu_nmp").near
    assert near is not None and near.placement == "fast" and near.bandwidth.value == pytest.approx(32 * 51.2e9)


def test_keys_that_nothing_reads_are_refused_by_name(tmp_path):
    """Keys of older descriptions: what they said never changed a result."""
    path = tmp_path / "old.yaml"
    for old, new in (("links:\n", "links:\n  stream: {value: 1 GB/s, source: me, status: assumed}\n"),
                     ("refill: true", "refill: true, lsb_augmentation: true")):  # fmt: skip
        path.write_text(preset_text("elmoe3d_8gb").replace(old, new))
        with pytest.raises(HardwareError, match=r"old\.yaml.*(stream|lsb_augmentation)"):
            load_hardware(path)


def test_a_preset_saved_to_a_file_loads_the_same(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(preset_text("elmoe3d_8gb"))
    assert load_hardware(path) == load_hardware("elmoe3d_8gb")
    assert isinstance(load_hardware(str(path)), Hardware)


def test_a_constant_at_another_value_keeps_its_source():
    constant = load_hardware("xpu").static_share
    assert constant.at(0.5).value == 0.5 and constant.at(0.5).source == constant.source


def change(path: str, value: object, name: str = "elmoe3d_8gb") -> str:
    """The preset with one value replaced (or removed: ``absent``), as YAML."""
    data = yaml.safe_load(preset_text(name))
    *parents, last = path.split(".")
    node = data
    for key in parents:
        node = node[key]
    if value == "absent":
        del node[last]
    else:
        node[last] = value
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("path", "value", "where", "what"),
    [
        ("main.bandwith", {"value": "1 GB/s"}, "$.main", "unknown field `bandwith`"),
        ("main.bandwidth.vaule", "1 GB/s", "$.main.bandwidth", "unknown key 'vaule'"),
        ("main.bandwidth.value", "102.4", "$.main.bandwidth", "has no unit"),
        ("main.bandwidth.value", 102.4, "$.main.bandwidth", "has no unit"),
        ("main.bandwidth.value", "102.4 GB", "$.main.bandwidth", "has a unit of capacity"),
        ("main.bandwidth.value", "102.4 Gbit/s", "$.main.bandwidth", "unknown unit 'Gbit/s'"),
        ("main.bandwidth.value", "0 GB/s", "$.main.bandwidth", "not positive"),
        ("main.bandwidth.value", "-3 GB/s", "$.main.bandwidth", "not a positive number"),
        ("main.bandwidth.value", "nan GB/s", "$.main.bandwidth", "not a positive number"),
        ("main.bandwidth.value", "1e999 GB/s", "$.main.bandwidth", "not finite"),
        ("main.bandwidth.value", True, "$.main.bandwidth", "'True' is not a number"),
        ("main.bandwidth.value", [1], "$.main.bandwidth", "a list is not a number"),
        ("main.bandwidth", "102.4 GB/s", "$.main.bandwidth", "needs a source"),
        ("main.bandwidth.source", "absent", "$.main.bandwidth", "has no 'source'"),
        ("main.bandwidth.source", " ", "$.main.bandwidth", "source is empty"),
        ("main.bandwidth.status", "absent", "$.main.bandwidth", "has no 'status'"),
        ("main.bandwidth.status", "guessed", "$.main.bandwidth", "allowed: published, derived, measured, assumed"),
        ("main.energy.value", "99 pJ/bit", "$.main.energy", "outside its range"),
        ("main.energy.range", ["9 pJ/bit", "3 pJ/bit"], "$.main.energy", "outside its range"),
        ("main.energy.range", "3-9 pJ/bit", "$.main.energy", "range must be"),
        ("main.energy.range", ["3 pJ/bit"], "$.main.energy", "range must be"),
        ("main.refresh.duration.value", "absent", "$.main.refresh.duration", "has no 'value'"),
        ("main.refresh.interval.value", "250 ns", "$.main.refresh", "refresh never ends"),
        ("fast.efficiency.value", "101 %", "$.fast.efficiency", "outside its range"),
        ("main.efficiency", {"value": "90 %", "source": "here", "status": "assumed"}, "$.main", "not both"),
        ("main", "absent", "", "required field `main`"),
        ("fast", "absent", "", "features need a 'fast' memory"),
        ("compute.kind", "gpu", "$.compute", "gpu"),
        ("compute.kind", "absent", "$.compute", "kind"),
        ("features.bit_slice", True, "$.features", "unknown field `bit_slice`"),
        ("features.bit_slices", "yes, please", "$.features.bit_slices", "Expected `bool`"),
        ("static_share", {"value": "100 %", "source": "here", "status": "assumed"}, "", "below 100 %"),
        ("name", 8, "$.name", "Expected `str`"),
        ("name", " ", "", "'name' must have 1 to 64 printable characters"),
        ("name", "x" * 65, "", "'name' must have 1 to 64 printable characters"),
        ("name", "two\nlines", "", "'name' must have 1 to 64 printable characters"),
    ],
)
def test_bad_input_names_file_path_and_mend(tmp_path, path, value, where, what):
    file = tmp_path / "mine.yaml"
    file.write_text(change(path, value))
    with pytest.raises(HardwareError) as caught:
        load_hardware(file)
    message = str(caught.value)
    assert "mine.yaml" in message and where in message and what in message, message
    assert caught.value.hint


def test_near_memory_under_a_fast_memory_that_is_not_there(tmp_path):
    file = tmp_path / "mine.yaml"
    near = yaml.safe_load(preset_text("xpu_nmp"))["near"]
    file.write_text(change("near", near, "xpu"))
    with pytest.raises(HardwareError, match="needs a 'fast' memory"):
        load_hardware(file)


@pytest.mark.parametrize(
    "text",
    ["{", "a: b: c", "", "- 1", "7", "\x00", "when: 2001-99-99", "[" * 100_000, "!!python/object/apply:os.system ['true']"],
    ids=["brace", "colons", "empty", "list", "number", "null byte", "date", "deep", "code"],
)
def test_what_is_no_description_is_named(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(HardwareError, match=r"mine\.yaml") as caught:
        load_hardware(file)
    assert caught.value.hint


def test_aliases_that_grow_are_not_printed(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, 9)]
    file = tmp_path / "mine.yaml"
    for place in ("capacity: *a8", "capacity: {value: *a8, source: x, status: assumed}"):
        file.write_text("\n".join(["name: x", "description: x", *lines, "main:", "  kind: x", f"  {place}"]))
        with pytest.raises(HardwareError) as caught:
            load_hardware(file)
        assert len(str(caught.value)) < 1000


def test_a_huge_a_binary_and_a_missing_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(HardwareError, match="larger than 1 MiB"):
        load_hardware(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(HardwareError, match="not text"):
        load_hardware(file)
    with pytest.raises(HardwareError, match="no hardware 'elmoe4d'") as caught:
        load_hardware("elmoe4d")
    assert "elmoe3d_8gb" in str(caught.value.hint)


@pytest.mark.parametrize("name", preset_names())
def test_a_description_that_is_written_loads_as_the_same(tmp_path, name):
    hardware = load_hardware(name)
    write_hardware(hardware, tmp_path / "written.yaml")
    assert load_hardware(tmp_path / "written.yaml") == hardware


CHOICES = ("main", "fast", "faster", "processor", "both", "same", "twice")
BOUNDS = st.lists(st.floats(1e-30, 1e30), min_size=3, max_size=3).map(sorted)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
NAMES = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=64).filter(
    lambda name: bool(name.strip()) and name.isprintable()
)


def changed(data: object, draw: st.DataObject) -> object:
    """A description of the same shape with other constants; ratios that are checked against others keep theirs."""
    if isinstance(data, Constant) and not isinstance(data, Ratio | Seconds):
        low, value, high = draw.draw(BOUNDS)
        return type(data)(value, draw.draw(TEXTS), draw.draw(st.sampled_from(["measured", "assumed"])), low, high)
    if isinstance(data, msgspec.Struct):
        names = [name for name in data.__struct_fields__ if name != "name"]
        return msgspec.structs.replace(data, **{name: changed(getattr(data, name), draw) for name in names})
    return draw.draw(TEXTS) if isinstance(data, str) and data not in CHOICES else data


@settings(deadline=None, max_examples=20)
@given(st.data(), st.sampled_from((*preset_names(), *variant_names())))
def test_any_description_survives_writing_and_loading(draw, name):
    hardware = msgspec.structs.replace(changed(load_hardware(name), draw), name=draw.draw(NAMES))
    assert load_described(described_text(hardware), "written", Hardware) == hardware


@pytest.mark.parametrize("text", ["1e100", "1_000", "0x1F", "1:30", "nan", "~"])
def test_text_that_looks_like_a_number_stays_text(text):
    hardware = load_hardware("xpu")
    named = msgspec.structs.replace(hardware, main=msgspec.structs.replace(hardware.main, kind=text))
    assert load_described(described_text(named), "written", Hardware) == named


@given(BOUNDS)
def test_ratios_and_times_survive_writing_and_loading(bounds):
    low, value, high = bounds
    for kind in (Ratio, Seconds):
        constant = kind(value, "a source", "derived", low, high)
        assert kind.parse(constant.written()) == constant


def test_constants_that_differ_anywhere_are_not_equal():
    one = Seconds(1.0, "a source", "derived", 0.5, 2.0)
    others = [(1.0000001, "a source", "derived", 0.5, 2.0), (1.0, "another", "derived", 0.5, 2.0),
              (1.0, "a source", "assumed", 0.5, 2.0), (1.0, "a source", "derived", 0.4, 2.0),
              (1.0, "a source", "derived", 0.5, 3.0)]  # fmt: skip
    assert one == Seconds(1.0, "a source", "derived", 0.5, 2.0) != Ratio(1.0, "a source", "derived", 0.5, 2.0)
    assert all(Seconds(*other) != one for other in others)


def test_quantities_are_written_short_and_impossible_ones_are_refused():
    hardware = load_hardware("xpu")
    text = described_text(hardware)
    assert "bandwidth: {value: 102.4 GB/s" in text and "static_share: {value: '0.2'" in text
    assert "\nfast:" not in text and "\nnear:" not in text
    for value in (0.0, -1.0, float("inf"), float("nan")):
        bad = msgspec.structs.replace(hardware, layer_overhead=Seconds(value, "a source", "measured"))
        with pytest.raises(RequestError, match="is no time"):
            described_text(bad)


def test_a_calibration_becomes_hardware(tmp_path):
    from elmoe.measure.calibrate import MeasuredMachine, hardware_of

    machine = MeasuredMachine(
        fast=31.4159265e9, slow=1.7e9, fixed=0.0, decisions=2.5e-6, throughput=4.2e11, error=0.01
    )  # fmt: skip
    write_hardware(hardware_of(machine, 8 << 30, 1 << 40), tmp_path / "mine.yaml")
    hardware = load_hardware(tmp_path / "mine.yaml")
    assert hardware == hardware_of(machine, 8 << 30, 1 << 40) and isinstance(hardware.compute, Processor)
    assert (hardware.fast.bandwidth.value, hardware.fast.bandwidth.status) == (31.4159e9, "measured")
    assert (hardware.fast.capacity.value, hardware.main.capacity.value) == (8 << 30, 1 << 40)
    assert 0 < hardware.layer_overhead.value < 1e-12 and hardware.decision_overhead.value == 2.5e-6
    assert hardware.main.energy.status == "assumed" and hardware.features.bit_slices
