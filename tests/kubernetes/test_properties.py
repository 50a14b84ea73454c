"""Whatever the settings: either they are refused in words, or the manifests are right."""

from __future__ import annotations

import hashlib

import yaml
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.config import SettingError, Settings
from orchestrator.kubernetes.pods import toleration
from orchestrator.kubernetes.render import as_yaml, render

from . import cases


def built(run, kubernetes, options) -> Settings:
    tree = {**cases.GOOD, "run": run, "kubernetes": kubernetes}
    tree["model"] = {"factory": "pkg.mod:model", "options": options}
    try:
        return Settings.model_validate(tree)
    except ValidationError:
        assume(False)
        raise


@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(run=cases.RUN, kubernetes=cases.ANY_KUBERNETES, options=cases.OPTIONS)
def test_rendered_manifests_validate(run, kubernetes, options):
    settings = built(run, kubernetes, options)
    try:
        manifests = render(settings)
    except SettingError:
        return
    assert cases.problems(manifests) == []
    text = as_yaml(manifests)
    assert list(yaml.safe_load_all(text)) == manifests
    config = next(one for one in manifests if one["kind"] == "ConfigMap")
    given = config["data"]["settings.yaml"]
    assert hashlib.sha256(given.encode()).hexdigest() in text
    again = Settings.model_validate(yaml.safe_load(given))
    assert again.model_dump(exclude={"kubernetes"}) == settings.model_dump(exclude={"kubernetes"})


@given(st.from_regex(r"[a-z]+/[A-Z]+(=[a-z]+)?:NoExecute", fullmatch=True))
def test_a_toleration_says_what_the_taint_says(taint):
    made = toleration(taint)
    value = f"={made['value']}" if made["operator"] == "Equal" else ""
    assert f"{made['key']}{value}:{made['effect']}" == taint
