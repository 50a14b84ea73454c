"""Settings: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from orchestrator import config
from orchestrator.config import SettingError, Settings, load

GOOD: dict[str, Any] = {
    "run": {"dir": "runs/a"},
    "train": {"epochs": 3, "global_batch_size": 8},
    "data": {"factory": "pkg.mod:data"},
    "model": {"factory": "pkg.mod:model", "options": {"width": 4}},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return path


def refusal(file, *words: str) -> str:
    with pytest.raises(SettingError) as caught:
        load(file, words)
    return str(caught.value)


def test_defaults(file):
    settings = load(file)
    assert settings.run.model_dump() == {
        "dir": "runs/a",
        "seed": None,
        "backend": "auto",
        "replicas": None,
        "deterministic": False,
        "resume": "auto",
        "init_from": None,
        "preempt_grace": 25.0,
        "preempt_notice": None,
        "timeout": 600.0,
    }
    assert settings.train.gradient_buckets == 1
    assert settings.data.options == {}
    assert settings.model.options == {"width": 4}
    assert settings.callbacks == []


def test_overrides_are_yaml_and_win(file):
    settings = load(
        file,
        [
            "train.epochs=7",
            "run.seed=11",
            "run.deterministic=true",
            "run.dir=s3://bucket/a=b",
            "model.options.width=8",
            "model.options.rate=1.0e-3",
            "data.options={validation: 0.1}",
            "callbacks=[{EarlyStopping: {patience: 3}}]",
        ],
    )
    assert settings.train.epochs == 7
    assert settings.run.seed == 11
    assert settings.run.deterministic is True
    assert settings.run.dir == "s3://bucket/a=b"
    assert settings.model.options == {"width": 8, "rate": 1e-3}
    assert settings.data.options == {"validation": 0.1}
    assert settings.callbacks == [{"EarlyStopping": {"patience": 3}}]


def test_what_is_dumped_is_read_back(file, tmp_path):
    settings = load(file, ["run.seed=3", "callbacks=[{CSVLogger: {filename: a.csv}}]"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(settings.dump())
    assert load(copy) == settings


def test_frozen(file):
    settings = load(file)
    with pytest.raises(ValidationError, match="frozen"):
        settings.train.epochs = 4
    with pytest.raises(ValidationError, match="frozen"):
        settings.run = settings.run  # pyright: ignore[reportAttributeAccessIssue]
    assert settings.train.epochs == 3


@pytest.mark.parametrize(
    ("word", "wrong", "right"),
    [
        ("train.epoch=3", "train.epoch", "train.epochs"),
        ("train.batch_size=3", "train.batch_size", "train.global_batch_size"),
        ("run.director=x", "run.director", "run.dir"),
        ("run.sed=1", "run.sed", "run.seed"),
        ("model.factorry=a:b", "model.factorry", "model.factory"),
        ("trian.epochs=3", "trian.epochs", "train.epochs"),
        ("callback=[]", "callback", "callbacks"),
        ("modle.factory=a:b", "modle.factory", "model.factory"),
    ],
)
def test_unknown_keys_name_the_nearest(file, word, wrong, right):
    message = refusal(file, word)
    assert message.startswith(f"{wrong} is not a setting.")
    assert f"Did you mean {right}" in message
    assert "train.global_batch_size" in message  # all are listed


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.epochs=many", ["train.epochs='many'", "integer"]),
        ("train.epochs=0", ["train.epochs=0", "greater than or equal to 1"]),
        ("train.epochs=2.5", ["train.epochs=2.5"]),
        ("train.epochs=", ["train.epochs=None"]),
        ("train.global_batch_size=-8", ["train.global_batch_size=-8"]),
        ("train.gradient_buckets=0", ["train.gradient_buckets=0"]),
        ("run.seed=-1", ["run.seed=-1"]),
        ("run.seed=2147483648", ["run.seed=2147483648", "less than"]),
        ("run.dir=", ["run.dir=None", "string"]),
        ("run.dir=''", ["run.dir=''"]),
        ("run.backend=nccl", ["run.backend='nccl'", "horovod", "mpi", "mirrored", "single"]),
        ("run.replicas=0", ["run.replicas=0"]),
        ("data.factory=digits", ["data.factory='digits'", "package.module:function"]),
        ("data.factory=digits:1", ["data.factory='digits:1'", "package.module:function"]),
        ("model.options=3", ["model.options=3", "dictionary"]),
        ("callbacks=EarlyStopping", ["callbacks='EarlyStopping'", "list"]),
        ("callbacks=[EarlyStopping]", ["callbacks.0='EarlyStopping'"]),
        ("train=3", ["train=3"]),
    ],
)
def test_wrong_values_say_what_is_allowed(file, word, parts):
    message = refusal(file, word)
    assert "is not allowed" in message
    for part in parts:
        assert part in message


def test_all_problems_at_once(file):
    lines = refusal(file, "train.epoch=1", "run.seed=x", "run.backend=y").splitlines()
    assert len(lines) == 3


def test_missing(file):
    file.write_text(yaml.safe_dump({**GOOD, "run": {}}))
    assert refusal(file) == (
        "run.dir is not set, and it has no default. Add it to the file or as run.dir=VALUE."
    )
    assert load(file, ["run.dir=here"]).run.dir == "here"


@pytest.mark.parametrize("word", ["epochs", "=3", "..=3", "--verbose"])
def test_no_setting_at_all(file, word):
    message = refusal(file, word)
    assert repr(word) in message
    assert "key=value" in message


def test_a_value_holds_no_settings(file):
    message = refusal(file, "train.epochs.most=3")
    assert "train.epochs.most=3" in message
    assert "'epochs'" in message


def test_bad_yaml_in_a_word(file):
    assert "run.dir='[a'" in refusal(file, "run.dir=[a")


@pytest.mark.parametrize("text", ["run: [", "a: b: c", "\t- x", "run: {dir: x}}"])
def test_bad_yaml_in_the_file(file, text):
    file.write_text(text)
    message = refusal(file)
    assert str(file) in message
    assert "cannot be read" in message


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a", "list"), ("7", "int")])
def test_a_file_of_something_else(file, text, kind):
    file.write_text(text)
    assert f"got {kind}" in refusal(file)


def test_a_file_that_is_not_there(tmp_path):
    assert "nonesuch.yaml cannot be read" in refusal(tmp_path / "nonesuch.yaml")
    assert "cannot be read" in refusal(tmp_path)  # a folder


def test_a_binary_file(file):
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(file)


def test_no_tags_that_run_code(file):
    file.write_text("run: !!python/object/apply:os.system ['exit 3']")
    assert "cannot be read" in refusal(file)


def test_known_keys():
    keys = config.known_keys()
    assert {"run.dir", "train.global_batch_size", "data.factory", "callbacks"} <= set(keys)
    assert set(keys) >= {f"run.{name}" for name in config.Run.model_fields}


def test_setting_error_is_a_value_error():
    assert issubclass(SettingError, ValueError)
    assert set(Settings.model_fields) == {
        "run",
        "train",
        "data",
        "model",
        "checkpoint",
        "callbacks",
        "kubernetes",
    }
