"""Shards appear whole or not at all, prove their content, and open without our code."""

import json
import subprocess
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store import shards
from pipeline.store.shards import HOST, file_digest, manifest_path, open_shard, open_writer, publish
from schemas.errors import OpdError
from schemas.manifest import Manifest, differences, digest
from schemas.tables import TABLES, arrow_schema

ROWS = [
    {
        "rollout_id": f"r{i}",
        "unit": i,
        "student_logp": -1.5,
        "advantage": 0.5,
        "credit": 0.5,
        "weight": 1.0,
        "is_ratio": 1.0,
        "reward": None,
        "reference_logp": None,
    }
    for i in range(5)
]


def write(path: Path, rows: list[dict] = ROWS, **identity: str) -> None:
    with open_writer(path, "weights", identity, {"units": "abc"}) as writer:
        writer.write(pa.Table.from_pylist(rows[:3], schema=arrow_schema("weights")))
        writer.write(pa.Table.from_pylist(rows[3:], schema=arrow_schema("weights")))


def test_round_trip_keeps_rows_groups_and_identity(tmp_path: Path) -> None:
    path = tmp_path / "000.parquet"
    write(path, scheme="uniform")
    shard = open_shard(path, "weights", {"scheme": "uniform"}, {"units": "abc"})
    assert shard.read().to_pylist() == ROWS
    assert [len(group) for group in shard.row_groups()] == [3, 2]
    footer = json.loads(shard.read().schema.metadata[b"opd"])
    assert footer["identity"] == {"scheme": "uniform"} and footer["kind"] == "weights"


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_readers_without_our_code(tmp_path: Path) -> None:
    path = tmp_path / "000.parquet"
    write(path)
    assert pl.read_parquet(tmp_path / "*.parquet")["unit"].to_list() == [0, 1, 2, 3, 4]
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded["rollout_id"][:2] == ["r0", "r1"]


def test_every_table_has_docs_in_its_schema() -> None:
    for kind, columns in TABLES.items():
        schema = arrow_schema(kind)
        assert [field.metadata[b"doc"].decode() for field in schema] == [column.doc for column in columns]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_writer(tmp_path / "000.parquet", "weights", {}, {}) as writer:
        writer.write(pa.Table.from_pylist(ROWS, schema=arrow_schema("weights")))
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_its_manifest_counts_as_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "000.parquet"
    write(path)
    manifest_path(path).unlink()
    with pytest.raises(OpdError, match="left unfinished"):
        open_shard(path, "weights")
    with pytest.raises(OpdError, match="does not exist"):
        open_shard(tmp_path / "001.parquet", "weights")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "000.parquet"
    write(path)
    for file in (path, manifest_path(path)):
        good = file.read_bytes()
        for at in range(0, len(good), 7):
            file.write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])
            with pytest.raises(OpdError, match=r"damaged|does not fit"):
                open_shard(path, "weights")
        file.write_bytes(good)
    open_shard(path, "weights")


def test_a_page_that_changes_after_a_shard_was_opened_is_found_when_it_is_read(tmp_path: Path) -> None:
    """By its checksum: the last byte of each column of a row group."""
    path = tmp_path / "000.parquet"
    write(path)
    shard, good, names = open_shard(path, "weights"), path.read_bytes(), arrow_schema("weights").names
    about = pq.read_metadata(path).row_group(1)
    for column in map(about.column, range(about.num_columns)):
        at = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])
        assert shard.row_group(0, names).to_pylist() == ROWS[:3]
        with pytest.raises(OpdError, match=r"000\.parquet: changed since it was opened, or unreadable: .*CRC"):
            shard.row_group(1, names)


@pytest.mark.parametrize(
    ("kind", "identity", "inputs", "named"),
    [
        ("units", {}, {}, "kind: expected 'units', found 'weights'"),
        ("weights", {"scheme": "iw_opd"}, {}, "identity.scheme: expected 'iw_opd', found 'uniform'"),
        ("weights", {"gamma": 1}, {}, "identity.gamma: expected 1, found 'nothing'"),
        ("weights", {}, {"units": "def"}, "inputs.units: expected 'def', found 'abc'"),
    ],
)
def test_a_foreign_shard_is_refused_by_field(
    tmp_path: Path, kind: str, identity: dict, inputs: dict, named: str
) -> None:
    write(tmp_path / "000.parquet", scheme="uniform")
    with pytest.raises(OpdError) as caught:
        open_shard(tmp_path / "000.parquet", kind, identity, inputs)
    assert named in str(caught.value) and "000.parquet" in str(caught.value)


def test_differences_name_nested_fields() -> None:
    assert list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})) == ["a.b: expected 1, found 3"]
    assert list(differences({"a": 1}, {"a": 1})) == []


