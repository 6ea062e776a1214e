"""Units: align a scored shard to this student's tokens."""

from pipeline.align.student_view import student_view
from pipeline.align.vocabularies import pair_ids, same_ids
from pipeline.store.shards import open_writer
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, ShardOption, policy, teacher
from stages.run.run import open_run


def main(phase: PhaseOption, shard: ShardOption = 0, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Find the aligned units of a shard and express the teacher's candidates in student ids."""
    run = open_run(config_file, "units", phase)
    place = run.phase(phase)[shard]
    student, scorer = policy(run, place.phase.number, weights=False), teacher(run, weights=False)
    rollouts, scores = place.rollouts, place.scores
    scores.expect({"teacher": scorer.ref.identity(), "stop_ids": scorer.stop.tolist()})
    pairs = pair_ids(scorer.vocabulary, student.vocabulary)
    identity = {
        "student_vocabulary": student.vocabulary_shard.manifest.sha256,
        "teacher_vocabulary": scorer.vocabulary_shard.manifest.sha256,
        "log_z": scores.manifest.identity["scores"]["log_z"],
    }
    same = scores.manifest.identity["reads"] == "tokens" and same_ids(scorer.vocabulary, student.vocabulary)
    counts: dict[str, int] = {}
    with open_writer(place.path("units"), "units", identity, place.inputs("units"), decided=run.decided) as writer:
        for sampled, scored in zip(rollouts.row_groups(), scores.row_groups(), strict=True):
            units = student_view(sampled, scored, student.vocabulary, student.stop, scorer.stop, pairs, same)
            for row in units.group_by("kind").aggregate([("s_len", "sum")]).to_pylist():
                counts[row["kind"]] = counts.get(row["kind"], 0) + row["s_len_sum"]
            writer.write(units)
    total = sum(counts.values())
    shares = ", ".join(f"{kind} {100 * n / max(1, total):.1f} %" for kind, n in sorted(counts.items()))
    console.say(f"{phase} units: {total:,} student tokens: {shares}")


if __name__ == "__main__":
    console.run(main)
