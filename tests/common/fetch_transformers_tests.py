# SPDX-License-Identifier: Apache-2.0
"""
Fetches transformers' own test suites from the source release of the installed version:

    python tests/common/fetch_transformers_tests.py

The release holds the suites, but not everything that they import; the missing modules are written as stubs. The result
is the package `transformers_tests` in `.cache/transformers-VERSION/`. Does nothing when that is there already.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / ".cache"

# File: source. A release that has the file keeps its own. Not among them is `fetch_hub_objects_for_ci.py`, which the
# suites import as a top-level module: it lies beside this file.
STUBS = {
    # The suites look up their own folder as a package
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def release_root(transformers_version: str) -> Path:
    """The folder to put on `sys.path` for `import transformers_tests`."""
    return CACHE / f"transformers-{transformers_version}"


def fetch(transformers_version: str) -> Path:
    """
    Downloads the source release with pip and unpacks its tests, unless done before.

    Args:
        transformers_version (`str`): The release, for example `"5.23.0"`.

    Returns:
        `Path`: [`release_root`] of that version.

    Raises:
        subprocess.CalledProcessError: If pip cannot get the source release.
    """
    root = release_root(transformers_version)
    if root.exists():
        return root
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        requirement = f"transformers=={transformers_version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-binary", "transformers", "--dest", folder, requirement], check=True)
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            prefix = f"transformers-{transformers_version}/tests/"
            tar.extractall(folder, [m for m in tar.getmembers() if m.name.startswith(prefix)], filter="data")
        unpacked = Path(folder) / "unpacked"
        # Not `tests`, which is the name of this project's own folder
        package = unpacked / "transformers_tests"
        unpacked.mkdir()
        (Path(folder) / prefix).rename(package)
        for name, source in STUBS.items():
            stub = package / name
            if not stub.exists():
                stub.parent.mkdir(parents=True, exist_ok=True)
                stub.write_text(source)
        # A rename, so that an interrupted run leaves nothing that looks complete
        unpacked.rename(root)
    return root


if __name__ == "__main__":
    print(fetch(version("transformers")))
