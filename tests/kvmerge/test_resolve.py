"""From a method's name and settings to the method, and the messages on the way."""

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from baselines.h2o import H2O
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.places import choices, config_dir
from kvmerge.resolve import build, load_method, method_settings


def test_choices_are_the_files_of_the_folder():
    assert {"cam", "full", "h2o", "kvmerger", "random"} <= set(choices("method"))
    assert choices("method") == sorted(choices("method"))


def test_settings_replace_those_of_the_file():
    assert load_method("kvmerger") == KVMerger()
    assert load_method("kvmerger", {"sigma": "mean_distance", "top": 0.1}) == KVMerger(
        sigma="mean_distance", top=0.1
    )
    assert load_method("h2o", {"recent": 8}) == H2O(recent=8)
    assert method_settings("kvmerger")["sigma"] == 5.0  # the file's own are untouched


def test_presets_differ_in_what_they_are_named_for():
    assert load_method("kvmerger_sized") == KVMerger(value_scale="size")
    assert load_method("kvmerger_log") == KVMerger(attn_bias="log_size")


def test_settings_are_a_copy_of_what_was_read():
    method_settings("h2o")["heavy"] = 3
    assert method_settings("h2o")["heavy"] is None


def test_a_method_loads_inside_another_hydra_application():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert load_method("kvmerger_log") == KVMerger(attn_bias="log_size")
        assert GlobalHydra.instance().is_initialized()


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'kvmergr'\. Did you mean 'kvmerger'\?"):
        load_method("kvmergr")


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown setting of kvmerger 'sgima'\. Did you mean 'sigma'"):
        load_method("kvmerger", {"sgima": 3})
    with pytest.raises(UserError, match="unknown setting of h2o '_target_'"):
        load_method("h2o", {"_target_": "os.system"})


def test_a_setting_out_of_range_is_told_without_hydras_wrapping():
    with pytest.raises(UserError, match=r"^sigma=-1 must be a positive key distance"):
        load_method("kvmerger", {"sigma": -1})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"_target_": "baselines.h2o.H2O", "score_dtype": "half"}, r"^unknown score_dtype 'half'"),
        (
            {"_target_": "baselines.h2o.H2O", "heavvy": 3},
            r"^unknown setting of baselines\.h2o\.H2O 'heavvy'\. Did you mean 'heavy'",
        ),
        (
            {"_target_": "kvmerge.kvmerger.KVMerger", "sigma": None},
            r"^sigma=None must be a number or a text\.$",
        ),
        ({"_target_": "baselines.nowhere.None"}, r"^baselines\.nowhere\.None cannot be loaded: "),
    ],
)
def test_what_cannot_be_built_is_told_in_a_sentence(config: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        build(config)


def broken() -> None:
    """A part with a fault of its own."""
    raise KeyError("absent")


def test_an_error_inside_a_part_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="absent"):
        build({"_target_": f"{__name__}.broken"})


def test_lists_of_a_configuration_arrive_as_lists() -> None:
    assert build(OmegaConf.create({"_target_": "builtins.dict", "tasks": ["a"]})) == {"tasks": ["a"]}
