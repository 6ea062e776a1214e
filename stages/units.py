"""Units: align a scored shard to this student's tokens."""

from pipeline.align.student_view import student_view
from pipeline.align.vocabularies import pair_ids
from pipeline.store.cache import responses_digest
from pipeline.store.shards import open_shard, open_writer
from stages.run import console, layout
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, ShardOption, policy, read_config, teacher


def main(phase: PhaseOption, shard: ShardOption = 0, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Find the aligned units of a shard and express the teacher's candidates in student ids."""
    config = read_config(config_file)
    _, number = layout.parse_phase(phase)
    rollouts = open_shard(layout.shard_path(config, phase, "rollouts", shard), "rollouts")
    student, scorer = policy(config, number), teacher(config)
    scores = open_shard(
        layout.shard_path(config, phase, "scores", shard),
        "scores",
        {"teacher": scorer.ref.identity(), "stop_ids": scorer.stop.tolist()},
        {"responses": responses_digest(rollouts)},
    )
    pairs = pair_ids(scorer.vocabulary, student.vocabulary)
    identity = {
        "student_vocabulary": student.vocabulary_shard.manifest.sha256,
        "teacher_vocabulary": scorer.vocabulary_shard.manifest.sha256,
        "log_z": scores.manifest.identity["scores"]["log_z"],
    }
    inputs = {"rollouts": rollouts.manifest.sha256, "scores": scores.manifest.sha256}
    counts: dict[str, int] = {}
    path = layout.shard_path(config, phase, "units", shard)
    with open_writer(path, "units", identity, inputs) as writer:
        for sampled, scored in zip(rollouts.row_groups(), scores.row_groups(), strict=True):
            units = student_view(sampled, scored, student.vocabulary, student.stop, scorer.stop, pairs)
            for row in units.group_by("kind").aggregate([("s_len", "sum")]).to_pylist():
                counts[row["kind"]] = counts.get(row["kind"], 0) + row["s_len_sum"]
            writer.write(units)
    total = sum(counts.values()) or 1
    shares = ", ".join(f"{kind} {100 * n / total:.1f} %" for kind, n in sorted(counts.items()))
    console.say(f"{phase} units: {total:,} student tokens: {shares}")


if __name__ == "__main__":
    console.run(main)
