"""Instruction budgets: the model by hand, and counts of kernels compiled without a GPU."""

import json
from dataclasses import replace

import pytest

from r2ec_kernels import aot, budget
from r2ec_kernels.budget import Card, Counts, Work, broken_limits, count, predict

H100, H200 = budget.CARDS["sm_90"]
CARD = Card("by hand", bandwidth=1000.0, flops=64.0 * 10 * 100, multiprocessors=10, tensor=64)
COUNTS = Counts(
    before=10,
    loop=20,
    epilogue=30,
    after=0,
    epilogue_shuffles=2,
    epilogue_shared=4,
    loads={"LDG.128": 1},
    products={"HGMMA.64x8x16.F32.BF16": 1},
    product_flops=6400.0,
    wgmma=True,
    tma=False,
    persistent=False,
    load_bits=128,
)


def test_cards_clock_is_that_of_their_quoted_rate():
    assert H100.clock == pytest.approx(1.829e9, rel=1e-3) == H200.clock
    assert (H100.bandwidth, H200.bandwidth, H100.flops) == (3.35e12, 4.8e12, 989e12)


def test_a_tile_by_hand():
    """100 cycles a second, 1 byte and 64 FLOPs a cycle and multiprocessor."""
    assert CARD.clock == 100.0
    work = Work(bytes=50, flops=3200, steps=4, tile_bytes=100)
    found = predict(CARD, COUNTS, work, warps=8)
    # 4 x 50 + 100 bytes; 4 x 6400 / 64; (4 x 20 + 10 + 30) instructions x 8 warps / 4
    assert (found.memory_cycles, found.tensor_cycles, found.issue_cycles) == (300, 400, 240)
    assert found.floor_seconds == 3.0 and found.bound == "tensor"  # 4 x 3200 / 64 = 200 < 300
    assert found.share == 300 / 400
    assert found.alone == 300 / (400 + 100)  # loop: 200, 400, 160; rest: 100, 0, 80


def test_a_persistent_program_pays_its_start_once():
    work = Work(bytes=50, flops=3200, steps=4)
    found = predict(CARD, replace(COUNTS, persistent=True), work, warps=8)
    assert found.issue_cycles == (4 * 20 + 30) * 2


def test_products_without_a_shape_take_the_flops_of_the_work():
    work = Work(bytes=50, flops=3200, steps=4)
    found = predict(CARD, replace(COUNTS, product_flops=None), work, warps=8)
    assert found.tensor_cycles == 4 * 3200 / 64


def test_rates_of_types():
    """In bfloat16's time: TF32 twice, 8-bit half; a warpgroup is four warps."""
    listing = ".L_x_0:\n/*0000*/ {} R0, R1 ;\n/*0010*/ @P0 BRA `(.L_x_0) ;\n/*0020*/ EXIT ;"
    for opcode, flops in (
        ("HGMMA.64x8x8.F32.TF32", 2 * 64 * 8 * 8 * 2 * 2),
        ("IGMMA.64x8x32.S8.S8", 2 * 64 * 8 * 32 * 2 / 2),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16 * 8),
    ):
        assert count(listing.format(opcode), warps=8).product_flops == flops
    assert count(listing.format("UTCHMMA"), warps=8).product_flops is None


def test_limits():
    measured = {"loop": 92, "epilogue_shuffles": 216, "load_bits": 16, "wgmma": False}
    held = {"loop": 92, "epilogue_shuffles": 216, "load_bits": 16, "wgmma": False}
    assert broken_limits(held, measured) == []
    broken = broken_limits(
        {"loop": 91, "epilogue_shuffles": 0, "load_bits": 128, "wgmma": True}, measured
    )
    assert broken == [
        "loop 92 > 91",
        "epilogue_shuffles 216 > 0",
        "load_bits 16 < 128",
        "wgmma is False, not True",
    ]
    with pytest.raises(ValueError, match="unknown key 'shuffles'; there are registers, loop"):
        broken_limits({"shuffles": 0}, measured)
    with pytest.raises(ValueError, match="needs an epilogue, and scores"):
        broken_limits({"epilogue_per_1024_scores": 40}, {"epilogue_per_1024_scores": None})


def scan(name, **constants):
    """The one configuration of bfloat16 rows on sm_90 with these constants."""
    [case] = [
        case
        for case in aot.configurations()
        if case["name"] == name
        and case["backend"] == "cuda"
        and "sm_90" in case.get("targets", ("sm_90",))
        and "bf16" in case["signature"].get("x", case["signature"].get("x_ptr"))
        and case["constexprs"].items() >= constants.items()
    ]
    return case


@pytest.fixture
def wide(monkeypatch):
    """The table of one kernel: 128 queries against 128 items, which takes norms."""
    case = scan("topk.group_best", BLOCK_M=128, GROUP=128, TAKE_NORM=True)
    monkeypatch.setattr(aot, "configurations", lambda: [case])
    return case


