"""The protocol that every engine keeps, and the values that cross it.

Owns the words between the loop and whatever runs the model: `State` goes in, `Version`, `Token`, `Score` and `Trace`
come out. Knows nothing of transformers, of files, or of why a state is wished for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from liveweight.adjustments import State
from liveweight.errors import InvalidInput

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and what its engine can do with it."""

    name: str
    source: str
    hash: str  # sha256 over the names, shapes, dtypes and bytes of the base's tensors
    architecture: str
    layers: int
    width: int  # of the residual stream
    neurons: int  # a layer (an expert, where the model has experts)
    heads: int
    vocabulary: int
    parameters: int
    dtype: str
    device: str
    tied_embeddings: bool
    experts: int = 0
    chat_template: bool = True
    gradients: bool = True
    context: int = 0  # tokens
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Version:
    """One state of the live weights: a counter for people, a hash for machines."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"v{self.number}:{self.hash[:12]}"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None  # with one, a reply does not depend on what else runs at the same time, to the last bit
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0  # how many of the likeliest tokens come with each token

    def __post_init__(self) -> None:
        """Refuse what no token can be drawn with. Raises InvalidInput naming the setting."""
        for name, fits, way_out in (
            ("max_tokens", self.max_tokens >= 0, "Give a number of tokens."),
            ("temperature", 0.0 <= self.temperature < math.inf, "Give 0 (the likeliest token) or more."),
            ("top_p", 0.0 < self.top_p <= 1.0, "Give a share above 0, at most 1."),
            ("top_k", self.top_k >= 0, "Give a number of tokens, or 0 for all."),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "Give a whole number of 64 bits."),
        ):
            if not fits:
                value = getattr(self, name)
                raise InvalidInput(f"The {name} cannot be {value}.", hint=way_out, setting=name, value=str(value))


@dataclass(frozen=True)
class Token:
    """One generated token and the version of the weights that chose it."""

    id: int
    text: str  # what is now known of the reply's text; empty inside a character, or where a stop word may have begun
    logprob: float
    version: Version
    finish: Literal["", "stop", "length"] = ""
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # watched site -> (size,)
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log-probabilities, likeliest first


@dataclass(frozen=True)
class ScoreItem:
    """A prompt and the continuation whose probability is asked for, as token ids."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-probabilities of one continuation."""

    tokens: Tensor  # (T,) the continuation
    logprobs: Tensor  # (T,) of those tokens
    argmax: Tensor  # (T,) what greedy decoding would have chosen at each position

    @property
    def total(self) -> float:
        """The continuation's log-probability in nats."""
        return float(self.logprobs.sum())

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood a token, in nats."""
        return float(-self.logprobs.mean())

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding gives exactly this continuation."""
        return bool((self.tokens == self.argmax).all())


@dataclass(frozen=True)
class Objective:
    """What a gradient is taken of: sum_t log p(tokens[t]) - log p(against[t]) at the answer's positions."""

    answer: tuple[int, ...]
    against: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What was read at each site on one forward (and backward) pass."""

    tokens: tuple[int, ...]
    values: Mapping[str, Tensor]  # site -> (T, size)
    gradients: Mapping[str, Tensor]  # site -> (T, size), empty without an objective
    objective: float | None
    version: Version


@runtime_checkable
class Engine(Protocol):
    """Runs one model and makes it be the state it is told."""

    @property
    def info(self) -> ModelInfo:
        """What the model is and what can be done with it."""
        ...

    @property
    def version(self) -> Version:
        """Which state the weights are in."""
        ...

    def become(self, state: State) -> Version:
        """Make the model be `state`, between two steps, all or nothing."""
        ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """A chat as the tokens that the model answers to."""
        ...

    def generate(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[Token]:
        """Answer a chat, token by token."""
        ...

    def score(self, items: Sequence[ScoreItem]) -> list[Score]:
        """Teacher-forced log-probabilities of continuations."""
        ...

    def trace(self, tokens: Sequence[int], sites: Sequence[str], gradient_of: Objective | None = None) -> Trace:
        """Read sites on one forward pass, and the objective's gradient there."""
        ...
