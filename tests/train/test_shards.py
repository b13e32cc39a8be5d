"""Tar shards: the index, random access, what happens to damaged ones."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from arimg.errors import InputError
from arimg.train.data import Loader
from arimg.train.data_config import CropConfig, DataConfig
from arimg.train.shards import INDEX_JSON, INDEX_NPY, ShardSource, read_shard, write_index
from arimg.train.sources import NO_CLASS, CorruptSample, Split, open_splits
from tests.train.toy_sources import CLASSES, number_of, picture, write_shard, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def test_every_sample_is_one_read_away(folder: Path) -> None:
    source = ShardSource(folder)
    assert len(source) == 23 and source.class_names == CLASSES
    assert [tuple(group) for group in source.groups] == [
        ("train-00.tar", 6), ("train-01.tar", 6), ("train-02.tar", 6), ("train-03.tar", 5)]
    for index in (22, 0, 7, 3):
        assert np.array_equal(np.asarray(source.image(index)), np.asarray(picture(index)))
        assert source.caption(index) == f"a {CLASSES[index % 3]}. On grass."
    assert source.labels().tolist() == [number % 3 for number in range(23)]
    assert source.key(7).endswith("train-01.tar: 000007")


def test_folders_inside_an_archive_and_samples_without_anything_else(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("x/one.png", "x/one.seg.png", "y/one.PNG", "y/notes.txt"):
            content = io.BytesIO()
            picture(9).save(content, "png")
            member = tarfile.TarInfo(name)
            member.size = content.tell()
            archive.addfile(member, io.BytesIO(content.getvalue()))
    write_index(tmp_path)
    source = ShardSource(tmp_path)
    assert [source.key(i).rpartition(": ")[2] for i in range(len(source))] == ["x/one", "y/one"]
    assert source.labels().tolist() == [NO_CLASS] * 2 and source.caption(0) == "" and source.class_names == ()


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:len(content) // 2]
    elif kind == "no end":
        content = content[:-tarfile.RECORDSIZE] if not any(content[-tarfile.RECORDSIZE:]) else content.rstrip(b"\0")
    elif kind == "header":
        second = content.index(b"000001.png")
        content[second:second + 512] = b"\xff" * 512
    elif kind == "empty":
        content = bytearray()
    elif kind == "class":
        at = content.index(b"000001.cls") + 512
        content[at] = ord("x")
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut", "no end", "header", "empty", "class"])
def test_a_damaged_shard_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    damage(write_shard(tmp_path / "bad.tar", range(6)), kind)
    write_shard(tmp_path / "good.tar", range(6, 9))
    with caplog.at_level(logging.WARNING, "arimg"):
        index = write_index(tmp_path)
    assert [shard["name"] for shard in index["shards"]] == ["good.tar"] and set(index["skipped"]) == {"bad.tar"}
    assert f"shard {tmp_path / 'bad.tar'} skipped: " in caplog.text
    source = ShardSource(tmp_path)
    assert [number_of(source.image(i)) for i in range(len(source))] == [6, 7, 8]


def test_a_shard_that_changes_after_indexing_is_named(folder: Path) -> None:
    with open(folder / "train-01.tar", "ab") as stream:
        stream.write(b"\0" * 512)
    (folder / "train-02.tar").unlink()
    source = ShardSource(folder)
    for index, reason in ((6, "when it was indexed"), (12, "No such file")):
        with pytest.raises(CorruptSample, match=f"train-0{index // 6}.tar: 0000.*{reason}"):
            source.image(index)
    assert number_of(source.image(0)) == 0


def test_folders_without_a_usable_index(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no usable tar shard"):
        write_index(tmp_path / "nothing")
    with pytest.raises(InputError, match="type: arimg data index"):
        ShardSource(tmp_path)
    index = json.loads((folder / INDEX_JSON).read_text())
    index["shards"][0]["samples"] += 1
    (folder / INDEX_JSON).write_text(json.dumps(index))
    with pytest.raises(InputError, match="do not fit; type: arimg data index"):
        ShardSource(folder)
    for damaged in ("{}", "[]", "{"):
        (folder / INDEX_JSON).write_text(damaged)
        with pytest.raises(InputError, match="has no index of its shards"):
            ShardSource(folder)
    (folder / INDEX_NPY).unlink()
    with pytest.raises(InputError, match="has no index"):
        ShardSource(folder)


def test_records_name_long_keys_and_large_offsets() -> None:
    from arimg.train.shards import RECORD
    assert RECORD["image_at"].itemsize == 8 and RECORD["key"].itemsize >= 64


# ---------------------------------------------------------------------------------------------------------------------
# Epochs over shards


NODES, WORKERS = 2, 2
LANES = NODES * WORKERS
BATCH = 3


def loaders(folder: Path, nodes: int = NODES, **changes: object) -> list[Loader]:
    """One per node, each a process of its own."""
    config = DataConfig(source="shards", folder=str(folder), batch_size=BATCH, window=2, workers=WORKERS,
                        crop=CropConfig(size=16), **changes)        # type: ignore[arg-type]
    sources = [ShardSource(folder) for _ in range(nodes)]
    return [Loader(config, Split(source, range(len(source))), 5, LANES) for source in sources]


def numbers(loader: Loader, step: int, micro: int) -> list[int]:
    """Which pictures this node reads for a micro-batch."""
    source = loader.split.source
    return loader.read(loader.indices(step, micro), lambda index, rng: number_of(source.image(index)), step, micro)


def test_two_nodes_with_two_workers_see_every_sample_exactly_once_per_epoch(folder: Path) -> None:
    """Node n makes the micro-batches 2n and 2n+1 of each step. A lane holds a quarter of an epoch, 5 or 6 of 23."""
    nodes = loaders(folder)
    steps = 12                                      # 36 samples per lane: six epochs or more
    seen = {lane: [number for step in range(steps) for number in numbers(nodes[lane // WORKERS], step, lane)]
            for lane in range(LANES)}
    sizes = [23 * (lane + 1) // LANES - 23 * lane // LANES for lane in range(LANES)]
    epochs = []
    for epoch in range(6):
        epochs.append([seen[lane][epoch * size:(epoch + 1) * size] for lane, size in zip(range(LANES), sizes)])
        assert sorted(number for lane in epochs[-1] for number in lane) == list(range(23)), epoch
    assert len({str(epoch) for epoch in epochs}) == 6, "every epoch has an order of its own"
    assert len({number // 6 for lane in epochs[0][:1] for number in lane}) <= 2, "a lane reads a window of two shards"


def test_resume_in_the_middle_of_an_epoch_repeats_and_loses_none(folder: Path) -> None:
    whole = [numbers(loaders(folder)[0], step, 1) for step in range(9)]
    resumed = [numbers(loaders(folder)[0], step, 1) for step in range(4, 9)]
    assert resumed == whole[4:]


def test_processes_and_threads_do_not_change_the_order(folder: Path) -> None:
    two, (one,) = loaders(folder), loaders(folder, nodes=1)
    for step in (0, 3):
        for micro in range(LANES):
            assert numbers(two[micro // WORKERS], step, micro) == numbers(one, step, micro)


def test_samples_are_shuffled_within_windows_of_shards(folder: Path) -> None:
    loader = loaders(folder, nodes=1)[0]
    order = [loader.order.at(0, place) for place in range(23)]
    assert sorted(order) == list(range(23)) and order != sorted(order)
    first = Counter(number // 6 for number in order[:11])
    assert len(first) == 2, "the first window holds two whole shards, mixed"
    assert [loader.order.at(0, place) for place in range(23)] == order
    assert [loader.order.at(1, place) for place in range(23)] != order


def spoil(folder: Path, number: int) -> None:
    """Overwrite the pixels of a sample within its shard."""
    source = ShardSource(folder)
    record = source.records[number]
    path = folder / source.groups[number // 6].name
    content = bytearray(path.read_bytes())
    content[record["image_at"]:record["image_at"] + record["image_bytes"]] = b"x" * int(record["image_bytes"])
    path.write_bytes(content)


def test_corrupt_samples_are_counted_named_and_replaced_the_same_way_every_time(
        folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = [numbers(loaders(folder, nodes=1)[0], step, 0) for step in range(2)]
    spoil(folder, 8)
    (loader,) = loaders(folder, nodes=1)
    bad = next((step, micro) for step in range(2) for micro in range(LANES)
               if 8 in loader.indices(step, micro).tolist())
    with caplog.at_level(logging.WARNING, "arimg"):
        found = numbers(loader, *bad)
    wanted = loader.indices(*bad).tolist()
    assert loader.skipped == 1 and "sample skipped (1 so far): " in caplog.text
    assert "train-01.tar: 000008: " in caplog.text
    assert [a == b for a, b in zip(found, wanted)].count(False) == 1 and 8 not in found
    assert numbers(loaders(folder, nodes=1)[0], *bad) == found
    assert all(numbers(loader, step, 0) == whole[step] for step in range(2) if (step, 0) != bad)


def test_a_run_gives_up_when_nothing_can_be_read(folder: Path) -> None:
    (loader,) = loaders(folder, nodes=1)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(InputError, match="100 samples in a row cannot be read"):
        numbers(loader, 0, 0)


def test_the_last_hundredth_is_held_out_or_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source="shards", folder=str(folder), crop=CropConfig(size=16))
    train, held_out = open_splits(config)
    assert list(train.indices) == list(range(22)) and list(held_out.indices) == [22]
    assert train.group_sizes() == [6, 6, 6, 4]
    other = write_shards(tmp_path / "other", shards=1)
    train, held_out = open_splits(DataConfig(source="shards", folder=str(folder), validation=str(other),
                                             crop=CropConfig(size=16)))
    assert len(train.indices) == 23 and len(held_out.indices) == 5 and held_out.source is not train.source


def test_reading_a_shard_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    assert len(read_shard(write_shard(tmp_path / "deep" / "er" / "one.tar", range(3)))) == 3
