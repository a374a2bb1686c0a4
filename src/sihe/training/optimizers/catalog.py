"""Update rules by the names that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

from sihe.core.errors import ConfigError
from sihe.training.optimizers.adamw import AdamW
from sihe.training.optimizers.adamw8bit import AdamW8bit
from sihe.training.optimizers.lion import Lion
from sihe.training.optimizers.muon import Muon
from sihe.training.optimizers.rule import UpdateRule
from sihe.training.optimizers.sgd import SGD

RuleKind = Literal["adamw", "adamw8bit", "lion", "muon", "sgd"]

_RULES: Mapping[str, Callable[..., UpdateRule]] = {
    "adamw": AdamW,
    "adamw8bit": lambda least_size=AdamW8bit.least_size, **rest: AdamW8bit(AdamW(**rest), least_size),
    "lion": Lion,
    "muon": lambda betas=AdamW.betas, eps=AdamW.eps, **rest: Muon(
        **rest, others=AdamW(betas, eps, rest.get("weight_decay", Muon.weight_decay))
    ),
    "sgd": SGD,
}
_ADAMW = tuple(each.name for each in fields(AdamW))
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "adamw": _ADAMW,
    "adamw8bit": (*_ADAMW, "least_size"),
    "lion": tuple(each.name for each in fields(Lion)),
    "muon": (*(each.name for each in fields(Muon) if each.name != "others"), "betas", "eps"),
    "sgd": tuple(each.name for each in fields(SGD)),
}


def make_rule(kind: str, settings: Mapping[str, Any] | None = None) -> UpdateRule:
    """The rule named `kind` with `settings` by name; what is not named has the rule's default.

    Of Muon, `betas` and `eps` are those of the AdamW that moves the other weights. Raises `ConfigError`, which names
    the key, for an unknown kind or setting and for a value that cannot be.
    """
    if kind not in _RULES:
        raise ConfigError(f"an optimizer is one of {', '.join(get_args(RuleKind))}, got {kind!r}", key="kind")
    given = dict(settings or {})
    for name in given:
        if name not in _SETTINGS[kind]:
            raise ConfigError(f"{kind} has the settings {', '.join(_SETTINGS[kind])}, got {name!r}", key=name)
    if "betas" in given:  # a list, where a file gave it
        given["betas"] = tuple(given["betas"])
    return _RULES[kind](**given)
