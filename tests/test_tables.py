import json

import pytest
from sadmoe.tables import divisors, format_table, si, to_json


def test_json_has_null_for_what_it_has_no_word_for():
    made = to_json({"rows": [{"error": float("nan"), "gain": float("inf")}, (1.5, None)]})
    assert json.loads(made, parse_constant=pytest.fail) == {
        "rows": [{"error": None, "gain": None}, [1.5, None]]
    }


def test_columns_are_aligned_first_left_others_right():
    table = format_table(["name", "n"], [["a", "1000"], ["longer", "7"]])
    assert table == "name       n\na       1000\nlonger     7"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="argument"):
        format_table(["a", "b"], [["1", "2", "3"]])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (999_900, "1 M"),
        (999.9, "1 k"),
        (1.18e6, "1.18 M"),
        (17.61e9, "17.6 G"),
        (2.64e12, "2.64 T"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(number, text):
    assert si(number) == text


def test_divisors_are_listed_the_smallest_first_and_not_without_end():
    assert divisors(1) == "1"
    assert divisors(12) == "1, 2, 3, 4, 6, 12"
    assert divisors(3072).endswith(", 192, 256, ...")
