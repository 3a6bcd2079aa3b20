"""Every kernel is there for every architecture, keeps its values in registers and reads 16 bytes at a time, several
times before it waits."""

from __future__ import annotations

import json

import pytest

from . import objects

ARCHS = ["100", "120", "80", "86", "89", "90"]
# cosf and sinf of large angles index an array of their own, which is in memory where their loop is not unrolled: it
# counts as if registers had overflowed.
ANGLES = 10
# Products of eight rows, whose sums fill the registers, put an address or two of a task aside while they multiply.
ASIDE = 14

needs_module = pytest.mark.skipif(
    objects.module_path() is None or objects.dump_tool() is None,
    reason="needs a build with CUDA, and cuobjdump (of the toolkit, or the package nvidia-cuda-cuobjdump)",
)


@pytest.mark.parametrize(
    ("mangled", "label"),
    [
        (
            "_ZN10flexidepth4cuda45_GLOBAL__N__e91c_12_attention_cu_e0616attention_kernelINS0_7Float16ELi16EEEvNS_13AttentionArgsE",
            "attention_kernel<Float16, 16>",
        ),
        (
            "_ZN10flexidepth4cuda13matvec_kernelIfLi8ENS0_7OutputsIfEEEEvNS0_5InputET1_",
            "matvec_kernel<float, 8, Outputs>",
        ),
        (
            "_ZN10flexidepth4cuda11tile_kernelINS0_8BFloat16ENS0_7OutputsIS2_EEEEvNS0_5InputET0_",
            "tile_kernel<BFloat16, Outputs>",
        ),
        ("_ZN10flexidepth4cuda12_GLOBAL__N_114compact_kernelENS_11CompactArgsE", "compact_kernel"),
        (
            "_ZN10flexidepth4cuda47_GLOBAL__N__3b734a44_14_router_code_cu_5424316618router_code_kernelILi4EEEvNS0_5InputENS0_7OutputsIfEENS1_6PiecesEl",
            "router_code_kernel<4, Outputs>",
        ),
        (
            "_ZN10flexidepth4cuda48_GLOBAL__N__2a59ba37_15_routed_entry_cu_d214962c19routed_entry_kernelINS0_8BFloat16ELi8EEEvNS1_5EntryIT_EE",
            "routed_entry_kernel<BFloat16, 8>",
        ),
    ],
)
def test_labels(mangled, label):
    assert objects.kernel_label(mangled) == label


def test_every_kernel_is_in_the_table_and_none_spills():
    kernels = json.loads(objects.TABLE.read_text(encoding="utf-8"))["kernels"]
    assert {name.partition("<")[0] for name in kernels} == {
        *(
            "matvec_kernel",
            "tile_kernel",
            "attention_kernel",
            "compact_kernel",
            "router_code_kernel",
        ),
        *("folded_kernel", "code_kernel", "head_kernel", "rms_norm_kernel", "rope_kernel"),
        *("rope_table_kernel", "embed_kernel", "kv_append_kernel", "sample_kernel"),
        *("attention_tiles_kernel", "routed_entry_kernel", "routed_exit_kernel", "advance_kernel"),
        *("silu_and_mul_kernel", "residual_add_kernel"),
        "persistent_kernel",
    }
    for name, archs in kernels.items():
        assert sorted(archs) == ARCHS, name
        for arch, (registers, loads, ahead, spilled) in archs.items():
            kept = ANGLES if name.startswith("persistent") else 0
            most = ASIDE if name.startswith(("matvec", "routed_exit")) and ", 8" in name else kept
            assert kept <= spilled <= most and registers <= 255, (name, arch)
            reads_weights = name.startswith(("matvec", "tile", "route", "attention", "persistent"))
            assert loads > 0 or not reads_weights, (name, arch)
            # Those of tiles, for prompts, compute for longer on what they load.
            least = 2 if "tile" in name else 4
            assert ahead >= least or not reads_weights, (name, arch)


def test_loads_in_flight():
    flight = objects.LoadsInFlight()
    program = [
        ("LDG.E.NA.128.CONSTANT", "R4, desc[UR8][R2.64]", 1),
        ("LDG.E.128", "R40, desc[UR8][R2.64]", 1),  # by way of the L1 cache
        ("LDG.E.NA.128", "R8, desc[UR8][R2.64+0x200]", 2),
        ("IMAD.U32", "R8, R12, 0x10000, RZ", 2),
        ("STS", "[R30], R11", 2),  # both have come
        ("LDG.E.NA.128", "R12, desc[UR8][R2.64+0x400]", 2),
        ("LDG.E.NA.128", "R16, desc[UR8][R2.64+0x600]", 2),
        ("LDG.E.NA.128", "R20, desc[UR8][R2.64+0x800]", 3),
        ("BRA", "0x620", 3),
        ("LDG.E.NA.128", "R24, desc[UR8][R2.64+0xa00]", 3),
    ]
    for name, operands, most in program:
        flight.follow(name, operands)
        assert flight.most == most, (name, operands)


@needs_module
def test_the_built_module_is_as_the_table_says():
    committed = json.loads(objects.TABLE.read_text(encoding="utf-8"))
    assert objects.module_path() is not None
    if committed["compiler"] != objects.compiler_version():
        pytest.skip(f"the table is of nvcc {committed['compiler']}, this build of another one")
    built = json.loads(objects.as_text(objects.table()))["kernels"]
    assert sorted(built) == sorted(committed["kernels"])
    for name, archs in built.items():
        # A build for this machine's device alone has fewer.
        for arch, values in archs.items():
            assert values == committed["kernels"][name][arch], (
                f"{name}, sm_{arch}: run python -m tests.cuda.objects --write and look at what changed"
            )
