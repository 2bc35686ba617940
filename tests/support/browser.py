"""The Chromium of this machine, if it is installed."""

import shutil

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
