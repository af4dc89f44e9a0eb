"""An option from a stranger: whatever it is set to, it works or is refused in one line that names it."""

from typing import Any

import pytest

from tcbench.budget.costing import macs_of
from tcbench.cli import _options
from tcbench.errors import UserError
from tcbench.method import LARGEST, LONGEST
from tcbench.registry import make_method, method_class, method_names

NFE = 12
NUMBERS = [0, -1, 1, 2, LARGEST, LARGEST + 1, 10**9, 2**64, 10**400, -(10**12), 0.5, -0.5, 1e-300, 1e308]
ODD = [float("nan"), float("inf"), True, False, None, 1j, b"x", object(), {}, {"a": 1}, {"x"}]
TEXTS = ["", "x", "1", "1e9", "true", "x" * (LONGEST + 1), "a\nb", "\x00", "../x"]
LISTS: list[Any] = [[], [0], [1.0, "1"], [1e308, 1.0], [0.0] * (LONGEST + 1), [[1]], (1, 2)]
ABSURD = [LARGEST + 1, 10**9, 2**64, 10**400, -(10**12), 1e308, *ODD[:2], *ODD[5:], *TEXTS[5:8], *LISTS[4:5]]
"""What no option can mean."""


@pytest.mark.parametrize("name", method_names())
def test_an_option_works_or_is_refused_by_its_name(name: str) -> None:
    for option, field in method_class(name).model_fields.items():
        for value in (*NUMBERS, *ODD, *TEXTS, *LISTS):
            case = f"{option}={value!r}"[:100]
            try:
                method = make_method(name, {option: value})
            except UserError as error:
                line = str(error)
                assert line.startswith(f"methods/{name}.py: {option}"), case
            else:
                assert not any(value is absurd for absurd in ABSURD), case
                assert type(getattr(method, option)) is not bool or field.annotation is bool, case
                try:
                    assert macs_of("tiny-dit", method, NFE)["per_sample"] > 0, case
                    continue
                except UserError as error:
                    line = str(error)
            assert line.isprintable() and len(line) < 600, case


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("interval=[", "--set interval: not valid YAML"),
        ("interval=024", "--set interval: write 24"),
        ("interval=no", "--set interval: write true or false"),
        ("interval=.inf", "--set interval: .inf is no finite number"),
        ("interval", "--set interval: give KEY=VALUE"),
    ],
)
def test_a_value_on_the_command_line_is_read_as_in_a_config(pair: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        _options([pair])
    assert str(refused.value).startswith(says)
    assert _options(["rate=1e-5", "values=[1, 0.5]"]) == {"rate": 1e-5, "values": [1, 0.5]}
