"""An independent fold in plain Python, with which the SQL fold is compared. Standard library only.

One event after the other, integers throughout; dollars appear only when rows are compared.
"""

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
NOT_OF_A_CALL = (
    "plan-assigned",
    "plan-cleared",
    "credit-granted",
    "credit-revoked",
    "segment-sealed",
    "ledger-recovered",
    "policy-applied",
    "credit-expired",
    "alert-raised",
    "budget-opened",
    "key-created",
    "key-revoked",
)


def usd(nanousd: int | None) -> Decimal | None:
    return None if nanousd is None else Decimal(nanousd) / 1_000_000_000


class FoldModel:
    """Feed it raw entries; read `budgets`, `spend`, `calls` and `discrepancies`."""

    def __init__(self) -> None:
        self.balances: dict[str, list[int]] = {}
        self.budgets: dict[str, dict[str, Any]] = {}
        self.spend: dict[tuple[str, str], dict[str, Any]] = {}
        self.calls: dict[str, dict[str, Any]] = {}
        self.discrepancies: list[tuple[int, str, str]] = []
        self.seq = 0

    def fold(self, entries: Iterable[Any]) -> "FoldModel":
        for raw_id, raw in entries:
            texts = [part.decode() for part in raw]
            fields = dict(zip(texts[0::2], texts[1::2], strict=True))
            self._fold(raw_id.decode(), fields, json.loads(fields["payload"]))
        return self

    def _fold(self, entry_id: str, fields: dict[str, str], payload: dict[str, Any]) -> None:
        kind, amount = fields["type"], int(fields["amount"])
        self.seq = int(fields["seq"])
        own = f"user:{fields['user_id']}:{fields['period']}"
        if fields["user_id"] and fields["period"]:
            committed = int(fields["committed"]) if fields["committed"] else None
            self._move(entry_id, own, kind, amount, payload, committed, payload.get("cap_nanousd"))
            self._count(own, fields, payload, amount)
        for extra in payload.get("budgets", ()):
            self._move(
                entry_id, extra["budget"], kind, amount, payload, extra["committed_nanousd"], extra.get("cap_nanousd")
            )
        if kind not in NOT_OF_A_CALL:
            self._call(fields, payload, amount)

    def _move(
        self,
        entry_id: str,
        name: str,
        kind: str,
        amount: int,
        payload: dict[str, Any],
        stamped: int | None,
        cap: int | None,
    ) -> None:
        balance = self.balances.setdefault(name, [0, 0])
        if kind == "budget-reserved":
            balance[1] += amount
        elif kind == "cost-recorded":
            balance[0] += amount
            balance[1] -= payload.get("hold_nanousd", 0)
        elif kind in ("cost-adjusted", "budget-opened"):
            balance[0] += amount
            balance[1] += payload.get("hold_nanousd", 0)  # Only of an opening.
        moves = kind in ("budget-reserved", "cost-recorded", "cost-adjusted", "budget-opened")
        if (stamped is None and moves) or (stamped is not None and stamped != sum(balance)):
            self.discrepancies.append((self.seq, name, "committed"))
        if kind == "budget-reserved" and amount and sum(balance) > (cap or 0):
            self.discrepancies.append((self.seq, name, "cap"))
        if moves:
            what, rest = name.split(":", 1)
            subject, window = rest.rsplit(":", 1)
            row = self.budgets.setdefault(name, {"cap_usd": None})
            row |= {"name": what, "value": subject, "window": window, "last_id": entry_id, "last_seq": self.seq}
            row |= {"settled_usd": usd(balance[0]), "held_usd": usd(balance[1])}
            if kind in ("budget-reserved", "budget-opened"):
                row["cap_usd"] = usd(cap or 0)

    def _count(self, own: str, fields: dict[str, str], payload: dict[str, Any], amount: int) -> None:
        kind = fields["type"]
        row = self.spend.setdefault(
            (fields["user_id"], fields["period"]),
            dict.fromkeys(
                ("calls", "denied", "fallbacks", "attempts", "credit", "adjusted", "assumed", "overage", *TOKENS), 0
            )
            | {"plan": None, "base": None},
        )
        row["plan"] = payload.get("assigned_plan") or payload.get("plan") or row["plan"]
        if kind in ("credit-granted", "credit-revoked"):
            row["credit"] += amount
        if kind == "plan-assigned":
            row["base"] = payload["cap_nanousd"]
        elif kind == "budget-reserved" or (kind == "budget-denied" and payload["budget"] == own):
            row["base"] = payload["cap_nanousd"] - row["credit"]
        is_first_hold = kind == "budget-reserved" and payload.get("kind", "hold") == "hold" and payload["hold"] == 1
        row["calls"] += is_first_hold or payload.get("outcome") == "recorded"
        row["denied"] += kind == "budget-denied"
        row["fallbacks"] += kind == "fallback-used"
        row["attempts"] += kind == "model-called"
        row["adjusted"] += amount if kind == "cost-adjusted" else 0
        self._add_amounts(row, kind, payload)
        row["last_seq"] = self.seq

    def _add_amounts(self, row: dict[str, Any], kind: str, payload: dict[str, Any]) -> None:
        row["assumed"] += payload.get("assumed_nanousd", 0)
        row["overage"] += payload.get("overage_nanousd", 0)
        if kind == "model-called" or payload.get("outcome") == "recorded":
            for name in TOKENS:
                row[name] += payload.get("usage", {}).get(name, 0)

    def _call(self, fields: dict[str, str], payload: dict[str, Any], amount: int) -> None:
        kind = fields["type"]
        row = self.calls.setdefault(
            fields["call_id"],
            dict.fromkeys(
                ("holds", "held", "cost", "adjusted", "assumed", "overage", "attempts", "fallbacks", "latency_ms"), 0
            )
            | dict.fromkeys(TOKENS, 0)
            | dict.fromkeys(("status", "reason", "plan", "campaign_id", "basis", "model", "model_used", "worker"))
            | {"user_id": fields["user_id"], "period": fields["period"], "first_seq": self.seq},
        )
        row["last_seq"] = self.seq
        row["plan"] = payload.get("assigned_plan") or payload.get("plan") or row["plan"]
        for name in ("campaign_id", "model_used", "worker"):
            row[name] = payload.get(name) or row[name]
        row["basis"] = payload.get("basis") or payload.get("charge_basis") or row["basis"]
        row["model"] = (
            payload.get("model") or payload.get("to_model") or payload.get("bound", {}).get("model") or row["model"]
        )
        row["attempts"] += kind == "model-called"
        row["fallbacks"] += kind == "fallback-used"
        row["latency_ms"] += payload.get("latency_ms", 0)
        if kind == "budget-reserved":
            row["status"] = "open"
            row["holds"] += payload.get("kind", "hold") == "hold"
            row["held"] += amount
        elif kind == "budget-denied":
            row["status"], row["reason"] = "denied", payload["reason"]
        elif kind == "cost-recorded":
            row["status"] = {"taken_over": "closed", "recorded": "done"}.get(payload["outcome"], payload["outcome"])
            row["reason"] = payload.get("reason") or row["reason"]
            row["held"] -= payload.get("hold_nanousd", 0)
        if kind in ("cost-recorded", "cost-adjusted"):
            row["cost"] += amount
        if kind == "cost-adjusted":
            row["adjusted"] += amount
        self._add_amounts(row, kind, payload)
