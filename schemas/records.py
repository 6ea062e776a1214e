"""What stages leave beside shards, as JSON that proves itself: one place defines each file's fields."""

from typing import Any, Literal

from pydantic import Field

from schemas.config import Section
from schemas.manifest import Signed


class Provenance(Signed):
    """`<phase>/<table>/<shard>.origin`: which cache entry a run's link stands for, and how the run came by it."""

    phase: str = Field(description="the phase that the link is of")
    shard: int = Field(description="its number")
    entry: str = Field(description="the entry's name: sha256 of all that determines its content")
    origin: str = Field(description="scored | sampled | cache | reused from <folder>")
    teacher_tokens: int = Field(description="tokens that the teacher scored or sampled")
    rows: int = Field(description="rows of the entry")
    bytes: int = Field(description="its size")


class Sampled(Signed):
    """`<phase>/rollouts/<shard>.origin`: whether a run sampled a shard of rollouts, or took what the cache had of them."""

    phase: str = Field(description="the phase that the shard is of")
    shard: int = Field(description="its number")
    rollouts: str = Field(description="sha256 of the shard")
    entry: str = Field(description="name of the cache's entry: sha256 of all that determines what is sampled")
    origin: str = Field(description="sampled | cache")
    tokens: int = Field(description="tokens of the student in it")


class Audited(Signed):
    """`<entry>.audit` beside scores whose own audit memory was too small for: what a later one found."""

    scores: str = Field(description="sha256 of the scores")
    figures: dict[str, Any] = Field(
        description="as scores that were audited when they were made have them in their manifest"
    )


class Room(Section):
    """What a model is to read, in its tokens."""

    context: int = Field(description="positions that it has")
    prompt: int = Field(description="the longest prompt")
    response: int = Field(description="the longest response")


class Fit(Signed):
    """`fit.json`: that all prompts and responses fit into both models."""

    student: Room
    teacher: Room | None = Field(None, description="null: none is needed")


class Gate(Signed):
    """`<phase>/coverage.json`: what of a phase can be compared."""

    phase: str
    compared: float = Field(description="share of student tokens in units that carry loss")
    one_to_one: float = Field(description="share of student tokens in 1:1 units, roles and stops")
    shared_mass: float = Field(description="share of the teacher's kept mass that has a student id")
    by_class: list[dict[str, Any]] = Field(description="tokens, units and mass by class of text and kind of unit")
    n_to_m: list[dict[str, int]] = Field(description="n:m units by size")


class Weighed(Signed):
    """`<phase>/weights.json`: sums over all weights of a phase (`pipeline.weights.credit.Summary`), and their digests."""

    responses: int
    incomparable: int
    units: int
    advantage: float
    weight: float
    weight_squared: float
    warped: int
    right: int = 0
    wrong: int = 0
    rewarded: int = 0
    shards: dict[str, str] = Field(description="sha256 of each shard by its number")


class Measured(Section):
    """How often a held-out set was answered right (`pipeline.measure.accuracy`), and by which scorer."""

    scorer: str
    scorer_code: str | None = Field(None, description="digest of a scorer of one's own")
    extract: str | None = None
    ignore_case: bool | None = None
    pattern: str | None = None
    code_seconds: float | None = None
    code_memory_mb: int | None = None
    items: int
    judged: int
    right: int | None
    accuracy: float | None
    accuracy_95: tuple[float, float] | None
    pass_at_k: dict[str, dict[str, Any]] | None
    stopped: float


class Evaluation(Measured, Signed):
    """`eval-<c>/result.json`: a checkpoint on the held-out sets."""

    checkpoint: int | Literal["base"]
    answers: str = Field(description="sha256 of the answers beside it")
    split: str
    samples: int
    temperature: float
    top_p: float
    reverse_kl: float | None
    reverse_kl_95: tuple[float, float] | None = None
    sampled_kl: float | None
    sampled_kl_95: tuple[float, float] | None = None
    reverse_kl_bound: float | None
    reverse_kl_bound_95: tuple[float, float] | None = None
    kl_responses: int
    kl_tokens: int
    also: dict[str, Measured]


class RunSummary(Signed):
    """`summary.json`: the run's figures; its parts are `Evaluation`s and `Diagnostics` again."""

    run: str
    before: dict[str, Any]
    after: dict[str, Any]
    measured: list[dict[str, Any]] = Field(
        description="of every checkpoint that was evaluated, in order: these two too"
    )
    sft: dict[str, Any] | None
    fixed: int | None
    broken: int | None
    gain: dict[str, dict[str, Any] | None]
    reverse_kl_ratio: float | None
    phases: list[dict[str, Any]]
    teacher_tokens: dict[str, int]
    seconds: dict[str, float]
    checkpoint: str
    report: str
