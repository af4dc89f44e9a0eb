"""The paper audit: the committed page is what the code makes, and every kind of check can come out either way."""

from pathlib import Path

import pytest

from tcbench.audit.checks import VERDICTS, Check, Section
from tcbench.audit.paper import (
    decimals,
    find,
    number,
    printed_ratio,
    reference,
    same,
    settings,
    statement,
    table,
    underived,
)
from tcbench.audit.sections import audit
from tcbench.cli import main
from tcbench.report.audit import audit_page

PAGE = Path(__file__).parent.parent / "results" / "reference" / "paper-audit.md"


@pytest.fixture(scope="module")
def sections() -> dict[str, Section]:
    return {section.title: section for section in audit()}


def verdicts(section: Section) -> dict[str, str]:
    return {check.where: check.verdict for check in section.checks}


def conflicts(section: Section) -> set[str]:
    return {check.where for check in section.checks if check.verdict == "conflicts"}


def check_of(section: Section, part: str) -> Check:
    (check,) = [check for check in section.checks if part in check.where]
    return check


# --- the page


def test_the_committed_page_is_what_the_code_makes(sections: dict[str, Section]) -> None:
    made = audit_page([*sections.values()])
    assert made == PAGE.read_text(encoding="utf-8"), "run `tcbench audit` and commit results/reference/paper-audit.md"


