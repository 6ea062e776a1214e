"""The store of teacher scores: made once, found again, shared, moved, emptied, never trusted when damaged."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import small
import tiny
import torch
import yaml
from typer.testing import CliRunner

from pipeline.infer.audit import Deltas
from pipeline.prepared import PreparedModel
from pipeline.store import cache
from pipeline.store.shards import manifest_path, open_shard, open_writer
from pipeline.store.signatures import check_signature, signature_path
from schemas.config import Config, load_config
from schemas.errors import OpdError
from schemas.tables import arrow_schema
from stages import models, prompts, rollouts, scores, train, units
from stages.diagnostics import sampled_tokens
from stages.run.run import Phase, run_of
from stages.tools import audit
from stages.tools.cli import app
from stages.train import check_audited

ROOT = Path(__file__).parents[1]
IDENTITY, INPUTS = {"teacher": {"weights": "w"}}, {"responses": "r"}


def rows(count: int = 3) -> pa.Table:
    row = {"rollout_id": "r", "pos": 0, "byte_start": 0, "byte_end": 1, "token_id": 5, "logp": -1.0, "entropy": 1.0}
    row |= {"stop_logp": -2.0, "tail_logp": -3.0, "cand_id": [1, 2], "cand_logp": [-0.5, -1.5]}
    return pa.Table.from_pylist([row] * count, schema=arrow_schema("scores"))


def maker(identity: dict[str, Any] = IDENTITY, inputs: dict[str, str] = INPUTS, count: int = 3) -> Any:
    def make(path: Path) -> None:
        make.calls += 1  # type: ignore[attr-defined]
        with open_writer(path, "scores", identity, inputs, {"teacher": "some/teacher"}) as writer:
            writer.write(rows(count))

    make.calls = 0  # type: ignore[attr-defined]
    return make


def fetch(folder: Path, link: Path, make: Any, inputs: dict[str, str] = INPUTS, remote: str | None = None) -> bool:
    return cache.fetch_or_make(folder, IDENTITY, inputs, make, link, remote)


def test_made_once_then_found_and_linked(tmp_path: Path) -> None:
    make, links = maker(), [tmp_path / f"run{i}/round-0/scores/000.parquet" for i in range(2)]
    assert [fetch(tmp_path / "c", link, make) for link in links] == [False, True] and make.calls == 1
    for link in links:
        assert open_shard(link, "scores", IDENTITY, INPUTS).rows == 3
    (entry,) = cache.entries(tmp_path / "c")
    assert sorted(entry.users) == sorted(links) and entry.manifest is not None and cache.verify(entry) is None


@pytest.mark.parametrize("what", ["shard", "manifest", "no manifest", "foreign"])
def test_a_damaged_entry_is_made_again(what: str, tmp_path: Path) -> None:
    make, link = maker(), tmp_path / "run/round-0/scores/000.parquet"
    fetch(tmp_path / "c", link, make)
    entry = cache.entry_path(tmp_path / "c", IDENTITY, INPUTS)
    if what == "shard":
        entry.write_bytes(entry.read_bytes()[:-1] + b"X")
    elif what == "manifest":
        manifest_path(entry).write_text("{}")
    elif what == "no manifest":
        manifest_path(entry).unlink()
    else:
        maker({"teacher": "another"})(entry)
        assert "belongs under the name" in (cache.verify(next(cache.entries(tmp_path / "c"))) or "")
    assert not fetch(tmp_path / "c", link, make) and make.calls == 2
    assert open_shard(link, "scores", IDENTITY, INPUTS).rows == 3


def _slow_fetch(folder: Path, number: int, log: Path) -> None:
    def make(path: Path) -> None:
        with log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(1)
        maker()(path)

    fetch(folder, folder / f"../run{number}/round-0/scores/000.parquet", make)


def test_two_runs_at_once_compute_it_once_and_a_dead_holder_frees_it(tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    first, *others = [context.Process(target=_slow_fetch, args=(tmp_path / "c", n, log)) for n in range(3)]
    first.start()
    while not log.exists():
        time.sleep(0.01)
    for process in others:
        process.start()
    time.sleep(0.2)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    for process in others:
        process.join(30)
        assert process.exitcode == 0
    assert len(log.read_text().split()) == 2  # the one that was killed, and one of the others
    assert len(list(cache.entries(tmp_path / "c"))) == 1
    assert not list((tmp_path / "c/scores").glob(".*.tmp"))


def test_a_moved_cache_is_valid_and_runs_find_it(tmp_path: Path) -> None:
    make, run = maker(), tmp_path / "run"
    link = run / "round-0/scores/000.parquet"
    fetch(tmp_path / "c", link, make)
    before = link.lstat().st_mtime_ns
    shutil.move(tmp_path / "c", tmp_path / "elsewhere")
    assert not link.exists()
    assert cache.relink(tmp_path / "elsewhere", run) == 2
    assert open_shard(link, "scores", IDENTITY, INPUTS).rows == 3
    assert link.lstat().st_mtime_ns == before  # what was made from it stays up to date
    assert fetch(tmp_path / "elsewhere", link, make) and make.calls == 1
    (entry,) = cache.entries(tmp_path / "elsewhere")
    assert entry.users == [link]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_remote_location_shares_entries_between_machines(kind: str, tmp_path: Path) -> None:
    remote = f"memory://{tmp_path.name}/shared" if kind == "memory" else f"file://{tmp_path}/shared"
    make = maker()
    assert not fetch(tmp_path / "here", tmp_path / "a/round-0/scores/000.parquet", make, remote=remote)
    assert fetch(tmp_path / "there", tmp_path / "b/round-0/scores/000.parquet", make, remote=remote)
    assert make.calls == 1
    assert open_shard(tmp_path / "b/round-0/scores/000.parquet", "scores", IDENTITY, INPUTS).rows == 3
    if kind == "file":  # what arrives damaged is not used
        (entry,) = (tmp_path / "shared/scores").glob("*.parquet")
        entry.write_bytes(entry.read_bytes()[:-1])
        assert not fetch(tmp_path / "third", tmp_path / "c/round-0/scores/000.parquet", make, remote=remote)
        assert make.calls == 2
        assert sorted(p.suffix for p in (tmp_path / "shared/scores").iterdir()) == [".json", ".parquet"]


def keys_in(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a private and a public key."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made, pem = Ed25519PrivateKey.generate(), form.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(made.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(made.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_entries_of_a_signed_cache_are_of_a_trusted_key(tmp_path: Path) -> None:
    """One that fits all its digests is refused unless a key that is trusted signed it; so it is through a remote location."""
    mine, my_public = keys_in(tmp_path, "mine")
    other, other_public = keys_in(tmp_path, "other")
    remote, link = f"file://{tmp_path}/shared", tmp_path / "run/round-0/scores/000.parquet"

    def asked(where: str, keys: list[Path], remote: str | None = None) -> bool:
        return cache.fetch_or_make(tmp_path / where, IDENTITY, INPUTS, maker(), link, remote, keys=keys)

    assert not asked("a", [mine], remote) and asked("a", [my_public, other_public])
    assert asked("b", [my_public], remote)  # its signature came along
    with pytest.raises(
        OpdError, match=r"its signature is of none of .*other\.pub; remove the entry, or add its maker's key"
    ):
        asked("c", [other_public], remote)
    (entry,) = (tmp_path / "a/scores").glob("*.parquet")
    runner = CliRunner()

    def verified(key: Path) -> tuple[int, str]:
        found = runner.invoke(app, ["cache", "verify", "--cache", str(tmp_path / "a"), "--key", str(key)])
        return found.exit_code, found.output

    assert verified(my_public)[0] == verified(mine)[0] == 0 and verified(other_public)[0] == 2
    # Made anew by someone else, with a manifest that proves itself.
    entry.unlink()
    maker(count=4)(entry)
    with pytest.raises(OpdError, match="its signature is of none of"):
        check_signature(entry, [my_public])
    signature_path(entry).unlink()
    code, said = verified(my_public)
    assert code == 2 and "not signed" in " ".join(said.split())
    # The cache of one who has no private key takes nothing that can't be trusted later.
    with pytest.raises(OpdError, match="no private key to sign with"):
        asked("d", [my_public])
    entry.unlink()
    manifest_path(entry).unlink()
    assert (
        not asked("a", [])
        and runner.invoke(app, ["cache", "sign", "--cache", str(tmp_path / "a"), "--key", str(mine)]).exit_code == 0
    )
    assert verified(my_public)[0] == 0
    for text in ("no key", my_public.read_text()[:-40]):
        other.write_text(text)
        with pytest.raises(OpdError, match=r"other\.pem: no key in PEM"):
            check_signature(entry, [other])


def test_a_remote_that_can_not_be_reached_is_told(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="cache_remote nosuch://x"):
        fetch(tmp_path / "c", tmp_path / "run/round-0/scores/000.parquet", maker(), remote="nosuch://x")


class Sampling:
    """Rollouts of a run in the working directory, and how often its policy was opened for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, opening = 0, rollouts.open_sampler

        def counted(*arguments: Any) -> Any:
            self.opened += 1
            return opening(*arguments)

        monkeypatch.setattr(rollouts, "open_sampler", counted)

    def __call__(self, run: str, shards: dict[str, int], **changes: Any) -> tuple[int, dict[str, bytes], list[Phase]]:
        """Openings, files and phases of a run of this name; `shards` of each phase that are made."""
        before, where = self.opened, small.written(run=run, **changes)
        prompts.main(where)
        models.main("student", where)
        for phase, count in shards.items():
            for shard in range(count):
                rollouts.main(phase, shard, where, None)
        files = [
            Path(f"runs/{run}/{phase}/rollouts/{n:03}.parquet") for phase, count in shards.items() for n in range(count)
        ]
        phases = [run_of(load_config(where)).phase(phase) for phase in shards]
        return self.opened - before, {str(path.relative_to(f"runs/{run}")): path.read_bytes() for path in files}, phases


