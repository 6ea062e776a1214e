"""Reuse: take over another run's rollouts and teacher scores for this student; no teacher forward."""

import pyarrow as pa

from pipeline.align.retokenise import positions, retokenise
from pipeline.align.tokens import from_table
from pipeline.align.vocabularies import same_ids
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.prompts import LATER, asked_of
from pipeline.store.cache import link_shard, responses_digest
from pipeline.store.shards import Shard, open_shard, open_writer
from schemas.errors import OpdError
from stages.run import console
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    open_prompts,
    policy,
)
from stages.run.provenance import scored_tokens, write_provenance
from stages.run.ratios import refuse_spread
from stages.run.run import BASE, Place, Run, Source, open_run


def main(phase: PhaseOption, shard: ShardOption = 0, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Re-tokenise a shard of another run's rollouts for this student, and link the scores that a teacher gave it."""
    run = open_run(config_file, "reuse", phase)
    part = run.phase(phase)
    source = part.source
    if source is None:
        raise OpdError(f"--phase {phase}: `reuse` gives this run {len(run.reused)} rounds, numbered from 0")
    place = part[shard]
    given = open_shard(source.shard("rollouts", shard), "rollouts")
    if not source.is_scored:
        write_rollouts(place, source, given)
        return
    scores = open_shard(source.shard("scores", shard), "scores", inputs={"responses": responses_digest(given)})
    write_rollouts(place, source, given)
    link_shard(scores.path.resolve(), place.path("scores"))
    tokens = scored_tokens(scores.manifest, given.rows)
    write_provenance(place, "scores", tokens, f"reused from {source.folder}")


def write_rollouts(place: Place, source: Source, given: Shard) -> None:
    """The responses in this student's tokens, with its own prompts and the foreign behaviour policy's log-probs."""
    prompts = PromptTable(open_shard(source.run / "prompts.parquet", "prompts"))
    run = place.phase.run
    refuse_leaks(run, prompts, source)
    behavior = from_table(
        open_shard(source.run / "models/student-vocabulary.parquet", "vocabulary").read(), str(source.run)
    )
    student = policy(run, BASE)
    renderer = student.renderer(prompts)
    identity = {"student": student.ref.tokenizer, "prompt": renderer.identity, "stop_ids": student.stop.tolist()}
    identity |= {name: given.manifest.identity[name] for name in ("sampling",) if name in given.manifest.identity}
    if not same_ids(behavior[0], student.vocabulary):
        identity["spread"] = True
        refuse_spread(run, given.path)
    inputs = {"rollouts": given.manifest.sha256, "prompts": prompts.shard.manifest.sha256}
    origin = {"reused": str(source.folder), **given.manifest.origin}
    with open_writer(place.path("rollouts"), "rollouts", identity, inputs, origin, run.decided) as writer:
        for group in given.row_groups():
            rows = prompts.take(group["prompt_id"].to_pylist())
            tokens = (student.vocabulary, student.stop)
            ids = renderer.ids(rows, student.context)
            table = retokenise(group, behavior, tokens, student.text_tokenizer, student.roles, ids)
            refuse_long(table, student)
            writer.write(table)
    what = "responses and their scores" if source.is_scored else "responses"
    console.say(f"{place.phase.name}: {given.rows} {what} reused from {source.folder}")


def refuse_long(rollouts: pa.Table, student: PreparedModel) -> None:
    """Raise OpdError when a prompt and its response are longer than the student's context."""
    found = positions(rollouts).to_numpy()
    if len(found) and found.max() > student.context:
        at = int(found.argmax())
        raise OpdError(
            f"reuse: response {rollouts['rollout_id'][at].as_py()}: it and its prompt take {found[at]} tokens for "
            f"{student.ref.source}, whose context is {student.context}; take a student that has room for it"
        )


def refuse_leaks(run: Run, prompts: PromptTable, source: Source) -> None:
    """Raise OpdError when the reused run trained on what this run holds out; of imported conversations, in any turn that
    `opd import` would have left out."""
    mine = open_prompts(run)
    held_out = (row for name in ("dev", "test") for row in mine.split(name))
    if prompts.imported:
        texts = {row["prompt"] for row in held_out}
        leaked = sum(row["prompt"] in texts for name in ("train", LATER) for row in prompts.split(name))
        cure = "import it again with this config, which leaves them out, or hold out others"
    else:
        keys = {asked_of(row).key for row in held_out}
        leaked = sum(asked_of(row).key in keys for row in prompts.split("train"))
        cure = "give both the same `prompts` and `seed`, or hold out others"
    if leaked:
        raise OpdError(f"reuse: {leaked} train prompts of {source.run} are held-out prompts of this run; {cure}")


if __name__ == "__main__":
    console.run(main)
