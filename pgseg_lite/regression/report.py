"""The verdict on a measurement, as text, JSON, JUnit XML and a page."""

import json
import math
import xml.etree.ElementTree as ET

from . import summary
from .baseline import versions
from .checks import FAIL, UNDECIDED
from .page import page
from .summary import HEADINGS, SHOWN, interval


class Report:
    def __init__(self, result, checks):
        self.result, self.checks = result, list(checks)
        self.failed = [check for check in self.checks if check.outcome == FAIL]
        self.undecided = [check for check in self.checks if check.outcome == UNDECIDED]
        self.figures = summary.dispersion(result)
        self.gaps, self.foils = summary.level_gap(result), summary.separation(result)

    @property
    def passed(self):
        return not self.failed

    @property
    def verdict(self):
        if deaf := [check for check in self.failed if check.gate == "deaf"]:
            return f"FAILED: {deaf[0].reason}"
        gates = ", ".join(dict.fromkeys(check.gate for check in self.failed))
        which = f" ({gates})" if gates else ""
        counts = f"{len(self.failed)} of {len(self.checks)} checks failed{which}, {len(self.undecided)} undecided"
        return f"{'passed' if self.passed else 'FAILED'}: {counts}"

    @property
    def heading(self):
        about = self.result.about
        asked, there = about["phrasings"]
        return (
            f"{about['model']} ({about['fingerprint']}) on {len(self.result.keys)} images of {about['dataset']} "
            f"({about['data_digest']}), {asked} of {there} phrasings of bank {about['bank']} ({about['bank_digest']})"
        )

    @property
    def measured_against(self):
        if self.result.about["truth"]:
            return "Dice is with the true masks."
        return "There are no true masks: Dice is with the mask of the pixels that most phrasings of a target mark."

    def text(self):
        """For a terminal: figures, then what failed or is undecided, then the verdict as the last line."""
        table = self.figures[["target", "level", *SHOWN, "images"]].rename(columns=HEADINGS)
        lines = [self.heading, self.measured_against, "", table.round(3).to_string(index=False, na_rep="-"), ""]
        for row in self.figures[self.figures["level"] == summary.ALL_LEVELS].dropna(subset="worst").itertuples():
            lines.append(f"worst for {row.target}: {row.worst_phrasing!r}, Dice {row.worst:.3f}")
        for row in self.gaps.itertuples():
            lines.append(f"levels of {row.target}: {row.levels} {interval(row.gap, row.gap_low, row.gap_high)} Dice")
        for row in self.foils.itertuples():
            numbers = interval(row.separation, row.separation_low, row.separation_high)
            lines.append(f"foils of {row.target}: {numbers} further off (Dice)")
        lines += [
            "",
            *(f"{c.outcome}: {c.gate}: {c.target} {c.level}: {c.reason}" for c in self.undecided + self.failed),
        ]
        return "\n".join([*lines, self.verdict])

    def json(self):
        """Every figure with its interval; the same measurement gives the same bytes."""
        content = {
            "passed": self.passed,
            "verdict": self.verdict,
            "about": self.result.about,
            "versions": versions(),
            "checks": rows(map(vars, self.checks)),
            "dispersion": rows(self.figures.to_dict("records")),
            "level_gap": rows(self.gaps.to_dict("records")),
            "foil_separation": rows(self.foils.to_dict("records")),
            "asked": self.result.asked,
            "failures": rows(self.result.failures.to_dict("records")),
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def junit(self):
        """A test case a check, as CI systems show them; an undecided check is skipped, with its reason."""
        count = {"tests": len(self.checks), "failures": len(self.failed), "skipped": len(self.undecided)}
        suite = ET.Element("testsuite", name="pgseg robustness", errors="0", **{k: str(v) for k, v in count.items()})
        for check in self.checks:
            name = clean(f"{check.target} {check.level}".strip())
            case = ET.SubElement(suite, "testcase", classname=f"pgseg.{check.gate.replace(' ', '_')}", name=name)
            if check.outcome in (FAIL, UNDECIDED):
                kind = "failure" if check.outcome == FAIL else "skipped"
                ET.SubElement(case, kind, message=clean(check.reason))
            else:
                ET.SubElement(case, "system-out").text = clean(check.reason)
        ET.indent(suite)
        return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def html(self):
        return page(self)


def rows(found):
    """Rows that JSON can hold: null for NaN."""
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in found]


def clean(text):
    """Without the control characters that XML forbids; a service may answer with anything."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
