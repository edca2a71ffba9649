"""A headless Chromium, where there is one, for tests of pages."""

from __future__ import annotations

import shutil
import subprocess

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


def browse(page, folder, width: int, height: int, dark: bool = False) -> tuple[str, list[str]]:
    """The document after its scripts have run, and the console's lines."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        f"--user-data-dir={folder}",
        f"--window-size={width},{height}",
        "--dump-dom",
    ]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "<body" in done.stdout, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
