"""From a method's name and settings to the method, and the messages on the way."""

import pytest

from baselines.h2o import H2O
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.resolve import choices, load_method, method_settings


def test_choices_are_the_files_of_the_folder():
    assert {"cam", "full", "h2o", "kvmerger", "random"} <= set(choices("method"))
    assert choices("method") == sorted(choices("method"))


def test_settings_replace_those_of_the_file():
    assert load_method("kvmerger") == KVMerger()
    assert load_method("kvmerger", {"sigma": "mean_distance", "top": 0.1}) == KVMerger(
        sigma="mean_distance", top=0.1
    )
    assert load_method("h2o", {"split": "kvmerger"}) == H2O(split="kvmerger")
    assert method_settings("kvmerger")["sigma"] == 5.0  # the file's own are untouched


def test_presets_differ_in_what_they_are_named_for():
    assert load_method("kvmerger_sized") == KVMerger(value_scale="size")
    assert load_method("kvmerger_log") == KVMerger(attn_bias="log_size")


def test_an_unknown_method():
    with pytest.raises(UserError, match=r"unknown method 'kvmergr'\. Did you mean 'kvmerger'\?"):
        load_method("kvmergr")


def test_an_unknown_setting():
    with pytest.raises(UserError, match=r"unknown setting of kvmerger 'sgima'\. Did you mean 'sigma'"):
        load_method("kvmerger", {"sgima": 3})
    with pytest.raises(UserError, match="unknown setting of h2o '_target_'"):
        load_method("h2o", {"_target_": "os.system"})


def test_a_setting_out_of_range_is_told_without_hydras_wrapping():
    with pytest.raises(UserError, match=r"^sigma=-1 must be a positive key distance"):
        load_method("kvmerger", {"sigma": -1})
