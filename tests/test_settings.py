"""The settings: precedence, where a bad value came from, and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from liveweight.errors import InvalidInput
from liveweight.live_model import LiveModel
from liveweight.settings import GuardSettings, Settings, config_file


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the person who runs the tests reach them."""
    import os

    for name in [name for name in os.environ if name.upper().startswith("LIVEWEIGHT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user-config"))
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_the_documented_ones() -> None:
    settings = Settings()
    assert (settings.model, settings.device, settings.dtype, settings.gate) == ("smollm2", "auto", "auto", "refresh")
    assert settings.generation.max_tokens == 128
    assert settings.guard == GuardSettings(
        tokens=8,
        max_mean_kl=0.01,
        max_p95_kl=0.05,
        max_worst_kl=1.0,
        max_changed_answers=0.02,
        max_perplexity_ratio=1.005,
        screen_items=24,
    )
    assert settings.trust_remote_code is False
    assert settings.workspace.is_absolute() and settings.cache_dir.is_absolute()


def test_every_setting_has_one_sentence() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), name
            assert field.description.count(". ") == 0, name
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(Settings)


def test_a_flag_wins_over_the_environment_which_wins_over_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liveweight.toml").write_text(
        'model = "toml"\nrevision = "toml"\ngate = "drain"\n[guard]\ntokens = 5\nscreen_items = 6\n'
    )
    monkeypatch.setenv("LIVEWEIGHT_MODEL", "environment")
    monkeypatch.setenv("LIVEWEIGHT_REVISION", "environment")
    monkeypatch.setenv("LIVEWEIGHT_GUARD__TOKENS", "7")
    settings = Settings(model="flag", guard={"max_mean_kl": 0.5})
    assert (settings.model, settings.revision, settings.gate) == ("flag", "environment", "drain")
    assert (settings.guard.max_mean_kl, settings.guard.tokens, settings.guard.screen_items) == (0.5, 7, 6)


def test_the_file_is_the_named_one_else_the_working_folder_s_else_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config_file() is None
    user = tmp_path / "user-config" / "liveweight" / "liveweight.toml"
    user.parent.mkdir(parents=True)
    user.write_text('model = "user"')
    assert config_file() == user and Settings().model == "user"
    (tmp_path / "liveweight.toml").write_text('model = "folder"')
    assert Settings().model == "folder"
    named = tmp_path / "other.toml"
    named.write_text('model = "named"')
    monkeypatch.setenv("LIVEWEIGHT_CONFIG", str(named))
    assert Settings().model == "named"


def test_a_named_file_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEWEIGHT_CONFIG", "nowhere.toml")
    with pytest.raises(InvalidInput, match=r"nowhere\.toml.*unset LIVEWEIGHT_CONFIG"):
        Settings()


def test_a_file_that_is_not_toml_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "liveweight.toml").write_text("model = ")
    with pytest.raises(InvalidInput, match=r"liveweight\.toml cannot be read as TOML"):
        Settings()


def test_a_bad_flag_names_setting_value_and_source() -> None:
    with pytest.raises(InvalidInput, match=r"guard\.tokens cannot be 0 \(from a flag\)") as caught:
        Settings(guard={"tokens": 0})
    assert caught.value.details["setting"] == "guard.tokens"
    assert "KL is measured" in caught.value.hint


def test_a_bad_environment_variable_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEWEIGHT_GENERATION__TEMPERATURE", "-1")
    with pytest.raises(InvalidInput, match=r"generation\.temperature.*-1.*variable LIVEWEIGHT_GENERATION__TEMPERATURE"):
        Settings()


def test_a_bad_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "liveweight.toml").write_text('dtype = "int8"')
    with pytest.raises(InvalidInput, match=r"dtype cannot be 'int8' \(from .*liveweight\.toml\)"):
        Settings()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU "])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(InvalidInput, match="device cannot be"):
        Settings(device=device)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_budget_that_is_no_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEWEIGHT_GUARD__MAX_MEAN_KL", value)
    with pytest.raises(InvalidInput, match="max_mean_kl"):
        Settings()


def test_a_misspelt_setting_is_refused_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"modell .*not a setting.*Did you mean 'model'"):
        Settings(modell="x")
    (tmp_path / "liveweight.toml").write_text("[guard]\ntoken = 3\n")
    with pytest.raises(InvalidInput, match=r"guard\.token .*liveweight\.toml.*Did you mean 'tokens'"):
        Settings()
    (tmp_path / "liveweight.toml").unlink()
    monkeypatch.setenv("LIVEWEIGHT_GUARD__TOKEN", "3")
    with pytest.raises(InvalidInput, match=r"LIVEWEIGHT_GUARD__TOKEN .*Did you mean LIVEWEIGHT_GUARD__TOKENS"):
        Settings()


def test_the_test_suite_s_own_switches_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEWEIGHT_TEST_NO_SKIP", "1")
    assert Settings().model == "smollm2"


def test_settings_cannot_be_changed_after_they_were_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().model = "other"  # type: ignore[misc]  # the assignment is what is tested


def test_every_setting_stands_in_the_docs() -> None:
    docs = Path(__file__).parents[1] / "docs"
    said = {page.name: page.read_text(encoding="utf-8") for page in docs.glob("*.md")}
    everywhere = "".join(said.values())
    missing = []
    for name, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if name == "server":
            missing += [f"server.{each}" for each in inner or () if f"`{each}`" not in said["server.md"]]
        elif inner is not None:
            missing += [f"{name}.{each}" for each in inner if f"`{name}.{each}`" not in everywhere]
        elif f"`{name}`" not in everywhere:
            missing.append(name)
    assert missing == []


def test_everything_public_of_a_live_model_stands_in_the_docs() -> None:
    said = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    public = [name for name in dir(LiveModel) if not name.startswith("_")]
    assert [name for name in public if f"`{name}" not in said and f"LiveModel.{name}" not in said] == []


@pytest.mark.parametrize(
    ("variable", "value", "form"),
    [("LIVEWEIGHT_SERVER__ORIGINS", "https://a.b", '["one", "two"]'), ("LIVEWEIGHT_GUARD", "abc", '{"name": value}')],
)
def test_a_variable_of_many_values_that_is_not_json_is_named(
    variable: str, value: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput, match=f"{variable} cannot be '{value}'") as caught:
        Settings()
    assert form in (caught.value.hint or "")


def test_a_home_is_written_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings(workspace="~/a", cache_dir="~/b", guard={"probe_file": "~/c"})
    assert (settings.workspace, settings.cache_dir) == (tmp_path / "a", tmp_path / "b")
    assert settings.guard.probe_file == tmp_path / "c"
    with pytest.raises(InvalidInput, match="workspace"):
        Settings(workspace="~nobody-of-that-name/a")