def test_command(capsys, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "audit.md"
    assert main(["audit", "--out", str(out)]) == 0
    assert out.read_bytes() == PAGE.read_bytes()
    assert capsys.readouterr().out.startswith(f"{out}: ") and out.read_text(encoding="utf-8").endswith("\n")


def test_the_summary_counts_every_check(sections: dict[str, Section]) -> None:
    text = audit_page([*sections.values()])
    counts = [sum(section.count(verdict) for section in sections.values()) for verdict in VERDICTS]
    assert sum(counts) == sum(len(section.checks) for section in sections.values())
    total = next(line for line in text.splitlines() if line.startswith("| all "))
    assert [int(cell) for cell in total.split("|")[2:-1]] == counts
    assert text.count("| **conflicts** ") == counts[1] and text.count("| **cannot be derived** ") == counts[2]


def test_every_check_says_why(sections: dict[str, Section]) -> None:
    for section in sections.values():
        places = [check.where for check in section.checks]
        assert len(set(places)) == len(places), section.title
        for check in section.checks:
            assert check.why and check.reported and (check.derived or check.verdict == "cannot be derived"), check


# --- what is known to be wrong in the paper, and nothing else, conflicts


def test_speedups(sections: dict[str, Section]) -> None:
    section = sections["Speedup as a ratio of MACs"]
    rows = sum(len(table(n)) - len(settings(n)) for n in (2, 3, 4, 5)) + len(table(7)) + len(table(9))
    assert len(section.checks) == rows
    assert conflicts(section) == {
        "Table II, DiT-XL/2 256, 14 of 20 steps",  # printed 1.50, 4.74 / 3.32 is 1.43
        "Table II, ToCa 256, 20 steps",  # printed 1.82, 4.74 / 2.76 is 1.72
        "Table IX, K = 4",  # printed 2.40, 11.86 / 4.748 is 2.50
    }


def test_latency_ratios(sections: dict[str, Section]) -> None:
    section = sections["Speedup as a ratio of latencies"]
    ours = {where: verdict for where, verdict in verdicts(section).items() if "TokenCache" in where}
    assert sum(verdict == "conflicts" for verdict in ours.values()) == 7 and len(ours) == 9
    slower = check_of(section, "Table IV, ToCa")
    assert slower.derived == "0.95" and "slower than uncached" in slower.why
    assert check_of(section, "Table II, TokenCache 256, 250 steps").derived == "2.05"


def test_latencies_that_the_hardware_allows(sections: dict[str, Section]) -> None:
    section = sections["Latency of plain sampling"]
    assert conflicts(section) == {"Table V, Open-Sora-Plan, 50 steps: a batch of 8 on an A100"}
    assert check_of(section, "Open-Sora-Plan, 50 steps").derived == "at least 88.08 s"  # 2 * 8 * 1717.49 / 312


def test_predictor(sections: dict[str, Section]) -> None:
    checks = sections["What the predictor costs"].checks
    assert [check.verdict for check in checks] == ["reproduced"] * 2 + ["conflicts"] * 6
    assert [check.derived for check in checks[:2]] == ["3.55", "3.58"]
    assert all(0.02 < check.difference < 0.09 for check in checks[2:])


def test_tables_that_print_one_setting_twice(sections: dict[str, Section]) -> None:
    assert conflicts(sections["The same setting in two tables"]) == {
        *(f"Table VII, r = 0.9: {metric}" for metric in ("IS", "FID", "sFID", "Precision", "Recall")),
        "Table IX, K = 4: TMACs",
    }


def test_sentences(sections: dict[str, Section]) -> None:
    section = sections["The text against the tables"]
    expected = {
        "Scaled FID": ("conflicts", "spatial"),
        "4,750 videos": ("reproduced", "4750"),
        "the best FID …": ("reproduced", "no exception"),
        "a higher IS": ("conflicts", "DiT-XL/2 256 250 steps: FORA 253.96"),
        "without a reduction": ("conflicts", "Precision: DiT-XL/2 0.81"),
        "surpassing both": ("conflicts", "IS: FORA 253.96; Precision: ToCa 0.81"),
        "increased resolution\", 50": ("conflicts", "1.82"),
        "increased resolution\", 20": ("conflicts", "1.63"),
        "consistently beat DDIM": ("conflicts", "DPM-Solver++"),
        "(2.18×)": ("conflicts", "2.31"),
        "Ratios below 0.8": ("conflicts", "6.35, 7.30, 8.26"),
        "best fidelity\": FID": ("reproduced", "0.8"),
        "first row in Table VIII": ("conflicts", "Reverse Selection"),
        "similar computational costs": ("cannot be derived", ""),
        "TFLOPs up to 4.748": ("conflicts", "2.498"),
    }  # fmt: skip
    for part, (verdict, derived) in expected.items():
        check = check_of(section, part)
        assert (check.verdict, check.derived) == (verdict, derived), part
    efficient = check_of(section, "both efficiency and quality")
    assert "ToCa 19.11 TMACs, FORA 8.60 s" in efficient.derived and "Open-Sora" not in efficient.derived


def test_equal_compute_units_and_equation(sections: dict[str, Section]) -> None:
    assert check_of(sections["Equal compute"], "256, 50 steps").derived == "4.94 to 5.94"
    assert check_of(sections["What a TFLOP is"], "NFE").derived == "500"
    assert check_of(sections["What a TFLOP is"], "TFLOPs").derived == "118.69"
    underflow, total = sections["Eq. (13) as printed"].checks
    assert underflow.derived == "0 for ᾱ above 0.093" and total.derived == "sums to 7.04"


# --- the kinds of checks


def test_numbers() -> None:
    assert number("", "2.00", 2.019, "").verdict == "reproduced"
    check = number("", "2.00", 2.03, "")
    assert (check.verdict, check.derived, round(check.difference, 4)) == ("conflicts", "2.03", 0.015)
    assert number("", "2.00", 2.03, "", tolerance=0.05).verdict == "reproduced"
    assert (underived("", "2.00", "").derived, underived("", "2.00", "", 2.0).derived) == ("", "2.00")
    assert [statement("", "", "", holds, "").verdict for holds in (True, False, None)] == list(VERDICTS)


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ("2.40", "2.4", "reproduced"),
        ("0.811", "0.81", "reproduced"),
        ("0.811", "0.79", "conflicts"),
        ("8", "9", "conflicts"),
    ],
)
def test_two_prints_of_a_number(one: str, other: str, verdict: str) -> None:
    assert same("", one, other, "").verdict == same("", other, one, "").verdict == verdict


@pytest.mark.parametrize(
    ("ratio", "top", "bottom", "verdict"),
    [
        ("2.37", "11.86", "4.99", "reproduced"),  # 2.3768, truncated
        ("1.43", "11.86", "8.26", "reproduced"),  # 1.4358, truncated
        ("1.67", "4.74", "2.84", "reproduced"),  # 1.6690, rounded
        ("1.82", "4.74", "2.76", "conflicts"),
        ("2.36", "11.86", "4.99", "conflicts"),
        ("2", "4.0", "1.9", "reproduced"),
    ],
)
def test_ratios_of_printed_numbers(ratio: str, top: str, bottom: str, verdict: str) -> None:
    assert printed_ratio("", ratio, top, bottom).verdict == verdict


# --- the paper's tables


def test_tables_are_complete() -> None:
    assert [len(table(n)) for n in range(1, 10)] == [7, 34, 5, 5, 5, 4, 5, 3, 4]
    assert [len(group) for group in settings(2)] == [6, 7, 6, 5, 5, 5]
    row = find(2, method="ToCa", resolution=512, nfe=20)
    assert reference(2, row)["tmacs"] == "20.99" and decimals(row["tmacs"]) == 2
    with pytest.raises(ValueError, match="not enough values"):
        find(3, method="no such method")
