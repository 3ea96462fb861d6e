"""The settings: one class, and where each value came from.

Owns names, defaults, bounds and the order of precedence (flags > LIVEWEIGHT_* environment > TOML > defaults). Knows
nothing of what the values are used for. Nested names are spelt with two underscores in the environment
(`LIVEWEIGHT_GUARD__TOKENS=16`) and as a table in TOML (`[guard]`, `tokens = 16`).

The TOML file is the one that `LIVEWEIGHT_CONFIG` names, else `liveweight.toml` in the working folder, else
`liveweight.toml` in the user's configuration folder. No file at all is fine; a named one that is missing is not.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from liveweight.errors import InvalidInput

ENV_PREFIX = "LIVEWEIGHT_"
CONFIG_VARIABLE = "LIVEWEIGHT_CONFIG"
# Variables with our prefix that are not settings: where the file is, and the test suite's own switches.
_NOT_SETTINGS = ("LIVEWEIGHT_CONFIG", "LIVEWEIGHT_TEST_")


def _expanded(path: Path | None) -> Path | None:
    """A path as a person writes it, with what ~ stands for."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:  # there is no such user
        raise ValueError(str(error)) from error


class _Group(BaseModel):
    """A frozen group of settings; a misspelt name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GenerationSettings(_Group):
    """How replies are generated, unless a request says otherwise."""

    max_tokens: int = Field(default=128, ge=1, description="The most tokens a reply may have.")
    temperature: float = Field(
        default=0.0, ge=0.0, description="How freely tokens are drawn; 0 always takes the likeliest."
    )
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Tokens are drawn from the likeliest ones of this mass."
    )
    system: str | None = Field(
        default=None, description="The system prompt of every chat; unset keeps the model's own."
    )


class GuardSettings(_Group):
    """How much else a change may move before it is refused."""

    tokens: int = Field(default=8, ge=1, description="Tokens of each protected answer over which KL is measured.")
    max_mean_kl: float = Field(default=0.01, ge=0.0, description="The largest mean KL, in nats a token.")
    max_p95_kl: float = Field(
        default=0.05, ge=0.0, description="The largest 95th percentile of the items' KL, in nats."
    )
    max_worst_kl: float = Field(default=1.0, ge=0.0, description="The largest KL of any single item, in nats.")
    max_changed_answers: float = Field(
        default=0.02, ge=0.0, le=1.0, description="The largest share of answers that change."
    )
    max_perplexity_ratio: float = Field(
        default=1.005, gt=0.0, description="The largest perplexity, as a ratio to before."
    )
    screen_items: int = Field(default=24, ge=1, description="Probe items that a method screens its candidates with.")
    probe_file: Path | None = Field(
        default=None, description="A JSON Lines file of probes used instead of the built-in set."
    )

    _expand = field_validator("probe_file")(_expanded)


class MethodSettings(_Group):
    """How methods look for a change."""

    method: str = Field(
        default="auto", min_length=1, description="The method that proposes; auto climbs the whole ladder."
    )
    layer: int | None = Field(default=None, ge=0, description="The layer to edit; unset lets the method choose.")
    max_steps: int = Field(default=25, ge=1, description="The most optimisation steps a method may take.")
    target_probability: float = Field(
        default=0.9, gt=0.0, lt=1.0, description="Optimisation stops at this answer probability."
    )
    margin: float = Field(
        default=6.0, gt=0.0, description="Nats by which rome, implant, memit and alphaedit let the answer lead."
    )
    clamp_norm: float = Field(
        default=4.0, gt=0.0, description="The largest new value, as a multiple of the old one's norm."
    )
    max_contexts: int = Field(
        default=7, ge=1, description="The most contexts of a question that a method optimises on."
    )
    held: int = Field(
        default=3,
        ge=0,
        description="Other questions about a subject whose answers rome, implant, memit and alphaedit hold; "
        "the fewer, the more wordings of the question are reached.",
    )
    max_neurons: int = Field(
        default=256, ge=1, description="The most neurons that select, contrast, scale and gain may change."
    )
    slopes: bool = Field(
        default=False, description="Whether gain may move slopes too, which cannot be folded into weights."
    )
    form: Literal["unit", "path"] = Field(
        default="unit", description="Whether scale changes what neurons write or the paths between them."
    )
    eta: float = Field(
        default=0.5, gt=0.0, le=1.0, description="How far scale moves a weight: by 1 - eta for bad, 1 + eta for good."
    )
    covariance_text: Path | None = Field(
        default=None, description="A plain text to take key statistics from; unset is ours."
    )

    _expand = field_validator("covariance_text")(_expanded)


class ServerSettings(_Group):
    """How `liveweight serve` listens, and what it lets in."""

    host: str = Field(default="127.0.0.1", min_length=1, description="The address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    page: bool = Field(default=True, description="Whether the page is served beside the API.")
    rows: int = Field(default=8, ge=1, description="Replies that are decoded together at most.")
    waiting: int = Field(default=64, ge=0, description="Requests that may wait for their turn; more get a 429.")
    origins: tuple[str, ...] = Field(
        default=(), description="Web origins, besides the page's own, whose scripts may call the API."
    )
    names: tuple[str, ...] = Field(
        default=(), description="Host names, besides localhost, by which a server on loopback may be called."
    )
    max_body_bytes: int = Field(default=1_000_000, ge=1024, description="The largest request body.")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="The longest prompt; unset is what the model's context takes."
    )
    requests_per_minute: int = Field(
        default=600, ge=1, description="Requests that one key (one address, without keys) may make a minute."
    )
    request_seconds: float = Field(
        default=15.0, gt=0.0, description="Seconds within which a request must have arrived whole."
    )
    change_seconds: float = Field(
        default=30.0,
        ge=0.0,
        description="Seconds that a switch (off, on, undo, strength) waits for a change in the making.",
    )
    stop_seconds: float = Field(
        default=20.0, ge=0.0, description="Seconds that replies and jobs get to end when the server is stopped."
    )
    log_prompts: bool = Field(default=False, description="Whether logs may hold what people and the model say.")


class Settings(BaseSettings):
    """Everything that can be set. Raises InvalidInput for a value that cannot be used, saying where it came from."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

    model: str = Field(
        default="smollm2", min_length=1, description="The model: smollm2, a hub id, a folder or a .gguf file."
    )
    revision: str | None = Field(
        default=None, description="The branch, tag or commit of a hub model; unset is its main."
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether a model may run Python code that it brings along."
    )
    workspace: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("liveweight"),
        description="The folder of the ledger and of its blobs.",
    )
    database_url: str | None = Field(
        default=None, description="The ledger's database; unset is SQLite in the workspace."
    )
    cache_dir: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("liveweight"),
        description="The folder of what can be computed again: converted models and reference outputs.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="Where the model runs: auto, cpu, mps, cuda or cuda:N.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="The weights' type; auto is float32 on a CPU and bfloat16 on a GPU."
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads to compute with; unset leaves it to torch."
    )
    spare_neurons: int = Field(
        default=256,
        ge=0,
        description="New neurons that each of three early and three late layers gets; the ledger's must fit.",
    )
    gate: Literal["refresh", "drain"] = Field(
        default="refresh",
        description="Whether a change lets running replies refresh their cache or waits for them to end.",
    )
    gate_patience: float = Field(
        default=30.0, ge=0.0, description="Seconds that a change waits, where the gate is drain, for replies to end."
    )
    generation: GenerationSettings = Field(default=GenerationSettings(), description="How replies are generated.")
    guard: GuardSettings = Field(default=GuardSettings(), description="How much else a change may move.")
    methods: MethodSettings = Field(default=MethodSettings(), description="How methods look for a change.")
    server: ServerSettings = Field(default=ServerSettings(), description="How the model is served.")

    _expand = field_validator("workspace", "cache_dir")(_expanded)

    def __init__(self, **flags: Any) -> None:
        """Read every source. `flags` win over the environment, which wins over the TOML file."""
        _refuse_unknown_variables()
        try:
            super().__init__(**flags)
        except ValidationError as error:
            raise _explained(error, flags) from error
        except SettingsError as error:
            raise _not_json(error) from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then TOML; neither .env files nor secrets folders."""
        toml = InitSettingsSource(settings_cls, init_kwargs=_read_toml(config_file()))
        return init_settings, env_settings, toml


def config_file() -> Path | None:
    """The TOML file that is read, or None. Raises InvalidInput if LIVEWEIGHT_CONFIG names a file that is not there."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise InvalidInput(
                f"{CONFIG_VARIABLE} names {named!r}, which is not a file.",
                hint=f"Create it, or unset {CONFIG_VARIABLE}.",
                setting=CONFIG_VARIABLE,
                value=named,
            )
        return path
    for folder in (Path.cwd(), platformdirs.user_config_path("liveweight")):
        try:
            if (folder / "liveweight.toml").is_file():
                return folder / "liveweight.toml"
        except PermissionError:  # a folder that this user may not look into holds nothing for them
            continue
    return None


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as TOML: {error}.", hint="Mend or remove that file.") from error


