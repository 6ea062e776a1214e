"""Log-probs that one of a run's policies gives to a shard of rollouts, as a table in step with it."""

from pipeline.infer.engines import open_teacher
from pipeline.infer.policy_logps import identity, longest, policy_table
from pipeline.prepared import PreparedModel
from pipeline.store.shards import open_writer
from schemas.tables import arrow_schema
from stages.run import console
from stages.run.run import Place


def write_logps(place: Place, table: str, student: PreparedModel) -> None:
    """Write `table` (`policy` or `reference`), in nats, of a checkpoint on a shard's rollouts.

    Raises OpdError when a single response is more than memory holds, or the shard can't be read or written.
    """
    run, rollouts, name = place.phase.run, place.rollouts, f"{place.phase.name} {table}"
    inputs, columns = place.inputs(table), arrow_schema(table).names
    with (
        open_teacher(student, longest(rollouts), run.settings.scores.batch_tokens, console.say) as scorer,
        console.progress(name, rollouts.rows, "responses") as advance,
        open_writer(place.path(table), table, identity(student), inputs, decided=run.decided) as writer,
    ):
        for group in rollouts.row_groups():
            writer.write(policy_table(scorer, student, group).rename_columns(columns))
            advance(len(group))
