"""Where the tests of the web page find headless Chromium, and how to get one.

``python -m tests.serve.chromium`` fetches one where there is none: playwright's own, or else, as root on
Debian or a system made of it, the package of the system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def of_the_system() -> str | None:
    """The Chromium that the environment names or the system has."""
    return os.environ.get("PUNA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def launch(driver: Any) -> Any:
    """Start the one that playwright brought, else the system's; None if there is neither."""
    if os.path.exists(driver.chromium.executable_path):
        return driver.chromium.launch()
    found = of_the_system()
    # As root, in a container, its sandbox cannot start; it is given this machine's own page alone.
    return found and driver.chromium.launch(executable_path=found, args=["--no-sandbox"])


def fetch() -> int:
    """Get a Chromium if there is none; 1 if none can be had."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        if of_the_system() or os.path.exists(driver.chromium.executable_path):
            return 0
    bring = [sys.executable, "-m", "playwright", "install", "chromium-headless-shell"]
    if (
        subprocess.run(bring, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode
        == 0
    ):
        return 0
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return 1
    subprocess.run(["apt-get", "update", "-qq"], check=False)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium-headless-shell"]
    return subprocess.run(install, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(fetch())
