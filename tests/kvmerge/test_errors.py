"""Messages for names that do not exist."""

import kvmerge
from kvmerge.errors import UserError, unknown


def test_unknown_says_what_exists_and_what_is_near():
    error = unknown("method", "kvmerge", ["h2o", "cam", "kvmerger"])
    assert isinstance(error, UserError)
    assert str(error) == (
        "unknown method 'kvmerge'. Did you mean 'kvmerger'? Available: cam, h2o, kvmerger."
    )


def test_unknown_guesses_nothing_far():
    assert "Did you mean" not in str(unknown("method", "xyz", ["h2o", "cam"]))


def test_the_package_gives_its_public_names():
    for name in kvmerge.__all__:
        assert getattr(kvmerge, name).__name__ == name