def test_what_another_run_has_sampled_is_not_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round 0 and eval-0 of a run under another name, whose training differs: bit for bit what it would have sampled."""
    monkeypatch.chdir(tmp_path)
    small.laid_out()
    tiny.saved(tmp_path / "other", [("1", "2"), ("a", "b")])
    sample = Sampling(monkeypatch)
    both, other = {"round-0": 2, "eval-0": 1}, {"train": {"learning_rate": 0.01}, "objective": {"recipe": "simct"}}
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "empty"))
    opened, alone, (fresh, _) = sample("b", both, **other)
    tokens = sum(sum(map(len, place.rollouts.read()["response_ids"].to_pylist())) for place in fresh)
    assert opened == 3 and sampled_tokens(fresh) == {"sampled": tokens}
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    assert sample("a", both)[0] == 3
    capsys.readouterr()
    opened, found, (taken, _) = sample("b", both, **other)
    assert opened == 0 and found == alone and sampled_tokens(taken) == {"cache": tokens}
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("tokens found in the cache, none sampled") == 3 and "round-0 rollouts:" in said
    # A longer run walks through the same prompts; its first shard has them.
    assert sample("c", {"round-0": 1}, rollouts={"prompts": 12, "rounds": 1})[0] == 0
    changes: list[dict[str, Any]] = [
        {"seed": 2},
        {"student": {"model": "other"}},
        {"rollouts": {"temperature": 0.7}},
        {"rollouts": {"max_new_tokens": 5}},
        {"rollouts": {"batch_size": 2}},
    ]
    for change in changes:
        opened, _, _ = sample("d", {"round-0": 1}, **change)
        assert opened == 1, change
    # What is damaged is never taken.
    entry = Path(json.loads(Path("runs/a/round-0/rollouts/000.origin").read_text())["entry"]).with_suffix(".parquet")
    path = tmp_path / "cache/sampled" / entry
    good = path.read_bytes()
    path.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    opened, again, _ = sample("b", both, **other)
    assert opened == 1 and again == alone and path.read_bytes() == good
    # A note is of the shard that it lies beside.
    shutil.copy("runs/b/round-0/rollouts/000.origin", "runs/b/round-0/rollouts/001.origin")
    with pytest.raises(OpdError, match=r"001\.origin: not of the rollouts that lie here"):
        sampled_tokens(taken)
    result = CliRunner().invoke(app, ["cache", "ls", "--json"])
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert len(rows) == 3 + len(changes) and {(row["kind"], row["student"]) for row in rows} == {
        ("rollouts", "student"),
        ("rollouts", "other"),
    }
    assert CliRunner().invoke(app, ["cache", "verify"]).exit_code == 0
    assert sum(row["tokens"] for row in rows if row["entry"] == entry.stem) > 0
    assert CliRunner().invoke(app, ["cache", "gc", "--delete"]).exit_code == 0
    assert not list(cache.entries(tmp_path / "cache")) and taken[0].rollouts.rows == 4


def test_gc_tells_of_the_bytes_that_it_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an empty OPD_CACHE is none."""
    for i in range(2):
        fetch(tmp_path / "c", tmp_path / f"run/round-0/scores/{i:03}.parquet", maker(count=9**i), {"responses": str(i)})
    shutil.rmtree(tmp_path / "run")
    kept, gone = cache.entries(tmp_path / "c")
    size, remove = gone.bytes, cache.remove
    monkeypatch.setattr(cache, "remove", lambda folder, entry: entry.path != kept.path and remove(folder, entry))
    monkeypatch.setattr("stages.tools.cache.MEGABYTE", 1)
    monkeypatch.setenv("OPD_CACHE", "")
    monkeypatch.setattr(Config.model_fields["cache"], "default", str(tmp_path / "c"))
    told = CliRunner().invoke(app, ["cache", "gc", "--delete"]).output
    assert f"1 entries ({size}.0 MB) and 0 leftovers removed" in told and not gone.path.exists()


