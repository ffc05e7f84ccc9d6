"""latentds doctor: what is here, what is missing and how to get it, what will go wrong."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from latentds_tools.reports.commands import show

if TYPE_CHECKING:
    from latentds_tools.health.surroundings import Finding

DECODE_S = 1.0  # on each device
HUB_TIMEOUT_S = 4.0
PROBE_TIMEOUT_S = 180.0  # importing torch from a slow network disk takes a minute
TITLES = {
    "base": "Base install",
    "extras": "Extras",
    "devices": "Devices",
    "hub": "Hub",
    "disk": "Disks",
    "limits": "Limits and known traps",
}
WIDTH = 28  # of state and name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Check this machine: versions, GPUs, the Hub, disks, limits and missing extras.

    Each line says ok, missing (something optional is not installed) or problem, with what to do.
    Nothing is changed, and no token is shown. The exit code is 1 where the base install does not
    work, else 0.
    """

    json: bool = False
    """Print JSON."""


def run(config: Config) -> int:
    from latentds_tools.health import surroundings

    findings = [
        *surroundings.examine_installed(),
        *surroundings.examine_devices(DECODE_S, PROBE_TIMEOUT_S),
        *surroundings.examine_hub(HUB_TIMEOUT_S),
        *surroundings.examine_disks(),
        *surroundings.examine_limits(),
    ]
    broken = any(finding.breaks_base for finding in findings)
    rows = [dataclasses.asdict(finding) for finding in findings]
    show({"works": not broken, "findings": rows}, config.json, lambda _: as_text(findings))
    return int(broken)


def as_text(findings: list[Finding]) -> str:
    """A line a finding under its heading, remedies below, and the sum in the last line."""
    lines: list[str] = []
    for group, title in TITLES.items():
        own = [finding for finding in findings if finding.group == group]
        lines += ["", title] if own else []
        for finding in own:
            lines.append(f"  {finding.state:<8} {finding.name:<{WIDTH - 9}} {finding.text}")
            lines += [f"  {'':<{WIDTH}} -> {finding.remedy}"] if finding.remedy else []
    counts = {
        state: sum(finding.state == state for finding in findings)
        for state in ("problem", "missing")
    }
    broken = [finding.name for finding in findings if finding.breaks_base]
    base = f"does not work ({', '.join(broken)})" if broken else "works"
    lines += [
        "",
        f"The base install {base}; problems: {counts['problem']}; optional things missing: "
        f"{counts['missing']}.",
    ]
    return "\n".join(lines[1:])
