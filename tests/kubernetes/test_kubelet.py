"""The kubelet's stand-in: how it reads a value that Kubernetes expands."""

from __future__ import annotations

import pytest

from .kubelet import environment, expanded


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("$(A)", "1"),
        ("$(A)$(B)-$(A)", "1two-1"),
        ("$(NONE)", "$(NONE)"),
        ("$()", "$()"),
        ("$$", "$"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$$$$(A)", "$$(A)"),
        ("$A ${A} a$", "$A ${A} a$"),
        ("$(A", "$(A"),
        ("$(A $$", "$(A $"),
        ("$($(A))", "$($(A))"),
        ("a)$(\nA)", "a)$(\nA)"),
    ],
)
def test_expansion(text, becomes):
    """The rules of Kubernetes' own expand_test.go."""
    assert expanded(text, {"A": "1", "B": "two"}) == becomes


def test_a_variable_names_those_before_it():
    given = [
        {"name": "A", "value": "$(SECRET)/$(B)"},
        {"name": "B", "value": "$(A)$$(A)"},
        {"name": "SECRET", "value": "over"},
        {"name": "C", "value": "$(SECRET)"},
    ]
    assert environment(given, {"SECRET": "s"}) == {
        "SECRET": "over",
        "A": "s/$(B)",
        "B": "s/$(B)$(A)",
        "C": "over",
    }