def _variable_names() -> set[str]:
    """Every environment variable that is a setting, in upper case; groups too, which take JSON."""
    names: set[str] = set()
    for name, field in Settings.model_fields.items():
        names.add(f"{ENV_PREFIX}{name}".upper())
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Group):
            names |= {f"{ENV_PREFIX}{name}__{inner}".upper() for inner in field.annotation.model_fields}
    return names


def _refuse_unknown_variables() -> None:
    """A misspelt variable would otherwise be ignored without a word."""
    known = _variable_names()
    for variable, value in os.environ.items():
        upper = variable.upper()
        if not upper.startswith(ENV_PREFIX) or upper in known or upper.startswith(_NOT_SETTINGS):
            continue
        close = difflib.get_close_matches(upper, known, n=1)
        raise InvalidInput(
            f"The environment variable {variable} (now {value!r}) is not a setting.",
            hint=f"Did you mean {close[0]}?" if close else f"Unset {variable}.",
            setting=variable,
            value=value,
        )


def _not_json(error: SettingsError) -> InvalidInput:
    """Say of an environment variable that holds many values which one it is, and how it is written."""
    value = getattr(error.__cause__, "doc", None)  # what could not be read as JSON
    known = _variable_names()
    variable = next((name for name, held in os.environ.items() if held == value and name.upper() in known), None)
    if variable is None:
        return InvalidInput(f"The settings cannot be read: {error}.", hint="See the LIVEWEIGHT_ variables.")
    return InvalidInput(
        f"The environment variable {variable} cannot be {value!r}: it is not JSON.",
        hint='Write a list as ["one", "two"], a group of settings as {"name": value}, or unset it.',
        setting=variable,
        value=value,
    )


