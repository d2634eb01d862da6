"""How commands end."""

from __future__ import annotations

import pytest

from kvmerge.command import exits, parser_of
from kvmerge.errors import UserError


@exits
def half(number: int) -> int:
    """Halve."""
    if number % 2:
        raise UserError(f"{number} is odd.")
    return number // 2


def test_what_the_user_gave_wrongly_is_one_message_and_exit_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert half(3) == 2
    assert capsys.readouterr().err == "error: 3 is odd.\n"


def test_another_status_and_another_error_are_left_as_they_are() -> None:
    assert half(2) == 1
    with pytest.raises(TypeError):
        half("2")  # type: ignore[arg-type]


def test_help_is_laid_out_as_the_text_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser_of("halve", "One line.\n\n    halve 2\n").parse_args(["--help"])
    assert "One line.\n\n    halve 2\n" in capsys.readouterr().out