def test_ls_verify_and_gc(tmp_path: Path) -> None:
    folder, links = tmp_path / "c", [tmp_path / f"run{i}/round-0/scores/000.parquet" for i in range(2)]
    for i, link in enumerate(links):
        fetch(folder, link, maker(inputs={"responses": str(i)}), {"responses": str(i)})
    runner = CliRunner()

    def opd(*arguments: str) -> Any:
        return runner.invoke(app, ["cache", *arguments, "--cache", str(folder)])

    listed = [json.loads(line) for line in opd("ls", "--json").output.splitlines()]
    assert {row["teacher"] for row in listed} == {"some/teacher"} and all(row["bytes"] > 500 for row in listed)
    assert sorted(row["runs"][0] for row in listed) == sorted(str(link.parents[2]) for link in links)
    assert "2 entries" in opd("ls").output and "every byte" in opd("verify").output
    shutil.rmtree(links[0].parents[2])
    (folder / "scores/.x.parquet.another-host.1.1.tmp").touch()
    os.utime(folder / "scores/.x.parquet.another-host.1.1.tmp", (0, 0))
    assert "1 entries" in opd("gc").output and len(list(cache.entries(folder))) == 2
    assert "0 entries" in opd("gc", "--days", "1").output
    assert "1 entries" in opd("gc", "--delete").output
    (entry,) = cache.entries(folder)
    assert entry.users == [links[1]] and not list((folder / "scores").glob(".*"))
    assert not cache.remove(folder, entry)  # in use
    entry.path.write_bytes(entry.path.read_bytes()[:-1])
    broken = opd("verify")
    assert broken.exit_code == 2 and "1 of 1 files are damaged" in broken.output.replace("\n", " ")
    assert runner.invoke(app, ["cache", "ls", "--cache", str(tmp_path / "none")]).exit_code == 2