def test_a_real_kernel(wide, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert aot.main(["--budget", "--target", "sm_90", "--json", str(path)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert "H100 SXM floor us" in head and "H200 floor us" in head and row.endswith("ok")
    [record] = json.loads(path.read_text())
    counts = record["counts"]
    # 128 x 128 x 64 = 4 products of 64 x 128 x 16 for each of two warpgroups
    assert counts["products"] == {"HGMMA.64x128x16.F32.BF16": 4}
    assert counts["product_flops"] == record["work"]["flops"] == 2 * 128 * 128 * 64
    assert counts["wgmma"] and not counts["tma"] and not counts["persistent"]
    # 2 x 128 rows of 128 bytes, 256 threads of 16; what rows share, 64 float32 for each thread's 8
    assert counts["loads"] == {"LDGSTS.128": 8, "LDG.128": 2}
    assert 180 <= counts["epilogue_shuffles"] <= 250
    assert 150 <= counts["loop"] <= 300 and 1000 <= counts["epilogue"] <= 1900
    assert record["per_1024_scores"] == counts["epilogue"] / 16
    assert [tile["card"] for tile in record["predictions"]] == ["H100 SXM", "H200"]
    assert all(0 < tile["alone"] <= tile["share"] <= 1 for tile in record["predictions"])


def test_a_reduction_in_registers(monkeypatch, tmp_path):
    """Of the scan for many queries no reduction shuffles; its tiles come by TMA, in a loop that
    programs stay in."""
    case = scan("topk.wide", GROUP=32, TMA=True, HAS_PAIRS=False)
    monkeypatch.setattr(aot, "configurations", lambda: [case])
    path = tmp_path / "rows.json"
    assert aot.main(["--budget", "--target", "sm_90", "--json", str(path)]) == 0
    [record] = json.loads(path.read_text())
    counts = record["counts"]
    assert counts["tma"] and counts["wgmma"] and counts["persistent"]
    assert counts["loads"] == {"UTMALDG": 2} and counts["epilogue_shared"] == 0
    assert counts["epilogue_shuffles"] <= 4 and record["per_1024_scores"] <= 40
    assert record["programs"] == 2 and record["spills"] == 0
    # it ships by TMA where there is one, and elsewhere by pointers
    assert aot.main(["--target", "sm_80"]) == 0


def test_a_broken_budget_fails(wide, capsys):
    wide["budget"] = {"epilogue_shuffles": 0, "loop": 10_000, "tma": True}
    assert aot.main(["--budget", "--target", "sm_90"]) == 1
    row = capsys.readouterr().out.splitlines()[1]
    assert "over budget: epilogue_shuffles 2" in row and "over budget: tma is False" in row
    assert "loop 1" not in row
    # the plain table and other targets do not hold budgets
    assert aot.main(["--target", "sm_90"]) == 0
    assert aot.main(["--budget", "--target", "sm_80"]) == 0


def test_a_budget_that_cannot_be_judged_fails(wide, capsys):
    wide["budget"] = {"shuffles": 0}
    assert aot.main(["--budget", "--target", "sm_90"]) == 1
    assert "not judged: budget: unknown key 'shuffles'" in capsys.readouterr().out


def test_a_configuration_without_work_has_counts_alone(wide, capsys):
    del wide["work"], wide["budget"]
    assert aot.main(["--budget", "--target", "sm_90"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert "HGMMA.64x128x16.F32.BF16" in row and row[-3:] == ["-", "-", "ok"]


def test_targets_of_other_makers_are_left_out(wide, capsys):
    with pytest.raises(SystemExit) as stop:
        aot.main(["--budget", "--target", "gfx942"])
    assert stop.value.code == 2
    assert "gfx942: left out, the budget is for NVIDIA targets only" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        aot.main(["--json", "rows.json"])
    assert "--json needs --budget" in capsys.readouterr().err


def test_a_missing_nvdisasm_is_said_before_anything_compiles(wide, monkeypatch, capsys):
    def nvdisasm():
        raise FileNotFoundError("nvdisasm not found: install it")

    monkeypatch.setattr(budget.sass, "nvdisasm", nvdisasm)
    with pytest.raises(SystemExit):
        aot.main(["--budget", "--target", "sm_90"])
    assert "--budget: nvdisasm not found: install it" in capsys.readouterr().err


def test_every_work_and_budget_entry_has_known_keys():
    for case in aot.configurations():
        if "work" not in case:
            continue
        work = Work(**case["work"])
        assert work.steps > 0 and work.bytes > 0 and work.sizes, case["name"]
        assert case.get("budget", {}).keys() <= budget.LIMITS.keys(), case["name"]


@pytest.mark.slow
def test_every_kernel_holds_its_budget(capsys):
    assert aot.main(["--budget", "--target", "sm_90"]) == 0, capsys.readouterr().out
