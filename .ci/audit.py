# SPDX-License-Identifier: Apache-2.0
"""
Looks up known vulnerabilities of the installed packages with pip-audit, and lists those that it
could not look up:

    python .ci/audit.py                   # also fails if the service cannot be reached or knows no package
    python .ci/audit.py --if-reachable    # fails for vulnerabilities alone

pip-audit by itself reports "no known vulnerabilities" for packages that it could not look up.
"""

import argparse
import json
import subprocess
import sys


UNREACHABLE = (
    "NOT AUDITED: no package could be looked up ({reason}). Whether one has a known vulnerability is unknown. Where "
    "PyPI's service can be reached: make audit"
)


def audit() -> tuple[list[dict], str]:
    """pip-audit's entries, one for each installed package, and its stderr."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner=off"]
    result = subprocess.run([*command, "--format=json"], capture_output=True, text=True)
    dependencies = json.loads(result.stdout)["dependencies"] if result.stdout else []
    return dependencies, result.stderr.strip()


def report(dependencies: list[dict], message: str) -> tuple[str, bool | None]:
    """
    The report of an audit and its result.

    Args:
        dependencies (`list[dict]`): With `name`, and either `version` and `vulns` or `skip_reason`.
        message (`str`): pip-audit's stderr, used if there are none.

    Returns:
        `tuple[str, bool | None]`: The text, and whether there is no known vulnerability; `None` if nothing is known.
    """
    known = [entry for entry in dependencies if "vulns" in entry]
    if not known:
        unknown = f"PyPI's service knows none of {len(dependencies)}"
        reason = unknown if dependencies else message.splitlines()[-1] if message else "pip-audit says nothing"
        return UNREACHABLE.format(reason=reason), None
    lines = [
        f"{entry['name']} {entry['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'none'}"
        for entry in known
        for flaw in entry["vulns"]
    ]
    is_clean = not lines
    lines.append(f"{len(known)} packages looked up, {len(lines) or 'no'} known vulnerabilities")
    if skipped := sorted(entry["name"] for entry in dependencies if "vulns" not in entry):
        lines.append(f"not looked up: {', '.join(skipped)}")
    return "\n".join(lines), is_clean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python .ci/audit.py", description="Looks up known vulnerabilities.")
    parser.add_argument("--if-reachable", action="store_true", help="do not fail if nothing could be looked up")
    text, is_clean = report(*audit())
    print(text)
    sys.exit(0 if is_clean or (is_clean is None and parser.parse_args().if_reachable) else 1)
