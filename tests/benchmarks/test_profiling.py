"""Kernels by class, and gaps between them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the programs' own modules are beside them
import profiling
from profiling import IDLE, REST, Kernel


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNN", "products"),
        ("gemm_fusion_dot_12", "products"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("cudnn::cnn::dgrad_engine", "convolutions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("memcpy128", "copies"),
        ("MemcpyD2D", "copies"),
        ("wrapped_slice_3", "copies"),
        ("loop_convert_fusion_7", REST),
        ("input_reduce_fusion", REST),
    ],
)
def test_class_of_a_kernel(name, expected):
    assert profiling.class_of(name) == expected


def test_times_are_those_of_a_run_and_gaps_are_idle():
    kernels = [
        Kernel("memcpy128", 0.0, 1.0),
        Kernel("gemm_fusion_dot_2", 0.5, 2.0),  # on another stream: no gap
        Kernel("gemm_fusion_dot_1", 2.00004, 3.0),
        Kernel("loop_add_fusion", 5.0, 6.0),
    ]
    summary = profiling.summarise(kernels[::-1], 2)
    assert summary["seconds"]["copies"] == pytest.approx(0.5)
    assert summary["seconds"]["products"] == pytest.approx(0.75 + 0.49998)
    assert summary["seconds"][REST] == pytest.approx(0.5)
    assert summary["seconds"][IDLE] == pytest.approx(1.00002)
    assert summary["idle_in_long_gaps"] == pytest.approx(1.0)
    assert summary["span"] == pytest.approx(3.0) and summary["kernels"] == 2
    assert summary["largest"][0]["name"] == "gemm_fusion_dot" and summary["largest"][0]["count"] == 1
    lines = list(profiling.table({"lora:2": summary}))
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
