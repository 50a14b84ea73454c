"""A manifest's bytes are taken for one only if they are whole, unaltered and the right step's."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.manifest import File, InvalidManifestError, Manifest

SHA = hashlib.sha256(b"x").hexdigest()
TOKEN = "0123456789abcdef"
FULL = Manifest(
    step=100,
    token=TOKEN,
    files=(File("model.weights.h5", 10, SHA), File("parts/state.json", 0, SHA)),
    epoch=3,
    metrics={"val_loss": 0.1, "bad": math.inf, "worse": -math.inf},
    world_size=4,
    created=1.5,
    writer="host:1:ab",
    libraries={"keras": "3.15.1"},
)


def resealed(change) -> bytes:
    """A manifest whose record was changed by someone who also knows the digest's rule."""
    record = json.loads(FULL.encode())
    del record["digest"]
    change(record)
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    record["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps(record).encode()


def test_what_is_written_is_read_back():
    assert manifest.decode(FULL.encode(), 100) == FULL
    record = json.loads(FULL.encode())
    assert record["format"] == 1
    assert record["files"][0] == {"name": "model.weights.h5", "size": 10, "sha256": SHA}
    assert (record["epoch"], record["world_size"]) == (3, 4)


def test_nan_is_kept():
    one = dataclasses.replace(FULL, metrics={"loss": math.nan})
    assert math.isnan(manifest.decode(one.encode(), 100).metrics["loss"])


@given(st.floats(allow_nan=False))
def test_metrics_are_kept_to_the_bit(value):
    one = dataclasses.replace(FULL, metrics={"loss": value})
    assert manifest.decode(one.encode(), 100).metrics == {"loss": value}


def test_every_truncation_is_refused():
    data = FULL.encode().rstrip()
    for length in range(len(data)):
        with pytest.raises(InvalidManifestError):
            manifest.decode(data[:length], 100)


def test_every_flipped_bit_is_refused_or_harmless():
    data = FULL.encode()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                found = manifest.decode(bytes(flipped), 100)
            except InvalidManifestError:
                continue
            assert found == FULL, (position, bit)  # white space between the parts


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a//b", "a/", ".hidden", "a/.b", "a\\b",
     "-rf", "a\0b", "a\nb", "ä" * 300, "C:x", "~/x", "%2e%2e/x", "s3://x/y"],
)  # fmt: skip
def test_no_name_leaves_the_prefix(name):
    with pytest.raises(ValueError, match="no name for a checkpoint's file"):
        manifest.check_name(name)

    def change(record):
        record["files"][0]["name"] = name

    with pytest.raises(InvalidManifestError):
        manifest.decode(resealed(change), 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(step=99), "that of step 99, not of 100"),
        (lambda r: r.update(step=-1), "step=-1"),
        (lambda r: r.update(token="../../../etc/abc"), "token="),
        (lambda r: r.update(world_size=0), "world_size=0"),
        (lambda r: r.update(world_size=True), "world_size=True"),
        (lambda r: r.update(epoch="3"), "epoch='3'"),
        (lambda r: r.update(files=3), "not valid"),
        (lambda r: r.update(files=r["files"] * 2), "occurs twice"),
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r.pop("files"), "files"),
        (lambda r: r.pop("token"), "token"),
        (lambda r: r.update(metrics={"loss": "abc"}), "abc"),
        (lambda r: r["files"][0].update(size=-1), "size=-1"),
        (lambda r: r["files"][0].update(size=1.5), r"size=1\.5"),
        (lambda r: r["files"][0].update(sha256="00"), "sha256='00'"),
        (lambda r: r["files"][0].update(more=1), "more"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(InvalidManifestError, match=message):
        manifest.decode(resealed(change), 100)


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_other_bytes_are_refused(data):
    with pytest.raises(InvalidManifestError):
        manifest.decode(data, 100)


def test_a_newer_format_is_told_apart():
    with pytest.raises(manifest.UnknownFormatError, match=r"format 2 .* update"):
        manifest.decode(resealed(lambda r: r.update(format=2, new_field=[])), 100)


def test_an_altered_manifest_is_named():
    data = FULL.encode().replace(b"0.1,", b"0.2,")
    assert data != FULL.encode()
    with pytest.raises(InvalidManifestError, match="digest"):
        manifest.decode(data, 100)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-0000000100", 100),
        ("step-0000000000", 0),
        ("step-12345678901", 12345678901),
        ("step-00000000100", None),
        ("step-100", None),
        ("step-0000000100.tmp", None),
        ("xstep-0000000100", None),
        ("step--000000001", None),
    ],
)
def test_folders(name, step):
    assert manifest.step_of(name) == step
    if step is not None:
        assert manifest.folder(step) == name


def test_same_content():
    again = dataclasses.replace(FULL, token="f" * 16, created=9.0, files=FULL.files[::-1])
    assert FULL.same_content(again)
    assert not FULL.same_content(dataclasses.replace(FULL, files=FULL.files[:1]))
    assert not FULL.same_content(dataclasses.replace(FULL, step=101))


def test_nothing_is_unpickled():
    package = Path(manifest.__file__).parent
    for name in ("manifest", "inventory", "catalog", "local", "objects", "saving", "store"):
        tree = ast.parse((package / f"{name}.py").read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", "") or "")
            assert not {"pickle", "cloudpickle", "marshal", "shelve"} & set(names), name
