"""The forms that names, labels and quantities have in Kubernetes; pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_QUANTITY = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei))?"
)
_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}

DNS_1123_LABEL = "a DNS label: at most 63 of a-z, 0-9 and -, no - at either end"
DNS_1035_LABEL = "a DNS-1035 label: at most 63 of a-z, 0-9 and -, a letter first, no - at the end"
DNS_SUBDOMAIN = "a DNS name: at most 253 of a-z, 0-9, - and ., a letter or digit at either end"


def dns_1123_label(name: str) -> bool:
    """Whether it may name a container, a volume or a pod (RFC 1123)."""
    return len(name) <= 63 and re.fullmatch(_LABEL, name) is not None


def dns_1035_label(name: str) -> bool:
    """Whether it may name a Service or a host of its (RFC 1035)."""
    return dns_1123_label(name) and name[0].isalpha()


def dns_subdomain(name: str) -> bool:
    """Whether it may name most objects."""
    return len(name) <= 253 and re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name) is not None


def label_key(key: str) -> bool:
    """Whether it may be a label's or an annotation's key: `name` or `domain/name`."""
    domain, slash, name = key.rpartition("/")
    return label_value(name) and bool(name) and (not slash or dns_subdomain(domain))


def label_value(value: Any) -> bool:
    """Whether it may be a label's value."""
    if not isinstance(value, str):
        return False
    return len(value) <= 63 and (not value or re.fullmatch(_WORD, value) is not None)


def port_name(name: str) -> bool:
    """Whether it may name a port (RFC 6335)."""
    form = re.fullmatch(_LABEL, name) is not None and "--" not in name
    return form and len(name) <= 15 and any(c.isalpha() for c in name)


def quantity(value: Any) -> Decimal | None:
    """The number that `500m`, `8Gi`, `1e3` or 2 stands for; none if it is no quantity."""
    found = _QUANTITY.fullmatch(str(value)) if isinstance(value, str | int | float) else None
    if found is None or isinstance(value, bool):
        return None
    number, exponent, suffix = found.groups()
    scale = (
        Decimal(1024) ** _BINARY[suffix]
        if suffix in _BINARY
        else Decimal(10) ** (_DECIMAL.get(suffix, 0) if suffix else int((exponent or "e0")[1:]))
    )
    return Decimal(number) * scale


def matches(selector: Any, labels: dict[str, Any]) -> bool:
    """Whether a label selector (`matchLabels` and `matchExpressions`) takes these labels in."""
    if not isinstance(selector, dict):
        return False
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(one, labels) for one in selector.get("matchExpressions") or [])


def _holds(expression: dict[str, Any], labels: dict[str, Any]) -> bool:
    key, operator = str(expression.get("key")), expression.get("operator")
    values = expression.get("values") or []
    return {
        "In": labels.get(key) in values and key in labels,
        "NotIn": labels.get(key) not in values or key not in labels,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }.get(str(operator), False)


def bad_labels(labels: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Keys and values that cannot be, as (key, value, rule)."""
    for key, value in labels.items():
        if not label_key(str(key)):
            yield key, value, "a label's key is NAME or DOMAIN/NAME, NAME at most 63 characters"
        elif not label_value(value):
            rule = "a label's value is a text of at most 63 of A-Z, a-z, 0-9, -, _ and ."
            yield key, value, f"{rule}, a letter or digit at either end"
