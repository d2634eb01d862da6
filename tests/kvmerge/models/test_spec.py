"""What a model's configuration says of its attention."""

from types import SimpleNamespace

import pytest

from kvmerge.models import attention_sizes


@pytest.mark.parametrize(
    ("stated", "sizes"),
    [
        ({}, (4, 4, 16)),
        ({"num_key_value_heads": 2}, (4, 2, 16)),
        ({"head_dim": 32}, (4, 4, 32)),
        ({"num_key_value_heads": None, "head_dim": None}, (4, 4, 16)),
    ],
)
def test_attention_sizes_are_those_stated_or_implied(stated, sizes):
    config = SimpleNamespace(num_attention_heads=4, hidden_size=64, **stated)
    assert attention_sizes(config) == sizes
