"""What a verb did to a model, as data and as text.

A report holds the changes of every pass, what was refused and why, costs before and after and the
proof. Pickled with the model it belongs to, it becomes a plain dict, so that the model loads where
fxprune is not installed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fxprune.costs import Costs
from fxprune.programs.pipeline import Change
from fxprune.proof.verification import Verification


@dataclass
class Report:
    """The report of `instrument` or `finalize`.

    passes: the changes, by pass; those of "insert_gates" say of every nonlinearity which gate it
    has, or why none. refused: what else could not be gated, removed or folded, and why.
    assumptions: what Python asked of the example inputs; other inputs are refused at run time.
    plans: how every chain of layers was cut, and what else was considered.
    """

    verb: str
    model: str
    passes: dict[str, list[Change]]
    refused: list[Change] = field(default_factory=list[Change])
    before: Costs | None = None
    after: Costs | None = None
    verification: Verification | None = None
    assumptions: list[Change] = field(default_factory=list[Change])
    plans: list[Change] = field(default_factory=list[Change])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "verb": self.verb,
            "model": self.model,
            "passes": {name: [_plain(c) for c in changes] for name, changes in self.passes.items()},
            "refused": [_plain(change) for change in self.refused],
            "plans": [_plain(change) for change in self.plans],
            "assumptions": [_plain(change) for change in self.assumptions],
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "verification": None if self.verification is None else self.verification.to_dict(),
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as a plain dict."""
        return dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Report":
        """Stay a report in a copy of the model; nothing edits it there."""
        return self

    def __str__(self) -> str:
        """Return the report as a short text."""
        lines = [f"{self.verb} {self.model}"]
        if self.before and self.after:
            lines += _costs(self.before, self.after)
        for name, changes in self.passes.items():
            lines += _section(name, changes)
        lines += _section("plans", self.plans)
        lines += _section("refused", self.refused)
        lines += _section("assumptions", self.assumptions)
        if self.verification is not None:
            lines.append(str(self.verification))
        return "\n".join(lines)


def _costs(before: Costs, after: Costs) -> list[str]:
    share = after.parameters / max(before.parameters, 1)
    lines = [f"  parameters {before.parameters:,} → {after.parameters:,} ({share:.1%})"]
    if before.macs:
        lines.append(f"  MACs {before.macs:,} → {after.macs:,} ({after.macs / before.macs:.1%})")
    return lines


def _section(name: str, changes: list[Change], most: int = 20) -> list[str]:
    if not changes:
        return []
    lines = [f"  {name}:", *(f"    {change}" for change in changes[:most])]
    if len(changes) > most:
        lines.append(f"    … and {len(changes) - most} more")
    return lines


def _plain(change: Change) -> dict[str, Any]:
    return {"where": change.where, "what": change.what, **dict(change.detail)}
