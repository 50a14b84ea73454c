"""`missing="error"`: a metric that is not there, as soon as that can be known."""

from __future__ import annotations

import warnings

import pytest

from orchestrator import SettingError
from orchestrator.callbacks import EarlyStopping, ModelCheckpoint, ReduceLROnPlateau
from tests.callbacks import ranks
from tests.callbacks.models import fit, make


def each(monitor, missing, folder):
    return [
        EarlyStopping(monitor, mode="min", missing=missing),
        ReduceLROnPlateau(monitor, mode="min", missing=missing),
        ModelCheckpoint(
            f"{folder}/a.keras", monitor, mode="min", save_best_only=True, missing=missing
        ),
    ]


@pytest.fixture(params=range(3), ids=["EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint"])
def one(request, tmp_path):
    return lambda monitor, missing: each(monitor, missing, tmp_path)[request.param]


def warned(*callbacks, **options):
    """The warnings of a `fit`, and its history."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(make(), *callbacks, **options)
    return [str(one.message) for one in caught if one.category is UserWarning], history.history


def test_a_warning_by_default(one):
    (message,) = warned(one("val_lss", "warn"))[0]
    assert "`val_lss` which is not available" in message or "with val_lss available" in message


def test_an_error_with_the_names_that_are_there(one):
    with pytest.raises(SettingError, match=r"'val_lss'.*no such metric.*accuracy.*val_loss"):
        fit(make(), one("val_lss", "error"), epochs=3)


def test_without_a_direction_too(tmp_path):
    """Which Keras could not infer for a name it does not know."""
    with pytest.raises(SettingError, match="no such metric"):
        fit(make(), EarlyStopping("val_lss", missing="error"))


def test_no_validation_data(one):
    with pytest.raises(SettingError, match=r"'val_loss'.*no such metric"):
        fit(make(), one("val_loss", "error"), validation_data=None)


@pytest.mark.parametrize("missing", ["warn", "error"])
def test_validation_in_other_epochs(one, missing):
    messages, history = warned(one("val_loss", missing), epochs=2, validation_freq=2)
    assert len(history["val_loss"]) == 1
    assert len(messages) == 1


def test_a_typo_is_found_in_the_first_epoch_with_validation(one):
    with pytest.raises(SettingError, match=r"'val_lss'.*Available: .*val_loss"):
        warned(one("val_lss", "error"), epochs=3, validation_freq=2)


def test_in_batches_there_is_no_validation(tmp_path):
    saver = ModelCheckpoint(
        str(tmp_path / "a.keras"), save_best_only=True, save_freq=2, missing="error"
    )
    with pytest.raises(SettingError, match=r"'val_loss'.*Available: accuracy, loss"):
        fit(make(), saver)


def test_a_checkpoint_that_saves_always_monitors_nothing(tmp_path):
    saver = ModelCheckpoint(str(tmp_path / "a.keras"), "nonesuch", mode="min", missing="error")
    fit(make(), saver)
    assert (tmp_path / "a.keras").exists()


def test_both_ranks_raise():
    def rank(runtime):
        with pytest.raises(SettingError, match="no such metric"):
            ranks.fit(runtime, [EarlyStopping("val_lss", mode="min", missing="error")])

    ranks.run(rank)


@pytest.mark.parametrize("kind", [EarlyStopping, ReduceLROnPlateau])
def test_another_word(kind):
    with pytest.raises(SettingError, match="missing='ignore'"):
        kind(missing="ignore")


def test_in_a_settings_file_it_is_an_error_by_default(tmp_path):
    from orchestrator.parts import _callback

    assert _callback({"EarlyStopping": {}}, str(tmp_path))().missing == "error"
    assert _callback({"EarlyStopping": {"missing": "warn"}}, str(tmp_path))().missing == "warn"
    board = _callback({"TensorBoard": {}}, "s3://bucket/run")()
    assert board.log_dir == "s3://bucket/run/logs"
    for name in ("RankZero", "LambdaCallback", "GlobalMetrics", "scaled_learning_rate"):
        with pytest.raises(SettingError, match=f"there is no '{name}'"):
            _callback({name: {}}, str(tmp_path))
