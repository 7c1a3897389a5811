"""What happened to a run: attempts of its jobs, checkpoints, evaluations."""

import time
from collections.abc import Iterator
from pathlib import Path

from cxr_vae.checkpoints.manifest import MANIFEST, published
from cxr_vae.console import clock
from cxr_vae.report.cells import Cell, Table, brief, describe, interval, number
from cxr_vae.report.inputs import Facts, Inputs, Results, read_checked, read_optional
from cxr_vae.training.run_log import read_records


def history_tables(run: Inputs) -> list[Table]:
    """Those there is something to tell of."""
    tables = [attempts(run), jobs(run), checkpoints(run), evaluations(run)]
    return [table for table in tables if table.rows]


def when(seconds: float) -> str:
    """A time of day for people, with its offset from UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def attempts(run: Inputs) -> Table:
    """Stretches of training, told apart by their clock, which starts anew; what was lost is not in the records."""
    stretches: list[list[Facts]] = []
    for record in run.speeds:
        if not stretches or record["elapsed_s"] < stretches[-1][-1]["elapsed_s"]:
            stretches.append([])
        stretches[-1].append(record)
    rows = []
    for place, records in enumerate(stretches):
        speeds = sorted(record["images_per_s"] for record in records)
        steps = f"{records[0]['step']} … {records[-1]['step']}"
        cells = [Cell(steps), Cell(clock(records[-1]["elapsed_s"])), number(round(speeds[len(speeds) // 2], 1))]
        rows.append([Cell(str(place + 1), is_number=False), *cells])
    return Table("Stretches of training", ["stretch", "recorded steps", "took", "median images/s"], rows)


def jobs(run: Inputs) -> Table:
    """Attempts of the jobs that a launcher started."""
    rows = []
    for folder in sorted(run.run.jobs.glob("*/job.json")):
        job = read_optional(folder)
        for began, ended in pairs(folder.with_name("attempts.jsonl")):
            took = clock(ended["ended"] - began["began"]) if "ended" in ended else "–"
            cells = [job.get("stage"), job.get("cluster"), began.get("host"), when(began["began"]), took]
            outcome = ended.get("outcome", "not ended, or not told")
            rows.append((began["began"], [number(value or None) for value in (*cells, outcome, ended.get("why"))]))
    headers = ["stage", "cluster", "host", "began", "took", "outcome", "why"]
    return Table("Jobs", headers, [row for _, row in sorted(rows, key=lambda row: row[0])])


def pairs(path: Path) -> Iterator[tuple[Facts, Facts]]:
    """Beginning and end of each attempt; an empty end where none was told."""
    begun: dict[int, Facts] = {}
    ended: dict[int, Facts] = {}
    for record in read_records(path):
        if "began" in record:
            begun[record.get("attempt", 0)] = record
        elif "ended" in record:
            ended[record.get("attempt", 0)] = record
    return ((record, ended.get(attempt, {})) for attempt, record in begun.items())


def checkpoints(run: Inputs) -> Table:
    """Those that are there, newest first."""
    rows = []
    for path in published(run.run.checkpoints):
        facts = read_optional(path / MANIFEST)
        loss = facts.get("test_loss_nats")
        cells = [number(facts.get("step")), number(facts.get("samples_seen")), number(facts.get("world_size"))]
        cells += [Cell(f"{loss:.2f}") if isinstance(loss, float) else number(None), number(when(path.stat().st_mtime))]
        rows.append([number(path.name), *cells])
    headers = ["checkpoint", "step", "images seen", "processes", "test loss", "written"]
    return Table("Checkpoints", headers, rows)


def evaluations(run: Inputs) -> Table:
    """Earlier ones and the last: their first figure."""
    rows = []
    kept = run.run.evaluation.glob("evaluation_results.*.json")
    for path in [*sorted(kept, key=lambda path: (len(path.name), path.name)), run.run.results]:
        results, _ = read_checked(path, Results, "")
        if results is None or not results.figures:
            continue
        name, figure = next(iter(results.figures.items()))
        title = describe(name)[0]
        cells = [
            number(when(path.stat().st_mtime)),
            number(title),
            Cell(brief(figure.value, figure.interval_95), interval(figure.interval_95)),
        ]
        rows.append([number(path.name), *cells, number(results.num_generated), number(results.num_real)])
    return Table("Evaluations", ["file", "written", "figure", "value", "generated", "real"], rows)