class ScoredRun:
    """A run of the stages themselves, up to scores: a model teaches itself with the answer at hand."""

    def __init__(self, folder: Path, model: str, shards: int = 4, dtype: str = "auto", **scores: Any) -> None:
        self.folder, self.shards, self.cache = folder, shards, folder / "cache"
        config: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
        config["prompts"]["splits"] = {"examples": 0, "train": 2 * shards, "dev": 0, "test": 1}
        config["student"] = {"model": model, "dtype": dtype}
        config["teacher"] = {"model": model, "dtype": dtype, "prompt": "{{ prompt }} (The answer is {{ answer }}.)"}
        config["rollouts"] |= {"rounds": 1, "prompts": 2 * shards, "shard_size": 2, "max_new_tokens": 12}
        config["audit"] = {"responses": 1}
        if scores:
            config["rollouts"]["top_k"], config["scores"] = 6, scores
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def shard(self, number: int, table: str = "scores") -> Path:
        return self.folder / f"runs/default/round-0/{table}/{number:03}.parquet"

    def make(self, patch: pytest.MonkeyPatch) -> "ScoredRun":
        """Run the stages; the process stays in the run's folder, with its cache."""
        patch.chdir(self.folder)
        patch.setenv("OPD_CACHE", str(self.cache))
        prompts.main(self.config)
        for role in ("student", "teacher"):
            models.main(role, self.config)
        for shard in range(self.shards):
            rollouts.main("round-0", shard, self.config, None)
            scores.main("round-0", shard, self.config, None)
        return self


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("scored")
    tiny.saved(folder / "model", [("a", "b"), ("1", "2")])
    with pytest.MonkeyPatch.context() as patch:
        yield ScoredRun(folder, str(folder / "model"), dtype="bfloat16").make(patch)  # the audit's is float32


