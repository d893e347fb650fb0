"""Which rows of the table of choices a result justifies."""

import ast

import pytest

from mmbase_bench.verdict import Place, Rivals, against_best, inexact, judge, obstacle, ranges, summary
from mmbase_kernels.choice import Win

RIVALS = Rivals(["peer", "slow"], ["compiled"])


def row(contender, ms, size=64, direction="forward+backward", *, noise=0.01, error=1e-3, problem="", dtype="bf16"):
    times = {"rounds_ms": [ms, 1.01 * ms], "p50_ms": ms, "noise": noise} if ms else {"p50_ms": None, "noise": None}
    return {
        "contender": contender,
        "in_case": f"case {size}",
        "size": size,
        "direction": direction,
        "dtype": dtype,
        "problem": problem,
        "out_error": error,
        **times,
    }


def rows(size=64, *, both=(1.0, 1.5, 1.3), forward=(1.0, 1.1, 1.2), **options):
    """Ours, peer and compiled; a second peer did not run."""
    found = []
    for direction, (ours, peer, compiled) in (("forward+backward", both), ("forward", forward)):
        found += [
            row("mmbase-triton", ours, size, direction, **options),
            row("peer", peer, size, direction),
            row("slow", None, size, direction, problem="out of memory"),
            row("compiled", compiled, size, direction),
        ]
    return found


def verdict(found, rivals=RIVALS, architecture="sm_90", result="benchmarks/results/x/y.json"):
    return judge(found, lambda r: Place("layer_norm", "add", 768, r["size"]), rivals, architecture, result)


def test_a_win_is_a_row_that_can_be_pasted():
    lines, wins = verdict(rows(64) + rows(256))
    assert wins == [
        {
            "operator": "layer_norm", "architecture": "sm_90", "dtype": "bf16", "case": "add", "width": 768,
            "smallest": 64, "largest": None, "compiled": True, "result": "benchmarks/results/x/y.json",
        }
    ]  # fmt: skip
    pasted = ast.parse(lines[-1].strip().rstrip(","), mode="eval").body
    names = [part.attr if isinstance(part, ast.Attribute) else part.value for part in pasted.args]
    assert dict(zip(Win.__dataclass_fields__, names, strict=True)) == wins[0] | {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (rows(both=(1.0, 0.9, 1.3)), "forward+backward: 1.111 x peer"),
        (rows(both=(1.0, 1.005, 1.3)), "forward+backward: 0.995 x peer (noise 1.0%)"),
        (rows(forward=(1.0, 0.9, 1.3)), "forward: 1.111 x peer"),
        (rows(error=9e-3), "out_error 0.009 is above 0.008"),
        (rows(error=None), "out_error None is above"),
        (rows(problem="not finite: out"), "not finite: out"),
        (rows(both=(None, 1.0, 1.0), problem="out of memory"), "out of memory"),
        ([r for r in rows() if r["contender"] != "peer"], "no rival ran"),
        ([r for r in rows() if r["direction"] != "forward"], "mmbase-triton was not measured forward"),
    ],
)
def test_no_row_where_it_does_not_win(found, why):
    assert why in obstacle(found, "mmbase-triton", RIVALS.eager)
    lines, wins = verdict(found)
    assert wins == [] and lines[-1] == "(none)" and any(why in line for line in lines)


def test_slower_than_the_compiler_is_a_row_for_eager_calls_alone():
    lines, wins = verdict(rows(64) + rows(256, both=(1.0, 1.5, 0.9)))
    assert [(win["smallest"], win["largest"], win["compiled"]) for win in wins] == [(64, 64, True), (256, None, False)]
    assert any("but in a compiled graph forward+backward: 1.111 x compiled" in line for line in lines)


def test_a_loss_between_ends_the_range_and_only_what_grows_is_open():
    found = rows(10) + rows(20) + rows(30, both=(1.0, 0.5, 2.0)) + rows(40)
    assert [(win["smallest"], win["largest"]) for win in verdict(found)[1]] == [(10, 20), (40, None)]
    closed = Rivals(["peer"], ["compiled"], grows=False)
    assert [(win["smallest"], win["largest"]) for win in verdict(found, closed)[1]] == [(10, 20), (40, 40)]
    assert ranges([(1, None), (2, True), (3, True), (4, False)]) == [(2, 3, True), (4, 4, False)]


def test_every_case_of_a_size_has_to_win():
    twice = rows(64) + [r | {"in_case": "another"} for r in rows(64, both=(1.0, 0.9, 2.0))]
    assert verdict(twice)[1] == []


def test_no_row_from_a_cpu_nor_without_a_file():
    assert verdict(rows(), architecture="")[1] == [] and "only a GPU" in verdict(rows(), architecture="")[0][0]
    assert verdict(rows(), result="")[1] == [] and "--output" in verdict(rows(), result="")[0][0]


def test_tolerances_are_those_of_the_dtype():
    assert inexact(row("x", 1.0, error=2e-3, dtype="fp16")) and not inexact(row("x", 1.0, error=2e-3, dtype="bf16"))
    assert inexact({"dtype": "fp32"}) == "no error against float64 is known"


def test_summary_is_the_geometric_mean_over_the_fastest_rival():
    found = rows(64, both=(1.0, 2.0, 9.0)) + rows(256, both=(1.0, 8.0, 9.0))
    speedups = against_best(found, "mmbase-triton", ["peer", "slow"])
    assert speedups == pytest.approx({"case 64": 2.0, "case 256": 8.0})
    assert "4.00 x as fast (geometric mean of 2), least 2.00 (case 64)" in summary(speedups, "ours", "theirs")[0]
    assert summary({}, "ours", "theirs") == []
