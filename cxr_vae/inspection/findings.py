"""What an inspection or an audit says: tables, and findings as sentences, on the terminal and in a JSON file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

Cell = str | bool | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under headers."""

    title: str
    headers: list[str]
    rows: list[list[Cell]]

    def __str__(self) -> str:
        return f"{self.title}\n\n{tabulate(self.rows, self.headers, missingval='-')}"


@dataclass(frozen=True)
class Finding:
    """A sentence: all is well (level `ok`), worth knowing (`note`), or something to mend (`warning`)."""

    level: str
    text: str


@dataclass(frozen=True)
class Part:
    """One subject's tables and findings."""

    tables: Sequence[Table] = ()
    findings: Sequence[Finding] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """More for the JSON file."""


def as_text(parts: Sequence[Part]) -> str:
    """All tables, then all findings."""
    tables = [str(table) for part in parts for table in part.tables]
    findings = [f"{finding.level:8}{finding.text}" for part in parts for finding in part.findings]
    return "\n\n".join([*tables, "\n".join(findings)])


def as_record(parts: Sequence[Part]) -> dict[str, Any]:
    """`tables`, `findings` and the facts, for a JSON file."""
    record: dict[str, Any] = {
        "tables": [asdict(table) for part in parts for table in part.tables],
        "findings": [asdict(finding) for part in parts for finding in part.findings],
    }
    for part in parts:
        record |= part.facts
    return record