def test_digest_ignores_key_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_publish_replaces_at_once_and_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ValueError, match="no"), publish(target) as temporary:
        temporary.write_text("half")
        raise ValueError("no")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with publish(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_manifest_knows_its_own_digest(tmp_path: Path) -> None:
    write(tmp_path / "000.parquet")
    text = manifest_path(tmp_path / "000.parquet").read_text()
    assert Manifest.parse(text).dump() == text
    with pytest.raises(ValueError, match="digest"):
        Manifest.parse(text.replace('"rows": 5', '"rows": 6'))
    with pytest.raises(ValueError, match="not an object"):
        Manifest.parse("[]")


FIELDS = sorted(Manifest.model_fields)


@pytest.mark.parametrize("resigned", [False, True])
@pytest.mark.parametrize("field", FIELDS)
def test_every_changed_field_is_refused_by_its_name(tmp_path: Path, field: str, resigned: bool) -> None:
    """Also by someone who knows how the manifest signs itself."""
    path = tmp_path / "000.parquet"
    write(path, scheme="uniform")
    value = Manifest.parse(manifest_path(path).read_text()).model_dump()
    changed: dict[type, Any] = {int: lambda v: v + 1, str: lambda v: v[::-1], dict: lambda v: v | {"extra": "x"}}
    changed[type(None)] = lambda _: {"extra": "x"}
    value[field] = changed[type(value[field])](value[field])
    if resigned:
        text = Manifest(**value).dump()
    else:
        body = json.loads(manifest_path(path).read_text()) | value
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    manifest_path(path).write_text(text)
    with pytest.raises(OpdError, match=rf"\b{field}\b"):
        open_shard(path, "weights")


def test_a_changed_self_digest_is_named(tmp_path: Path) -> None:
    write(tmp_path / "000.parquet")
    where = manifest_path(tmp_path / "000.parquet")
    body = json.loads(where.read_text())
    where.write_text(json.dumps(body | {"self": body["self"][::-1]}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(OpdError, match="self: found"):
        open_shard(tmp_path / "000.parquet", "weights")


def test_another_shards_manifest_does_not_vouch(tmp_path: Path) -> None:
    write(tmp_path / "000.parquet", scheme="uniform")
    write(tmp_path / "001.parquet", scheme="iw_opd")
    manifest_path(tmp_path / "000.parquet").write_text(manifest_path(tmp_path / "001.parquet").read_text())
    with pytest.raises(OpdError, match="sha256"):
        open_shard(tmp_path / "000.parquet", "weights")


def test_foreign_columns_are_named(tmp_path: Path) -> None:
    """Rows that came from elsewhere under our manifest, say a cast that someone thought harmless."""
    path = tmp_path / "000.parquet"
    write(path)
    table = pl.read_parquet(path).with_columns(pl.col("weight").cast(pl.Float64)).to_arrow()
    footer = open_shard(path, "weights").read().schema.metadata
    pq.write_table(table.replace_schema_metadata(footer), path, row_group_size=3)
    value = Manifest.parse(manifest_path(path).read_text()).model_dump()
    value |= {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    manifest_path(path).write_text(Manifest(**value).dump())
    with pytest.raises(OpdError, match=r"weight: expected 'float', found 'double'"):
        open_shard(path, "weights")


def test_a_killed_writers_temporary_is_swept_and_a_live_ones_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    live, path = process.pid, tmp_path / "000.parquet"
    dead = 2**22 + 1  # past the largest process id
    for pid in (live, dead):
        (tmp_path / f".000.parquet.{HOST}.{pid}.1.tmp").touch()
    write(path)
    assert [p.name.split(".")[-3] for p in tmp_path.glob(".*.tmp")] == [str(live)]
    process.kill()
    process.wait()
    write(path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_shard_of_format_3_is_read_with_nulls_for_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {"segments", "broken"}
    whole = arrow_schema("rollouts")
    older = pa.schema([field for field in whole if field.name not in new])
    row = {"rollout_id": "r", "prompt_id": "p", "sample": 0, "round": 0, "prompt_ids": [1], "response_ids": [2]}
    row |= {"response": "a", "behavior_logp": [-1.0], "sampler_logp": None, "top_id": None, "finish_reason": "stop"}
    table = pa.Table.from_pylist([row | {"answer": None}], schema=older)
    path = tmp_path / "old.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "FORMAT", 3)
        patch.setattr(shards, "arrow_schema", lambda kind: older)
        with shards.open_writer(path, "rollouts", {}, {}) as writer:
            writer.write(table)
    shard = shards.open_shard(path, "rollouts")
    assert shard.manifest.format == 3 and shard.read().schema.names == whole.names
    for group in (shard.read(), next(iter(shard.row_groups())), shard.row_group(0, whole.names)):
        assert all(group[name].null_count == 1 for name in new) and group["response"].to_pylist() == ["a"]
    assert next(iter(shard.row_groups(["rollout_id", "segments"]))).column_names == ["rollout_id", "segments"]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "FORMAT", 2)
        with shards.open_writer(path, "rollouts", {}, {}) as writer:
            writer.write(pa.Table.from_pylist([row | {"answer": None}], schema=whole))
    with pytest.raises(OpdError, match="format: expected 5, found 2"):
        shards.open_shard(path, "rollouts")
