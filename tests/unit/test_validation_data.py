"""Validation data: complete, and consistent with what is derived from it elsewhere."""

from __future__ import annotations

import pytest

from elmoe.errors import HardwareError
from elmoe.models.load import load_model
from elmoe.schema.hardware import load_hardware
from elmoe.schema.validation import (
    Claims,
    Decoding,
    FusedKernel,
    Streaming,
    load_validation,
    validation_names,
    validation_of_text,
)


def test_every_file_loads_and_has_a_source():
    assert set(validation_names()) == {"fused_moe", "dgx_spark", "ramulator", "paper_claims", "rival_gains"}
    for name in validation_names():
        data = load_validation(name)
        assert data.rows and len(data.source) > 10


def test_the_fused_kernel_is_a_line_in_the_experts():
    data = load_validation("fused_moe")
    assert isinstance(data, FusedKernel) and len(data.rows) == 18
    for row in data.rows:
        if row.tokens <= 64:
            assert data.fixed + data.per_expert * row.experts == pytest.approx(row.microseconds, rel=0.048)
    hardware, model = load_hardware(data.hardware), load_model(data.model)
    assert hardware.layer_overhead is not None and hardware.main.efficiency is not None
    assert hardware.layer_overhead.value == pytest.approx(data.fixed * 1e-6)
    rate = model.expert.expert_parameters * data.bits_per_weight / 8 / (data.per_expert * 1e-6)
    assert rate / hardware.main.bandwidth.value == pytest.approx(hardware.main.efficiency.value, abs=0.002)


def test_dgx_spark_decodes_at_the_measured_speed():
    """A closed form: bytes over streaming bandwidth, and an overhead a layer. Two rows are fitted, gpt-oss-20b is not."""
    data = load_validation("dgx_spark")
    assert isinstance(data, Decoding) and [row.fitted for row in data.rows] == [True, True, False]
    hardware = load_hardware(data.hardware)
    assert hardware.layer_overhead is not None and hardware.main.efficiency is not None
    for row in data.rows:
        model = load_model(row.model)
        seconds = model.active_bytes / (hardware.main.bandwidth.value * hardware.main.efficiency.value)
        seconds += len(model.layers) * hardware.layer_overhead.value
        assert 1 / seconds == pytest.approx(row.tokens_per_second, rel=0.01 if row.fitted else 0.05)


def test_claims_carry_their_status():
    claims = load_validation("paper_claims")
    assert isinstance(claims, Claims)
    assert claims.value("speedup_over_xpu_mean") == 6.6
    assert {row.name for row in claims.rows if row.status == "A"} == {
        "speedup_over_xpu_mean",
        "speedup_over_best_prior_mean",
        "efficiency_over_xpu_mean",
        "efficiency_over_best_prior_mean",
    }
    assert len({row.name for row in claims.rows}) == len(claims.rows)
    with pytest.raises(HardwareError, match="no claim 'cold_fusion'"):
        claims.value("cold_fusion")
    assert isinstance(load_validation("ramulator"), Streaming)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "mine.yaml"),
        ("kind: rumours", "rumours"),
        ("kind: streaming\ndescription: x\nsource: x\nstatus: guessed\nrows: []", "status"),
        ("kind: streaming\ndescription: x\nsource: ''\nstatus: measured\nrows: []", "source"),
        (
            "kind: streaming\ndescription: x\nsource: x\nstatus: measured\nrows: [{memory: x, efficiency: 93.3}]",
            "rows[0].efficiency",
        ),
        ("kind: streaming\ndescription: x\nsource: x\nstatus: measured\nrows: [{memory: x, share: 0.9}]", "share"),
    ],
)
def test_bad_data_is_named(text, named):
    with pytest.raises(HardwareError) as caught:
        validation_of_text(text, "mine.yaml")
    assert "mine.yaml" in str(caught.value) and named in str(caught.value) and caught.value.hint
    with pytest.raises(HardwareError, match="no validation data 'rumours'"):
        load_validation("rumours")