def _explained(error: ValidationError, flags: dict[str, Any]) -> InvalidInput:
    """Say of the first bad value which setting it is, where it came from and what would do."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    value = first.get("input")
    source = _source_of(path, flags)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(path[:-1])
        close = difflib.get_close_matches(path[-1], fields, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"The settings there are: {', '.join(sorted(fields))}."
        return InvalidInput(f"{name} (from {source}) is not a setting.", hint=hint, setting=name, source=source)
    return InvalidInput(
        f"The setting {name} cannot be {value!r} (from {source}): {first['msg']}.",
        hint=f"{_description_at(path)} Correct it there, or remove it to get the default.",
        setting=name,
        value=repr(value),
        source=source,
    )


def _source_of(path: list[str], flags: dict[str, Any]) -> str:
    if _holds(flags, path):
        return "a flag"
    # A whole group may be one JSON variable, so the variable can be named after any beginning of the path.
    environment = {variable.upper(): variable for variable in os.environ}
    for length in range(len(path), 0, -1):
        variable = (ENV_PREFIX + "__".join(path[:length])).upper()
        if variable in environment:
            return f"the environment variable {environment[variable]}"
    file = config_file()
    return str(file) if file is not None and _holds(_read_toml(file), path) else "the defaults"


def _holds(values: Any, path: list[str]) -> bool:
    for part in path:
        if isinstance(values, BaseModel):
            values = values.model_dump()
        if not isinstance(values, dict):
            return True  # the group itself is the bad value
        if part not in values:
            return False
        values = values[part]
    return True


def _fields_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in path:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def _description_at(path: list[str]) -> str:
    model: type[BaseModel] = Settings
    description = ""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            break
        description = field.description or ""
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return description
