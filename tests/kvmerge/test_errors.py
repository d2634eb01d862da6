"""Messages of errors, and what led to them."""

import pytest

import kvmerge
from kvmerge.errors import UserError, causes, first_line, unknown


def test_unknown_says_what_exists_and_what_is_near():
    error = unknown("method", "kvmerge", ["h2o", "cam", "kvmerger"])
    assert isinstance(error, UserError)
    assert str(error) == (
        "unknown method 'kvmerge'. Did you mean 'kvmerger'? Available: cam, h2o, kvmerger."
    )


def test_unknown_guesses_nothing_far():
    assert "Did you mean" not in str(unknown("method", "xyz", ["h2o", "cam"]))


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError("\n one\n"), "one"), (ValueError(), "ValueError")],
)
def test_the_first_line_of_a_message(error, line):
    assert first_line(error) == line


def test_causes_go_back_to_the_first():
    first, second, third = OSError("first"), ValueError("second"), UserError("third")
    second.__context__ = first
    third.__cause__ = second
    assert causes(third) == [third, second, first]
    second.__suppress_context__ = True  # as `from None` does
    assert causes(third) == [third, second]


def test_the_package_gives_its_public_names():
    for name in kvmerge.__all__:
        assert getattr(kvmerge, name).__name__ == name
