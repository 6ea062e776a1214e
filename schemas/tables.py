"""Arrow schemas of every table on disk. One place defines a column, its type and its meaning (`opd schema` prints it)."""

import math
from dataclasses import dataclass

import pyarrow as pa

LARGEST = 1e10
"""No weight, ratio or sum of advantages is larger: ratios are clipped to e^20, what multiplies them is small."""
STOP_ID = -1
"""`cand_id` of the stop candidate: any token of the reader's stop set (ids of real tokens are never negative)."""


@dataclass(frozen=True)
class Column:
    """A column: its name, Arrow type, and unit, shape and meaning in words."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    encoding: str | None = None
    """Parquet encoding of its values where measured better than the writer's choice; `dictionary` is one. docs/cache.md"""
    low: float = -math.inf
    high: float = math.inf
    """What its numbers, of lists the elements, lie between. With a bound, NaN is none that a writer makes either."""

    @property
    def bounded(self) -> bool:
        """Whether it has a bound."""
        return self.low > -math.inf or self.high < math.inf


SPLIT, DELTA, DICTIONARY = "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "dictionary"


def _list(of: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", of, nullable=False))


def _struct(**fields: pa.DataType) -> pa.DataType:
    """Of fields that are never null but for `role`."""
    return pa.struct([pa.field(name, of, nullable=name == "role") for name, of in fields.items()])


PROMPTS = (
    Column("prompt_id", pa.string(), "name of the prompt, unique in the run, stable for the same source row"),
    Column(
        "split",
        pa.string(),
        "examples | train | dev | test, no prompt in two of them; in also.parquet the name of a set; of imported rollouts "
        "train, and later for what users say after the first answer",
    ),
    Column(
        "prompt", pa.string(), "the bare question, before any template; of a conversation the last user message's text"
    ),
    Column(
        "messages",
        pa.string(),
        "JSON list of the conversation's messages (role, content, tool_calls, ...) that the model is to answer; null where the "
        "question is all there is",
        nullable=True,
    ),
    Column(
        "tools",
        pa.string(),
        "JSON list of the schemas of the tools it may call; null when there are none",
        nullable=True,
    ),
    Column("answer", pa.string(), "reference answer; null when the source has none", nullable=True),
    Column("fields", pa.string(), "JSON object of the source row's other fields; templates may use them"),
)

VOCABULARY = (
    Column("token_id", pa.int32(), "id, ascending from 0 without gaps"),
    Column(
        "bytes",
        pa.large_binary(),
        "bytes the id contributes to a text; null: special, padding or unreachable",
        nullable=True,
    ),
    Column("special", pa.bool_(), "a special token of the tokenizer"),
    Column("canonical", pa.bool_(), "the one id that stands for these bytes when several do"),
    Column("stop", pa.bool_(), "ends a response"),
    Column(
        "role",
        pa.string(),
        "what the id says by itself beside text, such as begin_thinking; of another special token its content. Ids of two "
        "models with the same role are a pair, whatever their bytes",
        nullable=True,
    ),
)

ROLLOUTS = (
    Column(
        "rollout_id",
        pa.string(),
        "unique name of the response within the run: r<round>, e<checkpoint> or t (the teacher's), prompt, sample",
    ),
    Column("prompt_id", pa.string(), "the prompt it answers"),
    Column("sample", pa.int32(), "0, 1, ... among the samples of one prompt", low=0),
    Column(
        "round",
        pa.int32(),
        "refresh round whose policy sampled it; -1: the teacher, or the student before `sft`",
        low=-1,
    ),
    Column("prompt_ids", _list(pa.int32()), "student token ids of the rendered prompt, BOS included", low=0),
    Column(
        "response_ids",
        _list(pa.int32()),
        "student token ids as sampled, the stop token included; never re-tokenised",
        low=0,
    ),
    Column(
        "response",
        pa.string(),
        "the response as text: role tokens by their content, U+FFFD for broken characters, and without what is no UTF-8 at "
        "the end of a stretch of text",
    ),
    Column(
        "segments",
        _list(_struct(role=pa.string(), tokens=pa.int32(), bytes=pa.int32(), text=pa.bool_(), loss=pa.bool_())),
        "what the response consists of, in order, the final stop left out: text (role null) and what text can't say "
        "(begin_thinking, end_turn, ..., or a special token by its content), each with its number of response ids, its bytes "
        "in `response`, whether those are read as text by a model without that role, and whether it carries loss or was only "
        "read, as a tool's result is; null: one text that does",
        nullable=True,
    ),
    Column(
        "broken",
        _list(_struct(byte=pa.int32(), raw=pa.int32())),
        "byte offset in `response` of each U+FFFD that stands for bytes that are no UTF-8, and how many; null: none",
        nullable=True,
    ),
    Column(
        "behavior_logp",
        _list(pa.float32()),
        "nats, one per response id: log-prob under the sampling model at temperature 1; "
        "at a final stop token that of stopping at all (log-sum-exp over the stop set)",
    ),
    Column(
        "sampler_logp",
        _list(pa.float32()),
        "nats, one per response id under the sampler (temperature, top-p applied), at a final stop token that of stopping; "
        "what importance ratios are to; null when it is the model itself, or was not kept",
        nullable=True,
    ),
    Column(
        "top_id",
        _list(_list(pa.int32())),
        "for each response id, the ids that the sampling model found likeliest there; null when not asked for "
        "(`rollouts.top_k`)",
        nullable=True,
        low=0,
    ),
    Column("finish_reason", pa.string(), "stop: the student sampled a stop token | length: cut at max_new_tokens"),
    Column("answer", pa.string(), "reference answer of the prompt", nullable=True),
)

SCORES = (
    Column("rollout_id", pa.string(), "the response; its rows are consecutive, ordered by pos", encoding=DICTIONARY),
    Column(
        "pos",
        pa.int32(),
        "index of the teacher token in the response; the last row is the end of the response",
        encoding=DELTA,
        low=0,
    ),
    Column(
        "byte_start",
        pa.int32(),
        "byte offset in `response` (UTF-8) where the token starts; -1 where tokens spell other bytes",
        encoding=DELTA,
    ),
    Column(
        "byte_end", pa.int32(), "byte offset where it ends, likewise; equals byte_start in the end row", encoding=DELTA
    ),
    Column("token_id", pa.int32(), "teacher id of the realised token; -1 in the end row", low=-1),
    Column(
        "segment",
        pa.int32(),
        "which of the rollout's `segments` the token spells, from 0; null: it has but one",
        nullable=True,
        encoding=DELTA,
    ),
    Column(
        "logp", pa.float32(), "nats, teacher log-prob of the realised token; of stopping in the end row", encoding=SPLIT
    ),
    Column("entropy", pa.float32(), "nats, entropy of the teacher's next-token distribution", encoding=SPLIT),
    Column("stop_logp", pa.float32(), "nats, log of the teacher's mass on its stop set", encoding=SPLIT),
    Column(
        "tail_logp",
        pa.float32(),
        "nats, log of the mass on neither candidates nor stop set; -inf when none is left",
        encoding=SPLIT,
    ),
    Column(
        "log_z",
        pa.float32(),
        "nats, log of the teacher's normaliser: a raw logit is its log-prob and this; null when not asked for (`scores.log_z`)",
        nullable=True,
        encoding=SPLIT,
    ),
    Column(
        "cand_id",
        _list(pa.int32()),
        "teacher ids of the kept candidates, by falling log-prob; no stop tokens",
        encoding=SPLIT,
        low=STOP_ID,
    ),
    Column(
        "cand_logp",
        _list(pa.float32()),
        "nats, their log-probs to 5 binary digits, never renormalised",
        encoding=DICTIONARY,
    ),
)

UNITS = (
    Column("rollout_id", pa.string(), "the response; its rows are consecutive, ordered by unit", encoding=DICTIONARY),
    Column("unit", pa.int32(), "index of the unit in the response", encoding=DELTA, low=0),
    Column(
        "kind",
        pa.string(),
        "1:1 | n:m | stop | role (what text can't say, each model in its own tokens) | masked (not comparable: no loss, "
        "counted) | context (not the student's own: no loss)",
        encoding=DICTIONARY,
    ),
    Column("s_start", pa.int32(), "first student token of the unit in response_ids", encoding=DELTA, low=0),
    Column("s_len", pa.int32(), "number of student tokens", low=0),
    Column("t_start", pa.int32(), "first teacher token of the unit (`pos` of scores)", encoding=DELTA, low=-1),
    Column("t_len", pa.int32(), "number of teacher tokens", low=0),
    Column("byte_start", pa.int32(), "where the unit starts in `response`, bytes", encoding=DELTA),
    Column("byte_end", pa.int32(), "where it ends", encoding=DELTA),
    Column(
        "teacher_logp",
        pa.float32(),
        "nats, sum of the teacher's log-probs over the unit; null when masked",
        nullable=True,
        encoding=SPLIT,
    ),
    Column(
        "teacher_entropy",
        pa.float32(),
        "nats, entropy of the teacher's whole next-token distribution at the unit's start; null when masked",
        nullable=True,
        encoding=SPLIT,
    ),
    Column(
        "t_log_z",
        pa.float32(),
        "nats, mean of the teacher's log Z over the unit's tokens less that at its start: what its mean raw logit is above its "
        "mean log-prob, on the scale of the candidates; null when masked or when the scores lack `log_z`",
        nullable=True,
        encoding=SPLIT,
    ),
    Column(
        "cand_id",
        _list(pa.int32()),
        f"student ids of the teacher's candidates at the unit's start; {STOP_ID} is the student's stop set",
        encoding=SPLIT,
        low=STOP_ID,
    ),
    Column("cand_logp", _list(pa.float32()), "nats, the teacher's log-probs of those candidates", encoding=DICTIONARY),
    Column("tail_logp", pa.float32(), "nats, teacher mass outside its own kept candidates (see scores)", nullable=True),
    Column("dropped_logp", pa.float32(), "nats, teacher mass kept in scores that has no student id", nullable=True),
)

POLICY = (
    Column("rollout_id", pa.string(), "same rows in the same order as rollouts"),
    Column(
        "policy_logp",
        _list(pa.float32()),
        "nats, one per response id: log-prob under the phase's policy; at a final stop token that of stopping",
    ),
)

WEIGHTS = (
    Column("rollout_id", pa.string(), "same rows in the same order as units"),
    Column("unit", pa.int32(), "index of the unit in the response", low=0),
    Column(
        "student_logp",
        pa.float32(),
        "nats, sum of the policy's log-probs over the unit; null when masked",
        nullable=True,
    ),
    Column("advantage", pa.float32(), "nats, teacher_logp - student_logp; 0 when masked", low=-LARGEST, high=LARGEST),
    Column(
        "credit",
        pa.float32(),
        "nats, credit assignment's sum of advantages, each clipped to `objective.clip` before",
        low=-LARGEST,
        high=LARGEST,
    ),
    Column("weight", pa.float32(), "importance weight of the unit's loss", low=-LARGEST, high=LARGEST),
    Column(
        "is_ratio",
        pa.float32(),
        "pi_theta / pi_sampler of the unit, clipped to e^+-20; 1 when sampled by this policy at temperature 1 and top-p 1",
        low=0,
        high=LARGEST,
    ),
    Column(
        "reward",
        pa.float32(),
        "advantage of the response's outcome over those of its prompt's other responses (`weights.reward`), the same at each "
        "of its units; null when not asked for, or where it can't be told",
        nullable=True,
        low=-LARGEST,
        high=LARGEST,
    ),
    Column(
        "reference_logp",
        pa.float32(),
        "nats, sum of the log-probs of the run's first policy over the unit (`objective.reference`); null when masked, when "
        "not asked for, and where that is the policy itself",
        nullable=True,
    ),
)

REFERENCE = (
    Column("rollout_id", pa.string(), "same rows in the same order as rollouts"),
    Column(
        "reference_logp",
        _list(pa.float32()),
        "nats, one per response id: log-prob under the run's first policy; at a final stop token that of stopping",
    ),
)

OUTCOMES = (
    Column("rollout_id", pa.string(), "same rows in the same order as rollouts"),
    Column("judged", pa.string(), "what of the response was judged"),
    Column("right", pa.bool_(), "whether it is right; null where it can't be told", nullable=True),
)

ANSWERS = (
    Column("set", pa.string(), "the held-out set: the run's own split, or a name in `evaluate.also`"),
    Column("prompt_id", pa.string(), "the prompt; its answers are consecutive"),
    Column("sample", pa.int32(), "0, 1, ... among the answers to one prompt", low=0),
    Column("prompt", pa.string(), "the bare question"),
    Column("reference", pa.string(), "reference answer; null when there is none", nullable=True),
    Column("response", pa.string(), "what the checkpoint said"),
    Column("answer", pa.string(), "what of it was judged; null when nothing was found", nullable=True),
    Column("right", pa.bool_(), "whether it is right; null where it can't be told", nullable=True),
    Column("stopped", pa.bool_(), "whether it ended by itself"),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "prompts": PROMPTS,
    "vocabulary": VOCABULARY,
    "rollouts": ROLLOUTS,
    "scores": SCORES,
    "units": UNITS,
    "policy": POLICY,
    "reference": REFERENCE,
    "outcomes": OUTCOMES,
    "weights": WEIGHTS,
    "answers": ANSWERS,
}


def arrow_schema(kind: str) -> pa.Schema:
    """Arrow schema of a table, with every column's doc in its field metadata."""
    return pa.schema([pa.field(c.name, c.type, c.nullable, {"doc": c.doc}) for c in TABLES[kind]])


def writer_options(kind: str) -> dict[str, object]:
    """Options of `pyarrow.parquet.ParquetWriter` for a table's columns."""
    paths = {c.name: c.name + ".list.element" * str(c.type).count("list<") for c in TABLES[kind]}
    chosen = {paths[c.name]: c.encoding for c in TABLES[kind] if c.encoding}
    return {
        # Text is coded by dictionary unless another encoding is named.
        "use_dictionary": [
            paths[c.name]
            for c in TABLES[kind]
            if c.encoding == DICTIONARY or (not c.encoding and c.type == pa.string())
        ],
        "column_encoding": {path: encoding for path, encoding in chosen.items() if encoding != DICTIONARY},
    }
