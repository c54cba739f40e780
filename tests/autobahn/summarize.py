"""Turns Autobahn's reports into Markdown tables, and compares anyagent with the libraries below it.

``python -m tests.autobahn.summarize REPORTS``; see README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

BASELINES: Final = {"anyagent-asyncio": "websockets", "anyagent-trio": "trio-websocket"}
"""The library below each of anyagent's transports."""

OUTCOMES: Final = ("pass", "non-strict", "informational", "fail", "refused")

SECTIONS: Final = {
    1: "Framing",
    2: "Pings and pongs",
    3: "Reserved bits",
    4: "Opcodes",
    5: "Fragmentation",
    6: "UTF-8",
    7: "Closing",
    9: "Limits and performance",
    10: "Miscellaneous",
}

_OF_BEHAVIOUR: Final = {"OK": "pass", "NON-STRICT": "non-strict", "INFORMATIONAL": "informational"}

Report = dict[str, Any]  # of one case, as Autobahn writes it
Reports = dict[str, dict[str, Report]]  # by the client and the case's id


def read_reports(folder: Path) -> Reports:
    index: Reports = json.loads((folder / "index.json").read_text())
    return {
        client: {
            case: json.loads((folder / entry["reportfile"]).read_text()) for case, entry in cases.items()
        }
        for client, cases in index.items()
    }


def outcome_of(report: Report) -> str:
    """One of `OUTCOMES`: pass and non-strict only if the connection was closed as expected, too."""
    if report["behavior"] == "FAILED" and _refused_binary(report):
        return "refused"
    if report["behaviorClose"] not in ("OK", "INFORMATIONAL"):
        return "fail"
    return _OF_BEHAVIOUR.get(report["behavior"], "fail")


def _refused_binary(report: Report) -> bool:
    """As the server saw it: it sent a binary message, and got nothing but a close frame with 1002."""
    return (
        report["agent"] in BASELINES
        and "2" in report["txFrameStats"]
        and set(report["rxFrameStats"]) == {"8"}
        and report["remoteCloseCode"] == 1002
    )


def _section(case: str) -> int:
    return int(case.partition(".")[0])


def _sorted(cases: Iterable[str]) -> list[str]:
    return sorted(cases, key=lambda case: [int(part) for part in case.split(".")])


def table(cases: dict[str, Report]) -> str:
    """Markdown: how many cases of each section had which outcome."""
    lines = [f"| section | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * len(OUTCOMES)]
    counts = {section: Counter[str]() for section in sorted({_section(case) for case in cases})}
    for case, report in cases.items():
        counts[_section(case)][outcome_of(report)] += 1
    rows = [(f"{section} {SECTIONS[section]}", count) for section, count in counts.items()]
    rows.append(("**all**", sum(counts.values(), Counter[str]())))
    for name, count in rows:
        lines.append(f"| {name} | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} |")
    return "\n".join(lines)


def details(cases: dict[str, Report]) -> str:
    """Markdown: which cases had which outcome, but for those passed; what happened in those failed."""
    lines = []
    for outcome in OUTCOMES[1:]:
        found = [case for case in _sorted(cases) if outcome_of(cases[case]) == outcome]
        lines.append(f"* {outcome}: {', '.join(found) or 'none'}")
        if outcome == "fail":
            lines += [f"  * {case}: {_describe(cases[case])}" for case in found]
    return "\n".join(lines)


def _describe(report: Report) -> str:
    parts = (
        f"expected: {' '.join(report['expectation'].split())}",
        f"got: {report['result']}",
        f"close code {report['remoteCloseCode']}: {report['resultClose']}",
    )
    return "; ".join(part.rstrip(".") for part in parts)


def faults(reports: Reports) -> list[str]:
    """What must not be: a client without all cases, a failure that the library below does not have."""
    found = []
    every_case = {case for cases in reports.values() for case in cases}
    for client, cases in reports.items():
        if missing := every_case - cases.keys():
            found.append(f"{client} did not run {', '.join(_sorted(missing))}")
    for client, baseline in BASELINES.items():
        if client not in reports or baseline not in reports:
            found.append(f"{client} cannot be compared with {baseline}: one of them did not run")
            continue
        failed = {
            name: {case for case, report in reports[name].items() if outcome_of(report) == "fail"}
            for name in (client, baseline)
        }
        if worse := failed[client] - failed[baseline]:
            found.append(f"{client} fails {', '.join(_sorted(worse))}, which {baseline} does not fail")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Turn Autobahn's reports into Markdown tables.")
    parser.add_argument("reports", type=Path, help="the folder with Autobahn's index.json")
    reports = read_reports(parser.parse_args().reports)
    for client, cases in sorted(reports.items()):
        print(f"### {client}\n\n{table(cases)}\n\n{details(cases)}\n")
    found = faults(reports)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