def test_the_audit_is_in_the_manifest_and_stops_what_differs(
    scored: ScoredRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = open_shard(scored.shard(0), "scores").manifest.figures
    assert figures["audit_responses"] == 1 and 0 < figures["audit_mean_delta"] < figures["audit_max_delta"] < 2
    outcome = CliRunner().invoke(app, ["audit", "--config", str(scored.config), "--responses", "2"])
    assert outcome.exit_code == 0 and "round-0/003" in outcome.output
    # Scores that are half a nat off: the run stops, and nothing is published.
    from pipeline.infer import score

    right = score._score_chunk

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        return found | {"logp": found["logp"] - 0.5}

    monkeypatch.setattr(score, "_score_chunk", wrong)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    with pytest.raises(OpdError, match=r"differs by 0\.\d+ nats on average"):
        scores.main("round-0", 0, scored.config, None)
    assert not [p for p in (tmp_path / "scores").iterdir() if p.suffix != ".lock"]
    # Nor do differences pass that are no numbers, here or in `opd audit`.
    monkeypatch.setattr(score, "_score_chunk", right)
    nothing = Deltas(np.array([np.nan]), np.zeros(1))
    monkeypatch.setattr("pipeline.infer.shard_scores.deltas", lambda *_: nothing)
    with pytest.raises(OpdError, match="differs by nan nats on average"):
        scores.main("round-0", 0, scored.config, None)
    monkeypatch.setenv("OPD_CACHE", str(scored.cache))
    with pytest.raises(OpdError, match="differences above the thresholds"):
        audit.main(scored.config, 1)


def test_a_quantised_teacher_is_audited_in_its_own_dtype(
    scored: ScoredRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cast to another, FP8 weights lose their scales, and other kinds raise."""

    def quantised(self: PreparedModel) -> Any:
        model = self.load()
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
        monkeypatch.setattr(type(model), "to", lambda *_: pytest.fail("cast"))
        return model

    monkeypatch.setattr(PreparedModel, "take_model", quantised)
    before = scored.shard(0).readlink()
    audit.main(scored.config, 1)
    assert "recomputed log-probs (bfloat16)" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(scored.folder)
    monkeypatch.setattr(PreparedModel, "take_model", quantised)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    try:
        scores.main("round-0", 0, scored.config, None)
        assert open_shard(scored.shard(0), "scores").manifest.figures["audit_dtype"] == "bfloat16"
    finally:
        cache.link_shard(before, scored.shard(0))


@pytest.mark.parametrize("fits", ["bfloat16", "nothing"])
def test_an_audit_without_memory_loses_no_scores(
    scored: ScoredRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], fits: str
) -> None:
    """It is done in the teacher's own dtype, or left out, which is said and told where the scores are trained on."""
    from pipeline.infer import shard_scores

    right = shard_scores.deltas

    def short(model: Any, *arguments: Any) -> Any:
        if str(model.dtype) != f"torch.{fits}":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return right(model, *arguments)

    monkeypatch.setattr(shard_scores, "deltas", short)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    before = scored.shard(0).readlink()
    try:
        scores.main("round-0", 0, scored.config, None)
        said, manifest = " ".join(capsys.readouterr().err.split()), open_shard(scored.shard(0), "scores").manifest
        assert "doesn't fit into memory in float32: CUDA out of memory." in said
        if fits == "bfloat16":
            assert manifest.figures["audit_dtype"] == "bfloat16" and manifest.figures["audit_responses"] == 1
            check_audited([scored.shard(0)])
        else:
            assert manifest.figures["unaudited"] == "out of memory" and "`audit.required: false`" in said
            with pytest.raises(OpdError, match=r"000\.parquet: these scores could not be audited \(out of memory\)"):
                train.main(0, scored.config)
            monkeypatch.setattr(shard_scores, "deltas", right)
            audit.main(scored.config, 1)  # where there is more memory; the scores stay as they are
            check_audited([scored.shard(0)])
            assert open_shard(scored.shard(0), "scores").manifest == manifest
            note = cache.audit_note(scored.shard(0))
            note.write_text(note.read_text().replace("float32", "float31"))
            with pytest.raises(OpdError, match=r"\.audit: damaged or edited; delete it and run `opd audit` again"):
                check_audited([scored.shard(0)])
            (entry,) = (one for one in cache.entries(tmp_path) if one.path == note.with_suffix(".parquet"))
            assert "damaged or edited" in (cache.verify(entry) or "")
    finally:
        cache.link_shard(before, scored.shard(0))
    check_audited([scored.shard(0), tmp_path / "none.parquet"])


def test_two_thousand_flipped_bytes_are_found(scored: ScoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `verify` and by opening; and by the stage that reads the shard, for some of them."""
    found = list(cache.entries(scored.cache))
    files = [file for entry in found for file in (entry.path, manifest_path(entry.path))]
    rng = random.Random(0)
    by_path = {file: entry for entry in found for file in (entry.path, manifest_path(entry.path))}
    numbers = {scored.shard(n).resolve(): n for n in range(scored.shards)}
    for count in range(2000):
        file = rng.choice(files)
        good = file.read_bytes()
        at, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
        file.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        entry = by_path[file]
        try:
            assert cache.verify(entry), (file, at, bit)
            with pytest.raises(OpdError):
                open_shard(entry.path, "scores" if entry.path in numbers else "rollouts")
            if count % 100 == 0 and entry.path in numbers:
                with pytest.raises(OpdError):
                    units.main("round-0", numbers[entry.path], scored.config)
        finally:
            file.write_bytes(good)
    assert all(cache.verify(entry) is None for entry in found)


def test_scores_of_a_moved_run_need_no_forward(scored: ScoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the cache: the teacher isn't even loaded."""
    from pipeline.prepared import PreparedModel

    def never(self: PreparedModel) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(PreparedModel, "load", never)
    before = scored.shard(1).resolve().stat().st_mtime_ns
    scored.shard(1).unlink()
    scores.main("round-0", 1, scored.config, None)
    assert scored.shard(1).resolve().stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_again_and_again_in_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte-identical to the uninterrupted run, nothing finished is made again, nothing temporary left.

    A tiny model: about half of the kills hit a shard that is being written."""
    (tmp_path / "run").mkdir()
    tiny.saved(tmp_path / "model", [("a", "b"), ("1", "2")])
    scored = ScoredRun(tmp_path / "run", str(tmp_path / "model")).make(monkeypatch)
    again = tmp_path / "again"  # the cache that is killed at
    expected = {scored.shard(n).resolve().name: scored.shard(n).read_bytes() for n in range(scored.shards)}
    environment = {**os.environ, "OPD_CACHE": str(again), "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/scoring_process.py"), str(scored.config), str(scored.shards)],
        cwd=scored.folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    rng, kills, completed, one, in_writing = random.Random(0), 0, 0, 0.0, 0
    finished: dict[str, int] = {}

    def start() -> int:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return int(process.stdout.readline())  # type: ignore[union-attr]

    wanted = int(os.environ.get("OPD_KILLS", "8"))
    while kills < wanted or completed < 2:
        child, began = start(), time.monotonic()
        # First an uninterrupted run, which says how long a shard takes; then kills; then one that may finish.
        deadline = began + rng.uniform(0, 2 * one) if completed and kills < wanted else float("inf")
        while time.monotonic() < deadline and Path(f"/proc/{child}").exists() and not _gone(child):
            time.sleep(0.002)
        in_writing += bool(list(again.glob(f"scores/.*.{child}.*.tmp")))
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
        status = int(process.stdout.readline())
        whole = [p for p in again.glob("scores/*.parquet") if manifest_path(p).exists()]
        for path in whole:
            # What was finished before is the same file still.
            assert finished.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        assert status == 0
        found = {p.name: p.read_bytes() for p in whole}
        assert found == expected
        assert not list(again.rglob("*.tmp")) and not list(scored.folder.rglob("runs/**/*.tmp"))
        one = one or (time.monotonic() - began) / scored.shards
        completed += 1
        shutil.rmtree(again / "scores")
        finished.clear()
    process.stdin.close()
    assert process.wait(30) == 0
    assert 16 * in_writing > wanted  # some of the kills did hit a shard that was being written
    print(f"{kills} kills, {completed} completed runs, {in_writing} kills while a shard was being written")


def _gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_rows_are_complete(scored: ScoredRun) -> None:
    """Candidates, stopping and the rest hold all mass, up to rounding; the realised token is there in any case."""
    table = open_shard(scored.shard(2), "scores").read().to_pylist()
    assert {row["token_id"] >= 0 for row in table} == {True, False}
    for row in table:
        assert row["log_z"] is None  # nobody asked for it
        kept = np.array(row["cand_logp"])
        assert (np.diff(kept) <= 0).all() and len(kept) <= 20
        held = np.exp(kept).sum() + np.exp(row["stop_logp"]) + np.exp(row["tail_logp"])
        # Rounding is off by 1/32 of a log-prob at most.
        assert (
            abs(held - 1) < 1e-3 + (row["entropy"] + 0.1) / 32 and 0 <= row["entropy"] < 11 and -40 < row["logp"] <= 0
        )
    assert any(row["token_id"] not in row["cand_id"] for row in table if row["token_id"] >= 0)


@pytest.mark.parametrize("support", ["union", pytest.param("student", marks=pytest.mark.slow)])
def test_the_students_own_candidates_are_kept(
    support: str, smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ScoredRun(tmp_path, smollm2.ref.path, shards=1, support=support, k_max=4, log_z=True).make(monkeypatch)
    stop = set(smollm2.stop().tolist())
    rows = iter(open_shard(run.shard(0), "scores").read().to_pylist())
    sampled = open_shard(run.shard(0, "rollouts"), "rollouts").read().to_pylist()
    sizes = []
    for response in sampled:
        stopped = response["finish_reason"] == "stop"
        for top in response["top_id"]:
            kept = set(next(rows)["cand_id"])
            own = set(top) - stop
            assert len(top) == 6 and own <= kept and (support == "union" or own == kept)
            sizes.append(len(kept - own))
        if not stopped:
            assert len(next(rows)["cand_id"]) == (4 if support == "union" else 0)  # nothing was asked at the cut
    assert next(rows, None) is None
    assert None not in open_shard(run.shard(0), "scores").read()["log_z"].to_pylist()
    assert max(sizes) <= 4 and (support == "student" or max(sizes) > 0)


def test_one_line_reads_a_shard_elsewhere(scored: ScoredRun) -> None:
    """The README's lines: polars, datasets, duckdb."""
    import datasets
    import duckdb
    import polars as pl

    files = str(scored.shard(0).parent / "*.parquet")
    frame = pl.read_parquet(files)
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scored.folder / "hf"))
    (found,) = duckdb.sql(f"select count(*), avg(logp), sum(len(cand_id)) from '{files}'").fetchall()
    assert found[0] == len(frame) == len(loaded)
    assert found[1] == pytest.approx(frame["logp"].mean()) and found[2] == frame["cand_id"].list.len().sum()
    assert loaded["cand_id"][3] == frame["cand_id"][3].to_list()
